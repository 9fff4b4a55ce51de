//! What a checkpoint says about its run: `trainer_state.json` as Hugging Face's trainer
//! writes it, for people and tools, and `resume.json`, which decides whether a run may
//! continue from it.

use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::folder::{RESUME, TRAINER_STATE};
use crate::metrics::Record;
use crate::{Error, Result};

/// `trainer_state.json` (transformers' `TrainerState`).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TrainerState {
    /// The lowest validation loss so far.
    pub best_metric: Option<f64>,
    /// The step it was reached at.
    pub best_global_step: Option<u64>,
    /// Always null: no checkpoint is kept for its loss.
    pub best_model_checkpoint: Option<String>,
    /// Passes over the training split.
    pub epoch: f64,
    /// As configured.
    pub eval_steps: u64,
    /// Optimiser steps done.
    pub global_step: u64,
    /// Always false.
    pub is_hyper_param_search: bool,
    /// Always true.
    pub is_local_process_zero: bool,
    /// Always true.
    pub is_world_process_zero: bool,
    /// The lines of `metrics.jsonl`.
    pub log_history: Vec<Record>,
    /// As configured.
    pub logging_steps: u64,
    /// Steps of the whole run.
    pub max_steps: u64,
    /// Tokens that went through the model, padding included.
    pub num_input_tokens_seen: u64,
    /// Passes over the training split in the whole run, rounded up.
    pub num_train_epochs: u64,
    /// As configured.
    pub save_steps: u64,
    /// Floating point operations so far, by the rule of 6 for each parameter and token.
    pub total_flos: f64,
    /// Sequences of one forward pass.
    pub train_batch_size: usize,
}

/// `resume.json`: everything that decides a run's future besides weights and moments.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResumeState {
    /// Version of this file's layout; 1.
    pub format: u32,
    /// Optimiser steps done.
    pub step: u64,
    /// Sequences of the shuffled stream that were consumed.
    pub sequences: u64,
    /// Tokens trained on, padding included.
    pub tokens: u64,
    /// What must stay the same.
    pub identity: Identity,
    /// The resolved configuration; differences to it are reported.
    pub config: serde_json::Value,
}

/// What a run cannot change and still be the same run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// Hash of corpus, tokenizer, packing and seed.
    pub corpus: String,
    /// Hash of the source's weight files and of the plan applied to it.
    pub model: String,
    /// Sequences of one forward pass, forward passes of one step, tokens of a sequence.
    pub batch: [usize; 3],
    /// Hash of the names of the trained tensors.
    pub trained: String,
}

impl ResumeState {
    /// Refuses a run that is not the one which wrote this state.
    ///
    /// # Errors
    /// The first difference, with both sides.
    pub fn check(&self, path: &Path, run: &Identity) -> Result<()> {
        const FORMAT: u32 = 1;
        let saved = &self.identity;
        let differences = [
            ("the checkpoint's format", self.format.to_string(), FORMAT.to_string()),
            ("the model", saved.model.clone(), run.model.clone()),
            (
                "the batch shape (batch size, accumulation, sequence length)",
                format!("{:?}", saved.batch),
                format!("{:?}", run.batch),
            ),
            (
                "the corpus (text, tokenizer, packing or seed)",
                saved.corpus.clone(),
                run.corpus.clone(),
            ),
            ("the choice of trained tensors", saved.trained.clone(), run.trained.clone()),
        ];
        match differences.into_iter().find(|(_, saved, run)| saved != run) {
            None => Ok(()),
            Some((what, expected, found)) => {
                Err(Error::Changed { path: path.into(), what, expected, found })
            }
        }
    }

    /// The configuration keys whose values differ from this run's, dotted.
    pub fn changed_keys(&self, config: &serde_json::Value) -> Vec<String> {
        let mut keys = Vec::new();
        difference("", &self.config, config, &mut keys);
        keys
    }
}

fn difference(at: &str, a: &serde_json::Value, b: &serde_json::Value, keys: &mut Vec<String>) {
    use serde_json::Value::{Null, Object};
    match (a, b) {
        (Object(left), Object(right)) => {
            let mut names: Vec<&String> = left.keys().chain(right.keys()).collect();
            names.sort();
            names.dedup();
            for name in names {
                let inner = if at.is_empty() { name.clone() } else { format!("{at}.{name}") };
                let of = |map: &serde_json::Map<String, serde_json::Value>| {
                    map.get(name).cloned().unwrap_or(Null)
                };
                difference(&inner, &of(left), &of(right), keys);
            }
        }
        _ if a == b => {}
        _ => keys.push(at.to_string()),
    }
}

/// Both files of a checkpoint.
pub fn read(checkpoint: &Path) -> Result<(TrainerState, ResumeState)> {
    Ok((read_json(&checkpoint.join(TRAINER_STATE))?, read_json(&checkpoint.join(RESUME))?))
}

/// Writes both files into a checkpoint that is being staged.
pub fn write(checkpoint: &Path, trainer: &TrainerState, resume: &ResumeState) -> Result<()> {
    write_trainer(checkpoint, trainer)?;
    write_json(&checkpoint.join(RESUME), resume)
}

/// Reads `trainer_state.json`; `None` if there is none.
pub fn read_trainer(folder: &Path) -> Result<Option<TrainerState>> {
    let path = folder.join(TRAINER_STATE);
    if path.is_file() { read_json(&path).map(Some) } else { Ok(None) }
}

/// Writes `trainer_state.json`.
pub fn write_trainer(folder: &Path, trainer: &TrainerState) -> Result<()> {
    write_json(&folder.join(TRAINER_STATE), trainer)
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let bytes = std::fs::read(path).map_err(|source| Error::io(path, source))?;
    serde_json::from_slice(&bytes).map_err(|error| Error::damaged(path, error))
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let mut bytes =
        serde_json::to_vec_pretty(value).map_err(|error| Error::damaged(path, error))?;
    bytes.push(b'\n');
    std::fs::write(path, bytes).map_err(|source| Error::io(path, source))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn state() -> ResumeState {
        ResumeState {
            format: 1,
            step: 20,
            sequences: 160,
            tokens: 20480,
            identity: Identity {
                corpus: "c".into(),
                model: "m".into(),
                batch: [8, 1, 128],
                trained: "t".into(),
            },
            config: json!({"optim": {"learning_rate": 1e-3, "max_grad_norm": 1.0}, "seed": 1}),
        }
    }

    #[test]
    fn only_the_same_run_may_resume() {
        let path = Path::new("runs/a/checkpoint-20");
        let saved = state();
        saved.check(path, &saved.identity).unwrap();
        let same = || saved.identity.clone();
        for (what, run) in [
            ("corpus", Identity { corpus: "other".into(), ..same() }),
            ("model", Identity { model: "other".into(), ..same() }),
            ("[8, 1, 128], this run [4, 2, 128]", Identity { batch: [4, 2, 128], ..same() }),
            ("trained tensors", Identity { trained: "other".into(), ..same() }),
        ] {
            let error = saved.check(path, &run).unwrap_err().to_string();
            assert!(error.contains(what) && error.contains("checkpoint-20"), "{error}");
        }
    }

    #[test]
    fn changed_settings_are_named() {
        let config = json!({"optim": {"learning_rate": 2e-3, "max_grad_norm": 1.0}, "seed": 1,
            "distill": {"weight": 0.5}});
        assert_eq!(state().changed_keys(&config), ["distill", "optim.learning_rate"]);
    }

    #[test]
    fn both_files_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let trainer = TrainerState { global_step: 20, epoch: 0.1, ..TrainerState::default() };
        write(folder.path(), &trainer, &state()).unwrap();
        assert_eq!(read(folder.path()).unwrap(), (trainer, state()));
    }
}
