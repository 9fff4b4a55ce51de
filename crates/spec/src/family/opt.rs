//! OPT: LayerNorm in front, learned positions, plain MLP with ReLU from birth.
//! Source: transformers' `configuration_opt.py`, `modeling_opt.py`.

use crate::{
    Attention, AttentionBias, DecoderSpec, Embedding, Head, Layer, LayerSlot::*, Mlp, MlpBias,
    MlpKind, Norm, NormKind, NormPlacement, Position, Residual, Result, SiteOps,
};

use super::{
    Parsed,
    common::{activation, attention_scale, divide, layer_count, unsupported},
    keys::Keys,
    names::{Module, Names, module},
};

/// OPT's table of positions has two rows that no token reaches.
const POSITION_OFFSET: usize = 2;

/// PyTorch's default; OPT's config has no key for it.
const LAYER_NORM_EPS: f64 = 1e-5;

const MODULES: &[Module] = &[
    module("self_attn_layer_norm", &[AttnNorm], &[AttnNormBias]),
    module("self_attn.q_proj", &[Q], &[QBias]),
    module("self_attn.k_proj", &[K], &[KBias]),
    module("self_attn.v_proj", &[V], &[VBias]),
    module("self_attn.out_proj", &[O], &[OBias]),
    module("final_layer_norm", &[MlpNorm], &[MlpNormBias]),
    module("fc1", &[Up], &[UpBias]),
    module("fc2", &[Down], &[DownBias]),
];

const NAMES: Names<'static> = Names {
    prefix: "model.",
    embed: "model.decoder.embed_tokens",
    positions: Some("model.decoder.embed_positions"),
    layers: "model.decoder.layers.",
    modules: MODULES,
    final_norm: "model.decoder.final_layer_norm",
    head: "lm_head",
    ignored_suffixes: &[],
};

/// Reads an OPT config.
pub(super) fn parse(keys: &mut Keys<'_>) -> Result<Parsed> {
    let vocab = keys.size_or(&["vocab_size"], 50_272)?;
    let hidden = keys.size_or(&["hidden_size"], 768)?;
    let layers = layer_count(keys, &["num_hidden_layers"], 12)?;
    let heads = keys.size_or(&["num_attention_heads"], 12)?;
    let ffn = keys.size_or(&["ffn_dim"], 3072)?;
    let max_positions = keys.size_or(&["max_position_embeddings"], 2048)?;
    let head_dim = divide(keys, "num_attention_heads", hidden, heads)?;
    refuse_variants(keys, hidden)?;

    let bias = keys.or("enable_bias", true)?;
    let norm = Norm { kind: NormKind::LayerNorm {}, eps: LAYER_NORM_EPS, bias: true };
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
            activation: activation(keys, "activation_function", "relu")?,
            bias: MlpBias { up: bias, down: bias },
        },
        norm,
        norm_placement: NormPlacement::Pre,
        residual: Residual::Sequential {},
        sites: SiteOps::default(),
    };
    let spec = DecoderSpec {
        vocab,
        hidden,
        max_positions,
        position: Position::Learned { offset: POSITION_OFFSET },
        embedding: Embedding::default(),
        layers: vec![layer; layers],
        final_norm: norm,
        head: Head { tied: keys.or("tie_word_embeddings", true)?, bias: false, softcap: None },
    };
    keys.ignore_numbers(&["dropout", "activation_dropout", "layerdrop", "init_std"])?;
    let weights = NAMES.weight_map(&spec);
    Ok(Parsed { family: "opt", spec, weights, activation_key: "activation_function" })
}

/// What opt-350m and early fine-tunes have, and this decoder has not.
fn refuse_variants(keys: &mut Keys<'_>, hidden: usize) -> Result<()> {
    if !keys.or("do_layer_norm_before", true)? {
        return Err(unsupported("OPT with norms behind (`do_layer_norm_before` = false)"));
    }
    if keys.size_or(&["word_embed_proj_dim"], hidden)? != hidden {
        return Err(unsupported(
            "OPT with projected embeddings (`word_embed_proj_dim` other than `hidden_size`)",
        ));
    }
    if keys.or("_remove_final_layer_norm", false)? {
        return Err(unsupported("OPT without a final norm (`_remove_final_layer_norm` = true)"));
    }
    if !keys.or("layer_norm_elementwise_affine", true)? {
        return Err(unsupported(
            "OPT with norms without weights (`layer_norm_elementwise_affine` = false)",
        ));
    }
    Ok(())
}
