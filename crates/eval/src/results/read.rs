//! Reading `results_*.json` back: the harness's part and ours, joined again.

use std::collections::BTreeMap;

use serde_json::Value;

use super::file::{File, NOT_APPLICABLE, Relufication, TaskDetails};
use super::{GroupResult, RunResult, Settings, TaskResult, TokenizerInfo};
use crate::metrics::{Estimate, Metric};
use crate::{Error, Result};

impl RunResult {
    /// Reads what [`RunResult::to_json`] wrote.
    ///
    /// # Errors
    /// What is no such file, or of another version.
    pub fn from_json(text: &str) -> Result<RunResult> {
        let mut file: File = serde_json::from_str(text)?;
        let format = file.relufication.get("format").and_then(Value::as_u64);
        if let Some(found) = format.filter(|format| *format != u64::from(RunResult::FORMAT)) {
            return Err(Error::Setting {
                what: "format of the result",
                expected: RunResult::FORMAT.to_string(),
                found: found.to_string(),
            });
        }
        let more: Relufication = serde_json::from_value(std::mem::take(&mut file.relufication))?;
        let tasks = more
            .tasks
            .into_iter()
            .map(|(name, details)| read_task(&file, name, serde_json::from_value(details)?))
            .collect::<Result<_>>()?;
        let groups = file
            .group_subtasks
            .iter()
            .map(|(name, members)| read_group(&file, name, members))
            .collect::<Result<_>>()?;
        let token = |(text, id): (Option<String>, String)| Some((text?, id.parse().ok()?));
        let config = file.config;
        Ok(RunResult {
            relufy: more.relufy,
            compat: more.compat,
            max_length: file.max_length,
            settings: Settings {
                pretrained: Some(file.model_name).filter(|name| *name != more.model.name),
                model_args: config.model_args,
                batch_size: config.batch_size,
                device: config.device,
                use_cache: config.use_cache,
                seeds: [
                    config.random_seed,
                    config.numpy_seed,
                    config.torch_seed,
                    config.fewshot_seed,
                ],
                bootstrap_iters: config.bootstrap_iters,
                date: file.date,
            },
            tokenizer: TokenizerInfo {
                pad: token(file.tokenizer_pad_token),
                eos: token(file.tokenizer_eos_token),
                bos: token(file.tokenizer_bos_token),
            },
            model: more.model,
            limit: config.limit,
            tasks,
            groups,
            densities: more.densities,
            flops: more.flops,
            flops_dense: more.flops_dense,
            seconds: more.seconds,
        })
    }
}

fn read_number(value: &Value) -> Option<f64> {
    match value {
        Value::String(text) if text != NOT_APPLICABLE => text.parse().ok(),
        value => value.as_f64(),
    }
}

/// Metrics of an entry in `results`, and the filter in their names.
fn read_metrics(entry: &Value) -> (BTreeMap<Metric, Estimate>, Option<String>) {
    let (mut found, mut name) = (BTreeMap::new(), None);
    for (key, value) in entry.as_object().into_iter().flatten() {
        let Some((metric, filter)) = key.split_once(',') else { continue };
        let metric = Metric::ALL.into_iter().find(|known| known.name() == metric);
        if let (Some(metric), Some(value)) = (metric, read_number(value)) {
            let stderr = entry.get(format!("{}_stderr,{filter}", metric.name()));
            let stderr = stderr.and_then(read_number);
            found.insert(metric, Estimate { value, stderr });
            name = Some(filter.to_owned());
        }
    }
    (found, name)
}

fn read_alias(entry: &Value, name: &str) -> Option<String> {
    let alias = entry.get("alias").and_then(Value::as_str)?;
    (alias != name).then(|| alias.to_owned())
}

fn count(value: Option<&Value>, key: &str) -> usize {
    let count = value.and_then(|value| value.get(key)).and_then(Value::as_u64);
    count.and_then(|count| usize::try_from(count).ok()).unwrap_or(0)
}

fn read_task(file: &File, name: String, more: TaskDetails) -> Result<TaskResult> {
    let entry = file.results.get(&name).ok_or_else(|| missing("results", &name))?;
    let (metrics, filter) = read_metrics(entry);
    Ok(TaskResult {
        alias: read_alias(entry, &name),
        version: file.versions.get(&name).and_then(Value::as_f64),
        source: more.source,
        filter: filter.unwrap_or_else(|| "none".into()),
        shots: file.n_shot.get(&name).copied().unwrap_or(0),
        split_documents: count(file.n_samples.get(&name), "original"),
        documents: count(file.n_samples.get(&name), "effective"),
        requests: more.requests,
        tokens: more.tokens,
        excluded: more.excluded,
        metrics,
        densities: more.densities,
        seconds: more.seconds,
        config: file.configs.get(&name).cloned().unwrap_or_default(),
        name,
    })
}

fn read_group(file: &File, name: &str, members: &Value) -> Result<GroupResult> {
    let entry = file.results.get(name).ok_or_else(|| missing("results", name))?;
    let version = file.versions.get(name).and_then(read_number);
    Ok(GroupResult {
        name: name.into(),
        alias: read_alias(entry, name),
        version: version.ok_or_else(|| missing("versions", name))?,
        members: serde_json::from_value(members.clone())?,
        documents: count(Some(entry), "sample_len"),
        metrics: read_metrics(entry).0,
    })
}

fn missing(section: &str, name: &str) -> Error {
    Error::Json(serde::de::Error::custom(format!("`{name}` is missing in `{section}`")))
}
