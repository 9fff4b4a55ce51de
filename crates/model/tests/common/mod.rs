//! Small models of every layout of weights and every kind of positions.

#![allow(clippy::unwrap_used)] // a failed unwrap is the failed test
#![allow(dead_code)] // no test program uses all of it

use candle_core::{Device, Tensor};
use relufy_model::{Decoder, Init, Params};
use relufy_spec::family::{self, ModelConfig};
use serde_json::{Value, json};

/// A small config of each layout of weights that families use.
pub fn config(
    kind: usize,
    groups: usize,
    queries: usize,
    dim: usize,
    layers: usize,
) -> ModelConfig {
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

pub const KINDS: usize = 8;

pub fn random(config: &ModelConfig, seed: u64) -> Params {
    let init = Init { std: 0.3, scale_residual: false, seed };
    Params::random(&config.spec, &init, &Device::Cpu).unwrap()
}

pub fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// A small model of a kind, with random weights.
pub fn decoder(kind: usize, seed: u64) -> Decoder {
    let config = config(kind, 2, 2, 8, 2);
    Decoder::new(config.spec.clone(), random(&config, seed)).unwrap()
}
