//! What stands for packed weights: a hash of all that they depend on.

use relufy_model::layer::LayerPlan;
use relufy_spec::DecoderSpec;

use crate::layout::LayerLayout;
use crate::{Calibrated, Error, Format, Result};

use super::file::VERSION;
use super::origin::Origin;

/// The key of weights, packed for a decoder: hexadecimal.
pub(super) fn of(origin: &Origin, spec: &DecoderSpec, calibrated: &Calibrated) -> Result<String> {
    let Origin { relufy, format, weights, .. } = origin;
    let mut hasher = blake3::Hasher::new();
    hasher.update(relufy.as_bytes());
    hasher.update(&VERSION.to_le_bytes());
    hasher.update(&1u32.to_ne_bytes());
    hasher.update(format.name().as_bytes());
    let spec_json = serde_json::to_vec(spec).map_err(|error| Error::Decoder(error.to_string()))?;
    hasher.update(&(spec_json.len() as u64).to_le_bytes());
    hasher.update(&spec_json);
    for (n, layer) in spec.layers.iter().enumerate() {
        let (plan, thresholds) =
            (LayerPlan::new(layer, &spec.position), calibrated.thresholds(n, layer));
        let layout = LayerLayout::new(&plan, &thresholds, calibrated.densities(n));
        let LayerLayout { qkv, o, first, up } = layout;
        hasher.update(&[qkv, o, first, up].map(u8::from));
    }
    hasher.update(weights.hash.as_bytes());
    Ok(hasher.finalize().to_hex().to_string())
}

/// A name that tells people what is in the file.
pub(super) fn file_name(model: &str, format: Format, key: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '-' };
    let model: String = model.chars().map(plain).take(80).collect();
    format!("{}-{format}-{}.packed", model.trim_start_matches('.'), &key[..16.min(key.len())])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_plain() {
        let key = "0123456789abcdef0123";
        assert_eq!(
            file_name("org/my model", Format::F16, key),
            "org-my-model-f16-0123456789abcdef.packed"
        );
        assert_eq!(file_name("../x", Format::Int8, "ab"), "-x-int8-ab.packed");
    }
}
