//! Falcon, in its three block forms: 7B (multi-query, parallel, one shared norm), 40B,
//! 180B and 11B (grouped queries, parallel, two norms or one), and RW (sequential, biases,
//! often ALiBi); also under the model types and key names of its first release.
//! Source: transformers' `configuration_falcon.py`, `modeling_falcon.py`; the first
//! release's `modelling_RW.py`.

use crate::{
    Attention, AttentionBias, DecoderSpec, Embedding, Error, Head, Layer, LayerSlot::*, Layout,
    Mlp, MlpBias, MlpKind, Norm, NormKind, NormPlacement, ParallelNorms, Position, Residual,
    Result, SiteOps,
};

use super::{
    Parsed,
    common::{activation, attention_scale, divide, layer_count, unsupported},
    keys::Keys,
    names::{Module, Names, module},
    rope::{ROPE_KEYS, rope},
};

/// Which config class wrote the file.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Release {
    /// `falcon`: transformers' own.
    Falcon,
    /// `RefinedWeb` and `RefinedWebModel`: the first release's remote code.
    RefinedWeb,
}

/// How a block is built.
struct Block {
    kv_heads: usize,
    residual: Residual,
    /// How queries, keys and values are fused.
    layout: Layout,
}

/// Reads a Falcon config.
pub(super) fn parse(keys: &mut Keys<'_>, release: Release) -> Result<Parsed> {
    let vocab = keys.size_or(&["vocab_size"], 65_024)?;
    let hidden = keys.size_or(&["hidden_size", "n_embed"], 4544)?;
    let layers = layer_count(keys, &["num_hidden_layers", "n_layer"], 32)?;
    let heads = keys.size_or(&["num_attention_heads", "n_head"], 71)?;
    let max_positions = keys.size_or(&["max_position_embeddings"], 2048)?;
    let head_dim = divide(keys, "num_attention_heads", hidden, heads)?;
    let block = block(keys, release, heads, head_dim)?;
    let ffn = ffn(keys, hidden)?;
    // The first release's code could add the norm's output; no released model does.
    keys.only("apply_residual_connection_post_layernorm", false)?;

    let norm = Norm {
        kind: NormKind::LayerNorm {},
        eps: keys.or("layer_norm_epsilon", 1e-5)?,
        bias: true,
    };
    let bias = keys.or("bias", false)?;
    let rotary = rope(keys, &ROPE_KEYS, head_dim, max_positions)?;
    let position = match (keys.or("alibi", false)?, rotary) {
        // transformers rounds the penalties to bfloat16, and scales them with the scores.
        (true, _) => Position::Alibi { bf16_slopes: true, scaled: true },
        (false, Position::Rope { rotary_dim, .. }) if rotary_dim != head_dim => {
            return Err(unsupported("`partial_rotary_factor` other than 1 in falcon"));
        }
        (false, rotary) => rotary,
    };
    let layer = Layer {
        attention: Attention {
            heads,
            kv_heads: block.kv_heads,
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
            activation: activation(keys, "activation", "gelu")?,
            bias: MlpBias { up: bias, down: bias },
        },
        norm,
        norm_placement: NormPlacement::Pre,
        residual: block.residual,
        sites: SiteOps::default(),
    };
    let spec = DecoderSpec {
        vocab,
        hidden,
        max_positions,
        position,
        embedding: Embedding::default(),
        layers: vec![layer; layers],
        final_norm: norm,
        head: Head { tied: keys.or("tie_word_embeddings", true)?, bias: false, softcap: None },
    };
    let weights = names(&spec, &block);
    Ok(Parsed { family: "falcon", spec, weights, activation_key: "activation" })
}

/// The block's form, from the flags that stand for it.
fn block(keys: &mut Keys<'_>, release: Release, heads: usize, head_dim: usize) -> Result<Block> {
    let kv = keys.optional_size(&["num_kv_heads", "n_head_kv"])?;
    // The first release had no flag for the 40B's decoder: its code alone had `n_head_kv`.
    let new_by_default = release == Release::RefinedWeb && kv.is_some();
    let new_decoder = keys.or("new_decoder_architecture", new_by_default)?;
    let norms = keys.optional::<usize>("num_ln_in_parallel_attn")?;
    let multi_query = keys.optional::<bool>("multi_query")?;
    let parallel = keys.optional::<bool>("parallel_attn")?;
    if new_decoder {
        if parallel == Some(false) {
            return Err(unsupported(
                "Falcon's new decoder with `parallel_attn` = false (transformers cannot run it)",
            ));
        }
        let kv_heads = kv.unwrap_or(heads);
        let queries = divide(keys, "num_kv_heads", heads, kv_heads)?;
        let norms = match norms.unwrap_or(2) {
            1 => ParallelNorms::Shared,
            2 => ParallelNorms::Separate,
            other => return Err(keys.bad("num_ln_in_parallel_attn", "1 or 2", other)),
        };
        return Ok(Block {
            kv_heads,
            residual: Residual::Parallel { norms },
            layout: Layout::PerGroup { queries, head_dim },
        });
    }
    // The old code and transformers assume opposites for these two.
    let flag = |key: &str, value: Option<bool>| match (value, release) {
        (Some(value), _) => Ok(value),
        (None, Release::Falcon) => Ok(true),
        (None, Release::RefinedWeb) => Err(Error::MissingKey { key: key.to_owned() }),
    };
    let multi_query = flag("multi_query", multi_query)?;
    let parallel = flag("parallel_attn", parallel)?;
    if let Some(norms) = norms.filter(|norms| *norms != 1 && parallel) {
        let expected = "1, unless `new_decoder_architecture` is true";
        return Err(keys.bad("num_ln_in_parallel_attn", expected, norms));
    }
    // With multi-query attention transformers does not look at the number.
    if let Some(kv) = kv.filter(|kv| !multi_query && *kv != heads) {
        let expected = format!("{heads}, as many as heads, without `new_decoder_architecture`");
        return Err(keys.bad("num_kv_heads", &expected, kv));
    }
    Ok(Block {
        kv_heads: if multi_query { 1 } else { heads },
        residual: if parallel {
            Residual::Parallel { norms: ParallelNorms::Shared }
        } else {
            Residual::Sequential {}
        },
        layout: if multi_query { Layout::Concat } else { Layout::PerHead { head_dim } },
    })
}

/// The MLP's width: said outright, or as a multiple of `hidden` (Falcon2's first files).
fn ffn(keys: &mut Keys<'_>, hidden: usize) -> Result<usize> {
    let factor = keys.size_or(&["ff_factor"], 4)?;
    let said = keys.optional_size(&["ffn_hidden_size"])?;
    Ok(said.unwrap_or(hidden.saturating_mul(factor)))
}

fn names(spec: &DecoderSpec, block: &Block) -> crate::WeightMap {
    let separate = block.residual == Residual::Parallel { norms: ParallelNorms::Separate };
    let (attn_norm, mlp_norm) = if separate {
        ("ln_attn", "ln_mlp")
    } else {
        ("input_layernorm", "post_attention_layernorm")
    };
    Names {
        prefix: "transformer.",
        embed: "transformer.word_embeddings",
        positions: None,
        layers: "transformer.h.",
        modules: &[
            module(attn_norm, &[AttnNorm], &[AttnNormBias]),
            Module {
                layout: block.layout,
                ..module("self_attention.query_key_value", &[Q, K, V], &[QBias, KBias, VBias])
            },
            module("self_attention.dense", &[O], &[OBias]),
            module(mlp_norm, &[MlpNorm], &[MlpNormBias]),
            module("mlp.dense_h_to_4h", &[Up], &[UpBias]),
            module("mlp.dense_4h_to_h", &[Down], &[DownBias]),
        ],
        final_norm: "transformer.ln_f",
        head: "lm_head",
        ignored_suffixes: &[".rotary_emb.inv_freq", ".maybe_rotary.inv_freq"],
    }
    .weight_map(spec)
}
