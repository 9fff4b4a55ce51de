//! The rows of the table: which models are evaluated, and on what.

use std::path::PathBuf;

use candle_core::Device;
use relufy_data::{Hub, Progress, SourceConfig, TaskData};
use relufy_eval::tasks::{Arc, Lambada};
use relufy_eval::{Cache, Corpus, Inputs, ModelInfo, Session, SessionOptions, Suite, evaluate};
use relufy_model::Checkpoint;
use relufy_spec::Stage;
use relufy_surgery::{SurgeryRequest, surgery};

use super::folder::Folder;
use super::training::RUNS;
use crate::error::Result;

/// The multiple-choice task.
pub(super) const QUESTIONS: &str = "questions";
/// The held-out text.
pub(super) const HELD_OUT: &str = "held_out";

/// A model of the table.
#[derive(Debug)]
pub(super) struct Model {
    pub key: &'static str,
    /// Its name in the table.
    name: &'static str,
    at: At,
    /// The training runs that it went through.
    runs: &'static [&'static str],
}

/// Where a model lies.
#[derive(Debug)]
enum At {
    Donor,
    Swapped(Stage),
    Trained,
}

/// Keys of [`MODELS`], for whoever looks one up.
pub(super) mod key {
    pub const DONOR: &str = "donor";
    pub const CONTROL_N1: &str = "control-n1";
    pub const CONTROL_N2: &str = "control-n2";
    pub const SWAP_S1: &str = "swap-s1";
    pub const S1: &str = "s1";
    pub const SWAP_S2: &str = "swap-s2";
    pub const S2: &str = "s2";
}

/// The rows of the table, in order.
pub(super) const MODELS: [Model; 7] = [
    Model { key: key::DONOR, name: "donor", at: At::Donor, runs: &[] },
    Model {
        key: key::CONTROL_N1,
        name: "dense control N1",
        at: At::Trained,
        runs: &["control-n1"],
    },
    Model {
        key: key::CONTROL_N2,
        name: "dense control N1+N2",
        at: At::Trained,
        runs: &["control-n1", "control-n2"],
    },
    Model { key: key::SWAP_S1, name: "swap alone", at: At::Swapped(Stage::One), runs: &[] },
    Model { key: key::S1, name: "fine-tuned", at: At::Trained, runs: &["s1"] },
    Model { key: key::SWAP_S2, name: "swap alone", at: At::Swapped(Stage::Two), runs: &[] },
    Model { key: key::S2, name: "fine-tuned", at: At::Trained, runs: &["s1", "s2"] },
];

impl Model {
    fn path(&self, folder: &Folder) -> PathBuf {
        match self.at {
            At::Donor => folder.donor(),
            At::Swapped(stage) => folder.swapped(stage),
            At::Trained => folder.trained(self.runs.last().copied().unwrap_or_default()),
        }
    }

    /// Tokens since the donor.
    fn tokens(&self, folder: &Folder) -> Result<u64> {
        RUNS.iter().filter(|run| self.runs.contains(&run.name)).map(|run| run.tokens(folder)).sum()
    }

    /// Asks the questions and reads the held-out text; writes what it found.
    pub fn evaluate(&self, folder: &Folder, progress: &dyn Progress) -> Result<()> {
        let checkpoint = Checkpoint::open(&self.path(folder))?;
        let tokenizer = checkpoint.tokenizer()?;
        let decoder = checkpoint.load(&Device::Cpu)?;
        let session = Session::new(&decoder, &tokenizer, SessionOptions::default())?;
        let model = ModelInfo {
            name: self.name.into(),
            tokens_trained: self.tokens(folder)?,
            ..ModelInfo::of(&checkpoint)
        };
        let world = folder.world();
        let held_out = SourceConfig::new(world.join("validation.jsonl").display().to_string());
        let suite = Suite {
            tasks: vec![
                Box::new(Arc::file(QUESTIONS, world.join("questions.jsonl"))),
                Box::new(Lambada::file("passages", world.join("passages.jsonl"))),
            ],
            corpora: vec![Corpus::new(HELD_OUT, held_out)],
            ..Suite::default()
        };
        let (tasks, hub) = (TaskData::local(&world), Hub::from_env()?);
        let inputs = Inputs { tasks: &tasks, hub: &hub };
        let found = evaluate(&session, model, &suite, &inputs, &mut Cache::none(), progress)?;
        found.save(&folder.results(self.key), true)?;
        Ok(())
    }
}

/// Writes the donor relufied and not fine-tuned.
pub(super) fn swap(folder: &Folder, stage: Stage, progress: &dyn Progress) -> Result<()> {
    let donor = Checkpoint::open(&folder.donor())?;
    let request = SurgeryRequest { stage, ..SurgeryRequest::default() };
    surgery(&donor, &request, &folder.swapped(stage), progress)?;
    Ok(())
}
