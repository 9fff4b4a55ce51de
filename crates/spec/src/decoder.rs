//! The one decoder, described by data.

use serde::{Deserialize, Serialize};

use crate::{Site, SiteOps, Slot};

/// A decoder-only transformer. Holds no family name, so that forward code cannot branch
/// on one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DecoderSpec {
    /// Rows of the embedding.
    pub vocab: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// The longest sequence that the model was made for.
    pub max_positions: usize,
    /// How positions enter.
    pub position: Position,
    /// What happens to a looked-up embedding.
    pub embedding: Embedding,
    /// The layers, each with its own attention (windows may alternate).
    pub layers: Vec<Layer>,
    /// The norm before the head.
    pub final_norm: Norm,
    /// The projection onto the vocabulary.
    pub head: Head,
}

/// One transformer block.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layer {
    /// Self-attention.
    pub attention: Attention,
    /// The feed-forward network.
    pub mlp: Mlp,
    /// The norms in front of attention and MLP.
    pub norm: Norm,
    /// Where the norms stand.
    pub norm_placement: NormPlacement,
    /// How attention and MLP join the residual stream.
    pub residual: Residual,
    /// What is applied where a tensor enters matrices.
    pub sites: SiteOps,
}

/// Self-attention of one layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attention {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads` (1: multi-query).
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Which projections have a bias.
    pub bias: AttentionBias,
    /// A norm over each head of queries and keys (Qwen3).
    pub qk_norm: Option<Norm>,
    /// Factor of the scores, usually `1/sqrt(head_dim)`.
    pub scale: f64,
    /// Keys further back than this many positions are not seen; `Some(w)`: a query at
    /// `i` sees keys `j` with `i - w < j <= i`.
    pub window: Option<usize>,
    /// `cap * tanh(score / cap)` on the scores (Gemma 2).
    pub softcap: Option<f64>,
}

/// Which attention projections have a bias.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttentionBias {
    /// Query, key and value projections.
    pub qkv: bool,
    /// Output projection.
    pub o: bool,
}

/// The feed-forward network of one layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mlp {
    /// Plain or gated.
    pub kind: MlpKind,
    /// Neurons: the width between up and down.
    pub ffn: usize,
    /// The activation, of `up` (plain) or of `gate` (gated).
    pub activation: Activation,
    /// Which projections have a bias.
    pub bias: MlpBias,
}

/// The two forms of a feed-forward network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MlpKind {
    /// `down(act(up(x)))`.
    Plain,
    /// `down(act(gate(x)) * up(x))`.
    Gated,
}

/// Which MLP projections have a bias.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MlpBias {
    /// Up projection, and gate projection where there is one.
    pub up: bool,
    /// Down projection.
    pub down: bool,
}

/// The non-linearity of an MLP.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// `x * Phi(x)`, with the error function.
    Gelu,
    /// GELU's tanh approximation (`gelu_new`, `gelu_pytorch_tanh`).
    GeluTanh,
    /// `x * sigmoid(beta * x)` (paper section 3; `quick_gelu` has beta 1.702).
    Swish {
        /// Steepness; 1 is SiLU, infinity ReLU.
        beta: f64,
    },
    /// `max(x, 0)`.
    Relu,
    /// `max(x - shift, 0)` (paper section 5.3).
    ShiftedRelu {
        /// What is subtracted before the ReLU.
        shift: f64,
    },
    /// `x` where `x >= threshold`, else 0 (ProSparse).
    FatRelu {
        /// The smallest value that survives.
        threshold: f64,
    },
}

impl Activation {
    /// The activation of a name in transformers' `ACT2FN` (also what `gelu_new`,
    /// `gelu_fast` and `gelu_pytorch_tanh` share: one formula, differently written).
    pub fn from_hf_name(name: &str) -> Option<Activation> {
        match name {
            "silu" | "swish" => Some(Activation::Silu),
            "gelu" => Some(Activation::Gelu),
            "gelu_new" | "gelu_fast" | "gelu_pytorch_tanh" => Some(Activation::GeluTanh),
            "quick_gelu" => Some(Activation::Swish { beta: 1.702 }),
            "relu" => Some(Activation::Relu),
            _ => None,
        }
    }

    /// The name in transformers' `ACT2FN`; `None` where transformers has no such function.
    pub fn hf_name(self) -> Option<&'static str> {
        match self {
            Activation::Silu => Some("silu"),
            Activation::Gelu => Some("gelu"),
            Activation::GeluTanh => Some("gelu_new"),
            Activation::Swish { beta: 1.702 } => Some("quick_gelu"),
            Activation::Relu => Some("relu"),
            _ => None,
        }
    }

    /// Whether the activation gives exact zeros for a whole range of inputs.
    pub fn is_sparse(self) -> bool {
        matches!(
            self,
            Activation::Relu | Activation::ShiftedRelu { .. } | Activation::FatRelu { .. }
        )
    }
}

/// A normalisation over the last dimension.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Norm {
    /// What is normalised by.
    pub kind: NormKind,
    /// Added to the variance (or mean square).
    pub eps: f64,
    /// Whether there is a bias.
    pub bias: bool,
}

/// The two normalisations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum NormKind {
    /// Mean and variance.
    LayerNorm {},
    /// Root mean square.
    Rms {
        /// The stored weight is an offset from 1 (Gemma).
        unit_offset: bool,
    },
}

/// Where the norms stand in a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum NormPlacement {
    /// In front of attention and MLP, inside the residual branches.
    Pre,
}

/// How attention and MLP join the residual stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Residual {
    /// `x += attention(norm1(x)); x += mlp(norm2(x))`.
    Sequential {},
    /// `x += attention(norm1(x)) + mlp(norm2(x))`.
    Parallel {
        /// Whether both branches read one norm.
        norms: ParallelNorms,
    },
}

/// The norms of a parallel block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ParallelNorms {
    /// One norm feeds attention and MLP (Falcon 7B).
    Shared,
    /// Each has its own (GPT-NeoX, Falcon 40B).
    Separate,
}

/// How positions enter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Position {
    /// Rotary embedding of queries and keys.
    Rope {
        /// Base of the frequencies.
        theta: f64,
        /// How many of a head's dimensions turn (from its start).
        rotary_dim: usize,
        /// Which dimensions form a pair.
        layout: RopeLayout,
        /// How frequencies are changed for longer contexts.
        scaling: RopeScaling,
    },
    /// A table of vectors added to the embeddings.
    Learned {
        /// Added to a position before the look-up (OPT: 2).
        offset: usize,
    },
    /// A linear penalty on the scores: `slope(head) * (j - i)`.
    Alibi {
        /// The slope is rounded to bfloat16, and so is each `slope * j`, `j` counted from
        /// the first key (transformers' Falcon; its checkpoints were trained that way).
        /// The penalty is then `slope * j` alone: softmax does not see a shift by `i`.
        bf16_slopes: bool,
        /// The penalty is scaled together with the scores (Falcon: `(q k + penalty) * scale`),
        /// or added after (MPT, BLOOM: `q k * scale + penalty`).
        scaled: bool,
    },
}

/// Which dimensions of a head form a rotary pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RopeLayout {
    /// `i` with `i + rotary_dim/2`.
    Half,
    /// `2i` with `2i + 1`.
    Interleaved,
}

/// How rotary frequencies are changed for longer contexts.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum RopeScaling {
    /// Not at all.
    None {},
    /// Every frequency divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3: low frequencies divided, high kept, those between interpolated.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are low.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are high.
        high_freq_factor: f64,
        /// Context length before scaling.
        original_max_positions: usize,
    },
}

/// What happens to a looked-up embedding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Embedding {
    /// Factor on the embedding (Gemma: `sqrt(hidden)`).
    pub multiplier: Option<f64>,
}

/// The projection onto the vocabulary.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Head {
    /// Whether it is the embedding itself.
    pub tied: bool,
    /// Whether it has a bias.
    pub bias: bool,
    /// `cap * tanh(logit / cap)` on the logits (Gemma 2).
    pub softcap: Option<f64>,
}

impl Layer {
    /// Whether attention and MLP read the output of one norm.
    pub fn shares_norm(&self) -> bool {
        self.residual == Residual::Parallel { norms: ParallelNorms::Shared }
    }

    /// How many elements of a token enter the matrices at `site`, in a model of width
    /// `hidden`.
    pub fn width_at(&self, site: Site, hidden: usize) -> usize {
        match site {
            Site::QkvIn | Site::UpIn => hidden,
            Site::OIn => self.attention.q_width(),
            Site::DownIn => self.mlp.ffn,
        }
    }
}

impl Attention {
    /// Columns of the query projection: `heads * head_dim`.
    pub fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Columns of the key (or value) projection: `kv_heads * head_dim`.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Columns of queries, keys and values together.
    pub fn qkv_width(&self) -> usize {
        self.q_width() + 2 * self.kv_width()
    }
}

impl DecoderSpec {
    /// Parameters in all; a tied head counts once.
    pub fn parameter_count(&self) -> usize {
        let size = |slot| self.shape(slot).into_iter().fold(1, usize::saturating_mul);
        self.slots().into_iter().map(size).fold(0, usize::saturating_add)
    }

    /// The slots that this decoder's weights fill, in the order a token meets them.
    pub fn slots(&self) -> Vec<Slot> {
        crate::weights::slots(self)
    }

    /// The shape of a slot: `[out, in]` for a matrix, `[n]` for a vector, whatever the
    /// checkpoint's own layout. Empty for a layer that does not exist.
    pub fn shape(&self, slot: Slot) -> Vec<usize> {
        crate::weights::shape(self, slot)
    }
}
