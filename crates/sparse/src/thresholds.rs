//! Activations that are taken as zero although they are not: for models that are not exact.

use relufy_spec::{DecoderSpec, Layer};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The magnitudes up to which activations are taken as zero, layer by layer. What is computed with
/// them is another function than the model's: an approximation, which should be named as such.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Thresholds {
    /// One a layer, from the first.
    pub layers: Vec<SiteThresholds>,
}

/// The same at one layer's sites: where `|x|` is at most the threshold, zero is taken. At 0 nothing
/// changes, and such a site is treated as if there were no threshold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SiteThresholds {
    /// At the input of queries, keys and values, after the norm and the site's operation.
    pub qkv: f32,
    /// At the input of attention's output projection.
    pub o: f32,
    /// At the input of up and gate. In a layer whose branches share one norm, that of `qkv` holds.
    pub up: f32,
    /// At the MLP's activation: the gate's, where there is one.
    pub gate: f32,
}

impl Thresholds {
    /// Whether they fit a decoder.
    pub(crate) fn check(&self, spec: &DecoderSpec) -> Result<()> {
        let (found, expected) = (self.layers.len(), spec.layers.len());
        if found != expected {
            let why = format!("thresholds of {found} layers for a decoder of {expected}");
            return Err(Error::Decoder(why));
        }
        for (n, SiteThresholds { qkv, o, up, gate }) in self.layers.iter().enumerate() {
            if let Some(t) = [qkv, o, up, gate].into_iter().find(|t| !(**t >= 0.0 && t.is_finite()))
            {
                let why = format!("a threshold of {t} in layer {n}; magnitudes are 0 or more");
                return Err(Error::Decoder(why));
            }
        }
        Ok(())
    }

    /// Those of layer `n`.
    pub(crate) fn layer(&self, n: usize, layer: &Layer) -> SiteThresholds {
        let mut each = self.layers.get(n).copied().unwrap_or_default();
        if layer.shares_norm() {
            each.up = each.qkv;
        }
        each
    }

    /// Whether any is above 0.
    pub fn any(&self) -> bool {
        self.layers.iter().any(|each| *each != SiteThresholds::default())
    }
}

/// Puts zero where a magnitude is at most `threshold`.
pub(crate) fn drop_small(x: &mut [f32], threshold: f32) {
    if threshold > 0.0 {
        // Not a number stays what it is.
        x.iter_mut().for_each(|x| *x = if x.abs() <= threshold { 0.0 } else { *x });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_small_is_dropped_on_both_sides() {
        let values = [0.5, -0.5, 0.51, -0.51, 0.0, -0.0, 1e-9];
        let mut x = values;
        drop_small(&mut x, 0.5);
        assert_eq!(x, [0.0, 0.0, 0.51, -0.51, 0.0, 0.0, 0.0]);
        let mut x = values;
        drop_small(&mut x, 0.0);
        assert_eq!(x.map(f32::to_bits), values.map(f32::to_bits));
        let mut x = [f32::NAN];
        drop_small(&mut x, 0.5);
        assert!(x[0].is_nan());
    }
}
