//! Real tokenizers, and what their folders say about BOS and EOS.

use std::path::Path;

use relufy_data::{Error, Tokenizer};

use crate::support::{shared, word_tokenizer, write_word_tokenizer};

const TEXTS: [&str; 6] = [
    "Once upon a time, there was a little girl.",
    "  two  spaces\n\n\tand a tab ",
    "naïve café — “quotes” 日本語のテキスト 🙂👩‍👩‍👧",
    "1234567890 + 3.14 = ?",
    "",
    "</s> <|endoftext|>",
];

fn open(path: &str) -> Tokenizer {
    Tokenizer::from_folder(&shared(path)).unwrap()
}

/// What stands where, and the sizes that the vocabularies have by their publishers.
#[test]
#[cfg_attr(not(relufy_shared), ignore = "needs the shared data: set RELUFY_SHARED")]
fn special_tokens_of_real_folders() {
    for (path, bos, eos, adds_bos, size) in [
        ("checkpoints/stories3M", Some(1), Some(2), true, 4096),
        ("checkpoints/stories260K", Some(1), Some(2), true, 512),
        ("checkpoints/TinyStories-656K", Some(1), Some(2), true, 2048),
        ("tokenizers/opt", Some(2), Some(2), true, 50265),
        ("tokenizers/falcon", None, Some(11), false, 65024),
        ("tokenizers/gpt2", None, None, false, 50257),
        ("tokenizers/gptneox", None, None, false, 50280),
    ] {
        let tokenizer = open(path);
        assert_eq!((tokenizer.bos_id(), tokenizer.eos_id()), (bos, eos), "{path}");
        assert_eq!(tokenizer.adds_bos(), adds_bos, "{path}");
        assert_eq!(tokenizer.vocab_size(), size, "{path}");
        assert_eq!(tokenizer.prefix_token(), bos.or(eos), "{path}");
    }
    assert_eq!(open("checkpoints/stories3M").model_max_length(), Some(512));
    assert_eq!(open("tokenizers/opt").model_max_length(), None);
}

#[test]
#[cfg_attr(not(relufy_shared), ignore = "needs the shared data: set RELUFY_SHARED")]
fn batches_and_streams_agree_with_single_texts() {
    for path in
        ["checkpoints/stories3M", "tokenizers/gpt2", "tokenizers/falcon", "tokenizers/gptneox"]
    {
        let tokenizer = open(path);
        let batch = tokenizer.encode_batch(&TEXTS, true).unwrap();
        for (text, ids) in TEXTS.iter().zip(&batch) {
            assert_eq!(ids, &tokenizer.encode(text, true).unwrap());
            let plain = tokenizer.encode(text, false).unwrap();
            assert_eq!(&ids[ids.len() - plain.len()..], plain);
            let whole = tokenizer.decode(&plain, false).unwrap();
            // NeoX normalises; Llama's decoder puts a space behind a special token.
            let lossless = match path {
                "tokenizers/gptneox" => false,
                "checkpoints/stories3M" => !text.contains("</s>"),
                _ => true,
            };
            if lossless {
                assert_eq!(&whole, text, "{path}");
            }
            let mut stream = tokenizer.stream(false);
            let mut streamed = String::new();
            for id in plain {
                if let Some(piece) = stream.push(id).unwrap() {
                    assert!(!piece.is_empty() && !piece.contains('\u{FFFD}'), "{path}: {piece:?}");
                    streamed.push_str(&piece);
                }
            }
            streamed.push_str(&stream.finish().unwrap().unwrap_or_default());
            assert_eq!(streamed, whole, "{path}");
        }
    }
}

#[test]
#[cfg_attr(not(relufy_shared), ignore = "needs the shared data: set RELUFY_SHARED")]
fn a_stream_goes_on_where_a_prompt_ends() {
    for path in ["checkpoints/stories3M", "tokenizers/gpt2", "tokenizers/falcon"] {
        let tokenizer = open(path);
        let whole = "Once upon a time, there was a naïve 𓀀 owl.";
        let ids = tokenizer.encode(whole, true).unwrap();
        let mut compared = 0;
        for cut in 0..ids.len() {
            let (before, after) = ids.split_at(cut);
            let mut stream = tokenizer.stream_after(before, true).unwrap();
            let mut text = tokenizer.decode(before, true).unwrap();
            let whole_before = !text.ends_with('\u{FFFD}');
            for id in after {
                text.push_str(&stream.push(*id).unwrap().unwrap_or_default());
            }
            text.push_str(&stream.finish().unwrap().unwrap_or_default());
            // Behind half a character the other half is no character either.
            if whole_before {
                assert_eq!(text, whole, "{path}");
                compared += 1;
            }
            assert!(text.ends_with("owl."), "{path}: {text}");
        }
        assert!(compared > 10, "{path}");
    }
    assert!(open("tokenizers/gpt2").stream_after(&[50257], true).is_err());
}

#[test]
#[cfg_attr(not(relufy_shared), ignore = "needs the shared data: set RELUFY_SHARED")]
fn half_a_character_waits_and_comes_out_at_the_end() {
    for path in ["checkpoints/stories3M", "tokenizers/gpt2"] {
        let tokenizer = open(path);
        let ids = tokenizer.encode("ok 𓀀", false).unwrap();
        let mut stream = tokenizer.stream(false);
        let mut text = String::new();
        for id in &ids[..ids.len() - 1] {
            text.push_str(&stream.push(*id).unwrap().unwrap_or_default());
        }
        assert_eq!(text.trim_end(), "ok", "{path}");
        let rest = stream.finish().unwrap().unwrap();
        assert!(rest.trim_start().chars().all(|c| c == '\u{FFFD}'), "{path}: {rest:?}");
    }
    let tokenizer = open("tokenizers/gpt2");
    let mut stream = tokenizer.stream(false);
    assert!(stream.push(50257).is_err());
    assert_eq!(stream.push(31373).unwrap().as_deref(), Some("hello"));
    assert!(matches!(tokenizer.decode(&[9, 50257], false), Err(Error::Tokenizer { .. })));
}

fn with(folder: &Path, file: &str, text: &str) -> Tokenizer {
    std::fs::write(folder.join(file), text).unwrap();
    Tokenizer::from_folder(folder).unwrap()
}

#[test]
fn classes_that_write_their_own_post_processor() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let first = word_tokenizer(folder, true);
    assert_eq!(first.encode("w0 w1", true).unwrap(), [1, 3, 4]);
    assert_eq!(first.encode("w0 w1", false).unwrap(), [3, 4]);

    let file = "tokenizer_config.json";
    let specials = r#""bos_token": "<s>", "eos_token": "</s>""#;
    for (class, flags, expected) in [
        ("PreTrainedTokenizerFast", r#", "add_bos_token": false"#, vec![1, 3]),
        ("LlamaTokenizer", r#", "add_bos_token": false"#, vec![3]),
        ("LlamaTokenizerFast", r#", "add_eos_token": true"#, vec![1, 3, 2]),
        ("GemmaTokenizer", "", vec![1, 3]),
        ("GPTNeoXTokenizerFast", "", vec![3]),
        ("GPTNeoXTokenizer", r#", "add_bos_token": true"#, vec![1, 3]),
    ] {
        let json = format!(r#"{{"tokenizer_class": "{class}", {specials}{flags}}}"#);
        let tokenizer = with(folder, file, &json);
        assert_eq!(tokenizer.encode("w0", true).unwrap(), expected, "{json}");
        assert_eq!(tokenizer.encode("w0", false).unwrap(), [3], "{json}");
        assert_eq!(tokenizer.adds_bos(), expected[0] == 1, "{json}");
        if expected != [1, 3] {
            assert_ne!(tokenizer.fingerprint(), first.fingerprint(), "{json}");
        }
    }
}

#[test]
fn ids_come_from_the_files_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    write_word_tokenizer(folder, false);
    std::fs::remove_file(folder.join("tokenizer_config.json")).unwrap();
    let tokenizer = Tokenizer::from_folder(folder).unwrap();
    assert_eq!((tokenizer.bos_id(), tokenizer.prefix_token()), (None, None));

    let tokenizer = with(folder, "config.json", r#"{"bos_token_id": 5, "eos_token_id": 6}"#);
    assert_eq!((tokenizer.bos_id(), tokenizer.eos_ids()), (Some(5), &[6][..]));
    let json = r#"{"eos_token_id": [7, 8, 4000], "pad_token_id": null}"#;
    let tokenizer = with(folder, "generation_config.json", json);
    assert_eq!((tokenizer.bos_id(), tokenizer.eos_ids()), (Some(5), &[7, 8][..]));
    let json = r#"{"eos_token": {"content": "</s>"}, "pad_token": "<unk>"}"#;
    let tokenizer = with(folder, "special_tokens_map.json", json);
    assert_eq!((tokenizer.pad_id(), tokenizer.eos_ids()), (Some(0), &[2, 7, 8][..]));
    let tokenizer = with(folder, "tokenizer_config.json", r#"{"eos_token": "w1"}"#);
    assert_eq!(tokenizer.eos_ids(), [4, 7, 8]);
}

#[test]
fn folders_without_a_readable_tokenizer() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let open = || Tokenizer::from_folder(folder).unwrap_err();
    assert!(matches!(open(), Error::MissingFile { .. }));
    std::fs::write(folder.join("tokenizer.model"), b"\x0a").unwrap();
    let error = open();
    assert!(matches!(error, Error::NoFastTokenizer { .. }) && error.hint().is_some());
    std::fs::write(folder.join("tokenizer.json"), b"{}").unwrap();
    assert!(matches!(open(), Error::BadFile { .. }));
    write_word_tokenizer(folder, true);
    std::fs::write(folder.join("tokenizer_config.json"), b"[1]").unwrap();
    assert!(open().to_string().contains("tokenizer_config.json"));
}
