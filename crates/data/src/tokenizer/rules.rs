//! Which tokens begin and end a text, and who adds them.
//!
//! Where the files disagree we follow transformers 4.57 (`tokenization_utils_fast.py`,
//! `models/*/tokenization_*_fast.py`): the post-processor of `tokenizer.json` decides,
//! except for the classes that write their own from `add_bos_token` and `add_eos_token`.

use std::path::Path;

use serde_json::{Map, Value};
use tokenizers::processors::template::{SpecialToken, TemplateProcessing};
use tokenizers::{AddedToken, Tokenizer};

use crate::{Error, Result};

/// Classes that replace the post-processor, and whether they add BOS unless told.
const REBUILDS: [(&str, bool); 5] = [
    ("LlamaTokenizer", true),
    ("CodeLlamaTokenizer", true),
    ("GemmaTokenizer", true),
    ("CohereTokenizer", true),
    ("GPTNeoXTokenizer", false),
];

/// transformers writes `int(1e30)` for "no limit".
const VERY_LARGE: f64 = 1e15;

/// The rules of one folder.
#[derive(Debug)]
pub(super) struct Rules {
    pub(super) bos: Option<u32>,
    /// The one of the tokenizer first.
    pub(super) eos: Vec<u32>,
    pub(super) pad: Option<u32>,
    pub(super) max_length: Option<usize>,
    pub(super) chat_template: Option<String>,
    /// Add BOS, add EOS; `None` leaves the post-processor as it is.
    rebuild: Option<(bool, bool)>,
    /// Special tokens that a config names and `tokenizer.json` does not know as such.
    extra: Vec<String>,
}

impl Rules {
    /// Reads what lies beside `tokenizer.json`. Every file is optional.
    pub(super) fn read(folder: &Path, tokenizer: &Tokenizer) -> Result<Self> {
        let config = object(folder, "tokenizer_config.json")?;
        let special = object(folder, "special_tokens_map.json")?;
        let generation = object(folder, "generation_config.json")?;
        let model = object(folder, "config.json")?;

        let spelled = |key: &str| token_text(&config, key).or_else(|| token_text(&special, key));
        // A name in the tokenizer's own files counts before an id in the model's files.
        let find = |name: &str| -> Option<u32> {
            spelled(name).and_then(|text| tokenizer.token_to_id(&text)).or_else(|| {
                let key = format!("{name}_id");
                let listed = ids(&generation, &key).into_iter().chain(ids(&model, &key));
                listed.into_iter().find(|id| tokenizer.id_to_token(*id).is_some())
            })
        };
        let (bos, pad) = (find("bos_token"), find("pad_token"));
        let mut eos: Vec<u32> = find("eos_token").into_iter().collect();
        for id in ids(&generation, "eos_token_id") {
            if !eos.contains(&id) && tokenizer.id_to_token(id).is_some() {
                eos.push(id);
            }
        }

        let class = text(&config, "tokenizer_class").unwrap_or_default();
        let class = class.strip_suffix("Fast").unwrap_or(&class).to_owned();
        let flag = |key: &str| config.get(key).and_then(Value::as_bool);
        let rebuild = REBUILDS.iter().find(|(name, _)| *name == class).map(|(_, adds_bos)| {
            let add_bos = flag("add_bos_token").unwrap_or(*adds_bos);
            (add_bos && bos.is_some(), flag("add_eos_token").unwrap_or(false) && !eos.is_empty())
        });
        let known: Vec<String> = tokenizer
            .get_added_vocabulary()
            .get_added_tokens_decoder()
            .values()
            .filter(|token| token.special)
            .map(|token| token.content.clone())
            .collect();
        let extra = ["bos_token", "eos_token", "unk_token", "pad_token"]
            .iter()
            .filter_map(|name| spelled(name))
            // A token without an id would grow the vocabulary past the embedding.
            .filter(|text| !known.contains(text) && tokenizer.token_to_id(text).is_some())
            .collect();
        let max_length = config
            .get("model_max_length")
            .and_then(Value::as_f64)
            .filter(|length| (1.0..VERY_LARGE).contains(length))
            .map(|length| length as usize);
        Ok(Rules {
            bos,
            eos,
            pad,
            max_length,
            chat_template: chat_template(folder, &config)?,
            rebuild,
            extra,
        })
    }

    /// Makes the tokenizer follow the rules.
    pub(super) fn apply(&self, tokenizer: &mut Tokenizer) -> tokenizers::Result<()> {
        if !self.extra.is_empty() {
            let tokens = self.extra.iter().map(|text| AddedToken::from(text.as_str(), true));
            tokenizer.add_special_tokens(tokens)?;
        }
        let Some((add_bos, add_eos)) = self.rebuild else { return Ok(()) };
        let mut template = vec!["$A".to_owned()];
        let mut special = Vec::new();
        let mut add = |at: usize, name: &str, id: Option<u32>| -> tokenizers::Result<()> {
            if let Some(id) = id {
                template.insert(at.min(template.len()), name.to_owned());
                let text = tokenizer.id_to_token(id).unwrap_or_default();
                special.push(SpecialToken::new(name.to_owned(), vec![id], vec![text])?);
            }
            Ok(())
        };
        // Names of our own, as a token's text may hold spaces or colons.
        add(0, "BOS", self.bos.filter(|_| add_bos))?;
        add(usize::MAX, "EOS", self.eos.first().copied().filter(|_| add_eos))?;
        let single = template.join(" ");
        let processor = TemplateProcessing::builder()
            .try_single(single.as_str())?
            .try_pair(format!("{single} {}", single.replace("$A", "$B")).as_str())?
            .special_tokens(special)
            .build()?;
        tokenizer.with_post_processor(Some(processor));
        Ok(())
    }

    /// What changes the ids of a text.
    pub(super) fn describe(&self) -> String {
        format!("{:?} {:?} {:?} {:?}", self.bos, self.eos.first(), self.rebuild, self.extra)
    }
}

/// A JSON object; empty where there is no such file.
fn object(folder: &Path, name: &str) -> Result<Map<String, Value>> {
    let path = folder.join(name);
    match std::fs::read(&path) {
        Ok(bytes) => match serde_json::from_slice(&bytes) {
            Ok(Value::Object(map)) => Ok(map),
            Ok(_) => Err(Error::bad_file(path, "is no JSON object")),
            Err(error) => Err(Error::bad_file(path, error)),
        },
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Map::new()),
        Err(error) => Err(Error::io(path, error)),
    }
}

fn text(map: &Map<String, Value>, key: &str) -> Option<String> {
    map.get(key).and_then(Value::as_str).map(str::to_owned)
}

/// A token given as a string, or as an object with `content`.
fn token_text(map: &Map<String, Value>, key: &str) -> Option<String> {
    match map.get(key)? {
        Value::String(text) => Some(text.clone()),
        Value::Object(token) => text(token, "content"),
        _ => None,
    }
}

/// One id or a list of them.
fn ids(map: &Map<String, Value>, key: &str) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match map.get(key) {
        Some(Value::Array(list)) => list.iter().filter_map(id).collect(),
        Some(value) => id(value).into_iter().collect(),
        None => Vec::new(),
    }
}

/// A string, or a list of named ones of which `default` counts; or a file of its own.
fn chat_template(folder: &Path, config: &Map<String, Value>) -> Result<Option<String>> {
    let path = folder.join("chat_template.jinja");
    if path.is_file() {
        return std::fs::read_to_string(&path).map(Some).map_err(|e| Error::io(path, e));
    }
    Ok(match config.get("chat_template") {
        Some(Value::String(template)) => Some(template.clone()),
        Some(Value::Array(named)) => named
            .iter()
            .filter_map(Value::as_object)
            .find(|entry| text(entry, "name").as_deref() == Some("default"))
            .and_then(|entry| text(entry, "template")),
        _ => None,
    })
}
