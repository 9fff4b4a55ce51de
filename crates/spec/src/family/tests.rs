//! Tables of configs: what each family reads, and what it refuses.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::{ModelConfig, parse};
use crate::{
    Activation, Error, LayerSlot, Layout, MlpKind, ParallelNorms, Position, Residual, RopeScaling,
    SiteOp, Slot,
};

/// A small config of each kind of block.
fn small() -> Vec<(&'static str, Value)> {
    let rope = json!({"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 48, "vocab_size": 50, "max_position_embeddings": 64});
    let falcon = json!({"model_type": "falcon", "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "vocab_size": 50});
    vec![
        ("llama", with(&rope, json!({"model_type": "llama"}))),
        (
            "llama, biases, groups, tied",
            with(
                &rope,
                json!({"model_type": "llama", "attention_bias": true, "mlp_bias": true,
                    "num_key_value_heads": 2, "tie_word_embeddings": true}),
            ),
        ),
        ("mistral", with(&rope, json!({"model_type": "mistral", "num_key_value_heads": 2}))),
        ("qwen2", with(&rope, json!({"model_type": "qwen2", "num_key_value_heads": 2}))),
        (
            "qwen3",
            with(&rope, json!({"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 10})),
        ),
        (
            "opt",
            json!({"model_type": "opt", "hidden_size": 32, "num_hidden_layers": 2,
                "num_attention_heads": 4, "ffn_dim": 48, "vocab_size": 50}),
        ),
        (
            "opt without biases, untied",
            json!({"model_type": "opt", "hidden_size": 32, "num_hidden_layers": 2,
                "num_attention_heads": 4, "ffn_dim": 48, "vocab_size": 50, "enable_bias": false,
                "tie_word_embeddings": false}),
        ),
        ("falcon 7B", falcon.clone()),
        ("falcon 40B", with(&falcon, json!({"new_decoder_architecture": true, "num_kv_heads": 2}))),
        (
            "falcon 11B",
            with(
                &falcon,
                json!({"new_decoder_architecture": true, "num_kv_heads": 2,
                    "num_ln_in_parallel_attn": 1}),
            ),
        ),
        (
            "falcon RW",
            with(
                &falcon,
                json!({"alibi": true, "bias": true, "multi_query": false, "parallel_attn": false}),
            ),
        ),
        (
            "falcon, multi-query, sequential",
            with(&falcon, json!({"parallel_attn": false, "tie_word_embeddings": false})),
        ),
        ("gpt_neox", with(&rope, json!({"model_type": "gpt_neox", "rotary_pct": 0.5}))),
        (
            "gpt_neox, sequential, no attention bias",
            with(
                &rope,
                json!({"model_type": "gpt_neox", "use_parallel_residual": false,
                    "attention_bias": false}),
            ),
        ),
        (
            "gpt2",
            json!({"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4,
                "n_positions": 64, "vocab_size": 50}),
        ),
    ]
}

/// `base` with the keys of `more`.
fn with(base: &Value, more: Value) -> Value {
    let mut map = base.as_object().unwrap().clone();
    map.extend(more.as_object().unwrap().clone());
    Value::Object(map)
}

fn small_of(name: &str) -> Value {
    small().into_iter().find(|(kind, _)| *kind == name).unwrap().1
}

fn ok(config: &Value) -> ModelConfig {
    parse(config).unwrap_or_else(|error| panic!("{error}\n{config}"))
}

fn refused(config: &Value) -> String {
    match parse(config) {
        Ok(_) => panic!("accepted: {config}"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn every_slot_stands_in_exactly_one_row() {
    for (kind, config) in small() {
        let model = ok(&config);
        let mut seen = Vec::new();
        for row in &model.weights.rows {
            assert!(!row.names.is_empty() && !row.slots.is_empty());
            seen.extend(row.slots.iter().copied());
        }
        let unique: BTreeSet<Slot> = seen.iter().copied().collect();
        assert_eq!(unique.len(), seen.len(), "{kind}: a slot stands twice");
        assert_eq!(unique, model.spec.slots().into_iter().collect(), "{kind}");
        let names: BTreeSet<&String> =
            model.weights.rows.iter().flat_map(|row| &row.names).collect();
        let rows: usize = model.weights.rows.iter().map(|row| row.names.len()).sum();
        assert_eq!(names.len(), rows, "{kind}: a name stands twice");
    }
}

#[test]
fn stored_rows_are_the_slots_rows_each_once() {
    for (kind, config) in small() {
        let model = ok(&config);
        for row in &model.weights.rows {
            let rows: Vec<usize> =
                row.slots.iter().map(|slot| model.spec.shape(*slot)[0]).collect();
            let order = row.row_order(&rows);
            let unique: BTreeSet<_> = order.iter().copied().collect();
            assert_eq!(order.len(), rows.iter().sum::<usize>(), "{kind} {:?}", row.names);
            assert_eq!(unique.len(), order.len(), "{kind} {:?}", row.names);
            assert!(order.iter().all(|(slot, at)| *at < rows[*slot]), "{kind} {:?}", row.names);
        }
    }
}

#[test]
fn tensor_names() {
    let name = |kind: &str, slot: Slot| {
        let model = ok(&small_of(kind));
        model.weights.row_of(slot).map(|(row, _)| row.names.join(" or "))
    };
    use LayerSlot::*;
    for (kind, slot, expected) in [
        ("llama", Slot::Embed, Some("model.embed_tokens.weight")),
        ("llama", Slot::Head, Some("lm_head.weight")),
        ("llama", Slot::Layer(1, Gate), Some("model.layers.1.mlp.gate_proj.weight")),
        ("llama", Slot::Layer(1, QBias), None),
        (
            "llama, biases, groups, tied",
            Slot::Embed,
            Some("model.embed_tokens.weight or lm_head.weight"),
        ),
        (
            "llama, biases, groups, tied",
            Slot::Layer(0, UpBias),
            Some("model.layers.0.mlp.up_proj.bias"),
        ),
        ("qwen2", Slot::Layer(0, OBias), None),
        ("qwen2", Slot::Layer(0, VBias), Some("model.layers.0.self_attn.v_proj.bias")),
        ("qwen3", Slot::Layer(0, KNorm), Some("model.layers.0.self_attn.k_norm.weight")),
        ("opt", Slot::Positions, Some("model.decoder.embed_positions.weight")),
        ("opt", Slot::FinalNormBias, Some("model.decoder.final_layer_norm.bias")),
        ("opt", Slot::Layer(0, MlpNorm), Some("model.decoder.layers.0.final_layer_norm.weight")),
        (
            "falcon 7B",
            Slot::Layer(0, V),
            Some("transformer.h.0.self_attention.query_key_value.weight"),
        ),
        ("falcon 7B", Slot::Layer(0, AttnNorm), Some("transformer.h.0.input_layernorm.weight")),
        ("falcon 7B", Slot::Layer(0, MlpNorm), None),
        ("falcon 40B", Slot::Layer(0, AttnNorm), Some("transformer.h.0.ln_attn.weight")),
        ("falcon 40B", Slot::Layer(0, MlpNorm), Some("transformer.h.0.ln_mlp.weight")),
        ("falcon 11B", Slot::Layer(0, AttnNorm), Some("transformer.h.0.input_layernorm.weight")),
        ("falcon 11B", Slot::Layer(0, MlpNorm), None),
        (
            "falcon RW",
            Slot::Layer(0, MlpNorm),
            Some("transformer.h.0.post_attention_layernorm.weight"),
        ),
        ("gpt_neox", Slot::Head, Some("embed_out.weight or lm_head.weight")),
        ("gpt_neox", Slot::Layer(1, Down), Some("gpt_neox.layers.1.mlp.dense_4h_to_h.weight")),
        ("gpt2", Slot::Layer(1, K), Some("transformer.h.1.attn.c_attn.weight")),
        ("gpt2", Slot::Embed, Some("transformer.wte.weight or lm_head.weight")),
    ] {
        assert_eq!(name(kind, slot).as_deref(), expected, "{kind} {slot}");
    }
}

#[test]
fn layouts() {
    let layout = |kind: &str, slot| {
        let model = ok(&small_of(kind));
        let (row, _) = model.weights.row_of(Slot::Layer(0, slot)).unwrap();
        (row.layout, row.transposed)
    };
    use LayerSlot::*;
    for (kind, slot, expected) in [
        ("llama", Q, (Layout::Concat, false)),
        ("falcon 7B", Q, (Layout::Concat, false)),
        ("falcon 40B", Q, (Layout::PerGroup { queries: 2, head_dim: 8 }, false)),
        ("falcon RW", QBias, (Layout::PerHead { head_dim: 8 }, false)),
        ("gpt_neox", K, (Layout::PerHead { head_dim: 8 }, false)),
        ("gpt2", Q, (Layout::Concat, true)),
        ("gpt2", QBias, (Layout::Concat, false)),
        ("gpt2", AttnNorm, (Layout::Concat, false)),
    ] {
        assert_eq!(layout(kind, slot), expected, "{kind} {slot:?}");
    }
}

#[test]
fn absent_keys_have_transformers_defaults() {
    for (model_type, parameters) in [
        ("llama", 6_738_415_616),
        ("mistral", 7_241_732_096),
        ("opt", 125_239_296),
        ("falcon", 6_921_720_704),
        ("gpt_neox", 20_554_567_680),
        ("gpt2", 124_439_808),
    ] {
        let model = ok(&json!({"model_type": model_type}));
        assert_eq!(model.spec.parameter_count(), parameters, "{model_type}");
    }
    let qwen3 = ok(&json!({"model_type": "qwen3"})).spec;
    assert_eq!((qwen3.layers[0].attention.kv_heads, qwen3.max_positions), (32, 32_768));
    // An explicit null is not an absent key here: Mistral's class then takes all heads.
    let mistral = ok(&json!({"model_type": "mistral", "num_key_value_heads": null}));
    assert_eq!(mistral.spec.layers[0].attention.kv_heads, 32);
}

#[test]
fn spellings_of_both_transformers_mean_the_same() {
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 32});
    for (kind, old, new) in [
        (
            "llama",
            json!({"rope_theta": 5e5, "rope_scaling": null, "torch_dtype": "bfloat16"}),
            json!({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"},
                "dtype": "bfloat16", "head_dim": 8, "pad_token_id": null}),
        ),
        (
            "llama",
            json!({"rope_theta": 5e5, "rope_scaling": llama3}),
            json!({"rope_parameters": with(&llama3, json!({"rope_theta": 5e5}))}),
        ),
        (
            "llama",
            json!({"rope_scaling": {"type": "linear", "factor": 2}}),
            json!({"rope_parameters":
                {"rope_theta": 10000, "rope_type": "linear", "factor": 2.0}}),
        ),
        (
            "mistral",
            json!({"sliding_window": null}),
            json!({"sliding_window": null, "layer_types": ["full_attention", "full_attention"],
                "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}),
        ),
        (
            "qwen2",
            json!({"use_sliding_window": true, "sliding_window": 16, "max_window_layers": 1}),
            json!({"use_sliding_window": true, "sliding_window": 16, "max_window_layers": 1,
                "layer_types": ["full_attention", "sliding_attention"]}),
        ),
        (
            "gpt_neox",
            json!({"rotary_pct": 0.5, "rotary_emb_base": 1000}),
            json!({"rotary_pct": null, "attention_bias": true, "is_decoder": false,
                "rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 1000,
                    "rope_type": "default"}}),
        ),
        (
            "falcon 7B",
            json!({"rope_theta": 10000.0}),
            json!({"num_kv_heads": 4, "ffn_hidden_size": 128, "activation": "gelu",
                "num_ln_in_parallel_attn": null,
                "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}),
        ),
        ("gpt2", json!({"n_ctx": 64}), json!({"hidden_size": 32, "n_inner": 128})),
    ] {
        let base = small_of(kind);
        let (old, new) = (ok(&with(&base, old)), ok(&with(&base, new)));
        assert_eq!(old.spec, new.spec, "{kind}");
        assert_eq!(old.weights, new.weights, "{kind}");
    }
}

#[test]
fn rope_scalings_are_read() {
    let scaling = |value: Value| match ok(&with(&small_of("llama"), json!({"rope_scaling": value})))
        .spec
        .position
    {
        Position::Rope { scaling, .. } => scaling,
        other => panic!("{other:?}"),
    };
    assert_eq!(
        scaling(json!({"type": "linear", "factor": 4.0})),
        RopeScaling::Linear { factor: 4.0 }
    );
    assert_eq!(
        scaling(json!({"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0})),
        RopeScaling::Llama3 {
            factor: 32.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_positions: 64
        }
    );
}

#[test]
fn windows_stand_where_transformers_applies_them() {
    let windows = |kind: &str, more: Value| -> Vec<Option<usize>> {
        let model = ok(&with(&small_of(kind), more));
        model.spec.layers.iter().map(|layer| layer.attention.window).collect()
    };
    for (kind, more, expected) in [
        ("mistral", json!({}), [Some(4096), Some(4096)]),
        ("mistral", json!({"sliding_window": 9}), [Some(9), Some(9)]),
        ("mistral", json!({"sliding_window": null}), [None, None]),
        ("qwen2", json!({"sliding_window": 9}), [None, None]),
        ("qwen2", json!({"sliding_window": 9, "use_sliding_window": true}), [None, None]),
        (
            "qwen3",
            json!({"sliding_window": 9, "use_sliding_window": true, "max_window_layers": 1}),
            [None, Some(9)],
        ),
        (
            "qwen3",
            json!({"sliding_window": 9, "use_sliding_window": true,
                "layer_types": ["sliding_attention", "full_attention"]}),
            [Some(9), None],
        ),
    ] {
        assert_eq!(windows(kind, more.clone()), expected, "{kind} {more}");
    }
}

#[test]
fn activations_by_their_names() {
    for (name, expected) in [
        ("silu", Activation::Silu),
        ("swish", Activation::Silu),
        ("gelu", Activation::Gelu),
        ("gelu_new", Activation::GeluTanh),
        ("gelu_fast", Activation::GeluTanh),
        ("gelu_pytorch_tanh", Activation::GeluTanh),
        ("quick_gelu", Activation::Swish { beta: 1.702 }),
        ("relu", Activation::Relu),
    ] {
        for kind in ["llama", "qwen3", "opt", "falcon 7B", "gpt_neox", "gpt2"] {
            let key = ok(&small_of(kind)).activation_key;
            let model = ok(&with(&small_of(kind), json!({key: name})));
            assert_eq!(model.spec.layers[1].mlp.activation, expected, "{kind} {name}");
        }
        let back = expected.hf_name().and_then(Activation::from_hf_name);
        assert_eq!(back, Some(expected));
    }
}

#[test]
fn prosparse_is_a_llama_with_its_own_activations() {
    let config =
        |more: Value| with(&small_of("llama"), with(&json!({"model_type": "sparsellama"}), more));
    for (more, expected) in [
        (
            json!({"hidden_act": "fatrelu", "hidden_act_param": 0.01}),
            Activation::FatRelu { threshold: 0.01 },
        ),
        (
            json!({"hidden_act": "shiftrelu", "hidden_act_param": 0.5}),
            Activation::ShiftedRelu { shift: 0.5 },
        ),
        (json!({"hidden_act": "relu", "hidden_act_param": 0.0}), Activation::Relu),
    ] {
        let model = ok(&config(more));
        assert_eq!(model.family, "llama");
        assert_eq!(model.spec.layers[0].mlp.activation, expected);
    }
    assert_eq!(
        refused(&config(json!({"hidden_act": "fatrelu"}))),
        "config key `hidden_act_param` is missing"
    );
}

#[test]
fn blocks_of_falcon() {
    let block = |config: &Value| {
        let model = ok(config);
        let layer = &model.spec.layers[0];
        (layer.attention.kv_heads, layer.residual, layer.attention.bias.qkv, model.spec.position)
    };
    let rope = ok(&small_of("falcon 7B")).spec.position;
    let parallel = |norms| Residual::Parallel { norms };
    let alibi = Position::Alibi { bf16_slopes: true, scaled: true };
    for (kind, kv_heads, residual, bias, position) in [
        ("falcon 7B", 1, parallel(ParallelNorms::Shared), false, &rope),
        ("falcon 40B", 2, parallel(ParallelNorms::Separate), false, &rope),
        ("falcon 11B", 2, parallel(ParallelNorms::Shared), false, &rope),
        ("falcon RW", 4, Residual::Sequential {}, true, &alibi),
        ("falcon, multi-query, sequential", 1, Residual::Sequential {}, false, &rope),
    ] {
        assert_eq!(block(&small_of(kind)), (kv_heads, residual, bias, position.clone()), "{kind}");
    }
}

#[test]
fn falcons_first_release_reads_the_same() {
    let old = |more: Value| {
        with(&json!({"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50}), more)
    };
    for (kind, config) in [
        (
            "falcon 7B",
            old(json!({"model_type": "RefinedWebModel", "multi_query": true,
                "parallel_attn": true, "alibi": false, "bias": false})),
        ),
        (
            "falcon 40B",
            old(json!({"model_type": "RefinedWeb", "n_head_kv": 2, "parallel_attn": true})),
        ),
        (
            "falcon RW",
            old(json!({"model_type": "RefinedWebModel", "multi_query": false,
                "parallel_attn": false, "alibi": true, "bias": true,
                "apply_residual_connection_post_layernorm": false})),
        ),
    ] {
        let (old, new) = (ok(&config), ok(&small_of(kind)));
        assert_eq!((old.family, &old.spec, &old.weights), ("falcon", &new.spec, &new.weights));
    }
    assert_eq!(
        refused(&old(json!({"model_type": "RefinedWebModel", "parallel_attn": true}))),
        "config key `multi_query` is missing"
    );
}

#[test]
fn gpt2_scales_by_layer() {
    let scales = |more: Value| -> Vec<f64> {
        let model = ok(&with(&small_of("gpt2"), more));
        model.spec.layers.iter().map(|layer| layer.attention.scale).collect()
    };
    let usual = 1.0 / 8f64.sqrt();
    assert_eq!(scales(json!({"reorder_and_upcast_attn": true})), [usual, usual]);
    assert_eq!(scales(json!({"scale_attn_by_inverse_layer_idx": true})), [usual, usual / 2.0]);
    assert_eq!(scales(json!({"scale_attn_weights": false})), [1.0, 1.0]);
}

#[test]
fn what_is_refused_is_named() {
    for (kind, more, says) in [
        ("llama", json!({"rope_scailng": {}}), "config keys nobody understands: rope_scailng"),
        (
            "llama",
            json!({"use_qk_norm": true, "a": 1}),
            "config keys nobody understands: a, use_qk_norm",
        ),
        ("llama", json!({"model_type": "mamba"}), "unknown architecture: model_type `mamba`"),
        ("llama", json!({"model_type": 7}), "config key `model_type`: expected a string, found 7"),
        ("llama", json!({"model_type": null}), "config key `model_type` is missing"),
        (
            "llama",
            json!({"hidden_act": "relu6"}),
            "not supported: activation `relu6` (config key `hidden_act`)",
        ),
        (
            "mistral",
            json!({"hidden_act": "fatrelu"}),
            "not supported: activation `fatrelu` (config key `hidden_act`)",
        ),
        (
            "llama",
            json!({"rope_scaling": {"type": "yarn", "factor": 2.0}}),
            "not supported: rotary scaling `yarn`",
        ),
        (
            "llama",
            json!({"rope_scaling": {"type": "linear", "factor": 2.0, "beta": 1}}),
            "config keys nobody understands: rope_scaling.beta",
        ),
        (
            "llama",
            json!({"rope_scaling": {"type": "linear"}}),
            "config key `rope_scaling.factor` is missing",
        ),
        (
            "llama",
            json!({"rope_scaling": {"type": "linear", "rope_type": "llama3"}}),
            "config key `rope_scaling.type`: expected the \"llama3\" of `rope_type`, found \"linear\"",
        ),
        (
            "llama",
            json!({"rope_scaling": {"type": "linear", "factor": 0.0}}),
            "decoder: rope factor is 0; it must be a positive number",
        ),
        (
            "llama",
            json!({"rope_scaling": 2}),
            "config key `rope_scaling`: expected an object, found 2",
        ),
        (
            "llama",
            json!({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}),
            "config key `rope_parameters.rope_theta`: expected 10000, as outside, found 1000000",
        ),
        (
            "llama",
            json!({"partial_rotary_factor": 0.5}),
            "not supported: `partial_rotary_factor` other than 1 in llama",
        ),
        ("llama", json!({"pretraining_tp": 2}), "config key `pretraining_tp`: expected 1, found 2"),
        (
            "llama",
            json!({"rope_interleaved": true}),
            "config key `rope_interleaved`: expected false, found true",
        ),
        (
            "llama",
            json!({"quantization_config": {"bits": 4}}),
            "not supported: quantized weights (`quantization_config`)",
        ),
        (
            "llama",
            json!({"pruned_heads": {"0": [1]}}),
            "not supported: pruned attention heads (`pruned_heads`)",
        ),
        (
            "llama",
            json!({"is_encoder_decoder": true}),
            "config key `is_encoder_decoder`: expected false, found true",
        ),
        (
            "llama",
            json!({"attention_dropout": "no"}),
            "config key `attention_dropout`: expected a number, found \"no\"",
        ),
        (
            "llama",
            json!({"hidden_size": 33}),
            "config key `num_attention_heads`: expected a divisor of 33, found 4",
        ),
        (
            "llama",
            json!({"num_key_value_heads": 3}),
            "decoder: layer 0: 4 heads cannot share 3 key/value heads",
        ),
        ("llama", json!({"head_dim": 7}), "decoder: 7 rotary dimensions; they turn in pairs"),
        (
            "llama",
            json!({"num_hidden_layers": 0}),
            "config key `num_hidden_layers`: expected 1 to 2147483648, found 0",
        ),
        (
            "llama",
            json!({"num_hidden_layers": 1000000}),
            "config key `num_hidden_layers`: expected 1 to 65536, found 1000000",
        ),
        (
            "llama",
            json!({"vocab_size": 0}),
            "config key `vocab_size`: expected 1 to 2147483648, found 0",
        ),
        (
            "llama",
            json!({"vocab_size": -1}),
            "config key `vocab_size`: expected a whole number, not negative, found -1",
        ),
        (
            "llama",
            json!({"vocab_size": 4.5}),
            "config key `vocab_size`: expected a whole number, not negative, found 4.5",
        ),
        (
            "llama",
            json!({"vocab_size": u64::MAX}),
            "config key `vocab_size`: expected 1 to 2147483648, found 18446744073709551615",
        ),
        (
            "llama",
            json!({"hidden_size": 1u64 << 31, "intermediate_size": 1u64 << 31}),
            "parameters; at most",
        ),
        (
            "llama",
            json!({"head_dim": 1u64 << 31}),
            "decoder: layer 0: heads * head_dim is 8589934592; at most 2147483648",
        ),
        (
            "llama",
            json!({"rms_norm_eps": -1e-5}),
            "decoder: epsilon of the final norm is -0.00001; it must be a positive number",
        ),
        (
            "mistral",
            json!({"attention_bias": true}),
            "config key `attention_bias`: expected false, found true",
        ),
        (
            "mistral",
            json!({"layer_types": ["full_attention", "sliding_attention"]}),
            "config key `layer_types`: expected sliding_attention, found full_attention",
        ),
        (
            "qwen2",
            json!({"layer_types": ["full_attention"]}),
            "config key `layer_types`: expected 2 entries, one a layer, found 1",
        ),
        (
            "qwen2",
            json!({"layer_types": ["full_attention", "sliding_attention"]}),
            "config key `layer_types`: expected no sliding layer, since there is no `sliding_window` in use, found `sliding_attention` at layer 1",
        ),
        (
            "qwen3",
            json!({"layer_types": ["full_attention", "linear_attention"]}),
            "not supported: attention of type `linear_attention` (layer 1)",
        ),
        (
            "opt",
            json!({"do_layer_norm_before": false}),
            "not supported: OPT with norms behind (`do_layer_norm_before` = false)",
        ),
        (
            "opt",
            json!({"word_embed_proj_dim": 16}),
            "not supported: OPT with projected embeddings (`word_embed_proj_dim` other than `hidden_size`)",
        ),
        (
            "opt",
            json!({"_remove_final_layer_norm": true}),
            "not supported: OPT without a final norm (`_remove_final_layer_norm` = true)",
        ),
        (
            "opt",
            json!({"layer_norm_elementwise_affine": false}),
            "not supported: OPT with norms without weights (`layer_norm_elementwise_affine` = false)",
        ),
        (
            "falcon 40B",
            json!({"parallel_attn": false}),
            "not supported: Falcon's new decoder with `parallel_attn` = false (transformers cannot run it)",
        ),
        (
            "falcon 40B",
            json!({"num_ln_in_parallel_attn": 3}),
            "config key `num_ln_in_parallel_attn`: expected 1 or 2, found 3",
        ),
        (
            "falcon 40B",
            json!({"num_kv_heads": 3}),
            "config key `num_kv_heads`: expected a divisor of 4, found 3",
        ),
        (
            "falcon 7B",
            json!({"num_ln_in_parallel_attn": 2}),
            "config key `num_ln_in_parallel_attn`: expected 1, unless `new_decoder_architecture` is true, found 2",
        ),
        (
            "falcon 7B",
            json!({"n_head": 8}),
            "config key `n_head`: expected the 4 of `num_attention_heads`, found 8",
        ),
        (
            "falcon 7B",
            json!({"apply_residual_connection_post_layernorm": true}),
            "config key `apply_residual_connection_post_layernorm`: expected false, found true",
        ),
        (
            "falcon RW",
            json!({"num_kv_heads": 2}),
            "config key `num_kv_heads`: expected 4, as many as heads, without `new_decoder_architecture`, found 2",
        ),
        (
            "gpt_neox",
            json!({"rotary_pct": 1.5}),
            "config key `rotary_pct`: expected a number above 0, at most 1, found 1.5",
        ),
        (
            "gpt_neox",
            json!({"rotary_pct": 0.4}),
            "decoder: 3 rotary dimensions; they turn in pairs",
        ),
        (
            "gpt2",
            json!({"add_cross_attention": true}),
            "config key `add_cross_attention`: expected false, found true",
        ),
    ] {
        let error = refused(&with(&small_of(kind), more.clone()));
        let exact = !says.ends_with("at most");
        assert!(if exact { error == says } else { error.contains(says) }, "{kind} {more}: {error}");
    }
    for not_an_object in [json!([]), json!("llama"), json!(null)] {
        assert!(refused(&not_an_object).contains("a JSON object"));
    }
}

#[test]
fn our_exports_read_back() {
    let block = json!({"format": 1, "stage": 2, "base_model_type": "llama", "plan": {
        "activation": {"kind": "relu"}, "qkv_in": {"op": "relu"}, "up_in": {"op": "relu"}}});
    let export = with(
        &small_of("llama"),
        json!({"model_type": "relu_llama", "hidden_act": "relu", "relufication": block,
            "auto_map": {"AutoConfig": "configuration_relu.ReluConfig"}}),
    );
    let model = ok(&export);
    assert_eq!(model.family, "llama");
    for layer in &model.spec.layers {
        assert_eq!(layer.mlp.activation, Activation::Relu);
        assert_eq!((layer.sites.qkv_in, layer.sites.up_in), (SiteOp::Relu, SiteOp::Relu));
    }
    assert_eq!(model.relufication.unwrap().base_model_type, "llama");

    let change = |key: &str, value: Value| {
        with(&export, json!({"relufication": with(&block, json!({key: value}))}))
    };
    for (config, says) in [
        (with(&export, json!({"relufication": null})), "config key `relufication` is missing"),
        (
            change("format", json!(2)),
            "not supported: `relufication` block of format 2 (this version reads 1)",
        ),
        (change("format", json!(null)), "config key `relufication.format` is missing"),
        (change("stage", json!(3)), "stage 3 does not exist"),
        (change("plan", json!({"qvk_in": {"op": "relu"}})), "unknown field `qvk_in`"),
        (
            change("plan", json!({"qkv_in": [{"op": "relu"}]})),
            "plan: `qkv` lists 1 layers, the model has 2",
        ),
        (
            with(&change("base_model_type", json!("opt")), json!({"model_type": "llama"})),
            "config key `relufication.base_model_type`: expected `llama`, as in `model_type`, found opt",
        ),
        (change("base_model_type", json!("mamba")), "unknown architecture: model_type `mamba`"),
    ] {
        let error = refused(&config);
        assert!(error.contains(says), "{error}");
    }
}

#[test]
fn every_family_takes_a_plan() {
    use crate::{ReluPlan, Stage};
    for (kind, config) in small() {
        let model = ok(&config);
        let block = json!({"format": 1, "stage": 2, "base_model_type": config["model_type"],
            "plan": ReluPlan::stage(Stage::Two)});
        let export = with(&config, json!({"relufication": block}));
        let expected = ReluPlan::stage(Stage::Two).apply(&model.spec).unwrap();
        assert_eq!(ok(&export).spec, expected, "{kind}");
        assert_ne!(expected, model.spec, "{kind}");
    }
}

#[test]
fn the_file_is_kept_in_its_order() {
    let model = ok(&json!({"vocab_size": 9, "model_type": "llama", "bos_token_id": null}));
    let keys: Vec<_> = model.json.keys().map(String::as_str).collect();
    assert_eq!(keys, ["vocab_size", "model_type", "bos_token_id"]);
}

#[test]
fn hand_written_specs_are_checked() {
    type Change = fn(&mut crate::DecoderSpec);
    let spec = ok(&small_of("qwen3")).spec;
    assert_eq!(spec.validate(), Ok(()));
    let changes: [(Change, &str); 10] = [
        (|s| s.layers.clear(), "the number of layers is 0"),
        (|s| s.hidden = 0, "hidden is 0"),
        (|s| s.final_norm.bias = true, "an RMS norm has no bias"),
        (|s| s.layers[1].attention.scale = f64::NAN, "layer 1: attention scale is NaN"),
        (|s| s.layers[1].attention.window = Some(0), "attention window is 0"),
        (|s| s.layers[1].attention.kv_heads = 0, "kv_heads is 0"),
        (|s| s.layers[0].attention.head_dim = 8, "10 rotary dimensions in heads of 8"),
        (|s| s.layers[0].mlp.activation = Activation::Swish { beta: f64::INFINITY }, "swish beta"),
        (|s| s.layers[0].sites.o_in = SiteOp::ShiftedRelu { shift: f64::NAN }, "ReLU shift is NaN"),
        (
            |s| {
                s.layers[1].residual = Residual::Parallel { norms: ParallelNorms::Shared };
                s.layers[1].sites.up_in = SiteOp::Relu;
            },
            "layer 1: attention and MLP read one shared norm",
        ),
    ];
    for (change, says) in changes {
        let mut changed = spec.clone();
        change(&mut changed);
        let Err(Error::Spec { why }) = changed.validate() else { panic!("accepted: {says}") };
        assert!(why.contains(says), "{why}");
    }
}

#[test]
fn a_spec_survives_serde() {
    for (kind, config) in small() {
        let spec = ok(&config).spec;
        let text = serde_json::to_string(&spec).unwrap();
        assert_eq!(serde_json::from_str::<crate::DecoderSpec>(&text).unwrap(), spec, "{kind}");
    }
}

#[test]
fn gates_belong_to_gated_mlps_only() {
    for (kind, config) in small() {
        let model = ok(&config);
        let gated = model.spec.layers[0].mlp.kind == MlpKind::Gated;
        let row = model.weights.row_of(Slot::Layer(0, LayerSlot::Gate));
        assert_eq!(gated, row.is_some(), "{kind}");
    }
}

#[test]
fn no_value_of_any_key_makes_it_panic() {
    let odd = [
        json!(0),
        json!(-1),
        json!(1),
        json!(7),
        json!(1u64 << 31),
        json!(u64::MAX),
        json!(0.3),
        json!(-1e308),
        json!(""),
        json!("full_attention"),
        json!(true),
        json!(false),
        json!(null),
        json!([]),
        json!([1, "a"]),
        json!({}),
        json!({"rope_type": "llama3", "factor": 0}),
    ];
    let more = json!({"head_dim": 8, "num_key_value_heads": 2, "num_kv_heads": 2, "n_inner": 9,
        "rope_scaling": null, "rope_theta": 1.0, "rotary_pct": 0.25, "relufication": null,
        "layer_types": null, "sliding_window": 4, "use_sliding_window": true, "ff_factor": 2,
        "hidden_act_param": 1, "layer_norm_epsilon": 1e-5, "scale_attn_weights": true,
        "partial_rotary_factor": 1.0, "max_position_embeddings": 64, "n_positions": 64});
    for (_, config) in small() {
        let keys: BTreeSet<String> = config
            .as_object()
            .unwrap()
            .keys()
            .chain(more.as_object().unwrap().keys())
            .cloned()
            .collect();
        for key in keys {
            for value in &odd {
                // Accepted or refused, but with no panic; and what is accepted is valid.
                if let Ok(model) = parse(&with(&config, json!({key.clone(): value}))) {
                    assert_eq!(model.spec.validate(), Ok(()), "{key} = {value}");
                }
            }
        }
    }
}
