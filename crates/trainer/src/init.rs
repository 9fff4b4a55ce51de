//! A random checkpoint of any spec: what training from scratch begins with.

use std::path::{Path, PathBuf};

use candle_core::Device;
use relufy_data::Tokenizer;
use relufy_model::checkpoint::{StagedDir, TOKENIZER_FILES, save_weights, write_config};
use relufy_model::{Init, Params, StoredDtype};
use relufy_spec::family;
use serde_json::{Map, Value};

use crate::{Error, Result};

/// What to make.
#[derive(Clone, Debug)]
pub struct InitOptions {
    /// A Hugging Face `config.json`, or the same keys as TOML.
    pub config: PathBuf,
    /// The folder to make; it must not exist, or be empty.
    pub output: PathBuf,
    /// Takes the tokenizer's files from this folder.
    pub tokenizer: Option<PathBuf>,
    /// Seed of the weights.
    pub seed: u64,
    /// Standard deviation of the matrices; where absent the config's `initializer_range`,
    /// else 0.02.
    pub std: Option<f64>,
    /// The number type of the weights.
    pub dtype: StoredDtype,
}

/// What was made.
#[derive(Clone, Debug, PartialEq)]
pub struct Initialised {
    /// The folder.
    pub path: PathBuf,
    /// The family.
    pub family: &'static str,
    /// Numbers in it.
    pub parameters: usize,
}

/// Writes a checkpoint with random weights: matrices normal, those that write into the
/// residual stream scaled by `1 / sqrt(2 * layers)` (GPT-2), norms 1, biases 0.
///
/// # Errors
/// A config that no family understands; a tokenizer that does not fit; a folder that
/// exists.
pub fn init(options: &InitOptions) -> Result<Initialised> {
    let json = read_config(&options.config)?;
    let config = family::parse(&Value::Object(json.clone()))?;
    let spec = &config.spec;
    if let Some(folder) = &options.tokenizer {
        let tokens = Tokenizer::from_folder(folder)?.vocab_size();
        if tokens > spec.vocab {
            let (path, rows) = (folder.clone(), spec.vocab);
            return Err(relufy_model::Error::TokenizerTooLarge { path, tokens, rows }.into());
        }
    }
    let staged = StagedDir::create(&options.output)?;
    let configured = json.get("initializer_range").and_then(Value::as_f64);
    let std = options.std.or(configured).unwrap_or(0.02);
    if !(std.is_finite() && std >= 0.0) {
        return Err(Error::Value {
            place: options.config.display().to_string(),
            key: "initializer_range".to_string(),
            expected: "a number of at least 0".to_string(),
            found: std.to_string(),
        });
    }
    let init = Init { std, scale_residual: true, seed: options.seed };
    let params = Params::random(spec, &init, &Device::Cpu)?;
    write_config(staged.path(), &json)?;
    save_weights(staged.path(), spec, &params, &config.weights, options.dtype)?;
    if let Some(folder) = &options.tokenizer {
        copy_tokenizer(folder, staged.path())?;
    }
    staged.commit()?;
    let parameters = spec.parameter_count();
    Ok(Initialised { path: options.output.clone(), family: config.family, parameters })
}

/// The keys of a config, from JSON or (by its name) TOML.
fn read_config(path: &Path) -> Result<Map<String, Value>> {
    let text = std::fs::read_to_string(path).map_err(|source| Error::io(path, source))?;
    let refuse = |message: String| Error::Config { origin: path.display().to_string(), message };
    if path.extension().is_some_and(|extension| extension == "toml") {
        toml::from_str(&text).map_err(|error| refuse(error.to_string().trim_end().to_string()))
    } else {
        serde_json::from_str(&text).map_err(|error| refuse(error.to_string()))
    }
}

fn copy_tokenizer(from: &Path, to: &Path) -> Result<()> {
    for name in TOKENIZER_FILES {
        let source = from.join(name);
        if source.is_file() {
            // Read and write: a copy must not inherit that its source is read-only.
            let bytes = std::fs::read(&source).map_err(|error| Error::io(&source, error))?;
            let target = to.join(name);
            std::fs::write(&target, bytes).map_err(|error| Error::io(&target, error))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use relufy_model::Checkpoint;

    use super::*;

    const TOML: &str = "model_type = 'opt'\narchitectures = ['OPTForCausalLM']\nhidden_size = 32\n\
        ffn_dim = 64\nnum_hidden_layers = 2\nnum_attention_heads = 4\nvocab_size = 40\n\
        max_position_embeddings = 32\nword_embed_proj_dim = 32\ninit_std = 0.1\n";

    #[test]
    fn a_random_model_opens_like_any_other_and_is_the_seed_s() {
        let folder = tempfile::tempdir().unwrap();
        let config = folder.path().join("opt.toml");
        std::fs::write(&config, TOML).unwrap();
        let make = |name: &str, seed: u64| {
            let options = InitOptions {
                config: config.clone(),
                output: folder.path().join(name),
                tokenizer: None,
                seed,
                std: None,
                dtype: StoredDtype::Bf16,
            };
            init(&options)
        };
        let made = make("a", 1).unwrap();
        let opened = Checkpoint::open(&made.path).unwrap();
        assert_eq!(opened.config().spec.parameter_count(), made.parameters);
        assert_eq!(opened.stored_dtype(), StoredDtype::Bf16);
        opened.load(&Device::Cpu).unwrap();
        let bytes =
            |name: &str| std::fs::read(folder.path().join(name).join("model.safetensors")).unwrap();
        make("b", 1).unwrap();
        make("c", 2).unwrap();
        assert!(bytes("a") == bytes("b") && bytes("a") != bytes("c"));
        assert!(matches!(make("a", 1), Err(Error::Model(_))), "an existing folder is kept");
    }

    #[test]
    fn a_config_that_nobody_understands_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let config = folder.path().join("config.json");
        let output = folder.path().join("out");
        for (text, why) in [
            ("{\"model_type\": \"owl\"}", "owl"),
            ("{\"model_type\": ", "EOF"),
            ("{\"model_type\": \"llama\", \"rope_scalin\": 1}", "rope_scalin"),
        ] {
            std::fs::write(&config, text).unwrap();
            let options = InitOptions {
                config: config.clone(),
                output: output.clone(),
                tokenizer: None,
                seed: 0,
                std: None,
                dtype: StoredDtype::F32,
            };
            let error = init(&options).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
            assert!(!output.exists());
        }
    }
}
