//! What several tests need.

use std::path::{Path, PathBuf};

use relufy_data::{Hub, HubSettings, Tokenizer};

/// The folder with shared data; tests that call this are ignored without it.
pub fn shared(path: &str) -> PathBuf {
    Path::new(option_env!("RELUFY_SHARED_DIR").unwrap_or_default()).join("data").join(path)
}

/// A hub that is never asked.
pub fn no_hub(folder: &Path) -> Hub {
    Hub::new(HubSettings {
        endpoint: "http://127.0.0.1:9".to_owned(),
        cache: folder.join("hub"),
        token: None,
        offline: true,
    })
}

/// Words `w0` to `w99` have ids 3 to 102; BOS is 1 and EOS 2; anything else is 0.
pub fn write_word_tokenizer(folder: &Path, bos: bool) {
    let mut vocab = serde_json::Map::new();
    for (id, token) in ["<unk>", "<s>", "</s>"].into_iter().enumerate() {
        vocab.insert(token.to_owned(), id.into());
    }
    for word in 0..100 {
        vocab.insert(format!("w{word}"), (word + 3).into());
    }
    let special = |id: u32, content: &str| {
        serde_json::json!({
            "id": id, "content": content, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true,
        })
    };
    let template = serde_json::json!({
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    });
    let tokenizer = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "normalizer": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": if bos { template } else { serde_json::Value::Null },
        "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    });
    let config = serde_json::json!({"bos_token": "<s>", "eos_token": {"content": "</s>"}});
    std::fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    std::fs::write(folder.join("tokenizer_config.json"), config.to_string()).unwrap();
}

pub fn word_tokenizer(folder: &Path, bos: bool) -> Tokenizer {
    write_word_tokenizer(folder, bos);
    Tokenizer::from_folder(folder).unwrap()
}
