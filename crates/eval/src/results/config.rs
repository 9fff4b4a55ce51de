//! How an evaluation was asked for, as the harness's `config` and `configs` tell it.

use relufy_data::Tokenizer;
use serde_json::{Map, Value, json};

use crate::bootstrap;
use crate::metrics::Metric;
use crate::request::Request;
use crate::tasks::{Prepared, Shots, Source, Task};

/// How an evaluation was asked for, beside what changes its numbers.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// The model as it was named: folder or hub id.
    pub pretrained: Option<String>,
    /// The harness's `model_args`.
    pub model_args: Map<String, Value>,
    /// The harness's `batch_size`: `auto` or a number.
    pub batch_size: Value,
    /// Where the model ran.
    pub device: String,
    /// The file of kept answers.
    pub use_cache: Option<String>,
    /// The harness's seeds: Python, NumPy, PyTorch, few-shot. Only the last changes
    /// anything here.
    pub seeds: [Option<u64>; 4],
    /// Replicates of the bootstrap behind a perplexity's standard error.
    pub bootstrap_iters: u32,
    /// When it began, in seconds since 1970.
    pub date: f64,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            pretrained: None,
            model_args: Map::new(),
            batch_size: "auto".into(),
            device: "cpu".into(),
            use_cache: None,
            seeds: [Some(0), Some(1234), Some(1234), Some(1234)],
            bootstrap_iters: bootstrap::REPLICATES,
            date: 0.0,
        }
    }
}

impl Settings {
    /// The defaults, beginning now.
    pub(crate) fn now() -> Settings {
        let since = std::time::UNIX_EPOCH.elapsed().unwrap_or_default();
        Settings { date: since.as_secs_f64(), ..Settings::default() }
    }
}

/// A tokenizer's special tokens: text and id.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenizerInfo {
    /// What fills a batch.
    pub pad: Option<(String, u32)>,
    /// What ends a text.
    pub eos: Option<(String, u32)>,
    /// What begins a text.
    pub bos: Option<(String, u32)>,
}

impl TokenizerInfo {
    /// A tokenizer's.
    pub(crate) fn of(tokenizer: &Tokenizer) -> TokenizerInfo {
        let token = |id: Option<u32>| {
            let id = id?;
            Some((tokenizer.token(id)?, id))
        };
        TokenizerInfo {
            pad: token(tokenizer.pad_id()),
            eos: token(tokenizer.eos_id()),
            bos: token(tokenizer.bos_id()),
        }
    }
}

/// What can be said of a task in the words of the harness's YAML.
pub(crate) fn task_config(task: &dyn Task, prepared: &Prepared) -> Map<String, Value> {
    let mut config = Map::new();
    let mut put = |key: &str, value: Value| {
        config.insert(key.into(), value);
    };
    put("task", task.name().into());
    if let Some(alias) = task.alias() {
        put("task_alias", alias.into());
    }
    match task.source() {
        Source::Split { repo, config, split } => {
            put("dataset_path", repo.into());
            put("dataset_name", config.into());
            put(if split == "test" { "test_split" } else { "validation_split" }, split.into());
        }
        Source::File(path) => {
            put("dataset_path", "json".into());
            put("dataset_kwargs", json!({ "data_files": path.display().to_string() }));
        }
    }
    match task.shots() {
        Shots::None => {}
        Shots::First(split) => put("fewshot_config", json!({"sampler": "first_n", "split": split})),
        Shots::Drawn { split, .. } => {
            put("fewshot_config", json!({"sampler": "default", "split": split}))
        }
    }
    put("description", task.description().into());
    put("target_delimiter", " ".into());
    put("fewshot_delimiter", "\n\n".into());
    put("num_fewshot", prepared.shots.into());
    put("metric_list", task.metrics().iter().map(|metric| metric_config(*metric)).collect());
    let requests = prepared.documents.first().map_or(&[][..], |asked| asked.document.requests());
    put("output_type", output_type(requests).into());
    if let Some(kwargs) = requests.first().and_then(generation) {
        put("generation_kwargs", kwargs);
    }
    put("repeats", 1.into());
    if task.filter() != "none" {
        put("filter_list", json!([{ "name": task.filter() }]));
    }
    put("metadata", json!({ "version": task.version() }));
    config
}

fn metric_config(metric: Metric) -> Value {
    let aggregation = match metric {
        Metric::Perplexity => "perplexity",
        Metric::WordPerplexity | Metric::BytePerplexity => "weighted_perplexity",
        Metric::BitsPerByte => "bits_per_byte",
        _ => "mean",
    };
    let mut config = json!({
        "metric": metric.name(), "aggregation": aggregation,
        "higher_is_better": metric.is_accuracy(),
    });
    if metric == Metric::ExactMatch {
        config["ignore_case"] = true.into();
        config["ignore_punctuation"] = true.into();
    }
    config
}

/// What kind of questions a document asks.
pub(super) fn output_type(requests: &[Request]) -> &'static str {
    match requests {
        [Request::Generate { .. }, ..] => "generate_until",
        [Request::Rolling { .. }, ..] => "loglikelihood_rolling",
        [_] => "loglikelihood",
        _ => "multiple_choice",
    }
}

/// How an answer is generated.
pub(super) fn generation(request: &Request) -> Option<Value> {
    match request {
        Request::Generate { until, max_tokens, .. } => {
            let mut kwargs = json!({ "until": until, "do_sample": false, "temperature": 0.0 });
            // The harness does not name its default.
            if *max_tokens != 256 {
                kwargs["max_gen_toks"] = (*max_tokens).into();
            }
            Some(kwargs)
        }
        _ => None,
    }
}
