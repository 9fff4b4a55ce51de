//! The Llama room: Llama, Mistral, Qwen2, Qwen3 and ProSparse's Llama. RMS norms, rotary
//! positions, grouped queries, a gated MLP; they differ in defaults, biases and windows.
//! Source: transformers' `configuration_*.py` and `modeling_*.py` of those names.

use crate::{
    Activation, Attention, AttentionBias, DecoderSpec, Embedding, Head, Layer, LayerSlot::*, Mlp,
    MlpBias, MlpKind, Norm, NormKind, NormPlacement, Position, Residual, Result, SiteOps,
};

use super::{
    Parsed,
    common::{activation, attention_scale, divide, layer_count, unsupported},
    keys::Keys,
    names::{Module, Names, module},
    rope::{ROPE_KEYS, rope},
};

/// Which of the room's models a config describes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Dialect {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
}

/// What transformers' config classes assume for absent keys.
struct Defaults {
    vocab: usize,
    ffn: usize,
    /// `None`: as many as heads.
    kv_heads: Option<usize>,
    /// `None`: hidden / heads.
    head_dim: Option<usize>,
    max_positions: usize,
}

impl Dialect {
    fn name(self) -> &'static str {
        match self {
            Dialect::Llama => "llama",
            Dialect::Mistral => "mistral",
            Dialect::Qwen2 => "qwen2",
            Dialect::Qwen3 => "qwen3",
        }
    }

    fn defaults(self) -> Defaults {
        let qwen = Defaults {
            vocab: 151_936,
            ffn: 22_016,
            kv_heads: Some(32),
            head_dim: None,
            max_positions: 32_768,
        };
        match self {
            Dialect::Llama => Defaults {
                vocab: 32_000,
                ffn: 11_008,
                kv_heads: None,
                head_dim: None,
                max_positions: 2_048,
            },
            Dialect::Mistral => Defaults {
                vocab: 32_000,
                ffn: 14_336,
                kv_heads: Some(8),
                head_dim: None,
                max_positions: 131_072,
            },
            Dialect::Qwen2 => qwen,
            Dialect::Qwen3 => Defaults { head_dim: Some(128), ..qwen },
        }
    }
}

const MODULES: &[Module] = &[
    module("input_layernorm", &[AttnNorm], &[]),
    module("self_attn.q_proj", &[Q], &[QBias]),
    module("self_attn.k_proj", &[K], &[KBias]),
    module("self_attn.v_proj", &[V], &[VBias]),
    module("self_attn.q_norm", &[QNorm], &[]),
    module("self_attn.k_norm", &[KNorm], &[]),
    module("self_attn.o_proj", &[O], &[OBias]),
    module("post_attention_layernorm", &[MlpNorm], &[]),
    module("mlp.gate_proj", &[Gate], &[GateBias]),
    module("mlp.up_proj", &[Up], &[UpBias]),
    module("mlp.down_proj", &[Down], &[DownBias]),
];

const NAMES: Names<'static> = Names {
    prefix: "model.",
    embed: "model.embed_tokens",
    positions: None,
    layers: "model.layers.",
    modules: MODULES,
    final_norm: "model.norm",
    head: "lm_head",
    ignored_suffixes: &[".rotary_emb.inv_freq"],
};

/// Reads the config of one of the room's models.
pub(super) fn parse(keys: &mut Keys<'_>, dialect: Dialect) -> Result<Parsed> {
    let defaults = dialect.defaults();
    let vocab = keys.size_or(&["vocab_size"], defaults.vocab)?;
    let hidden = keys.size_or(&["hidden_size"], 4096)?;
    let ffn = keys.size_or(&["intermediate_size"], defaults.ffn)?;
    let layers = layer_count(keys, &["num_hidden_layers"], 32)?;
    let heads = keys.size_or(&["num_attention_heads"], 32)?;
    let max_positions = keys.size_or(&["max_position_embeddings"], defaults.max_positions)?;

    // For these two keys, transformers takes `null` for "derive it", whatever the default.
    let unless_null =
        |keys: &Keys<'_>, key, default| if keys.is_null(key) { None } else { default };
    let kv_default = unless_null(keys, "num_key_value_heads", defaults.kv_heads);
    let kv_heads = keys.optional_size(&["num_key_value_heads"])?.or(kv_default).unwrap_or(heads);
    let dim_default = unless_null(keys, "head_dim", defaults.head_dim);
    let head_dim = match keys.optional_size(&["head_dim"])?.or(dim_default) {
        Some(head_dim) => head_dim,
        None => divide(keys, "num_attention_heads", hidden, heads)?,
    };

    let norm = Norm {
        kind: NormKind::Rms { unit_offset: false },
        eps: keys.or("rms_norm_eps", 1e-6)?,
        bias: false,
    };
    let (bias, mlp_bias) = biases(keys, dialect)?;
    let attention = Attention {
        heads,
        kv_heads,
        head_dim,
        bias,
        qk_norm: (dialect == Dialect::Qwen3).then_some(norm),
        scale: attention_scale(head_dim),
        window: None,
        softcap: None,
    };
    let mlp = Mlp {
        kind: MlpKind::Gated,
        ffn,
        activation: gate_activation(keys, dialect)?,
        bias: MlpBias { up: mlp_bias, down: mlp_bias },
    };
    let position = rope(keys, &ROPE_KEYS, head_dim, max_positions)?;
    if !matches!(position, Position::Rope { rotary_dim, .. } if rotary_dim == head_dim) {
        return Err(unsupported(format!(
            "`partial_rotary_factor` other than 1 in {}",
            dialect.name()
        )));
    }
    let layers = windows(keys, dialect, layers)?
        .into_iter()
        .map(|window| Layer {
            attention: Attention { window, ..attention.clone() },
            mlp: mlp.clone(),
            norm,
            norm_placement: NormPlacement::Pre,
            residual: Residual::Sequential {},
            sites: SiteOps::default(),
        })
        .collect();
    let spec = DecoderSpec {
        vocab,
        hidden,
        max_positions,
        position,
        embedding: Embedding::default(),
        layers,
        final_norm: norm,
        head: Head { tied: keys.or("tie_word_embeddings", false)?, bias: false, softcap: None },
    };
    // Splits a product in pieces, with the same result up to rounding.
    keys.only("pretraining_tp", 1)?;
    for flag in ["rope_interleaved", "use_mrope"] {
        keys.only(flag, false)?;
    }
    keys.optional::<bool>("is_llama_config")?;
    let weights = NAMES.weight_map(&spec);
    Ok(Parsed { family: dialect.name(), spec, weights, activation_key: "hidden_act" })
}

/// Whether attention and MLP have biases.
fn biases(keys: &mut Keys<'_>, dialect: Dialect) -> Result<(AttentionBias, bool)> {
    match dialect {
        Dialect::Llama => {
            let attention = keys.or("attention_bias", false)?;
            let mlp = keys.or("mlp_bias", false)?;
            Ok((AttentionBias { qkv: attention, o: attention }, mlp))
        }
        Dialect::Mistral => {
            keys.only("attention_bias", false)?;
            keys.only("mlp_bias", false)?;
            Ok((AttentionBias::default(), false))
        }
        Dialect::Qwen2 => Ok((AttentionBias { qkv: true, o: false }, false)),
        Dialect::Qwen3 => {
            let attention = keys.or("attention_bias", false)?;
            Ok((AttentionBias { qkv: attention, o: attention }, false))
        }
    }
}

/// The gate's activation. ProSparse's Llama has two more, with a parameter.
fn gate_activation(keys: &mut Keys<'_>, dialect: Dialect) -> Result<Activation> {
    if dialect != Dialect::Llama {
        return activation(keys, "hidden_act", "silu");
    }
    let parameter = keys.optional::<f64>("hidden_act_param")?;
    let needed =
        || parameter.ok_or_else(|| crate::Error::MissingKey { key: "hidden_act_param".to_owned() });
    match keys.peek("hidden_act").and_then(|value| value.as_str()) {
        Some("fatrelu") => {
            keys.ignore(&["hidden_act"]);
            Ok(Activation::FatRelu { threshold: needed()? })
        }
        Some("shiftrelu") => {
            keys.ignore(&["hidden_act"]);
            Ok(Activation::ShiftedRelu { shift: needed()? })
        }
        _ => activation(keys, "hidden_act", "silu"),
    }
}

/// Each layer's attention window, as transformers applies it: everywhere in Mistral; in
/// Qwen only where `use_sliding_window` is set, and only in the layers that `layer_types`
/// names, or else from `max_window_layers` on.
fn windows(keys: &mut Keys<'_>, dialect: Dialect, layers: usize) -> Result<Vec<Option<usize>>> {
    const FULL: &str = "full_attention";
    const SLIDING: &str = "sliding_attention";
    if dialect == Dialect::Llama {
        return Ok(vec![None; layers]);
    }
    let off = keys.is_null("sliding_window");
    let window = keys.optional_size(&["sliding_window"])?.or((!off).then_some(4096));
    let (window, first) = match dialect {
        Dialect::Mistral => (window, 0),
        _ => {
            let used = keys.or("use_sliding_window", false)?;
            (window.filter(|_| used), keys.or("max_window_layers", 28)?)
        }
    };
    let by_position = |n| window.filter(|_| n >= first);
    let Some(types) = keys.optional::<Vec<String>>("layer_types")? else {
        return Ok((0..layers).map(by_position).collect());
    };
    if types.len() != layers {
        let expected = format!("{layers} entries, one a layer");
        return Err(keys.bad("layer_types", &expected, types.len()));
    }
    types
        .iter()
        .enumerate()
        .map(|(n, kind)| match (kind.as_str(), window) {
            // Mistral's code slides everywhere and does not read the list.
            (FULL, Some(_)) if dialect == Dialect::Mistral => {
                Err(keys.bad("layer_types", SLIDING, kind))
            }
            (FULL, _) => Ok(None),
            (SLIDING, Some(window)) => Ok(Some(window)),
            (SLIDING, None) => Err(keys.bad(
                "layer_types",
                "no sliding layer, since there is no `sliding_window` in use",
                format!("`{kind}` at layer {n}"),
            )),
            (other, _) => Err(unsupported(format!("attention of type `{other}` (layer {n})"))),
        })
        .collect()
}
