//! A folder with a tiny model, its tokenizer and some text, and the real program run in it.
#![allow(clippy::unwrap_used, clippy::panic, dead_code, reason = "helpers of tests")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Map, Value, json};

/// The program under test.
pub const RELUFY: &str = env!("CARGO_BIN_EXE_relufy");

/// The words that the tokenizer knows.
pub const WORDS: [&str; 12] =
    ["the", "a", "cat", "dog", "bird", "sees", "likes", "follows", "red", "small", "old", "."];

/// A run that trains for three steps.
pub const RUN: &str = "output_dir = 'run'

[model]
path = 'model'

[train]
seq_len = 24
per_device_train_batch_size = 2
max_steps = 3

[data]
validation_fraction = 0.1
cache_dir = 'cache'

[[data.sources]]
path = 'corpus.jsonl'
";

/// The config of `model`: 2 layers, 64 positions, 16 rows in the embedding.
pub fn llama() -> Map<String, Value> {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 16,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": false, "initializer_range": 0.15, "torch_dtype": "float32",
    });
    config.as_object().unwrap().clone()
}

/// One token a word, and `more` that mean nothing.
pub fn tokenizer(more: usize) -> Value {
    let mut vocab = Map::new();
    let more: Vec<String> = (0..more).map(|n| format!("more{n}")).collect();
    let words = ["<unk>", "</s>"].into_iter().chain(WORDS).chain(more.iter().map(String::as_str));
    for (id, word) in words.enumerate() {
        vocab.insert(word.to_owned(), id.into());
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

/// A folder of its own, in which the program runs.
pub struct Lab {
    folder: tempfile::TempDir,
}

impl Lab {
    /// With `model`, `tokenizer`, `corpus.jsonl`, `run.toml` and `ids.json`.
    pub fn new() -> Lab {
        let lab = Lab { folder: tempfile::tempdir().unwrap() };
        lab.write("llama.json", Value::Object(llama()).to_string());
        lab.write("tokenizer/tokenizer.json", tokenizer(0).to_string());
        let lines: Vec<String> = (0..200)
            .map(|n| {
                let words: Vec<_> = (0..8).map(|k| WORDS[(n * 7 + k * (n + 3)) % 11]).collect();
                json!({"text": words.join(" ") + " ."}).to_string() + "\n"
            })
            .collect();
        lab.write("corpus.jsonl", lines.concat());
        lab.write("run.toml", RUN);
        lab.write("ids.json", "[[1, 2, 3, 4], [5, 6, 7, 8]]");
        lab.succeed(&["init", "llama.json", "--tokenizer", "tokenizer", "-o", "model"]);
        lab
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes a file, and the folder it lies in.
    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap()
    }

    /// Makes `to` a fresh copy of `from`.
    pub fn copy(&self, from: &str, to: &str) {
        drop(fs::remove_dir_all(self.path(to)));
        fs::create_dir(self.path(to)).unwrap();
        for entry in fs::read_dir(self.path(from)).unwrap() {
            let name = entry.unwrap().file_name();
            fs::copy(self.path(from).join(&name), self.path(to).join(&name)).unwrap();
        }
    }

    /// Changes a model's `config.json`.
    pub fn config(&self, model: &str, change: impl FnOnce(&mut Map<String, Value>)) {
        let name = format!("{model}/config.json");
        let mut config: Map<_, _> = serde_json::from_slice(&self.read(&name)).unwrap();
        change(&mut config);
        self.write(&name, Value::Object(config).to_string());
    }

    /// Changes a model's `model.safetensors`.
    pub fn weights(&self, model: &str, change: impl FnOnce(&mut Weights)) {
        let name = format!("{model}/model.safetensors");
        let mut weights = Weights::read(&self.read(&name));
        change(&mut weights);
        self.write(&name, weights.bytes());
    }

    /// The program, offline and with a cache of its own.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(RELUFY);
        command
            .args(args)
            .current_dir(self.folder.path())
            .env("HF_HOME", self.path("hub"))
            .env("HF_HUB_OFFLINE", "1")
            .env("NO_COLOR", "1")
            .env("COLUMNS", "100")
            .env_remove("RELUFY_LOG")
            .env_remove("RELUFY_THREADS");
        command
    }

    pub fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Runs what must succeed; its standard output.
    pub fn succeed(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
        text(&output.stdout)
    }

    /// Runs what must be refused: exit code 2, a message with each of `expected`, nothing on
    /// standard output, and no file made, changed or lost.
    #[track_caller]
    pub fn refuse(&self, args: &[&str], expected: &[&str]) {
        let before = self.files();
        let output = self.run(args);
        let message = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {message}");
        assert!(message.starts_with("error: "), "{args:?}: {message}");
        for part in expected {
            assert!(message.contains(part), "{args:?}: no `{part}` in: {message}");
        }
        assert!(!message.contains("panicked") && !message.contains("RUST_BACKTRACE"), "{message}");
        assert_eq!(text(&output.stdout), "", "{args:?}");
        self.assert_files(&before, &format!("{args:?}"));
    }

    /// Demands that the files are as before.
    #[track_caller]
    pub fn assert_files(&self, before: &BTreeMap<PathBuf, Vec<u8>>, what: &str) {
        let after = self.files();
        let names = |files: &BTreeMap<PathBuf, Vec<u8>>| files.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(&after), names(before), "{what}: files were made or lost");
        for (name, bytes) in before {
            assert!(after[name] == *bytes, "{what}: {} was changed", name.display());
        }
    }

    /// Every file and folder, with what it holds. The cache of tokens is left out: what is in
    /// it is of use to a later run.
    pub fn files(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut files = BTreeMap::new();
        walk(self.folder.path(), &mut files);
        let cache = self.path("cache");
        files.retain(|path, _| !path.starts_with(&cache));
        files
    }
}

fn walk(folder: &Path, files: &mut BTreeMap<PathBuf, Vec<u8>>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            walk(&path, files);
            files.insert(path, Vec::new());
        } else {
            let bytes = fs::read(&path).unwrap();
            files.insert(path, bytes);
        }
    }
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A safetensors file taken apart.
pub struct Weights {
    pub header: Map<String, Value>,
    pub data: Vec<u8>,
}

impl Weights {
    pub fn read(file: &[u8]) -> Weights {
        let (length, rest) = file.split_at(8);
        let length = u64::from_le_bytes(length.try_into().unwrap()) as usize;
        let header = serde_json::from_slice(&rest[..length]).unwrap();
        Weights { header, data: rest[length..].to_vec() }
    }

    pub fn bytes(&self) -> Vec<u8> {
        let header = Value::Object(self.header.clone()).to_string();
        self.lying(header.len() as u64)
    }

    /// The file, with a header that claims to be `length` bytes long.
    pub fn lying(&self, length: u64) -> Vec<u8> {
        let header = Value::Object(self.header.clone()).to_string();
        [&length.to_le_bytes()[..], header.as_bytes(), &self.data].concat()
    }

    pub fn names(&self) -> Vec<String> {
        self.header.keys().filter(|name| *name != "__metadata__").cloned().collect()
    }

    pub fn shape(&self, name: &str) -> Vec<usize> {
        serde_json::from_value(self.header[name]["shape"].clone()).unwrap()
    }

    fn range(&self, name: &str) -> std::ops::Range<usize> {
        let [start, end] =
            serde_json::from_value(self.header[name]["data_offsets"].clone()).unwrap();
        start..end
    }

    pub fn bytes_of(&self, name: &str) -> &[u8] {
        &self.data[self.range(name)]
    }

    /// The f32 values of a tensor.
    pub fn values(&self, name: &str) -> Vec<f32> {
        let bytes = self.bytes_of(name).chunks_exact(4);
        bytes.map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    /// Puts a value into an f32 tensor.
    pub fn set(&mut self, name: &str, element: usize, value: f32) {
        let start = self.range(name).start + 4 * element;
        self.data[start..start + 4].copy_from_slice(&value.to_le_bytes());
    }

    /// Adds a tensor.
    pub fn add(&mut self, name: &str, dtype: &str, shape: &[usize], bytes: &[u8]) {
        let start = self.data.len();
        self.data.extend(bytes);
        let offsets = [start, self.data.len()];
        self.header.insert(
            name.to_owned(),
            json!({"dtype": dtype, "shape": shape, "data_offsets": offsets}),
        );
    }

    /// A file without tensors.
    pub fn empty() -> Weights {
        Weights { header: Map::new(), data: Vec::new() }
    }
}
