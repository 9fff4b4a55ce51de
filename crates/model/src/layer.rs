//! What a layer's spec means to the arithmetic, worked out once: shared by the decoder here and by
//! engines that decode in their own way.

use relufy_ops::attention::{Alibi, Heads};
use relufy_ops::norm::NormKind;
use relufy_ops::pointwise::Pointwise;
use relufy_ops::rope::RopePairs;
use relufy_spec::{
    Activation, Layer, MlpKind, NormKind as SpecNorm, ParallelNorms, Position, Residual,
    RopeLayout, RopeScaling, SiteOp,
};

/// One layer, in the terms of the operations.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerPlan {
    /// Attention's heads and scores.
    pub heads: Heads,
    /// Columns of the queries.
    pub q_width: usize,
    /// Columns of the keys, and of the values.
    pub kv_width: usize,
    /// The norms in front of both branches.
    pub norm: NormPlan,
    /// The norm over each head of queries and keys.
    pub qk_norm: Option<NormPlan>,
    /// Whether the MLP has a gate.
    pub gated: bool,
    /// Neurons of the MLP.
    pub ffn: usize,
    /// The MLP's activation, of the gate where there is one.
    pub activation: Pointwise,
    /// At the input of queries, keys and values.
    pub qkv_in: Pointwise,
    /// At the input of attention's output projection.
    pub o_in: Pointwise,
    /// At the input of up and gate.
    pub up_in: Pointwise,
    /// At the input of down, after the activation.
    pub down_in: Pointwise,
    /// How the branches join.
    pub joins: Joins,
}

/// How the two branches meet the residual stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Joins {
    /// One after the other.
    Sequential,
    /// Side by side, reading one norm.
    ParallelShared,
    /// Side by side, each with its norm.
    ParallelSeparate,
}

/// A norm, in the terms of the operations.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NormPlan {
    /// Which norm.
    pub kind: NormKind,
    /// Added to the variance.
    pub eps: f32,
}

impl LayerPlan {
    /// What a layer of a decoder with such positions does.
    pub fn new(layer: &Layer, position: &Position) -> LayerPlan {
        let attention = &layer.attention;
        let sites = layer.sites;
        LayerPlan {
            heads: Heads {
                heads: attention.heads,
                kv_heads: attention.kv_heads,
                head_dim: attention.head_dim,
                scale: attention.scale as f32,
                window: attention.window,
                softcap: attention.softcap.map(|cap| cap as f32),
                alibi: alibi(position, attention.heads, attention.scale),
            },
            q_width: attention.q_width(),
            kv_width: attention.kv_width(),
            norm: norm_plan(&layer.norm),
            qk_norm: attention.qk_norm.as_ref().map(norm_plan),
            gated: layer.mlp.kind == MlpKind::Gated,
            ffn: layer.mlp.ffn,
            activation: activation(layer.mlp.activation),
            qkv_in: site_op(sites.qkv_in),
            o_in: site_op(sites.o_in),
            up_in: site_op(sites.up_in),
            down_in: site_op(sites.down_in),
            joins: match layer.residual {
                Residual::Sequential {} => Joins::Sequential,
                Residual::Parallel { norms: ParallelNorms::Shared } => Joins::ParallelShared,
                Residual::Parallel { norms: ParallelNorms::Separate } => Joins::ParallelSeparate,
            },
        }
    }
}

/// A norm's spec in the terms of the operations.
pub fn norm_plan(norm: &relufy_spec::Norm) -> NormPlan {
    let kind = match norm.kind {
        SpecNorm::LayerNorm {} => NormKind::Layer,
        SpecNorm::Rms { unit_offset } => NormKind::Rms { unit_offset },
    };
    NormPlan { kind, eps: norm.eps as f32 }
}

fn activation(activation: Activation) -> Pointwise {
    match activation {
        Activation::Silu => Pointwise::Silu,
        Activation::Gelu => Pointwise::Gelu,
        Activation::GeluTanh => Pointwise::GeluTanh,
        Activation::Swish { beta } => Pointwise::Swish { beta: beta as f32 },
        Activation::Relu => Pointwise::Relu,
        Activation::ShiftedRelu { shift } => Pointwise::ShiftedRelu { shift: shift as f32 },
        Activation::FatRelu { threshold } => Pointwise::FatRelu { threshold: threshold as f32 },
    }
}

fn site_op(op: SiteOp) -> Pointwise {
    match op {
        SiteOp::Identity => Pointwise::Identity,
        SiteOp::Relu => Pointwise::Relu,
        SiteOp::ShiftedRelu { shift } => Pointwise::ShiftedRelu { shift: shift as f32 },
        SiteOp::FatRelu { threshold } => Pointwise::FatRelu { threshold: threshold as f32 },
    }
}

/// ALiBi's penalty: slopes are powers of `2^(-8/n)` for the largest power of two `n` up to
/// `heads`, then every other power of `2^(-4/n)` for the rest (Press et al. 2022).
fn alibi(position: &Position, heads: usize, scale: f64) -> Option<Alibi> {
    let Position::Alibi { bf16_slopes, scaled } = *position else { return None };
    let n = if heads.is_power_of_two() { heads } else { heads.next_power_of_two() / 2 };
    let base = |n: usize| 2f64.powf(-8.0 / n as f64);
    let first = (1..=n).map(|i| base(n).powi(i as i32));
    let rest = (0..heads - n).map(|i| base(2 * n).powi(2 * i as i32 + 1));
    let stored = |slope: f64| match bf16_slopes {
        true => half::bf16::from_f64(slope).to_f32(),
        false => slope as f32,
    };
    Some(Alibi {
        slopes: first.chain(rest).map(stored).collect(),
        factor: if scaled { scale as f32 } else { 1.0 },
        bf16: bf16_slopes,
    })
}

/// Which dimensions of a head form a rotary pair.
pub fn rope_pairs(layout: RopeLayout) -> RopePairs {
    match layout {
        RopeLayout::Half => RopePairs::Half,
        RopeLayout::Interleaved => RopePairs::Interleaved,
    }
}

/// Rotary frequencies, in f32 as Hugging Face computes them: `theta^(-2i/rotary_dim)`,
/// then the scaling (transformers `modeling_rope_utils.py`).
pub fn inverse_frequencies(theta: f64, rotary_dim: usize, scaling: RopeScaling) -> Vec<f64> {
    let plain = (0..rotary_dim / 2).map(|i| {
        let exponent = (2 * i) as f32 / rotary_dim as f32;
        f64::from(1.0 / (theta as f32).powf(exponent))
    });
    match scaling {
        RopeScaling::None {} => plain.collect(),
        RopeScaling::Linear { factor } => plain.map(|frequency| frequency / factor).collect(),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_positions,
        } => {
            let original = original_max_positions as f64;
            plain
                .map(|frequency| {
                    let wavelength = std::f64::consts::TAU / frequency;
                    if wavelength > original / low_freq_factor {
                        frequency / factor
                    } else if wavelength < original / high_freq_factor {
                        frequency
                    } else {
                        let smooth = (original / wavelength - low_freq_factor)
                            / (high_freq_factor - low_freq_factor);
                        (1.0 - smooth) * frequency / factor + smooth * frequency
                    }
                })
                .collect()
        }
    }
}
