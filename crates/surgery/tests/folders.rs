//! Surgery from folder to folder, for every family: what is written reads back as the
//! model that surgery in memory makes, and nothing else changes.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::Device;
use relufy_data::Silent;
use relufy_model::checkpoint::{save_weights, write_config};
use relufy_model::{Checkpoint, Decoder, Init, NoTap, Params, StoredDtype, Tokens};
use relufy_spec::{Activation, Site, Stage, family};
use relufy_surgery::{Linked, Report, Shift, SurgeryRequest, surgery};
use serde_json::{Value, json};

/// A tiny config of every family and block form.
fn configs() -> Vec<(&'static str, Value)> {
    let llama = |model_type: &str| {
        json!({"architectures": ["X"], "hidden_size": 32, "intermediate_size": 40,
            "max_position_embeddings": 64, "model_type": model_type, "num_attention_heads": 4,
            "num_hidden_layers": 2, "num_key_value_heads": 2, "rope_theta": 10000.0,
            "torch_dtype": "float32", "vocab_size": 50, "head_dim": 8, "hidden_act": "silu"})
    };
    let falcon = |extra: Value| {
        let mut config = json!({"activation": "gelu", "hidden_size": 32, "model_type": "falcon",
            "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 50});
        let map = config.as_object_mut().unwrap();
        map.extend(extra.as_object().unwrap().clone());
        config
    };
    vec![
        ("llama", llama("llama")),
        ("mistral", llama("mistral")),
        ("qwen2", llama("qwen2")),
        ("qwen3", llama("qwen3")),
        (
            "opt",
            json!({"activation_function": "relu", "ffn_dim": 40, "hidden_size": 32,
                "max_position_embeddings": 64, "model_type": "opt", "num_attention_heads": 4,
                "num_hidden_layers": 2, "vocab_size": 50}),
        ),
        ("falcon-7b", falcon(json!({"multi_query": true, "parallel_attn": true}))),
        ("falcon-40b", falcon(json!({"new_decoder_architecture": true, "num_kv_heads": 2}))),
        (
            "falcon-rw",
            falcon(json!({"alibi": true, "bias": true, "multi_query": false,
                "parallel_attn": false})),
        ),
        (
            "gpt_neox",
            json!({"hidden_act": "gelu", "hidden_size": 32, "intermediate_size": 40,
                "max_position_embeddings": 64, "model_type": "gpt_neox",
                "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 50}),
        ),
        (
            "gpt2",
            json!({"activation_function": "gelu_new", "model_type": "gpt2", "n_embd": 32,
                "n_head": 4, "n_layer": 2, "n_positions": 64, "vocab_size": 50}),
        ),
    ]
}

/// Writes a random model with files beside it.
fn make(folder: &Path, config: &Value) {
    let parsed = family::parse(config).unwrap();
    let init = Init { std: 0.3, seed: 7, scale_residual: false };
    let params = Params::random(&parsed.spec, &init, &Device::Cpu).unwrap();
    fs::create_dir(folder).unwrap();
    write_config(folder, config.as_object().unwrap()).unwrap();
    save_weights(folder, &parsed.spec, &params, &parsed.weights, StoredDtype::Bf16).unwrap();
    fs::write(folder.join("generation_config.json"), "{ \"odd\":   \"spacing\" }").unwrap();
    fs::write(folder.join("tokenizer_config.json"), "{}").unwrap();
    fs::write(folder.join("pytorch_model.bin"), "other weights, not read").unwrap();
}

fn logits(decoder: &Decoder) -> Vec<f32> {
    let ids = (0..24).map(|i| (i * i + 3) % 50).collect();
    let hidden = decoder.hidden(&Tokens::rows(ids, 12), &mut NoTap).unwrap();
    decoder.logits(&hidden).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn request(stage: Stage) -> SurgeryRequest {
    SurgeryRequest { stage, ..SurgeryRequest::default() }
}

/// Surgery, and its result opened.
fn operate(from: &Path, to: PathBuf, request: &SurgeryRequest) -> (Report, Checkpoint) {
    let report = surgery(&Checkpoint::open(from).unwrap(), request, &to, &Silent).unwrap();
    (report, Checkpoint::open(&to).unwrap())
}

fn same_bytes(a: &Path, b: &Path, name: &str) {
    assert_eq!(fs::read(a.join(name)).unwrap(), fs::read(b.join(name)).unwrap(), "{name}");
}

#[test]
fn a_folder_after_surgery_is_the_model_of_surgery_in_memory() {
    let dir = tempfile::tempdir().unwrap();
    for (name, config) in configs() {
        let from = dir.path().join(name);
        make(&from, &config);
        let source = Checkpoint::open(&from).unwrap();
        let shifted = SurgeryRequest { shift: Shift::Fixed(0.25), ..request(Stage::Two) };
        for (kind, request) in
            [("s1", request(Stage::One)), ("s2", request(Stage::Two)), ("shifted", shifted)]
        {
            let plan = request.plan(&source.config().spec).unwrap();
            let expected = source.load_with(&Device::Cpu, &plan).unwrap();
            let to = dir.path().join(format!("{name}-{kind}"));
            let (report, made) = operate(&from, to.clone(), &request);
            assert_eq!(made.config().spec, *expected.spec(), "{name} {kind}");
            let found = logits(&made.load(&Device::Cpu).unwrap());
            assert_eq!(found, logits(&expected), "{name} {kind}");
            assert!(found != logits(&source.load(&Device::Cpu).unwrap()) || !report.changed);

            assert_eq!(report.remote_code, kind != "s1", "{name}");
            assert_eq!(to.join("modeling_relu.py").exists(), kind != "s1", "{name}");
            let model_type = made.config().json["model_type"].as_str().unwrap().to_owned();
            assert_eq!(model_type.starts_with("relu_"), kind != "s1", "{name}");
            for file in ["model.safetensors", "generation_config.json", "tokenizer_config.json"] {
                same_bytes(&from, &to, file);
            }
            assert!(!to.join("pytorch_model.bin").exists());
            let before: Vec<&String> = source.config().json.keys().collect();
            let after: Vec<&String> = made.config().json.keys().collect();
            assert_eq!(after[..before.len()], before, "{name} {kind}: order of keys");
        }
    }
}

#[test]
fn surgery_with_nothing_to_change_is_the_identity() {
    let dir = tempfile::tempdir().unwrap();
    for (name, config) in configs() {
        let from = dir.path().join(name);
        make(&from, &config);
        let dense = logits(&Checkpoint::open(&from).unwrap().load(&Device::Cpu).unwrap());
        let stage = if name == "opt" { Stage::One } else { Stage::Dense };
        let (report, made) =
            operate(&from, dir.path().join(format!("{name}-same")), &request(stage));
        assert!(!report.changed);
        assert_eq!(logits(&made.load(&Device::Cpu).unwrap()), dense, "{name}");
        same_bytes(&from, made.dir(), "model.safetensors");
        if stage == Stage::Dense {
            same_bytes(&from, made.dir(), "config.json");
        } else {
            // OPT is born ReLU: only the record is added.
            let mut json = made.config().json.clone();
            let block = json.shift_remove("relufication").unwrap();
            assert_eq!(Value::Object(json), config);
            assert_eq!(block["stage"], 1);
        }
    }
}

#[test]
fn stage_2_of_a_stage_1_folder_is_stage_2_of_the_source() {
    let dir = tempfile::tempdir().unwrap();
    for (name, config) in configs() {
        let from = dir.path().join(name);
        make(&from, &config);
        let at = |kind: &str| dir.path().join(format!("{name}-{kind}"));
        let first = SurgeryRequest { shift: Shift::Fixed(0.1), ..request(Stage::One) };
        let both = SurgeryRequest { shift: Shift::Fixed(0.1), ..request(Stage::Two) };
        operate(&from, at("s1"), &first);
        let (report, steps) = operate(&at("s1"), at("s1-s2"), &request(Stage::Two));
        let (direct, at_once) = operate(&from, at("s2"), &both);
        assert_eq!(steps.config().spec, at_once.config().spec, "{name}");
        let shifted = Activation::ShiftedRelu { shift: 0.1 };
        assert_eq!(steps.config().spec.layers[1].mlp.activation, shifted, "{name}");
        assert_eq!(report.relufication.unwrap().source, direct.relufication.unwrap().source);
        // And stage 1 takes nothing back.
        let (_, back) = operate(&at("s2"), at("s2-s1"), &request(Stage::One));
        assert_eq!(back.config().spec, at_once.config().spec, "{name}");
    }
}

#[test]
fn the_record_says_what_was_converted() {
    let dir = tempfile::tempdir().unwrap();
    let from = dir.path().join("donor");
    make(&from, &configs()[0].1);
    let sites = Some(vec![Site::QkvIn]);
    let (report, made) =
        operate(&from, dir.path().join("out"), &SurgeryRequest { sites, ..request(Stage::Two) });
    let block = report.relufication.unwrap();
    assert_eq!(made.config().relufication.as_ref(), Some(&block));
    assert_eq!((block.stage, block.base_model_type.as_str()), (Stage::Two, "llama"));
    assert_eq!((block.plan.activation, block.plan.up_in), (None, None));
    let source = block.source.unwrap();
    assert_eq!((source.model.as_str(), source.revision), ("donor", None));
    let hash = blake3::hash(&fs::read(from.join("model.safetensors")).unwrap());
    assert_eq!(source.weights_blake3, Some(hash.to_hex().to_string()));
    let card = fs::read_to_string(made.dir().join("README.md")).unwrap();
    assert!(card.contains("# donor, relufied") && card.contains("trust_remote_code=True"));
    assert!(!card.contains("base_model:"));
}

#[test]
fn a_tokenizer_that_only_the_model_type_named_keeps_its_class() {
    let dir = tempfile::tempdir().unwrap();
    let gpt2 = &configs().into_iter().find(|(name, _)| *name == "gpt2").unwrap().1;
    for (n, (files, expected)) in [
        (vec![], None),
        (vec![("tokenizer.json", "{}")], Some("GPT2Tokenizer")),
        (
            vec![
                ("tokenizer.json", "{}"),
                ("tokenizer_config.json", r#"{"tokenizer_class": "X"}"#),
            ],
            None,
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let from = dir.path().join(format!("donor-{n}"));
        make(&from, gpt2);
        for (file, text) in files {
            fs::write(from.join(file), text).unwrap();
        }
        let (_, made) = operate(&from, dir.path().join(format!("s2-{n}")), &request(Stage::Two));
        assert_eq!(made.config().json.get("tokenizer_class").and_then(Value::as_str), expected);
        let (_, made) = operate(&from, dir.path().join(format!("s1-{n}")), &request(Stage::One));
        assert_eq!(made.config().json.get("tokenizer_class"), None);
    }
}

#[cfg(unix)]
#[test]
fn weights_on_the_same_file_system_take_no_room() {
    use std::os::unix::fs::MetadataExt;
    let dir = tempfile::tempdir().unwrap();
    let from = dir.path().join("donor");
    make(&from, &configs()[0].1);
    let (report, made) = operate(&from, dir.path().join("out"), &request(Stage::One));
    let inode = |folder: &Path| fs::metadata(folder.join("model.safetensors")).unwrap().ino();
    let how = report.weights[0].1;
    assert_ne!(how, Linked::Copy);
    assert_eq!(how == Linked::HardLink, inode(&from) == inode(made.dir()));
}

#[test]
fn shards_travel_with_their_index() {
    let dir = tempfile::tempdir().unwrap();
    let from = dir.path().join("donor");
    make(&from, &configs()[0].1);
    let bytes = fs::read(from.join("model.safetensors")).unwrap();
    let all = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut weight_map = serde_json::Map::new();
    for shard in 0..2 {
        let file = format!("model-{:05}-of-00002.safetensors", shard + 1);
        let part: Vec<_> =
            all.tensors().into_iter().enumerate().filter(|(i, _)| i % 2 == shard).collect();
        weight_map.extend(part.iter().map(|(_, (name, _))| (name.clone(), json!(file))));
        let views = part.into_iter().map(|(_, pair)| pair);
        safetensors::serialize_to_file(views, None, &from.join(file)).unwrap();
    }
    fs::remove_file(from.join("model.safetensors")).unwrap();
    let index = json!({"metadata": {"total_size": 1}, "weight_map": weight_map});
    fs::write(from.join("model.safetensors.index.json"), index.to_string()).unwrap();

    let (report, made) = operate(&from, dir.path().join("out"), &request(Stage::One));
    assert_eq!(report.weights.len(), 2);
    same_bytes(&from, made.dir(), "model.safetensors.index.json");
    let expected = request(Stage::One).plan(&made.config().spec).unwrap();
    let source = Checkpoint::open(&from).unwrap().load_with(&Device::Cpu, &expected).unwrap();
    assert_eq!(logits(&made.load(&Device::Cpu).unwrap()), logits(&source));
}

#[test]
fn an_output_that_exists_stays_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("donor"), dir.path().join("out"));
    make(&from, &configs()[0].1);
    fs::create_dir(&to).unwrap();
    fs::write(to.join("mine"), "mine").unwrap();
    let source = Checkpoint::open(&from).unwrap();
    assert!(surgery(&source, &request(Stage::One), &to, &Silent).is_err());
    // A request that makes no sense leaves nothing behind either.
    let bad = SurgeryRequest { sites: Some(vec![Site::UpIn]), ..request(Stage::One) };
    assert!(surgery(&source, &bad, &dir.path().join("new"), &Silent).is_err());
    let names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names.len(), 2, "{names:?}");
    assert_eq!(fs::read_dir(&to).unwrap().count(), 1);
}
