//! Whether a spec can be a decoder at all: for configs that lie, and for specs that a
//! person wrote by hand.

use crate::{
    Activation, DecoderSpec, Error, Layer, Norm, NormKind, Position, Result, RopeScaling, SiteOp,
};

/// The largest size of one dimension. Products of two still fit a `usize`.
pub const MAX_SIZE: usize = 1 << 31;

/// The most parameters: so that bytes of weights, gradients and moments fit a `u64`.
const MAX_PARAMETERS: usize = 1 << 50;

/// The most layers; each takes a few hundred bytes before any weight is there.
pub(crate) const MAX_LAYERS: usize = 1 << 16;

type Check = std::result::Result<(), String>;

impl DecoderSpec {
    /// Checks what no decoder can do without: sizes within bounds, heads that divide,
    /// rotary dimensions in pairs, finite numbers. [`crate::family::parse`] calls it; call
    /// it for a spec that comes from anywhere else.
    ///
    /// # Errors
    /// [`Error::Spec`] saying which layer and what.
    pub fn validate(&self) -> Result<()> {
        self.check().map_err(|why| Error::Spec { why })
    }

    fn check(&self) -> Check {
        size("vocab", self.vocab)?;
        size("hidden", self.hidden)?;
        size("max_positions", self.max_positions)?;
        size("the number of layers", self.layers.len())?;
        if self.layers.len() > MAX_LAYERS {
            return Err(format!("{} layers; at most {MAX_LAYERS}", self.layers.len()));
        }
        position(&self.position)?;
        norm("the final norm", &self.final_norm)?;
        positive("the embedding's multiplier", self.embedding.multiplier.unwrap_or(1.0))?;
        positive("the head's softcap", self.head.softcap.unwrap_or(1.0))?;
        for (n, layer) in self.layers.iter().enumerate() {
            check_layer(layer, &self.position).map_err(|why| format!("layer {n}: {why}"))?;
        }
        shared_norms(self)?;
        match self.parameter_count() {
            count if count > MAX_PARAMETERS => {
                Err(format!("{count} parameters; at most {MAX_PARAMETERS}"))
            }
            _ => Ok(()),
        }
    }
}

/// Where attention and MLP read one norm, they read one tensor.
pub(crate) fn shared_norms(spec: &DecoderSpec) -> Check {
    let differs = |layer: &Layer| layer.shares_norm() && layer.sites.qkv_in != layer.sites.up_in;
    match spec.layers.iter().position(differs) {
        Some(n) => Err(format!(
            "layer {n}: attention and MLP read one shared norm, so `qkv` and `up` must get the \
             same operation"
        )),
        None => Ok(()),
    }
}

fn size(what: &str, value: usize) -> Check {
    match value {
        0 => Err(format!("{what} is 0")),
        value if value > MAX_SIZE => Err(format!("{what} is {value}; at most {MAX_SIZE}")),
        _ => Ok(()),
    }
}

fn positive(what: &str, value: f64) -> Check {
    if value.is_finite() && value > 0.0 {
        return Ok(());
    }
    Err(format!("{what} is {value}; it must be a positive number"))
}

fn finite(what: &str, value: f64) -> Check {
    if value.is_finite() { Ok(()) } else { Err(format!("{what} is {value}")) }
}

fn norm(what: &str, norm: &Norm) -> Check {
    positive(&format!("epsilon of {what}"), norm.eps)?;
    match norm.kind {
        NormKind::Rms { .. } if norm.bias => Err(format!("{what}: an RMS norm has no bias")),
        _ => Ok(()),
    }
}

fn position(position: &Position) -> Check {
    match *position {
        Position::Rope { theta, rotary_dim, scaling, .. } => {
            positive("rope theta", theta)?;
            if rotary_dim == 0 || !rotary_dim.is_multiple_of(2) {
                return Err(format!("{rotary_dim} rotary dimensions; they turn in pairs"));
            }
            match scaling {
                RopeScaling::None {} => Ok(()),
                RopeScaling::Linear { factor } => positive("rope factor", factor),
                RopeScaling::Llama3 {
                    factor,
                    low_freq_factor,
                    high_freq_factor,
                    original_max_positions,
                } => {
                    positive("rope factor", factor)?;
                    positive("rope low_freq_factor", low_freq_factor)?;
                    positive("rope high_freq_factor", high_freq_factor)?;
                    size("rope original_max_positions", original_max_positions)?;
                    if high_freq_factor <= low_freq_factor {
                        return Err(format!(
                            "rope high_freq_factor {high_freq_factor} is not above \
                             low_freq_factor {low_freq_factor}"
                        ));
                    }
                    Ok(())
                }
            }
        }
        Position::Learned { offset } if offset > MAX_SIZE => {
            Err(format!("position offset {offset}; at most {MAX_SIZE}"))
        }
        Position::Learned { .. } | Position::Alibi { .. } => Ok(()),
    }
}

fn check_layer(layer: &Layer, position: &Position) -> Check {
    let attention = &layer.attention;
    size("heads", attention.heads)?;
    size("kv_heads", attention.kv_heads)?;
    size("head_dim", attention.head_dim)?;
    size("heads * head_dim", attention.heads.saturating_mul(attention.head_dim))?;
    if !attention.heads.is_multiple_of(attention.kv_heads) {
        return Err(format!(
            "{} heads cannot share {} key/value heads",
            attention.heads, attention.kv_heads
        ));
    }
    if let Position::Rope { rotary_dim, .. } = *position
        && rotary_dim > attention.head_dim
    {
        return Err(format!("{rotary_dim} rotary dimensions in heads of {}", attention.head_dim));
    }
    if let Some(qk_norm) = &attention.qk_norm {
        norm("the norm of queries and keys", qk_norm)?;
        if qk_norm.bias {
            return Err("the norm of queries and keys has no bias".to_owned());
        }
    }
    positive("attention scale", attention.scale)?;
    positive("attention softcap", attention.softcap.unwrap_or(1.0))?;
    size("attention window", attention.window.unwrap_or(1))?;
    norm("the norm", &layer.norm)?;
    size("ffn", layer.mlp.ffn)?;
    match layer.mlp.activation {
        Activation::Swish { beta } => finite("swish beta", beta)?,
        Activation::ShiftedRelu { shift } => finite("ReLU shift", shift)?,
        Activation::FatRelu { threshold } => finite("FATReLU threshold", threshold)?,
        Activation::Silu | Activation::Gelu | Activation::GeluTanh | Activation::Relu => {}
    }
    crate::Site::ALL.into_iter().try_for_each(|site| match layer.sites.get(site) {
        SiteOp::ShiftedRelu { shift } => finite("ReLU shift", shift),
        SiteOp::FatRelu { threshold } => finite("FATReLU threshold", threshold),
        SiteOp::Identity | SiteOp::Relu => Ok(()),
    })
}
