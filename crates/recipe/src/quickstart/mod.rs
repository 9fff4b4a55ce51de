//! The whole job in minutes, offline: a dense donor becomes a stage 1 and a stage 2 model,
//! each fine-tuned and exported, beside dense controls of the same tokens; all are evaluated
//! and laid side by side.
//!
//! The donor is built into the program and the text is generated, so nothing is fetched. Each
//! step leaves a file or folder that appears whole or not at all: a second call skips what is
//! there, continues a training that was stopped, and otherwise gives the table again.

mod donor;
mod evaluation;
mod folder;
mod training;
mod verdict;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use relufy_data::Progress;
use relufy_eval::RunResult;
use relufy_eval::table::{Format, Grid, accuracy_vs_flops};
use relufy_model::checkpoint::write_atomic;
use relufy_spec::Stage;
use relufy_spec::flops::Convention;
use relufy_trainer::Observer;

use crate::error::Result;
use crate::world::{Sizes, World};
use evaluation::MODELS;
use folder::Folder;
pub use training::{RUNS, TrainingRun};
pub use verdict::{Recovery, Verdict};

/// The seed of the world that the donor knows.
pub const WORLD_SEED: u64 = 1;

/// What is counted as FLOPs, in table and verdict.
const CONVENTION: Convention = Convention::PaperCompat;

/// How to run it.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// The folder for everything; it is made if it is missing.
    pub dir: PathBuf,
    /// Train the donor from random weights instead of taking the one in the program.
    pub rebuild_donor: bool,
    /// Scales the steps of every training; 1 is the real thing.
    pub steps_scale: f64,
}

/// Watches the chain; trainings report to it as to any [`Observer`].
pub trait Watcher: Observer {
    /// Step `number` of `of` begins; `done` if an earlier call did it.
    fn begin(&mut self, number: usize, of: usize, what: &str, done: bool);

    /// Watches what is not training.
    fn progress(&self) -> &dyn Progress;
}

/// How a call ended.
#[derive(Clone, Debug)]
pub enum Ending {
    /// It was told to stop; another call continues.
    Interrupted,
    /// All is done.
    Done(Box<Report>),
}

/// The outcome of the chain.
#[derive(Clone, Debug)]
pub struct Report {
    /// Every model's results.
    pub results: Vec<RunResult>,
    /// The accuracy-vs-FLOPs table of them.
    pub table: Grid,
    /// What the table says.
    pub verdict: Verdict,
    /// Whether an earlier call had done everything.
    pub nothing_to_do: bool,
    /// The exported stage 1 and stage 2 models, as Hugging Face folders.
    pub models: [PathBuf; 2],
    /// The files `table.md` and `table.csv`.
    pub files: [PathBuf; 2],
}

/// One thing to do; what it leaves is named after it.
enum Step {
    World,
    Donor,
    Train(&'static TrainingRun),
    Swap(Stage),
    Evaluate(&'static evaluation::Model),
}

/// Runs what is not done yet.
///
/// # Errors
/// A folder that holds something else, or a quickstart of other settings; whatever training,
/// surgery or evaluation meet.
pub fn run(options: &Options, watcher: &mut dyn Watcher, stop: &AtomicBool) -> Result<Ending> {
    let folder = Folder::open(options)?;
    let steps = steps(options);
    let mut nothing_to_do = true;
    for (index, step) in steps.iter().enumerate() {
        if stop.load(Ordering::SeqCst) {
            return Ok(Ending::Interrupted);
        }
        let done = step.is_done(&folder)?;
        nothing_to_do &= done;
        watcher.begin(index + 1, steps.len(), &step.title(&folder)?, done);
        if !done && !step.run(&folder, watcher, stop)? {
            return Ok(Ending::Interrupted);
        }
    }
    let report = report(&folder, nothing_to_do)?;
    Ok(Ending::Done(Box::new(report)))
}

/// Everything to do, in order.
fn steps(options: &Options) -> Vec<Step> {
    let mut steps = vec![Step::World];
    if options.rebuild_donor {
        steps.push(Step::Train(&training::DONOR));
    }
    steps.push(Step::Donor);
    steps.extend(RUNS.iter().map(Step::Train));
    steps.extend([Stage::One, Stage::Two].map(Step::Swap));
    steps.extend(MODELS.iter().map(Step::Evaluate));
    steps
}

impl Step {
    fn title(&self, folder: &Folder) -> Result<String> {
        Ok(match self {
            Step::World => "write the little world: text, tokenizer, questions".into(),
            Step::Donor if folder.settings.rebuild_donor => "take the trained donor".into(),
            Step::Donor => "unpack the donor".into(),
            Step::Train(run) => {
                let tokens = verdict::count(run.tokens(folder)?);
                format!("train {}: {tokens} tokens", run.what)
            }
            Step::Swap(stage) => {
                format!("relufy the donor to stage {}, without training", u8::from(*stage))
            }
            Step::Evaluate(model) => format!("evaluate {}", model.key),
        })
    }

    fn is_done(&self, folder: &Folder) -> Result<bool> {
        Ok(match self {
            Step::World => folder.world().join("manifest.json").is_file(),
            Step::Donor => folder.donor().is_dir(),
            Step::Train(run) => run.is_done(folder)?,
            Step::Swap(stage) => folder.swapped(*stage).is_dir(),
            Step::Evaluate(model) => RunResult::is_below(&folder.results(model.key)),
        })
    }

    /// False if it was told to stop before its end.
    fn run(&self, folder: &Folder, watcher: &mut dyn Watcher, stop: &AtomicBool) -> Result<bool> {
        match self {
            Step::World => {
                World::new(WORLD_SEED).write(&folder.world(), &Sizes::default())?;
            }
            Step::Donor => donor::install(folder)?,
            Step::Train(run) => return run.train(folder, watcher, stop),
            Step::Swap(stage) => evaluation::swap(folder, *stage, watcher.progress())?,
            Step::Evaluate(model) => model.evaluate(folder, watcher.progress())?,
        }
        Ok(true)
    }
}

/// Lays the results side by side and judges them.
fn report(folder: &Folder, nothing_to_do: bool) -> Result<Report> {
    let results: Vec<RunResult> = MODELS
        .iter()
        .map(|model| Ok(RunResult::read(&folder.results(model.key))?))
        .collect::<Result<_>>()?;
    let verdict = Verdict::of(folder, &results)?;
    let table = accuracy_vs_flops(&results, CONVENTION);
    let files = [folder.path("table.md"), folder.path("table.csv")];
    let lines: String = verdict.lines().iter().map(|line| format!("- {line}\n")).collect();
    let markdown = format!("{}\n{lines}", table.render(Format::Markdown));
    for (file, text) in files.iter().zip([markdown, table.render(Format::Csv)]) {
        write_atomic(file, text.as_bytes())?;
    }
    let models = ["s1", "s2"].map(|run| folder.trained(run));
    Ok(Report { results, table, verdict, nothing_to_do, models, files })
}
