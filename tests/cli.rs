//! The program as a person uses it: help, inspect, surgery, probe, generate, and the forms
//! in which checkpoints come.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod support;

use std::fs;

use half::{bf16, f16};
use serde_json::{Value, json};
use support::{Lab, Weights, tokenizer};

#[test]
fn every_command_has_help_with_an_example() {
    let lab = Lab::new();
    let help = lab.succeed(&["--help"]);
    assert!(help.contains("Exit codes: 0 success, 1 failure, 2 bad input, 130 interrupted."));
    let (_, commands) = help.split_once("Commands:\n").unwrap();
    let (commands, _) = commands.split_once("\n\n").unwrap();
    let names: Vec<&str> = commands
        .lines()
        .filter(|line| line.starts_with("  ") && !line.starts_with("   "))
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| *name != "help")
        .collect();
    for known in
        ["inspect", "surgery", "calibrate", "init", "train", "eval", "table", "generate", "probe"]
    {
        assert!(names.contains(&known), "{known} is not in {names:?}");
    }
    for name in names {
        let verbs: &[&str] = match name {
            "bench" => &["train", "prefill", "prompt", "decode"],
            "cache" => &["", "list", "clean"],
            _ => &[""],
        };
        for verb in verbs {
            let args: Vec<&str> = [name, verb].into_iter().filter(|arg| !arg.is_empty()).collect();
            let command = format!("relufy {}", args.join(" "));
            let help = lab.succeed(&[&args[..], &["--help"]].concat());
            assert!(help.contains(&format!("Usage: {command}")), "{command}: {help}");
            let (_, examples) = help.split_once("Example").unwrap();
            assert!(examples.contains(&command), "{command}: {help}");
        }
    }
    assert!(lab.succeed(&["--version"]).starts_with("relufy "));
}

#[test]
fn inspect_says_what_a_model_is() {
    let lab = Lab::new();
    insta::assert_snapshot!("inspect", lab.succeed(&["inspect", "model"]));
    let report: Value =
        serde_json::from_str(&lab.succeed(&["inspect", "model", "--json"])).unwrap();
    let stored = Weights::read(&lab.read("model/model.safetensors"));
    let parameters: usize =
        stored.names().iter().map(|name| stored.shape(name).iter().product::<usize>()).sum();
    assert_eq!(report["parameters"], json!(parameters));
    assert_eq!(report["family"], "llama");
    assert_eq!(report["stage"], 0);
    assert_eq!(report["tokenizer"]["tokens"], 14);
    // Two layers of q, k, v, o (k and v have half the heads) and three matrices of the MLP.
    let blocks = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48);
    assert_eq!(report["flops"]["blocks"].as_f64(), Some(f64::from(blocks)));
    assert_eq!(report["flops"]["with_head"].as_f64(), Some(f64::from(blocks + 32 * 16)));
}

/// What a probe of `model` writes.
fn probe(lab: &Lab, model: &str, more: &[&str]) -> Vec<u8> {
    let args = ["probe", model, "--input-ids", "ids.json", "-o", "probe.safetensors"];
    lab.succeed(&[&args[..], more].concat());
    lab.read("probe.safetensors")
}

#[test]
fn surgery_on_disk_is_surgery_in_memory() {
    let lab = Lab::new();
    let grad =
        ["--grad", "model.embed_tokens.weight", "--grad", "model.layers.0.mlp.down_proj.weight"];
    let mut seen = vec![probe(&lab, "model", &grad)];
    for stage in ["1", "2"] {
        let folder = format!("s{stage}");
        lab.succeed(&["surgery", "model", "--stage", stage, "-o", &folder]);
        let exported = probe(&lab, &folder, &grad);
        assert!(exported == probe(&lab, "model", &[&grad[..], &["--stage", stage]].concat()));
        for file in ["model.safetensors", "tokenizer.json"] {
            assert!(lab.read(&format!("{folder}/{file}")) == lab.read(&format!("model/{file}")));
        }
        assert!(!seen.contains(&exported), "stage {stage} changed nothing");
        seen.push(exported);
    }
    lab.succeed(&["surgery", "model", "--stage", "0", "-o", "s0"]);
    assert!(probe(&lab, "s0", &grad) == seen[0], "nothing to change is the identity");

    let probed = Weights::read(&seen[2]);
    assert_eq!(probed.shape("logits"), [2, 4, 16]);
    assert_eq!(probed.shape("grad.model.embed_tokens.weight"), [16, 32]);
    for site in ["density.qkv", "density.up", "density.down"] {
        let densities = probed.values(site);
        assert!(
            densities.len() == 2 && densities.iter().all(|d| (0.2..0.8).contains(d)),
            "{densities:?}"
        );
    }
}

#[test]
fn the_same_gradient_asked_twice_is_one() {
    let lab = Lab::new();
    let one = probe(&lab, "model", &["--grad", "model.norm.weight"]);
    assert!(
        probe(&lab, "model", &["--grad", "model.norm.weight", "--grad", "model.norm.weight"])
            == one
    );
}

#[test]
fn greedy_text_is_what_whole_passes_predict() {
    let lab = Lab::new();
    // Every row of the embedding gets a word, and nothing is left out of the text.
    let mut words = tokenizer(2);
    words["added_tokens"] = json!([]);
    lab.write("model/tokenizer.json", words.to_string());
    let ids = words["model"]["vocab"].as_object().unwrap();
    let generate = |count: &str| {
        lab.succeed(&["generate", "model", "--prompt", "the cat", "-n", count, "--no-echo"])
    };
    let made = generate("40");
    assert_eq!(made, generate("40"));
    let tokens: Vec<u64> = "the cat"
        .split_whitespace()
        .chain(made.split_whitespace())
        .map(|word| ids[word].as_u64().unwrap())
        .collect();
    assert_eq!(tokens.len(), 42);
    lab.write("ids.json", json!([tokens]).to_string());
    let logits = Weights::read(&probe(&lab, "model", &[])).values("logits");
    for (n, row) in logits.chunks(16).enumerate().skip(1).take(40) {
        let best = (0..16).max_by(|a, b| row[*a].total_cmp(&row[*b])).unwrap();
        assert_eq!(best as u64, tokens[n + 1], "token {}", n + 1);
    }
    // Text ends where the positions end.
    assert_eq!(generate("500").split_whitespace().count(), 62);
    let seeded = |seed: &str| {
        let args = ["generate", "model", "--prompt", "the", "--temperature", "1", "--seed", seed];
        lab.succeed(&args)
    };
    assert_eq!(seeded("1"), seeded("1"));
    assert_ne!(seeded("1"), seeded("2"));
}

#[test]
fn half_precision_shards_and_names_without_prefix_are_the_same_model() {
    let lab = Lab::new();
    for dtype in ["bf16", "f16"] {
        let folder = format!("model-{dtype}");
        lab.succeed(&["init", "llama.json", "--dtype", dtype, "-o", &folder]);
        let expected = probe(&lab, &folder, &[]);
        let stored = Weights::read(&lab.read(&format!("{folder}/model.safetensors")));

        // The same numbers as f32, in two files, with and without `model.` before the names.
        for prefix in ["model.", ""] {
            let wide = format!("wide-{dtype}{prefix}");
            lab.copy(&folder, &wide);
            fs::remove_file(lab.path(&format!("{wide}/model.safetensors"))).unwrap();
            let files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
            let mut shards = [Weights::empty(), Weights::empty()];
            let mut map = serde_json::Map::new();
            for (n, name) in stored.names().iter().enumerate() {
                let bits =
                    stored.bytes_of(name).chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
                let values = bits.map(|bits| match dtype {
                    "bf16" => bf16::from_bits(bits).to_f32(),
                    _ => f16::from_bits(bits).to_f32(),
                });
                let bytes: Vec<u8> = values.flat_map(f32::to_le_bytes).collect();
                let name_there = match name.strip_prefix("model.") {
                    Some(bare) => format!("{prefix}{bare}"),
                    None => name.clone(),
                };
                shards[n % 2].add(&name_there, "F32", &stored.shape(name), &bytes);
                map.insert(name_there, files[n % 2].into());
            }
            for (file, shard) in files.iter().zip(&shards) {
                lab.write(&format!("{wide}/{file}"), shard.bytes());
            }
            let index = json!({"metadata": {}, "weight_map": map}).to_string();
            lab.write(&format!("{wide}/model.safetensors.index.json"), index);
            assert!(probe(&lab, &wide, &[]) == expected, "{wide}");
        }
    }
}

/// `tests/data/pickle` holds one model three times: `model.safetensors`, and as `torch.save`
/// wrote it in f32 (one tensor transposed in place, two as views of one storage) and bf16.
#[test]
fn pickles_are_the_same_model() {
    let lab = Lab::new();
    let config = include_str!("data/pickle/config.json");
    let files: [(&str, &str, &[u8]); 3] = [
        ("safetensors", "model.safetensors", include_bytes!("data/pickle/model.safetensors")),
        ("f32", "pytorch_model.bin", include_bytes!("data/pickle/f32.bin")),
        ("bf16", "pytorch_model.bin", include_bytes!("data/pickle/bf16.bin")),
    ];
    let probed = files.map(|(folder, file, bytes)| {
        lab.write(&format!("{folder}/config.json"), config);
        lab.write(&format!("{folder}/{file}"), bytes);
        probe(&lab, folder, &["--grad", "model.layers.0.self_attn.o_proj.weight"])
    });
    assert!(probed[0] == probed[1], "f32 differs");
    assert!(probed[0] == probed[2], "bf16 differs");
}

#[test]
#[cfg_attr(not(relufy_shared), ignore = "needs the shared checkpoints: set RELUFY_SHARED")]
fn real_checkpoints_tell_stories() {
    let Some(shared) = option_env!("RELUFY_SHARED_DIR") else { return };
    let lab = Lab::new();
    for model in ["stories3M", "TinyStories-656K", "stories260K"] {
        let folder = format!("{shared}/data/checkpoints/{model}");
        let told = lab.succeed(&["generate", &folder, "--prompt", "Once upon a time", "-n", "40"]);
        assert!(told.starts_with("Once upon a time"), "{model}: {told}");
        let plain =
            ["there", "was", "a", "little", "girl", "named", "to", "the", "and", "She", "in"];
        let known = told.split_whitespace().filter(|word| plain.contains(word)).count();
        assert!(known >= 8, "{model}: {told}");
    }
}
