//! A run as one TOML file: each section is a struct, and a key that no struct knows is an
//! error at its line. Names are those of Hugging Face's `TrainingArguments`.

mod edit;
mod sections;
mod validate;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use sections::{
    Distill, Freeze, LrScheduler, ModelSection, Optim, ProSparse, RecomputeChoice, Regularise,
    Train,
};

use crate::{Error, Result};

/// Everything a training run needs to know.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// The run's folder: checkpoints, metrics and the final model go there.
    pub output_dir: PathBuf,
    /// Seed of the data order.
    #[serde(default = "sections::default_seed")]
    pub seed: u64,
    /// What is trained.
    pub model: ModelSection,
    /// How long, in which batches, and what is written when.
    pub train: Train,
    /// The optimiser and its schedule.
    #[serde(default)]
    pub optim: Optim,
    /// Which tensors are trained.
    #[serde(default)]
    pub freeze: Freeze,
    /// Learn from another model's distribution too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub distill: Option<Distill>,
    /// Push activations towards zero.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub regularise: Option<Regularise>,
    /// The text.
    pub data: relufy_data::CorpusConfig,
}

impl TrainConfig {
    /// Reads a file and applies `--set key=value` arguments to it.
    ///
    /// # Errors
    /// A file that cannot be read; TOML or a key that does not parse, with line and
    /// column; a value that makes no sense.
    pub fn read(path: &Path, set: &[String]) -> Result<TrainConfig> {
        let text = std::fs::read_to_string(path).map_err(|source| Error::io(path, source))?;
        TrainConfig::parse(&text, &path.display().to_string(), set)
    }

    /// Parses the text of a file; `origin` names it in errors.
    ///
    /// # Errors
    /// As [`TrainConfig::read`].
    pub fn parse(text: &str, origin: &str, set: &[String]) -> Result<TrainConfig> {
        let text = edit::apply(text, origin, set)?;
        let config: TrainConfig = toml::from_str(&text).map_err(|error| Error::Config {
            origin: origin.to_string(),
            message: error.to_string().trim_end().to_string(),
        })?;
        validate::check(&config, &validate::Source { origin, text: &text })?;
        Ok(config)
    }

    /// Checks a configuration that a program built.
    ///
    /// # Errors
    /// A value that makes no sense.
    pub fn validate(&self) -> Result<()> {
        validate::check(self, &validate::Source { origin: "configuration", text: "" })
    }

    /// The configuration with every default written out, as TOML that parses back to it.
    ///
    /// # Errors
    /// A path that is not Unicode.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string_pretty(self).map_err(|error| Error::Config {
            origin: "configuration".to_string(),
            message: error.to_string(),
        })
    }

    /// Sequences of one optimiser step.
    pub fn sequences_per_step(&self) -> u64 {
        self.train.per_device_train_batch_size as u64
            * self.train.gradient_accumulation_steps as u64
    }

    /// Tokens of one optimiser step, padding included.
    pub fn tokens_per_step(&self) -> u64 {
        self.sequences_per_step() * self.train.seq_len as u64
    }
}

#[cfg(test)]
mod tests;
