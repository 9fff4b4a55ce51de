//! A model, a tokenizer and a corpus, small enough to be made anew for every test.
#![allow(clippy::unwrap_used, clippy::panic, dead_code, reason = "helpers of tests")]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use relufy_data::Silent;
use relufy_model::StoredDtype;
use relufy_trainer::{
    InitOptions, Observer, StepReport, Summary, Surroundings, TrainConfig, Trainer,
};
use serde_json::{Map, Value, json};

const WORDS: [&str; 12] =
    ["the", "a", "cat", "dog", "bird", "sees", "likes", "follows", "red", "small", "old", "."];

/// A folder with a model, its tokenizer and a corpus.
pub struct World {
    pub folder: tempfile::TempDir,
}

impl World {
    /// Llama with weights of the given type.
    pub fn new(dtype: StoredDtype) -> World {
        let folder = tempfile::tempdir().unwrap();
        let world = World { folder };
        fs::write(world.path("corpus.jsonl"), corpus()).unwrap();
        fs::create_dir(world.path("tokenizer")).unwrap();
        let tokenizer = serde_json::to_string(&tokenizer()).unwrap();
        fs::write(world.path("tokenizer/tokenizer.json"), tokenizer).unwrap();
        world.model("model", 7, dtype, |_| {});
        world
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Adds a model whose config `change` has altered.
    pub fn model(
        &self,
        name: &str,
        seed: u64,
        dtype: StoredDtype,
        change: impl Fn(&mut Map<String, Value>),
    ) -> PathBuf {
        let mut config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 16,
            "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "tie_word_embeddings": false, "initializer_range": 0.15, "torch_dtype": "float32",
        });
        change(config.as_object_mut().unwrap());
        let path = self.path(&format!("{name}.json"));
        fs::write(&path, config.to_string()).unwrap();
        let options = InitOptions {
            config: path,
            output: self.path(name),
            tokenizer: Some(self.path("tokenizer")),
            seed,
            std: None,
            dtype,
        };
        relufy_trainer::init(&options).unwrap().path
    }

    /// A configuration for `model` into `output`; `extra` is more TOML, `set` edits it.
    pub fn config(&self, model: &str, output: &str, extra: &str, set: &[&str]) -> TrainConfig {
        let root = self.folder.path().display();
        let text = format!(
            "output_dir = '{root}/{output}'\n\
             [model]\npath = '{root}/{model}'\n\
             [train]\nseq_len = 24\nper_device_train_batch_size = 2\n\
             gradient_accumulation_steps = 2\nmax_steps = 40\nlogging_steps = 1\n\
             eval_steps = 10\nsave_steps = 10\n\
             [optim]\nlearning_rate = 3e-3\nwarmup_steps = 4\nweight_decay = 0.1\n\
             [data]\nvalidation_fraction = 0.1\ncache_dir = '{root}/cache'\n\
             [[data.sources]]\npath = '{root}/corpus.jsonl'\n{extra}"
        );
        let set: Vec<String> = set.iter().map(ToString::to_string).collect();
        TrainConfig::parse(&text, "test", &set).unwrap()
    }
}

/// Sentences with some order in them, so that there is something to learn.
fn corpus() -> String {
    let mut state = 12345u64;
    let mut pick = |from: &[&str]| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        from[(state >> 33) as usize % from.len()].to_string()
    };
    let mut lines = String::new();
    for _ in 0..400 {
        let mut sentence = Vec::new();
        for part in
            [&WORDS[..2], &WORDS[8..11], &WORDS[2..5], &WORDS[5..8], &WORDS[..2], &WORDS[2..5]]
        {
            sentence.push(pick(part));
        }
        lines += &json!({"text": format!("{} .", sentence.join(" "))}).to_string();
        lines.push('\n');
    }
    lines
}

/// One token a word.
fn tokenizer() -> Value {
    let mut vocab = Map::new();
    for (id, word) in ["<unk>", "</s>"].into_iter().chain(WORDS).enumerate() {
        vocab.insert(word.to_string(), id.into());
    }
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true})
    };
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(0, "<unk>"), special(1, "</s>")],
        "normalizer": null, "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    })
}

/// Prepares and runs.
pub fn train(config: &TrainConfig, resume: bool) -> relufy_trainer::Result<Summary> {
    train_until(config, resume, u64::MAX).map(|(summary, _)| summary)
}

/// Prepares and runs, and stops after step `last`; the losses of the steps taken.
pub fn train_until(
    config: &TrainConfig,
    resume: bool,
    last: u64,
) -> relufy_trainer::Result<(Summary, Vec<Step>)> {
    let stop = AtomicBool::new(false);
    let surroundings = Surroundings { resume, progress: &Silent };
    let mut trainer = Trainer::prepare(config, surroundings)?;
    let mut observer = StopAfter { last, stop: &stop, steps: Vec::new() };
    let summary = trainer.run(&mut observer, &stop)?;
    Ok((summary, observer.steps))
}

/// What a test looks at.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    pub step: u64,
    pub loss: f64,
    pub kl: Option<f64>,
    pub l1: Option<f64>,
}

struct StopAfter<'a> {
    last: u64,
    stop: &'a AtomicBool,
    steps: Vec<Step>,
}

impl Observer for StopAfter<'_> {
    fn step(&mut self, report: &StepReport<'_>) {
        let StepReport { step, loss, kl, l1, .. } = *report;
        self.steps.push(Step { step, loss, kl, l1 });
        if step >= self.last {
            self.stop.store(true, Ordering::Relaxed);
        }
    }
}

/// The lines of a run's metrics.
pub fn metrics(output: &Path) -> Vec<Map<String, Value>> {
    let text = fs::read_to_string(output.join("metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The names in a folder, sorted.
pub fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}
