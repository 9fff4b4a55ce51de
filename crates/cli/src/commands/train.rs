//! `relufy train`: fine-tune or pretrain, from one TOML file.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use indicatif::ProgressBar;
use relufy_model::Precision;
use relufy_spec::Site;
use relufy_spec::memory::Recompute;
use relufy_trainer::{
    Observer, Plan, StepReport, Summary, Surroundings, TrainConfig, Trainer, Validation,
};

use crate::compute;
use crate::progress::{Bars, style};
use crate::{human, out, stop};

/// Fine-tune (or pretrain) a model on text, as a TOML file says.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  relufy train configs/tinystories/s1.toml --dry-run
  relufy train configs/tinystories/s1.toml --set optim.learning_rate=1e-5
  relufy train configs/tinystories/s1.toml --resume
  relufy train configs/tinystories/s1.toml --device cuda         # bf16, with f32 masters
  relufy train configs/tinystories/s1.toml --device cuda:1 --set train.recompute=block
Ctrl-C saves and ends the run (exit code 130); --resume continues it with the very same numbers.
The run's folder holds train.toml (the resolved configuration), metrics.jsonl, TensorBoard events,
checkpoint-N folders and, at the end, the trained model.")]
pub struct Train {
    /// The run's configuration.
    config: PathBuf,
    /// Change a key of the configuration: `section.key=value`; may be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Where to compute: cpu, cuda (the first GPU) or cuda:N; short for --set train.device=DEVICE.
    #[arg(long, value_name = "DEVICE", value_parser = compute::device)]
    device: Option<String>,
    /// Number type of weights and activations: auto (f32 on the CPU, bf16 on a GPU), f32 or bf16;
    /// short for --set train.dtype=TYPE.
    #[arg(long, value_name = "TYPE")]
    dtype: Option<Precision>,
    /// Continue from the newest checkpoint of the run's folder.
    #[arg(long)]
    resume: bool,
    /// Read and check everything, time one step, say what the run would take, and stop.
    #[arg(long)]
    dry_run: bool,
}

impl Train {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let mut set = self.set;
        set.extend(self.device.map(|device| format!("train.device=\"{device}\"")));
        set.extend(self.dtype.map(|dtype| format!("train.dtype=\"{dtype}\"")));
        let config = TrainConfig::read(&self.config, &set)?;
        let bars = Bars::default();
        let around = Surroundings { resume: self.resume, progress: &bars };
        let mut trainer = Trainer::prepare(&config, around)?;
        trainer.measure()?;
        if self.dry_run {
            out::line(plan_text(trainer.plan()))?;
            return Ok(ExitCode::SUCCESS);
        }
        let stop = stop::flag()?;
        let summary = trainer.run(&mut Bar::default(), &stop)?;
        Ok(match summary.interrupted {
            true => ExitCode::from(stop::INTERRUPTED),
            false => ExitCode::SUCCESS,
        })
    }
}

/// What a run will take, before it starts.
fn plan_text(plan: &Plan) -> String {
    let trained = match plan.trained_parameters == plan.parameters {
        true => "all trained".to_owned(),
        false => format!(
            "{} trained ({} of {} tensors)",
            human::count(plan.trained_parameters as f64),
            plan.tensors.0,
            plan.tensors.1
        ),
    };
    let mut lines = vec![
        format!(
            "model   {}: {} parameters, {trained}",
            plan.model,
            human::count(plan.parameters as f64)
        ),
        format!(
            "run     steps {} to {}, {} tokens each: {} tokens, {:.2} epochs of {}",
            plan.start_step,
            plan.max_steps,
            human::count(plan.tokens_per_step as f64),
            human::count(plan.tokens as f64),
            plan.epochs,
            human::count(plan.tokens_per_epoch as f64),
        ),
        memory_text(plan),
    ];
    if let (Some(step), Some(all)) = (plan.seconds_per_step, plan.seconds()) {
        lines.push(format!(
            "time    about {} ({:.0} tokens/s)",
            human::duration(Duration::from_secs_f64(all)),
            plan.tokens_per_step as f64 / step,
        ));
    }
    lines.push(format!("output  {}", plan.output_dir.display()));
    lines.extend(
        plan.changed_settings
            .iter()
            .map(|key| format!("note    `{key}` differs from the checkpoint's run")),
    );
    lines.join("\n")
}

/// What a run holds at its peak, and where.
fn memory_text(plan: &Plan) -> String {
    let memory = &plan.memory;
    let mut text = format!(
        "memory  {} (weights {}, moments {}, gradients {}, activations {}",
        human::bytes(plan.memory_total()),
        human::bytes(memory.masters + memory.weights + plan.teacher_memory),
        human::bytes(memory.moments),
        human::bytes(memory.gradients),
        human::bytes(memory.activations + memory.transient),
    );
    text.push_str(match plan.recompute {
        Recompute::None => ")",
        Recompute::Inputs => " with their inputs recomputed)",
        Recompute::Block => " with blocks recomputed)",
    });
    if let Some(free) = plan.free_memory {
        text.push_str(&format!(
            "\ndevice  {}, {}, {} free",
            plan.device,
            plan.dtype,
            human::bytes(free)
        ));
        if plan.memory_total() > free {
            text.push_str(", which is too little: take smaller batches");
        }
    }
    text
}

/// Draws a run: a bar on a terminal, lines elsewhere.
#[derive(Default)]
pub struct Bar {
    bar: Option<ProgressBar>,
}

const TEMPLATE: &str = "{wide_bar} {pos}/{len} steps, {eta} left  {msg}";

impl Bar {
    fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) if !bar.is_hidden() => bar.println(text),
            _ => out::progress(text),
        }
    }

    fn end(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

impl Observer for Bar {
    fn started(&mut self, plan: &Plan) {
        out::progress(plan_text(plan));
        let bar = ProgressBar::new(plan.max_steps).with_style(style(TEMPLATE));
        bar.set_position(plan.start_step);
        // Steps before a resume must not count into the rate.
        bar.reset_eta();
        self.bar = Some(bar);
    }

    fn step(&mut self, report: &StepReport<'_>) {
        let rate = format!("{} tokens/s", human::count(report.tokens_per_second));
        if let Some(bar) = &self.bar {
            bar.set_position(report.step);
            bar.set_message(format!("loss {:.4}, {rate}", report.loss));
        }
        if let Some(densities) = report.densities {
            let share = |site| human::percent(densities.mean(site));
            self.line(&format!(
                "step {:>6}  loss {:.4}  lr {:.2e}  grad {:.3}  {rate}  density qkv {} up {} down {}",
                report.step,
                report.loss,
                report.learning_rate,
                report.grad_norm,
                share(Site::QkvIn),
                share(Site::UpIn),
                share(Site::DownIn),
            ));
        }
    }

    fn validated(&mut self, step: u64, validation: &Validation) {
        self.line(&format!(
            "step {step:>6}  validation loss {:.4}, perplexity {:.3}",
            validation.loss, validation.perplexity
        ));
        if let Some(dead) = &validation.dead_neurons {
            let all: usize = dead.iter().sum();
            self.line(&format!("step {step:>6}  dead neurons {all}, by layer {dead:?}"));
        }
    }

    fn saved(&mut self, _step: u64, path: &Path) {
        self.line(&format!("saved {}", path.display()));
    }

    fn note(&mut self, text: &str) {
        self.line(text);
    }

    fn interrupted(&mut self, summary: &Summary) {
        self.end();
        out::progress(format_args!(
            "interrupted after step {}; continue with --resume",
            summary.steps
        ));
    }

    fn finished(&mut self, summary: &Summary) {
        self.end();
        let loss = summary.loss.map_or(String::new(), |loss| format!(", loss {loss:.4}"));
        out::progress(format_args!(
            "done: {} steps in {}{loss}",
            summary.steps,
            human::duration(summary.elapsed)
        ));
        if let Some(model) = &summary.model {
            out::progress(format_args!("model {}", model.display()));
        }
    }
}
