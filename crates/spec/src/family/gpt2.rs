//! GPT-2: LayerNorm in front, learned positions, weights stored `[in, out]`.
//! Source: transformers' `configuration_gpt2.py`, `modeling_gpt2.py`.

use crate::{
    Attention, AttentionBias, DecoderSpec, Embedding, Head, Layer, LayerSlot::*, Layout, Mlp,
    MlpBias, MlpKind, Norm, NormKind, NormPlacement, Position, Residual, Result, SiteOps,
};

use super::{
    Parsed,
    common::{activation, attention_scale, divide, layer_count},
    keys::Keys,
    names::{Module, Names, module},
};

/// One of GPT-2's `Conv1D` modules: a linear layer stored `[in, out]`.
const fn conv1d(
    name: &'static str,
    weight: &'static [crate::LayerSlot],
    bias: &'static [crate::LayerSlot],
) -> Module {
    Module { name, weight, bias, layout: Layout::Concat, transposed: true }
}

const MODULES: &[Module] = &[
    module("ln_1", &[AttnNorm], &[AttnNormBias]),
    conv1d("attn.c_attn", &[Q, K, V], &[QBias, KBias, VBias]),
    conv1d("attn.c_proj", &[O], &[OBias]),
    module("ln_2", &[MlpNorm], &[MlpNormBias]),
    conv1d("mlp.c_fc", &[Up], &[UpBias]),
    conv1d("mlp.c_proj", &[Down], &[DownBias]),
];

const NAMES: Names<'static> = Names {
    prefix: "transformer.",
    embed: "transformer.wte",
    positions: Some("transformer.wpe"),
    layers: "transformer.h.",
    modules: MODULES,
    final_norm: "transformer.ln_f",
    head: "lm_head",
    ignored_suffixes: &[".attn.bias", ".attn.masked_bias"],
};

/// Reads a GPT-2 config.
pub(super) fn parse(keys: &mut Keys<'_>) -> Result<Parsed> {
    let vocab = keys.size_or(&["vocab_size"], 50_257)?;
    let hidden = keys.size_or(&["n_embd", "hidden_size"], 768)?;
    let layers = layer_count(keys, &["n_layer", "num_hidden_layers"], 12)?;
    let heads = keys.size_or(&["n_head", "num_attention_heads"], 12)?;
    let ffn = keys.size_or(&["n_inner"], hidden.saturating_mul(4))?;
    let max_positions = keys.size_or(&["n_positions", "max_position_embeddings"], 1024)?;
    let head_dim = divide(keys, "n_head", hidden, heads)?;

    let norm = Norm {
        kind: NormKind::LayerNorm {},
        eps: keys.or("layer_norm_epsilon", 1e-5)?,
        bias: true,
    };
    let scale = if keys.or("scale_attn_weights", true)? { attention_scale(head_dim) } else { 1.0 };
    let by_layer = keys.or("scale_attn_by_inverse_layer_idx", false)?;
    // Another order of the same product and scale, in f32.
    keys.optional::<bool>("reorder_and_upcast_attn")?;
    let activation = activation(keys, "activation_function", "gelu_new")?;
    let layer = |n: usize| Layer {
        attention: Attention {
            heads,
            kv_heads: heads,
            head_dim,
            bias: AttentionBias { qkv: true, o: true },
            qk_norm: None,
            scale: if by_layer { scale / (n + 1) as f64 } else { scale },
            window: None,
            softcap: None,
        },
        mlp: Mlp { kind: MlpKind::Plain, ffn, activation, bias: MlpBias { up: true, down: true } },
        norm,
        norm_placement: NormPlacement::Pre,
        residual: Residual::Sequential {},
        sites: SiteOps::default(),
    };
    let spec = DecoderSpec {
        vocab,
        hidden,
        max_positions,
        position: Position::Learned { offset: 0 },
        embedding: Embedding::default(),
        layers: (0..layers).map(layer).collect(),
        final_norm: norm,
        head: Head { tied: keys.or("tie_word_embeddings", true)?, bias: false, softcap: None },
    };
    keys.ignore_numbers(&["resid_pdrop", "embd_pdrop", "attn_pdrop", "n_ctx"])?;
    // The head of `GPT2DoubleHeadsModel`, which no language model has.
    keys.ignore(&[
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
    ]);
    let weights = NAMES.weight_map(&spec);
    Ok(Parsed { family: "gpt2", spec, weights, activation_key: "activation_function" })
}
