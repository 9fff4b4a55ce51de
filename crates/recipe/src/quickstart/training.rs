//! The trainings of the chain, each as `configs/micro/*.toml` says.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use relufy_trainer::{Surroundings, TrainConfig, Trainer};

use super::folder::Folder;
use super::{Watcher, donor};
use crate::error::Result;

/// One training run.
#[derive(Debug)]
pub struct TrainingRun {
    /// Its name: the folder's, and the configuration's in `configs/micro`.
    pub name: &'static str,
    /// For a person.
    pub what: &'static str,
    /// The text of its configuration.
    pub config: &'static str,
}

/// The donor's own training, from random weights.
pub(super) const DONOR: TrainingRun = TrainingRun {
    name: "donor-run",
    what: "the donor from random weights",
    config: include_str!("../../../../configs/micro/donor.toml"),
};

/// The fine-tunings, in the order in which they build on each other.
pub const RUNS: [TrainingRun; 4] = [
    TrainingRun {
        name: "s1",
        what: "stage 1",
        config: include_str!("../../../../configs/micro/s1.toml"),
    },
    TrainingRun {
        name: "s2",
        what: "stage 2, from stage 1",
        config: include_str!("../../../../configs/micro/s2.toml"),
    },
    TrainingRun {
        name: "control-n1",
        what: "the dense control of stage 1",
        config: include_str!("../../../../configs/micro/control-n1.toml"),
    },
    TrainingRun {
        name: "control-n2",
        what: "the dense control of stage 2",
        config: include_str!("../../../../configs/micro/control-n2.toml"),
    },
];

impl TrainingRun {
    /// The configuration, in the folder and with its steps scaled.
    fn config(&self, folder: &Folder) -> Result<TrainConfig> {
        let origin = format!("configs/micro/{}.toml", self.name);
        let mut config = TrainConfig::parse(self.config, &origin, &[])?;
        let rebased = |path: &str| folder.rebase(Path::new(path)).display().to_string();
        config.output_dir = folder.rebase(&config.output_dir);
        config.model.path = rebased(&config.model.path);
        config.data.cache_dir = config.data.cache_dir.map(|path| folder.rebase(&path));
        for source in config.data.sources.iter_mut().chain(&mut config.data.validation) {
            source.path = rebased(&source.path);
        }
        let scaled = |steps: u64| (steps as f64 * folder.settings.steps_scale).ceil() as u64;
        config.train.max_steps = config.train.max_steps.map(|steps| scaled(steps).max(1));
        Ok(config)
    }

    /// Tokens of the run.
    pub(super) fn tokens(&self, folder: &Folder) -> Result<u64> {
        let config = self.config(folder)?;
        Ok(config.tokens_per_step() * config.train.max_steps.unwrap_or_default())
    }

    /// Whether its model is there.
    pub(super) fn is_done(&self, folder: &Folder) -> Result<bool> {
        Ok(relufy_trainer::completed(&self.config(folder)?)?.is_some())
    }

    /// Trains, or goes on from the newest checkpoint. False if it was told to stop.
    pub(super) fn train(
        &self,
        folder: &Folder,
        watcher: &mut dyn Watcher,
        stop: &AtomicBool,
    ) -> Result<bool> {
        if self.name == DONOR.name {
            donor::init(folder)?;
        }
        let config = self.config(folder)?;
        // A folder that is not there yet continues from nothing.
        let around = Surroundings { resume: true, progress: watcher.progress() };
        let mut trainer = Trainer::prepare(&config, around)?;
        Ok(!trainer.run(watcher, stop)?.interrupted)
    }
}
