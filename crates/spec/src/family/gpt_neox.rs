//! GPT-NeoX and Pythia: two LayerNorms, parallel or sequential residual, rotary positions
//! over part of a head, queries, keys and values fused head by head.
//! Source: transformers' `configuration_gpt_neox.py`, `modeling_gpt_neox.py`.

use crate::{
    Attention, AttentionBias, DecoderSpec, Embedding, Head, Layer, LayerSlot::*, Layout, Mlp,
    MlpBias, MlpKind, Norm, NormKind, NormPlacement, ParallelNorms, Residual, Result, SiteOps,
};

use super::{
    Parsed,
    common::{activation, attention_scale, divide, layer_count},
    keys::Keys,
    names::{Module, Names, module},
    rope::{RopeKeys, rope},
};

const ROPE_KEYS: RopeKeys = RopeKeys {
    theta: &["rotary_emb_base", "rope_theta"],
    fraction: &["rotary_pct", "partial_rotary_factor"],
    default_fraction: 0.25,
};

/// Reads a GPT-NeoX config.
pub(super) fn parse(keys: &mut Keys<'_>) -> Result<Parsed> {
    let vocab = keys.size_or(&["vocab_size"], 50_432)?;
    let hidden = keys.size_or(&["hidden_size"], 6144)?;
    let layers = layer_count(keys, &["num_hidden_layers"], 44)?;
    let heads = keys.size_or(&["num_attention_heads"], 64)?;
    let ffn = keys.size_or(&["intermediate_size"], 24_576)?;
    let max_positions = keys.size_or(&["max_position_embeddings"], 2048)?;
    let head_dim = divide(keys, "num_attention_heads", hidden, heads)?;

    let norm =
        Norm { kind: NormKind::LayerNorm {}, eps: keys.or("layer_norm_eps", 1e-5)?, bias: true };
    let bias = keys.or("attention_bias", true)?;
    let residual = if keys.or("use_parallel_residual", true)? {
        Residual::Parallel { norms: ParallelNorms::Separate }
    } else {
        Residual::Sequential {}
    };
    let layer = Layer {
        attention: Attention {
            heads,
            kv_heads: heads,
            head_dim,
            bias: AttentionBias { qkv: bias, o: bias },
            qk_norm: None,
            scale: attention_scale(head_dim),
            window: None,
            softcap: None,
        },
        mlp: Mlp {
            kind: MlpKind::Plain,
            ffn,
            activation: activation(keys, "hidden_act", "gelu")?,
            bias: MlpBias { up: true, down: true },
        },
        norm,
        norm_placement: NormPlacement::Pre,
        residual,
        sites: SiteOps::default(),
    };
    let spec = DecoderSpec {
        vocab,
        hidden,
        max_positions,
        position: rope(keys, &ROPE_KEYS, head_dim, max_positions)?,
        embedding: Embedding::default(),
        layers: vec![layer; layers],
        final_norm: norm,
        head: Head { tied: keys.or("tie_word_embeddings", false)?, bias: false, softcap: None },
    };
    keys.ignore_numbers(&["attention_probs_dropout_prob", "hidden_dropout_prob"])?;
    let names = Names {
        prefix: "gpt_neox.",
        embed: "gpt_neox.embed_in",
        positions: None,
        layers: "gpt_neox.layers.",
        modules: &[
            module("input_layernorm", &[AttnNorm], &[AttnNormBias]),
            Module {
                layout: Layout::PerHead { head_dim },
                ..module("attention.query_key_value", &[Q, K, V], &[QBias, KBias, VBias])
            },
            module("attention.dense", &[O], &[OBias]),
            module("post_attention_layernorm", &[MlpNorm], &[MlpNormBias]),
            module("mlp.dense_h_to_4h", &[Up], &[UpBias]),
            module("mlp.dense_4h_to_h", &[Down], &[DownBias]),
        ],
        final_norm: "gpt_neox.final_layer_norm",
        head: "embed_out",
        ignored_suffixes: &[".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"],
    };
    let mut weights = names.weight_map(&spec);
    // transformers 5 calls the head `lm_head`.
    for row in &mut weights.rows {
        if row.names.iter().any(|name| name == "embed_out.weight") {
            row.names.push("lm_head.weight".to_owned());
        }
    }
    Ok(Parsed { family: "gpt_neox", spec, weights, activation_key: "hidden_act" })
}
