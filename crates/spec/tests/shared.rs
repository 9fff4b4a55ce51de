//! The configs of real checkpoints and of the goldens.

#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests

use std::{collections::BTreeMap, io::Read, path::PathBuf};

use relufy_spec::{
    Layout, ParallelNorms, Residual,
    family::{ModelConfig, parse},
};
use serde_json::Value;

fn shared() -> PathBuf {
    PathBuf::from(option_env!("RELUFY_SHARED_DIR").unwrap_or_default())
}

fn read(path: &str) -> ModelConfig {
    let text =
        std::fs::read_to_string(shared().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"));
    let json = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{path}: {e}"));
    parse(&json).unwrap_or_else(|e| panic!("{path}: {e}"))
}

#[test]
#[cfg_attr(not(relufy_shared), ignore = "needs the shared goldens: set RELUFY_SHARED")]
fn both_transformers_write_the_same_goldens() {
    for family in ["llama", "opt", "falcon7b", "gpt_neox", "gpt2"] {
        let v4 = read(&format!("golden/{family}/config.json"));
        let v5 = read(&format!("golden/{family}/config_v5.json"));
        assert_eq!(v4.spec, v5.spec, "{family}");
        assert_eq!(v4.weights, v5.weights, "{family}");
        assert_eq!((v4.family, v4.activation_key), (v5.family, v5.activation_key));
        assert_eq!((v4.spec.hidden, v4.spec.layers.len(), v4.spec.vocab), (64, 2, 288));
    }
}

/// A safetensors file's tensors: name and shape.
fn tensors(path: &str) -> BTreeMap<String, Vec<usize>> {
    let mut file = std::fs::File::open(shared().join(path)).unwrap();
    let mut length = [0; 8];
    file.read_exact(&mut length).unwrap();
    let mut header = vec![0; u64::from_le_bytes(length) as usize];
    file.read_exact(&mut header).unwrap();
    let header: serde_json::Map<String, Value> = serde_json::from_slice(&header).unwrap();
    let shape = |value: &Value| serde_json::from_value(value["shape"].clone()).unwrap();
    header
        .iter()
        .filter(|(name, _)| *name != "__metadata__")
        .map(|(name, value)| (name.clone(), shape(value)))
        .collect()
}

#[test]
#[cfg_attr(not(relufy_shared), ignore = "needs the shared goldens: set RELUFY_SHARED")]
fn weight_maps_name_the_files_tensors_and_their_shapes() {
    for folder in [
        "golden/llama",
        "golden/opt",
        "golden/falcon7b",
        "golden/gpt_neox",
        "golden/gpt2",
        "data/checkpoints/TinyStories-656K",
        "data/checkpoints/stories260K",
        "data/checkpoints/stories3M",
    ] {
        let model = read(&format!("{folder}/config.json"));
        let mut stored = tensors(&format!("{folder}/model.safetensors"));
        for row in &model.weights.rows {
            let shapes: Vec<_> = row.slots.iter().map(|slot| model.spec.shape(*slot)).collect();
            let mut shape = shapes[0].clone();
            shape[0] = shapes.iter().map(|shape| shape[0]).sum();
            if row.transposed {
                shape.reverse();
            }
            let bare = |name: &String| name.strip_prefix(&model.weights.prefix).map(str::to_owned);
            let found = row
                .names
                .iter()
                .find_map(|name| stored.remove(name).or_else(|| stored.remove(&bare(name)?)));
            assert_eq!(found, Some(shape), "{folder} {:?}", row.names);
            for name in &row.names {
                stored.remove(name);
            }
        }
        assert!(stored.is_empty(), "{folder}: {:?}", stored.keys());
    }
}

#[test]
#[cfg_attr(not(relufy_shared), ignore = "needs the shared goldens: set RELUFY_SHARED")]
fn falcon_40b_as_first_released() {
    let model = read("data/configs/falcon-40b/config.json");
    let layer = &model.spec.layers[0];
    assert_eq!(model.spec.layers.len(), 60);
    assert_eq!(layer.attention.kv_heads, 8);
    assert_eq!(layer.residual, Residual::Parallel { norms: ParallelNorms::Separate });
    assert_eq!(model.weights.rows[3].layout, Layout::PerGroup { queries: 16, head_dim: 64 });
    // The card says 40B.
    assert_eq!(model.spec.parameter_count() / 1_000_000_000, 41);
}
