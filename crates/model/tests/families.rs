//! What must hold for every family whatever its shape: saving and loading gives the same
//! bytes, and a KV cache the same hidden states.

#![allow(clippy::unwrap_used)] // a failed unwrap is the failed test

use std::path::Path;

use candle_core::{Device, Tensor};
use proptest::prelude::*;
use relufy_model::checkpoint::{save_weights, write_config};
use relufy_model::{Checkpoint, Decoder, Init, KvCache, NoTap, Params, StoredDtype, Tokens};
use relufy_spec::family::{self, ModelConfig};
use serde_json::{Value, json};

/// A small config of each layout of weights that families use.
fn config(kind: usize, groups: usize, queries: usize, dim: usize, layers: usize) -> ModelConfig {
    let heads = groups * queries;
    let (hidden, vocab) = (heads * dim, 40);
    let json: Value = match kind {
        0 => json!({"model_type": "llama", "hidden_size": hidden, "intermediate_size": 24,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": groups,
            "vocab_size": vocab, "max_position_embeddings": 64, "hidden_act": "silu", "rms_norm_eps": 1e-5}),
        1 => {
            json!({"model_type": "qwen3", "hidden_size": hidden, "intermediate_size": 24, "head_dim": dim,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": groups,
            "vocab_size": vocab, "max_position_embeddings": 64, "hidden_act": "silu", "rms_norm_eps": 1e-6,
            "tie_word_embeddings": true})
        }
        2 => {
            json!({"model_type": "opt", "hidden_size": hidden, "ffn_dim": 20, "num_hidden_layers": layers,
            "num_attention_heads": heads, "vocab_size": vocab, "max_position_embeddings": 64,
            "word_embed_proj_dim": hidden, "activation_function": "relu", "do_layer_norm_before": true})
        }
        3 => json!({"model_type": "falcon", "hidden_size": hidden, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_kv_heads": groups, "vocab_size": vocab,
            "new_decoder_architecture": true, "parallel_attn": true, "bias": false, "alibi": false}),
        4 => json!({"model_type": "falcon", "hidden_size": hidden, "num_hidden_layers": layers,
            "num_attention_heads": heads, "vocab_size": vocab, "new_decoder_architecture": false,
            "multi_query": false, "parallel_attn": false, "bias": true, "alibi": true}),
        5 => json!({"model_type": "gpt_neox", "hidden_size": hidden, "intermediate_size": 20,
            "num_hidden_layers": layers, "num_attention_heads": heads, "vocab_size": vocab,
            "max_position_embeddings": 64, "hidden_act": "gelu", "rotary_pct": 0.5, "rotary_emb_base": 10000,
            "use_parallel_residual": true, "tie_word_embeddings": false}),
        6 => {
            json!({"model_type": "gpt2", "n_embd": hidden, "n_layer": layers, "n_head": heads, "n_positions": 64,
            "vocab_size": vocab, "activation_function": "gelu_new"})
        }
        _ => json!({"model_type": "mistral", "hidden_size": hidden, "intermediate_size": 24,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": groups,
            "vocab_size": vocab, "max_position_embeddings": 64, "hidden_act": "silu", "rms_norm_eps": 1e-5,
            "sliding_window": 5}),
    };
    family::parse(&json).unwrap()
}

const KINDS: usize = 8;

fn random(config: &ModelConfig, seed: u64) -> Params {
    let init = Init { std: 0.3, scale_residual: false, seed };
    Params::random(&config.spec, &init, &Device::Cpu).unwrap()
}

fn write(dir: &Path, config: &ModelConfig, params: &Params, dtype: StoredDtype) {
    write_config(dir, &config.json).unwrap();
    save_weights(dir, &config.spec, params, &config.weights, dtype).unwrap();
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// The weight map read one way and then the other is the identity, byte for byte.
    #[test]
    fn saving_what_was_loaded_gives_the_same_bytes(
        kind in 0..KINDS, groups in 1usize..4, queries in 1usize..4, half in 1usize..5,
        layers in 1usize..3, seed in any::<u64>(), half_precision in any::<bool>(),
    ) {
        // Rotary pairs of half a head: dimensions in fours.
        let config = config(kind, groups, queries, 4 * half, layers);
        let dtype = if half_precision { StoredDtype::Bf16 } else { StoredDtype::F32 };
        let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        write(first.path(), &config, &random(&config, seed), dtype);

        let checkpoint = Checkpoint::open(first.path()).unwrap();
        prop_assert_eq!(checkpoint.stored_dtype(), dtype);
        let decoder = checkpoint.load(&Device::Cpu).unwrap();
        write(second.path(), checkpoint.config(), decoder.params(), dtype);

        let bytes = |dir: &Path| std::fs::read(dir.join("model.safetensors")).unwrap();
        prop_assert_eq!(bytes(first.path()), bytes(second.path()));
    }

    /// Tokens in pieces through the cache, several sequences side by side, see what they
    /// would see at once.
    #[test]
    fn a_cache_changes_no_hidden_state(
        kind in 0..KINDS, seed in any::<u64>(), cuts in prop::collection::vec(1usize..6, 1..5),
    ) {
        let config = config(kind, 2, 2, 8, 2);
        let decoder = Decoder::new(config.spec.clone(), random(&config, seed)).unwrap();
        let total: usize = cuts.iter().sum();
        let ids: Vec<u32> = (0..2 * total as u32).map(|i| (i * 7 + seed as u32 % 11) % 40).collect();
        let whole = values(&decoder.hidden(&Tokens::rows(ids.clone(), total), &mut NoTap).unwrap());

        let mut cache = KvCache::new(&decoder, 2, total).unwrap();
        let hidden = config.spec.hidden;
        let mut start = 0;
        for cut in cuts {
            let (a, b) = (&ids[start..start + cut], &ids[total + start..total + start + cut]);
            // A wrong guess first: truncating must forget it.
            let wrong = cache.extend(&[(0, &[1, 2][..cut.min(2)])]).unwrap();
            decoder.hidden_cached(&wrong, &mut cache, &mut NoTap).unwrap();
            cache.truncate(0, start);
            let tokens = cache.extend(&[(1, b), (0, a)]).unwrap();
            let seen = values(&decoder.hidden_cached(&tokens, &mut cache, &mut NoTap).unwrap());
            let expected = [total + start, start].map(|row| &whole[row * hidden..(row + cut) * hidden]).concat();
            for (seen, expected) in seen.iter().zip(&expected) {
                prop_assert!((seen - expected).abs() < 2e-5, "{} against {}", seen, expected);
            }
            start += cut;
        }
        prop_assert_eq!((cache.len(0), cache.len(1)), (total, total));
        prop_assert!(cache.extend(&[(0, &[1])]).is_err());
    }
}

#[test]
fn a_cache_refuses_what_it_cannot_hold() {
    let config = config(0, 2, 1, 8, 1);
    let decoder = Decoder::new(config.spec.clone(), random(&config, 1)).unwrap();
    assert!(KvCache::new(&decoder, 1, 65).is_err(), "more than the model's positions");
    let mut cache = KvCache::new(&decoder, 2, 4).unwrap();
    assert!(cache.extend(&[(2, &[1])]).is_err(), "no such sequence");
    assert!(cache.extend(&[(0, &[1]), (0, &[2])]).is_err(), "one sequence twice");
    assert!(cache.extend(&[(0, &[1, 2, 3, 4, 5])]).is_err(), "full");
    assert_eq!(cache.len(0), 0, "a refused extension leaves nothing behind");
    let tokens = cache.extend(&[(0, &[1, 2])]).unwrap();
    cache.extend(&[(0, &[3])]).unwrap();
    assert!(
        decoder.hidden_cached(&tokens, &mut cache, &mut NoTap).is_err(),
        "not what was announced"
    );
}

#[test]
fn tokens_outside_the_model_are_refused() {
    let config = config(2, 1, 2, 4, 1);
    let decoder = Decoder::new(config.spec.clone(), random(&config, 1)).unwrap();
    let refused = |ids: Vec<u32>, len| decoder.hidden(&Tokens::rows(ids, len), &mut NoTap).is_err();
    assert!(refused(vec![40], 1));
    assert!(refused(vec![1; 65], 65));
    assert!(!refused(vec![1; 65], 64));
}
