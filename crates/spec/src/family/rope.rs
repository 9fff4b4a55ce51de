//! Rotary positions, as transformers 4 and 5 write them into a `config.json`.

use crate::{Position, Result, RopeLayout, RopeScaling};

use super::{common::unsupported, keys::Keys};

/// Names and defaults of the rotary keys, which differ between families.
pub(super) struct RopeKeys {
    /// The base, outside `rope_parameters`.
    pub theta: &'static [&'static str],
    /// The rotated part of a head, outside `rope_parameters`.
    pub fraction: &'static [&'static str],
    /// The rotated part where nothing is said.
    pub default_fraction: f64,
}

/// The names that most families use.
pub(super) const ROPE_KEYS: RopeKeys = RopeKeys {
    theta: &["rope_theta"],
    fraction: &["partial_rotary_factor"],
    default_fraction: 1.0,
};

/// Reads rotary positions, from transformers 4's keys (`rope_theta`, `rope_scaling`) or
/// transformers 5's one object (`rope_parameters`).
pub(super) fn rope(
    keys: &mut Keys<'_>,
    names: &RopeKeys,
    head_dim: usize,
    max_positions: usize,
) -> Result<Position> {
    let mut theta = keys.alias::<f64>(names.theta)?;
    let mut fraction = keys.alias::<f64>(names.fraction)?;
    let mut scaling: Option<RopeScaling> = None;
    for (key, path) in [("rope_scaling", "rope_scaling."), ("rope_parameters", "rope_parameters.")]
    {
        let Some(value) = keys.take(key) else { continue };
        let map = value.as_object().ok_or_else(|| keys.bad(key, "an object", value))?;
        let mut inner = Keys::new(map, path);
        merge(&mut inner, "rope_theta", &mut theta)?;
        merge(&mut inner, "partial_rotary_factor", &mut fraction)?;
        let found = rope_scaling(&mut inner, max_positions)?;
        inner.finish()?;
        if scaling.is_some_and(|earlier| earlier != found) {
            return Err(keys.bad(key, "what `rope_scaling` says", value));
        }
        scaling = Some(found);
    }
    let fraction = fraction.unwrap_or(names.default_fraction);
    if !(fraction > 0.0 && fraction <= 1.0) {
        let key = names.fraction.first().copied().unwrap_or("partial_rotary_factor");
        return Err(keys.bad(key, "a number above 0, at most 1", fraction));
    }
    Ok(Position::Rope {
        theta: theta.unwrap_or(10_000.0),
        // Truncated, as transformers does it.
        rotary_dim: (head_dim as f64 * fraction) as usize,
        layout: RopeLayout::Half,
        scaling: scaling.unwrap_or(RopeScaling::None {}),
    })
}

/// Takes a number from an inner object; where the outer one has it too, both must agree.
fn merge(inner: &mut Keys<'_>, key: &str, outer: &mut Option<f64>) -> Result<()> {
    let Some(found) = inner.optional::<f64>(key)? else { return Ok(()) };
    match outer.replace(found) {
        Some(earlier) if earlier != found => {
            Err(inner.bad(key, &format!("{earlier}, as outside"), found))
        }
        _ => Ok(()),
    }
}

fn rope_scaling(keys: &mut Keys<'_>, max_positions: usize) -> Result<RopeScaling> {
    let kind = keys.alias::<String>(&["rope_type", "type"])?.unwrap_or("default".to_owned());
    match kind.as_str() {
        "default" => Ok(RopeScaling::None {}),
        "linear" => Ok(RopeScaling::Linear { factor: keys.required("factor")? }),
        "llama3" => Ok(RopeScaling::Llama3 {
            factor: keys.required("factor")?,
            low_freq_factor: keys.required("low_freq_factor")?,
            high_freq_factor: keys.required("high_freq_factor")?,
            original_max_positions: keys
                .size_or(&["original_max_position_embeddings"], max_positions)?,
        }),
        other => Err(unsupported(format!("rotary scaling `{other}`"))),
    }
}
