//! Bad input, case by case, on the real program: exit code 2, an error that names the place
//! with what was expected and found, and no file made, changed or lost.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod support;

use std::fs;

use serde_json::{Map, Value, json};
use support::{Lab, RUN, Weights, tokenizer};

const PROBE: [&str; 6] = ["probe", "bad", "--input-ids", "ids.json", "-o", "out.safetensors"];

#[test]
fn folders_that_hold_no_model() {
    let lab = Lab::new();
    lab.write("empty/README.md", "");
    lab.refuse(
        &["inspect", "empty"],
        &["empty: no config.json", "hint: give a Hugging Face folder"],
    );
    lab.refuse(&["inspect", "ids.json"], &["ids.json: is a file: a model is a folder"]);
    lab.refuse(
        &["inspect", "./nowhere"],
        &["`./nowhere` is neither a folder nor a hub id", "hint:"],
    );
    lab.copy("model", "bad");
    fs::remove_file(lab.path("bad/model.safetensors")).unwrap();
    lab.refuse(&PROBE, &["bad: no model.safetensors or pytorch_model.bin", "hint:"]);
}

#[test]
fn a_hub_id_that_is_not_in_the_cache_offline() {
    let lab = Lab::new();
    lab.refuse(
        &["inspect", "org/name@v2"],
        &[
            "model `org/name` at revision `v2` is not in the cache",
            "HF_HUB_OFFLINE",
            "hint: download",
        ],
    );
    lab.refuse(
        &["eval", "model", "--tasks", "arc_easy"],
        &["dataset `allenai/ai2_arc`", "is not in the cache", "hint:"],
    );
}

#[test]
fn configs() {
    type Change = fn(&mut Map<String, Value>);
    let cases: [(Change, &[&str]); 11] = [
        (
            |c| drop(c.insert("model_type".into(), "mamba".into())),
            &["`mamba`", "hint: relufy reads llama"],
        ),
        (|c| drop(c.remove("model_type")), &["config key `model_type` is missing"]),
        (
            |c| c.extend([("foo".into(), 1.into()), ("attention_typ".into(), 2.into())]),
            &["config keys nobody understands: attention_typ, foo", "hint: an unknown key"],
        ),
        (
            |c| drop(c.insert("pretraining_tp".into(), 2.into())),
            &["`pretraining_tp`: expected 1, found 2"],
        ),
        (
            |c| drop(c.insert("hidden_size".into(), "32".into())),
            &["`hidden_size`: expected", "found \"32\""],
        ),
        (
            |c| drop(c.insert("hidden_size".into(), json!(1u64 << 62))),
            &["`hidden_size`: expected 1 to"],
        ),
        (
            |c| drop(c.insert("num_hidden_layers".into(), 0.into())),
            &["`num_hidden_layers`", "found 0"],
        ),
        (
            |c| drop(c.insert("num_hidden_layers".into(), json!(1u64 << 40))),
            &["`num_hidden_layers`"],
        ),
        (|c| drop(c.insert("num_key_value_heads".into(), 3.into())), &["4 heads cannot share 3"]),
        (|c| drop(c.insert("rope_theta".into(), 0.into())), &["rope theta is 0"]),
        (|c| drop(c.insert("hidden_act".into(), "mish".into())), &["`hidden_act`", "mish"]),
    ];
    let lab = Lab::new();
    for (change, expected) in cases {
        lab.copy("model", "bad");
        lab.config("bad", change);
        lab.refuse(&PROBE, &[expected, &["bad/config.json: "]].concat());
    }
    for (bytes, expected) in [
        (&b"{\"a\":"[..], "EOF while parsing a value at line 1 column 5"),
        (b"[1]", "expected a JSON object, found [1]"),
        (b"\xff\xfe", "UTF-8"),
        (&[b'['; 100_000], "recursion limit"),
    ] {
        lab.write("bad/config.json", bytes);
        lab.refuse(&PROBE, &["bad/config.json: ", expected]);
    }
}

/// Where a tensor's header entry is changed.
fn entry<'a>(weights: &'a mut Weights, name: &str) -> &'a mut Value {
    weights.header.get_mut(name).unwrap()
}

const NORM: &str = "model.norm.weight";
const EMBED: &str = "model.embed_tokens.weight";

#[test]
fn tensors() {
    type Change = fn(&mut Weights);
    let cases: [(Change, &[&str]); 13] = [
        (
            |w| {
                let norm = w.header.remove(NORM).unwrap();
                w.header.insert("model.nrm.weight".into(), norm);
            },
            &["tensor `model.norm.weight` is missing", "hint:"],
        ),
        (
            |w| w.add("adapter.weight", "F32", &[2], &[0; 8]),
            &["no place for: adapter.weight", "hint:"],
        ),
        (
            |w| entry(w, EMBED)["shape"] = json!([32, 16]),
            &["tensor `model.embed_tokens.weight`: expected shape [16, 32], found [32, 16]"],
        ),
        (
            |w| entry(w, NORM)["dtype"] = json!("I32"),
            &[
                "tensor `model.norm.weight`: expected f32, f16 or bf16, found I32",
                "hint: quantised",
            ],
        ),
        (
            |w| entry(w, NORM)["dtype"] = json!("Q4"),
            &["damaged weight file", "unknown variant `Q4`"],
        ),
        // Lies: a product of dimensions beyond any integer, bytes that belong to another
        // tensor, an end before its start, bytes that belong to nobody, and too few of them.
        (
            |w| entry(w, NORM)["shape"] = json!([1u64 << 62, 8]),
            &["damaged weight file: overflow", "hint: download"],
        ),
        (
            |w| entry(w, NORM)["data_offsets"] = json!([0, 128]),
            &["damaged weight file: invalid offset"],
        ),
        (
            |w| entry(w, NORM)["data_offsets"] = json!([128, 0]),
            &["damaged weight file: invalid offset"],
        ),
        (|w| drop(w.header.remove(NORM)), &["damaged weight file: "]),
        (|w| w.data.extend([0; 100]), &["do not add up to the file's "]),
        (|w| w.data.truncate(w.data.len() - 100), &["do not add up to the file's "]),
        (
            |w| w.set("model.layers.1.mlp.up_proj.weight", 37, f32::NAN),
            &["tensor `model.layers.1.mlp.up_proj.weight` holds NaN at element 37", "hint:"],
        ),
        (
            |w| w.set("lm_head.weight", 5, f32::NEG_INFINITY),
            &["`lm_head.weight` holds -inf at element 5"],
        ),
    ];
    let lab = Lab::new();
    for (change, expected) in cases {
        lab.copy("model", "bad");
        lab.weights("bad", change);
        lab.refuse(&PROBE, &[expected, &["bad"]].concat());
    }
}

#[test]
fn weight_files() {
    let lab = Lab::new();
    lab.copy("model", "bad");
    let whole = Weights::read(&lab.read("model/model.safetensors"));
    let size = whole.bytes().len();
    let claims = |length: u64| format!("a header of {length} bytes in a file of {size}");
    for (bytes, expected) in [
        (Vec::new(), "at least 8 bytes, found 0".to_owned()),
        (b"1234".to_vec(), "at least 8 bytes, found 4".to_owned()),
        (whole.lying(size as u64), claims(size as u64)),
        (whole.lying(1 << 40), claims(1 << 40)),
        (whole.lying(u64::MAX), claims(u64::MAX)),
        ([&8u64.to_le_bytes()[..], b"hello wo"].concat(), "invalid JSON in header".to_owned()),
        ([&2u64.to_le_bytes()[..], b"\xff\xfe"].concat(), "invalid UTF-8 in header".to_owned()),
    ] {
        lab.write("bad/model.safetensors", bytes);
        lab.refuse(&PROBE, &["bad/model.safetensors: damaged weight file: ", &expected, "hint:"]);
    }

    fs::remove_file(lab.path("bad/model.safetensors")).unwrap();
    for bytes in [&b""[..], b"garbage", b"PK\x03\x04garbage"] {
        lab.write("bad/pytorch_model.bin", bytes);
        lab.refuse(&PROBE, &["bad/pytorch_model.bin: damaged weight file: ", "hint:"]);
    }
    let pickle = include_bytes!("data/pickle/f32.bin");
    lab.write("bad/pytorch_model.bin", &pickle[..pickle.len() / 2]);
    lab.refuse(&PROBE, &["bad/pytorch_model.bin: damaged weight file: ", "hint:"]);
}

#[test]
fn shards() {
    let lab = Lab::new();
    lab.copy("model", "bad");
    let (one, two) = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors");
    fs::rename(lab.path("bad/model.safetensors"), lab.path(&format!("bad/{one}"))).unwrap();
    let names = Weights::read(&lab.read(&format!("bad/{one}"))).names();
    let index = |other: &str| {
        let mut map: Map<String, Value> =
            names.iter().map(|name| (name.clone(), one.into())).collect();
        map.insert(NORM.into(), other.into());
        json!({"metadata": {}, "weight_map": map}).to_string()
    };
    for (index, expected) in [
        (index(two), vec![two]),
        (index("../model/model.safetensors"), vec!["index.json", "../model/model.safetensors"]),
        (json!({"metadata": {}}).to_string(), vec!["index.json", "`weight_map`"]),
        (json!({"weight_map": {}}).to_string(), vec!["index.json", "`weight_map` is empty"]),
        ("{".to_owned(), vec!["index.json", "EOF"]),
    ] {
        lab.write("bad/model.safetensors.index.json", index);
        lab.refuse(&PROBE, &expected);
    }
}

#[test]
fn a_tied_head_with_values_of_its_own() {
    let lab = Lab::new();
    lab.copy("model", "bad");
    lab.config("bad", |config| drop(config.insert("tie_word_embeddings".into(), true.into())));
    lab.refuse(
        &PROBE,
        &[
            "`model.embed_tokens.weight` and `lm_head.weight` are tied",
            "hint:",
            "tie_word_embeddings",
        ],
    );
}

#[test]
fn tokenizers() {
    let lab = Lab::new();
    lab.copy("model", "bad");
    let generate = ["generate", "bad", "--prompt", "the cat"];
    lab.write("bad/tokenizer.json", tokenizer(5).to_string());
    let expected = ["the tokenizer has 19 tokens, the embedding 16 rows", "hint:"];
    lab.refuse(&generate, &expected);
    lab.refuse(&["inspect", "bad"], &expected);
    lab.refuse(&["init", "llama.json", "--tokenizer", "bad", "-o", "new"], &expected);
    lab.write("bad/tokenizer.json", "{");
    lab.refuse(&generate, &["bad/tokenizer.json: is not a tokenizer", "line 1"]);
    fs::remove_file(lab.path("bad/tokenizer.json")).unwrap();
    lab.refuse(&generate, &["bad: there is no tokenizer.json"]);
}

#[test]
fn corpora() {
    let good = "{\"text\": \"the cat sees a dog .\"}\n";
    let line = |bad: &[u8]| [good.as_bytes(), bad, b"\n"].concat();
    let packed = zstd::encode_all(good.repeat(500).as_bytes(), 3).unwrap();
    let cases: [(&str, Vec<u8>, &[&str]); 15] = [
        ("e.jsonl", vec![], &["empty corpus: e.jsonl holds no text", "hint:"]),
        ("e.txt", b"\n \n".to_vec(), &["empty corpus: e.txt holds no text", "hint:"]),
        ("e.jsonl", line(b"not json"), &["e.jsonl: line 2: is not JSON (column 2)"]),
        (
            "e.jsonl",
            line(b"{\"txt\": 1}"),
            &["line 2: there is no field `text`; the fields are: txt"],
        ),
        (
            "e.jsonl",
            line(b"{\"text\": 3}"),
            &["line 2: field `text` should be a string, but is a number"],
        ),
        ("e.jsonl", line(b"[1]"), &["line 2: expected a JSON object, found [1]"]),
        (
            "e.jsonl",
            line(b"{\"text\": \"\xff\"}"),
            &["e.jsonl: line 2: is not UTF-8 (byte 10 of it)"],
        ),
        ("e.txt", b"the \xff cat".to_vec(), &["e.txt: document 1: is not UTF-8"]),
        ("e.jsonl", line(b"{\"messages\": [{\"role\": \"user\"}]}"), &["line 2: "]),
        (
            "e.jsonl.zst",
            packed[..packed.len() / 2].to_vec(),
            &["e.jsonl.zst: ", "incomplete frame"],
        ),
        ("e.jsonl.zst", b"garbage".to_vec(), &["e.jsonl.zst: ", "frame descriptor"]),
        ("e.jsonl.gz", b"garbage garbage".to_vec(), &["e.jsonl.gz: ", "gzip header"]),
        ("e.parquet", b"garbage garbage".to_vec(), &["e.parquet: ", "Corrupt footer"]),
        ("e.docx", b"hello".to_vec(), &["e.docx: the name does not tell the format"]),
        ("e.jsonl", good.into(), &["`validation_fraction`", "e.jsonl"]),
    ];
    let lab = Lab::new();
    for (name, content, expected) in cases {
        lab.write(name, content);
        lab.write("run.toml", RUN.replace("corpus.jsonl", name));
        lab.refuse(&["train", "run.toml"], expected);
        fs::remove_file(lab.path(name)).unwrap();
    }
    for (path, expected) in [
        ("none.jsonl", "none.jsonl: there is no such file"),
        ("none*.jsonl", "none*.jsonl: no corpus file"),
    ] {
        lab.write("run.toml", RUN.replace("corpus.jsonl", path));
        lab.refuse(&["train", "run.toml"], &[expected]);
    }
}

#[test]
fn sequences_longer_than_positions() {
    let lab = Lab::new();
    lab.refuse(
        &["train", "run.toml", "--set", "train.seq_len=65"],
        &["`train.seq_len`: expected at most the model's 64 positions, found 65"],
    );
    let words = "the ".repeat(65);
    let expected = ["a sequence of 65 tokens is longer than the model's 64 positions", "hint:"];
    lab.refuse(&["generate", "model", "--prompt", &words], &expected);
    lab.write("long.json", json!([vec![1; 65]]).to_string());
    lab.refuse(
        &["probe", "model", "--input-ids", "long.json", "-o", "out.safetensors"],
        &[&expected[..], &["long.json: "]].concat(),
    );
    lab.refuse(
        &["eval", "model", "--corpus", "c=corpus.jsonl", "--seq-len", "65"],
        &["expected 1 to 64", "found 65"],
    );
}

#[test]
fn probes() {
    let lab = Lab::new();
    let probe = ["probe", "model", "--input-ids", "bad.json", "-o", "out.safetensors"];
    for (ids, expected) in [
        ("[[1, 99]]", "bad.json: token id 99 is outside the vocabulary of 16"),
        ("[[1, 2], [1]]", "bad.json: row 2 has 1 token ids, but row 1 has 2"),
        ("[]", "bad.json: expected rows of token ids, found none"),
        ("[[]]", "bad.json: expected rows of token ids, found an empty one"),
        ("[[1, -1]]", "bad.json: not a list of lists of token ids: invalid value: integer `-1`"),
        ("[[1, 1.5]]", "bad.json: not a list of lists of token ids"),
        ("[1, 2]", "bad.json: not a list of lists of token ids"),
        ("[[1,", "EOF while parsing a value at line 1 column 4"),
    ] {
        lab.write("bad.json", ids);
        lab.refuse(&probe, &[expected]);
    }
    fs::remove_file(lab.path("bad.json")).unwrap();
    lab.refuse(&probe, &["bad.json: No such file"]);
    let grad = ["probe", "model", "--input-ids", "ids.json", "-o", "o.safetensors", "--grad"];
    lab.refuse(
        &[&grad[..], &["model.nrm.weight"]].concat(),
        &["no tensor `model.nrm.weight`", "hint:"],
    );
}

#[test]
fn outputs_that_exist() {
    let lab = Lab::new();
    lab.write("taken/precious.txt", "mine");
    for args in [
        ["init", "llama.json", "-o", "taken"].as_slice(),
        &["init", "llama.json", "-o", "ids.json"],
        &["surgery", "model", "--stage", "1", "-o", "taken"],
        &["surgery", "model", "--stage", "1", "-o", "model"],
    ] {
        lab.refuse(args, &[args[args.len() - 1], "exists already", "hint: choose another folder"]);
    }
    lab.refuse(
        &["train", "run.toml", "--set", "output_dir=taken"],
        &["taken already exists and is not empty", "hint:", "--resume"],
    );
    lab.refuse(
        &["train", "run.toml", "--resume", "--set", "output_dir=taken"],
        &["taken: not the folder of a training run", "hint:"],
    );
    lab.refuse(
        &["surgery", "model", "--stage", "1", "-o", "ids.json/x"],
        &["ids.json: not a directory"],
    );
}

#[test]
fn run_configs() {
    let lab = Lab::new();
    for (text, expected) in [
        (RUN.replace("seq_len", "seq_lenn"), ["line 7, column 1", "unknown field `seq_lenn`"]),
        (RUN.replace("= 24", "= 'x'"), ["line 7, column 11", "invalid type: string"]),
        (RUN.replace("[model]", "[model"), ["line 3, column 7", "expected `]`"]),
        (RUN.replace("[train]", "[trian]"), ["line 6, column 2", "unknown field `trian`"]),
        (
            RUN.replace("= 2\n", "= 0\n"),
            ["bad.toml:8:1: `train.per_device_train_batch_size`", "found 0"],
        ),
    ] {
        lab.write("bad.toml", text);
        lab.refuse(&["train", "bad.toml"], &[&expected[..], &["bad.toml"]].concat());
    }
    for (set, expected) in [
        ("train.seq_lenn=4", ["unknown field `seq_lenn`", "seq_lenn = 4"]),
        ("trian.seq_len=4", ["unknown field `trian`", "[trian]"]),
        ("train.seq_len=abc", ["invalid type: string \"abc\"", "line 7, column 11"]),
        ("train.seq_len", ["--set train.seq_len: ", "expected key=value"]),
        ("freeze.train=['nope.*']", ["`nope.*` matches no tensor", "hint:"]),
        ("data.validation_fraction=1.0", ["`validation_fraction`", "[0, 1)"]),
    ] {
        lab.refuse(&["train", "run.toml", "--set", set], &expected);
    }
    lab.refuse(&["train", "none.toml"], &["none.toml: No such file"]);
}

#[test]
fn tasks_and_results() {
    let lab = Lab::new();
    let record = json!({"question": "the", "answerKey": "A",
        "choices": {"text": ["a", "cat"], "label": ["A", "B"]}});
    let eval = |task: &'static str| ["eval", "model", "--tasks", task, "-o", "results"];
    lab.refuse(&eval("arc_eazy"), &["unknown task `arc_eazy`; near it: arc_easy", "hint: "]);
    lab.write("q.jsonl", format!("{record}\n{{\"question\": \"x\"}}\n"));
    lab.refuse(
        &eval("facts=q.jsonl"),
        &["task `facts`, q.jsonl, record 2: field `choices` is missing"],
    );
    lab.write("q.jsonl", format!("{record}\nno json\n"));
    lab.refuse(&eval("facts=q.jsonl"), &["q.jsonl: line 2: is not JSON"]);
    lab.write("q.jsonl", "");
    lab.refuse(&eval("facts=q.jsonl"), &["`facts` (q.jsonl): no documents"]);
    lab.refuse(
        &["eval", "model", "--tasks", "piqa", "--data", "none"],
        &["task data: no ", "looked for none"],
    );
    lab.refuse(&["eval", "model"], &["nothing to evaluate"]);
    lab.write("results.json", "{\"a\": 1}");
    lab.refuse(
        &["table", "results.json"],
        &["results.json is no evaluation result: missing field `results`", "hint: "],
    );
    lab.refuse(&["table", "none"], &["none", "No such file"]);
    lab.refuse(&["table", "model"], &["model holds no results_*.json", "hint: "]);
}

#[test]
fn flags_of_the_harness() {
    let lab = Lab::new();
    lab.write("q.jsonl", "");
    for (flags, expected) in [
        (["--limit", "0"].as_slice(), "expected a whole number from 1, or a share"),
        (&["--limit", "1.5"], "expected a whole number from 1, or a share"),
        (&["--limit", "2", "--samples", "{}"], "cannot be used with"),
        (&["--samples", "{\"facts\": [-1]}"], "samples: expected {\"TASK\": [0, 3]}"),
        (&["--samples", "{\"other\": [1]}"], "`other`"),
        (&["--batch_size", "none"], "expected `auto`"),
        (&["--batch_size", "0"], "expected `auto`"),
        (&["--device", "gpu"], "expected cpu, cuda or cuda:N"),
        (&["--dtype", "half"], "expected auto, f32 or bf16"),
        (&["--dtype", "bf16"], "bf16 needs a GPU"),
        (&["--compat", "0.3"], "expected 0.4.13 or 0.4.9.1"),
        (&["--seed", "1,2"], "expected 1, 3 or 4 seeds"),
        (&["--seed", "1,2,3,None"], "the last seed draws examples"),
        (&["--log_samples"], "--output_path"),
        (&["--model", "vllm"], "possible values: hf"),
        (&["--model_args", "pretrained=other"], "the model is named twice"),
        (&["--model_args", "peft=x"], "peft=x: not supported"),
        (&["--model_args", "dtype=bfloat16"], "bf16 needs a GPU"),
        (&["--model_args", "dtype=float16"], "expected auto, float32 or bfloat16"),
        (&["--model_args", "dtype=bfloat16", "--dtype", "f32"], "the dtype is named twice"),
        (&["--gen_kwargs", "temperature=1"], "--gen_kwargs is not supported"),
        (&["--apply_chat_template"], "--apply_chat_template is not supported"),
        (&["--include_path", "x"], "--include_path is not supported"),
        (&["--predict_only"], "--predict_only is not supported"),
        (&["--wandb_args", "project=x"], "--wandb_args is not supported"),
    ] {
        lab.refuse(&[&["eval", "model", "-t", "facts=q.jsonl"], flags].concat(), &[expected]);
    }
    lab.refuse(&["eval", "-t", "facts=q.jsonl"], &["no model: give a folder or hub id"]);
    lab.write("cache.jsonl", "{}\n");
    lab.refuse(
        &["eval", "model", "-t", "facts=q.jsonl", "-c", "cache.jsonl"],
        &["cache.jsonl: line 1 is no answer", "hint: "],
    );
}

#[test]
fn arguments() {
    let lab = Lab::new();
    for (args, expected) in [
        (["generate", "model", "--prompt", "the", "--top-p", "2"].as_slice(), "--top-p"),
        (&["generate", "model", "--prompt", "the", "--temperature", "nan"], "--temperature"),
        (&["generate", "model", "--prompt", ""], "an empty prompt"),
        (&["surgery", "model", "--stage", "3", "-o", "x"], "3 is not in 0..=2"),
        (
            &["surgery", "model", "--stage", "1", "--sites", "foo", "-o", "x"],
            "expected qkv, o, up or down",
        ),
        (
            &["surgery", "model", "--stage", "1", "--sites", "qkv", "-o", "x"],
            "does not change the site `qkv`",
        ),
        (&["surgery", "model", "--stage", "1", "--shift", "nan", "-o", "x"], "a shift of NaN"),
        (
            &["calibrate", "model", "--corpus", "corpus.jsonl", "--sparsity", "1.5"],
            "between 0 and 1",
        ),
        (&["init", "llama.json", "--std", "-1", "-o", "x"], "found -1"),
        (&["--threads", "99999", "inspect", "model"], "1..=1024"),
        (&["inspect", "model", "--batch", "0"], "1..="),
        (&["inspekt", "model"], "unrecognized subcommand"),
    ] {
        lab.refuse(args, &[expected]);
    }
}
