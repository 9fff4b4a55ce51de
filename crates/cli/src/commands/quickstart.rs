//! `relufy quickstart`: the whole job in minutes, offline.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use indicatif::ProgressBar;
use relufy_data::Progress;
use relufy_eval::table::Format;
use relufy_recipe::quickstart::{self, Ending, Options, Report, Watcher};
use relufy_trainer::{Observer, Plan, StepReport, Summary};

use crate::progress::{Bars, style};
use crate::{human, out, stop};

/// Do the whole job in minutes, offline: relufy a small donor, fine-tune it, and tabulate what
/// that cost and saved.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  relufy quickstart
  relufy quickstart -o runs/rebuilt --rebuild-donor    # the donor too, from random weights
  relufy quickstart -o runs/glance --steps-scale 0.02  # the chain in seconds, without a result
The donor is built into the program; the text, with facts and questions about them, is generated.
A second call skips what is done and continues what was stopped. The folder then holds table.md,
table.csv, results/, and the models as Hugging Face folders: s1/final and s2/final.")]
pub struct Quickstart {
    /// The folder for everything.
    #[arg(short, long, value_name = "DIR", default_value = "runs/quickstart")]
    output: PathBuf,
    /// Train the donor from random weights instead of taking the one in the program.
    #[arg(long)]
    rebuild_donor: bool,
    /// Multiply the steps of every training; below 1 for a look at the chain.
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0, value_parser = factor)]
    steps_scale: f64,
}

fn factor(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(factor) if factor > 0.0 && factor <= 100.0 => Ok(factor),
        _ => Err("expected a number above 0 and up to 100".to_owned()),
    }
}

impl Quickstart {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let began = Instant::now();
        let options = Options {
            dir: self.output,
            rebuild_donor: self.rebuild_donor,
            steps_scale: self.steps_scale,
        };
        let stop = stop::flag()?;
        Ok(match quickstart::run(&options, &mut Screen::default(), &stop)? {
            Ending::Interrupted => {
                out::progress("interrupted; the same command continues");
                ExitCode::from(stop::INTERRUPTED)
            }
            Ending::Done(report) => {
                let end = match report.nothing_to_do {
                    true => "Nothing was left to do.".to_owned(),
                    false => format!("Took {}.", human::duration(began.elapsed())),
                };
                out::line(format_args!("{}{end}", text(&report)))?;
                ExitCode::SUCCESS
            }
        })
    }
}

/// The table, what it says, and where things lie.
fn text(report: &Report) -> String {
    let lines: String = report.verdict.lines().iter().map(|line| format!("{line}\n")).collect();
    let paths = |paths: &[PathBuf]| {
        paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
    };
    format!(
        "\n{}\n{lines}\nModels: {}\nTables: {}\n",
        report.table.render(Format::Terminal),
        paths(&report.models),
        paths(&report.files)
    )
}

/// Draws the chain: a line a step, and a bar below while it runs.
#[derive(Default)]
struct Screen {
    bars: Bars,
    bar: Option<ProgressBar>,
}

const TEMPLATE: &str = "  {wide_bar} {pos}/{len} steps, {eta} left  {msg}";

impl Watcher for Screen {
    fn begin(&mut self, number: usize, of: usize, what: &str, done: bool) {
        let done = if done { " (done already)" } else { "" };
        out::progress(format_args!("[{number:>2}/{of}] {what}{done}"));
    }

    fn progress(&self) -> &dyn Progress {
        &self.bars
    }
}

impl Observer for Screen {
    fn started(&mut self, plan: &Plan) {
        let bar = ProgressBar::new(plan.max_steps).with_style(style(TEMPLATE));
        bar.set_position(plan.start_step);
        // Steps before a resume must not count into the rate.
        bar.reset_eta();
        self.bar = Some(bar);
    }

    fn step(&mut self, report: &StepReport<'_>) {
        if let Some(bar) = &self.bar {
            bar.set_position(report.step);
            let rate = human::count(report.tokens_per_second);
            bar.set_message(format!("loss {:.3}, {rate} tokens/s", report.loss));
        }
    }

    fn interrupted(&mut self, _summary: &Summary) {
        self.end();
    }

    fn finished(&mut self, summary: &Summary) {
        self.end();
        if let Some(loss) = summary.loss {
            let time = human::duration(summary.elapsed);
            out::progress(format_args!(
                "        loss {loss:.3} after {} steps, {time}",
                summary.steps
            ));
        }
    }
}

impl Screen {
    fn end(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}
