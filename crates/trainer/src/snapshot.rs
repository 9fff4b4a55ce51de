//! Checkpoints and the final model: written under a temporary name, synced, renamed.

use std::path::{Path, PathBuf};

use relufy_model::checkpoint::{StagedDir, save_weights};
use relufy_model::export::{source_of, write_trained_export};

use crate::config::TrainConfig;
use crate::folder::{OPTIMIZER, RunFolder};
use crate::state::{self, TrainerState};
use crate::trainer::Trainer;
use crate::{Error, Result};

impl Trainer {
    /// Saves the present state as `checkpoint-N`, unless it is there already.
    pub(crate) fn save_checkpoint(&mut self) -> Result<PathBuf> {
        let target = self.folder.checkpoint(self.resume.step);
        if self.folder.checkpoints()?.iter().any(|saved| saved.path == target) {
            return Ok(target);
        }
        self.folder.remove(&target)?;
        let staged = StagedDir::create(&target)?;
        self.write_model(staged.path())?;
        self.optimizer.save(&staged.path().join(OPTIMIZER), self.decoder.params())?;
        self.update_state();
        state::write(staged.path(), &self.state, &self.resume)?;
        staged.commit()?;
        Ok(target)
    }

    /// Writes the trained model, in place of an earlier one. Where nothing was `trained` in
    /// this call, a model of this very step stays.
    pub(crate) fn save_final(&mut self, trained: bool) -> Result<PathBuf> {
        let target = self.folder.final_model();
        let earlier = state::read_trainer(&target)?;
        if !trained && earlier.is_some_and(|earlier| earlier.global_step == self.resume.step) {
            return Ok(target);
        }
        self.folder.remove(&target)?;
        let staged = StagedDir::create(&target)?;
        self.write_model(staged.path())?;
        self.update_state();
        state::write_trainer(staged.path(), &self.state)?;
        staged.commit()?;
        Ok(target)
    }

    /// A Hugging Face folder of the present weights.
    fn write_model(&self, folder: &Path) -> Result<()> {
        let source = &self.source;
        let mut origin = source_of(source);
        if origin.revision.is_none() {
            origin.weights_blake3 = Some(self.source_hash.clone());
        }
        // A dense model gets the record too: its tokens count in tables of controls.
        write_trained_export(source, &self.plan, origin, self.resume.tokens, folder)?;
        save_weights(
            folder,
            self.decoder.spec(),
            &self.optimizer.precise(self.decoder.params()),
            &source.config().weights,
            source.stored_dtype(),
        )?;
        Ok(())
    }

    /// Brings what Hugging Face's trainer would say up to date.
    fn update_state(&mut self) {
        let train = &self.config.train;
        let per_epoch = self.dataset.train.sequences().max(1) as f64;
        let history = std::mem::take(&mut self.state.log_history);
        self.state = TrainerState {
            best_metric: self.state.best_metric,
            best_global_step: self.state.best_global_step,
            best_model_checkpoint: None,
            epoch: self.resume.sequences as f64 / per_epoch,
            eval_steps: train.eval_steps,
            global_step: self.resume.step,
            is_hyper_param_search: false,
            is_local_process_zero: true,
            is_world_process_zero: true,
            log_history: history,
            logging_steps: train.logging_steps,
            max_steps: self.run.max_steps,
            num_input_tokens_seen: self.resume.tokens,
            num_train_epochs: self.run.epochs.ceil() as u64,
            save_steps: train.save_steps,
            total_flos: 6.0 * self.run.parameters as f64 * self.resume.tokens as f64,
            train_batch_size: train.per_device_train_batch_size,
        };
    }
}

/// The trained model of a run that is complete: its folder and what is known about it.
/// `None` if the run has not ended, or ended under another configuration.
///
/// # Errors
/// Files of the run that cannot be read.
pub fn completed(config: &TrainConfig) -> Result<Option<(PathBuf, TrainerState)>> {
    let folder = RunFolder::existing(&config.output_dir)?;
    let path = folder.config();
    let written = match std::fs::read_to_string(&path) {
        Ok(written) => written,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(Error::io(path, source)),
    };
    let model = folder.final_model();
    let state = state::read_trainer(&model)?.filter(|state| state.global_step == state.max_steps);
    Ok(state.filter(|_| config.to_toml().is_ok_and(|now| now == written)).map(|s| (model, s)))
}
