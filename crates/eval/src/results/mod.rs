//! What an evaluation found: in memory here, and in the files of lm-evaluation-harness in
//! the modules below.

mod config;
#[cfg(test)]
pub(crate) mod example;
mod file;
mod folder;
mod interval;
mod order;
mod pyjson;
mod read;
mod samples;

use std::collections::BTreeMap;

pub(crate) use config::task_config;
pub use config::{Settings, TokenizerInfo};
pub use folder::Saved;
pub(crate) use folder::{locate, samples_beside};
pub(crate) use interval::Spread;
pub use interval::{DensityError, DensityReport};
pub(crate) use pyjson::float as python_float;
use relufy_model::Checkpoint;
use relufy_spec::Stage;
use relufy_spec::flops::{FlopsReport, SiteDensities};
pub(crate) use samples::{Judged, read_samples};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::activity::Activity;
use crate::metrics::{Estimate, Metric, Point};
use crate::request::{Compat, Exclusion};
use crate::session::Answer;
use crate::tasks::{Asked, Limit};

/// What an evaluation found.
#[derive(Clone, Debug, PartialEq)]
pub struct RunResult {
    /// Version of the program that evaluated.
    pub relufy: String,
    /// The harness release whose rules were followed.
    pub compat: Compat,
    /// The model.
    pub model: ModelInfo,
    /// Longest input in tokens.
    pub max_length: usize,
    /// How it was asked for.
    pub settings: Settings,
    /// The tokenizer's special tokens.
    pub tokenizer: TokenizerInfo,
    /// Only so many documents of each task were asked.
    pub limit: Option<Limit>,
    /// Tasks, then corpora, in the order asked for.
    pub tasks: Vec<TaskResult>,
    /// Means over groups of tasks.
    pub groups: Vec<GroupResult>,
    /// How much of each site's input was not zero.
    pub densities: DensityReport,
    /// Multiply-accumulates of a token, skipping those zeros.
    pub flops: FlopsReport,
    /// The same, skipping nothing.
    pub flops_dense: FlopsReport,
    /// Time for everything but loading the model.
    pub seconds: f64,
}

/// The model that was evaluated.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelInfo {
    /// Name in tables: hub id, folder, or what the caller says.
    pub name: String,
    /// Commit, where it came from the hub.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// The family: Hugging Face's `model_type`.
    pub family: String,
    /// How far it is relufied.
    pub stage: Stage,
    /// Parameters; a tied head counts once.
    pub parameters: usize,
    /// Tokens of fine-tuning since the donor.
    pub tokens_trained: u64,
}

/// One task or corpus.
#[derive(Clone, Debug, PartialEq)]
pub struct TaskResult {
    /// Its name.
    pub name: String,
    /// A shorter name within its group.
    pub alias: Option<String>,
    /// Version of the task; `None` for a corpus.
    pub version: Option<f64>,
    /// Where the text came from.
    pub source: String,
    /// What is done to answers before they are judged; `none` or the harness's name.
    pub filter: String,
    /// Examples in front of each question.
    pub shots: usize,
    /// Documents of the split.
    pub split_documents: usize,
    /// Documents that count.
    pub documents: usize,
    /// Requests made, or windows of a corpus.
    pub requests: usize,
    /// Tokens that entered the model (a corpus: that were predicted).
    pub tokens: u64,
    /// Documents that do not count.
    pub excluded: Vec<Excluded>,
    /// What was measured.
    pub metrics: BTreeMap<Metric, Estimate>,
    /// Non-zeros in the mean over the layers, on this task's tokens.
    pub densities: Option<SiteDensities>,
    /// Time for tokenising and scoring, without loading and metrics.
    pub seconds: f64,
    /// The task as the harness describes it (`configs`), as far as that says something here.
    pub config: Map<String, Value>,
}

/// The mean of a group's tasks.
#[derive(Clone, Debug, PartialEq)]
pub struct GroupResult {
    /// Its name.
    pub name: String,
    /// A shorter name within its own group.
    pub alias: Option<String>,
    /// Version of the group.
    pub version: f64,
    /// Names of its tasks and groups, in their order.
    pub members: Vec<String>,
    /// Documents that count, of all its tasks.
    pub documents: usize,
    /// What was measured, each task weighing as much as it has documents.
    pub metrics: BTreeMap<Metric, Estimate>,
}

/// A task, document by document.
#[derive(Clone, Debug, PartialEq)]
pub struct TaskSamples {
    /// The task.
    pub task: String,
    /// What is done to answers before they are judged.
    pub filter: &'static str,
    /// The documents that count.
    pub samples: Vec<Sample>,
}

/// One document, what the model answered, and what that is worth.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// The document.
    pub asked: Asked,
    /// One for each request.
    pub answers: Vec<Answer>,
    /// Its part in each metric.
    pub values: Vec<(Metric, Point)>,
    /// Non-zeros on its tokens.
    pub activity: Activity,
}

impl Sample {
    /// The document's part in `metric`.
    pub fn value(&self, metric: Metric) -> Option<Point> {
        self.values.iter().find(|(candidate, _)| *candidate == metric).map(|(_, point)| *point)
    }
}

/// A document that could not be scored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Excluded {
    /// Its index in the split, from 0.
    pub document: usize,
    /// Why.
    pub reason: Exclusion,
}

impl RunResult {
    /// The layout of the `relufication` section that this version writes and reads.
    pub const FORMAT: u32 = 3;

    /// The value of `metric` in the task called `task`.
    pub fn metric(&self, task: &str, metric: Metric) -> Option<Estimate> {
        let task = self.tasks.iter().find(|candidate| candidate.name == task)?;
        task.metrics.get(&metric).copied()
    }

    /// The accuracy by which a task or group is known: exact match where answers are
    /// generated.
    pub fn accuracy(&self, name: &str) -> Option<Estimate> {
        let task = self.tasks.iter().find(|task| task.name == name).map(|task| &task.metrics);
        let group =
            || self.groups.iter().find(|group| group.name == name).map(|group| &group.metrics);
        let metrics = task.or_else(group)?;
        metrics.get(&Metric::Acc).or_else(|| metrics.get(&Metric::ExactMatch)).copied()
    }

    /// The perplexity by which a task or corpus is known.
    pub fn perplexity(&self, name: &str) -> Option<Estimate> {
        let metric = |metric| self.metric(name, metric);
        metric(Metric::Perplexity).or_else(|| metric(Metric::WordPerplexity))
    }

    /// Names of the tasks in a group, those of its groups too; none of what is no group.
    pub fn tasks_of<'a>(&'a self, group: &str) -> Vec<&'a str> {
        let group_of = |name: &str| self.groups.iter().find(|group| group.name == name);
        let mut open: Vec<&str> = group_of(group).map(|group| &*group.name).into_iter().collect();
        let (mut seen, mut tasks) = (Vec::new(), Vec::new());
        while let Some(name) = open.pop() {
            if seen.contains(&name) {
                continue;
            }
            seen.push(name);
            match group_of(name) {
                Some(group) => open.extend(group.members.iter().rev().map(String::as_str)),
                None if self.tasks.iter().any(|task| task.name == name) => tasks.push(name),
                None => {}
            }
        }
        tasks
    }
}

impl ModelInfo {
    /// What a checkpoint says about itself.
    pub fn of(checkpoint: &Checkpoint) -> ModelInfo {
        let config = checkpoint.config();
        let relufication = config.relufication.as_ref();
        ModelInfo {
            name: checkpoint.name().to_owned(),
            revision: checkpoint.revision().map(str::to_owned),
            family: config.family.to_owned(),
            stage: relufication.map_or(Stage::Dense, |record| record.stage),
            parameters: config.spec.parameter_count(),
            tokens_trained: relufication.map_or(0, |record| record.tokens_trained),
        }
    }
}
