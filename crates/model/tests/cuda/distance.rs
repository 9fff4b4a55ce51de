//! How far a GPU's results are from the CPU's, how far they may be, and the worst that was seen.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Mutex, PoisonError};

use candle_core::DType;
use relufy_model::{DensityTap, ParamId};

/// What a pass over a batch gives.
pub struct Outcome {
    pub loss: f64,
    pub logits: Vec<f32>,
    pub gradients: Vec<(ParamId, Vec<f32>)>,
    pub tap: DensityTap,
    /// Whether the model has ReLUs.
    pub relu: bool,
}

/// Distances relative to the CPU's, by norm.
#[derive(Clone, Copy, Debug, Default)]
pub struct Distance {
    pub loss: f64,
    pub logits: f64,
    /// Of all parameters as one vector.
    pub gradient: f64,
    /// Of the parameter that is farthest off, see [`part`].
    pub part: f64,
}

/// The bounds: about three times the worst of all kinds, which the summary shows.
mod bounds {
    use super::Distance;

    pub const F32: Distance = Distance { loss: 2e-7, logits: 2e-6, gradient: 2e-6, part: 2e-6 };
    pub const F32_RELU: Distance =
        Distance { loss: 2e-7, logits: 2e-6, gradient: 2e-6, part: 2e-6 };
    pub const BF16: Distance = Distance { loss: 2e-3, logits: 2e-2, gradient: 4e-2, part: 3e-2 };
    /// Rounding sends what lies next to ReLU's kink to its other side, gradient and all.
    pub const BF16_RELU: Distance =
        Distance { loss: 2e-3, logits: 2e-2, gradient: 1e-1, part: 1e-1 };
}

/// A number type, and whether there are ReLUs.
type Arithmetic = (&'static str, bool);

fn bound((dtype, relu): Arithmetic) -> Distance {
    match (dtype, relu) {
        ("bf16", false) => bounds::BF16,
        ("bf16", true) => bounds::BF16_RELU,
        (_, false) => bounds::F32,
        (_, true) => bounds::F32_RELU,
    }
}

impl Distance {
    pub fn between(found: &Outcome, expected: &Outcome) -> Distance {
        let all = |outcome: &Outcome| -> Vec<f32> {
            outcome.gradients.iter().flat_map(|(_, values)| values.iter().copied()).collect()
        };
        let whole = norm(&all(expected));
        let parts = found.gradients.iter().zip(&expected.gradients);
        Distance {
            loss: (found.loss - expected.loss).abs() / expected.loss,
            logits: relative(&found.logits, &expected.logits),
            gradient: relative(&all(found), &all(expected)),
            part: parts.map(|((_, f), (_, e))| part(f, e, whole)).fold(0.0, worse),
        }
    }

    fn parts(self) -> [(&'static str, f64); 4] {
        let Distance { loss, logits, gradient, part } = self;
        [("loss", loss), ("logits", logits), ("gradient", gradient), ("part", part)]
    }

    fn worst(self, other: Distance) -> Distance {
        Distance {
            loss: worse(self.loss, other.loss),
            logits: worse(self.logits, other.logits),
            gradient: worse(self.gradient, other.gradient),
            part: worse(self.part, other.part),
        }
    }
}

impl fmt::Display for Distance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.parts().iter().try_for_each(|(name, value)| write!(f, "  {name} {value:.1e}"))
    }
}

/// The larger, and infinity where one is no number.
fn worse(a: f64, b: f64) -> f64 {
    let number = |x: f64| if x.is_nan() { f64::INFINITY } else { x };
    number(a).max(number(b))
}

fn norm(values: &[f32]) -> f64 {
    values.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt()
}

fn apart(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt()
}

/// `|a - b| / |b|`.
fn relative(a: &[f32], b: &[f32]) -> f64 {
    apart(a, b) / norm(b).max(1e-10)
}

/// A parameter's gradient. One that nearly cancels is only held to the size of the whole.
fn part(found: &[f32], expected: &[f32], whole: f64) -> f64 {
    apart(found, expected) / (2.0 * norm(expected) + 0.02 * whole).max(1e-10)
}

/// The worst of each kind of model.
static SEEN: Mutex<BTreeMap<(Arithmetic, usize), Distance>> = Mutex::new(BTreeMap::new());

/// Notes how far `found` is from the CPU's result and demands that it is within the bounds.
#[track_caller]
pub fn compare(kind: usize, dtype: DType, found: &Outcome, expected: &Outcome) {
    let arithmetic = (if dtype == DType::BF16 { "bf16" } else { "f32" }, found.relu);
    let distance = Distance::between(found, expected);
    let mut seen = SEEN.lock().unwrap_or_else(PoisonError::into_inner);
    let worst = seen.entry((arithmetic, kind)).or_default();
    *worst = worst.worst(distance);
    drop(seen);
    for ((what, far), (_, most)) in distance.parts().into_iter().zip(bound(arithmetic).parts()) {
        assert!(far <= most, "{what} is too far off ({most:.0e} allowed):{distance}");
    }
}

/// A line for each kind of model, and one over all with its bounds, for each arithmetic that ran.
pub fn summary(names: &[String]) -> String {
    let seen = SEEN.lock().unwrap_or_else(PoisonError::into_inner);
    let mut all: BTreeMap<Arithmetic, Distance> = BTreeMap::new();
    let mut lines = vec!["the worst distances from the CPU, relative by norm:".to_string()];
    let label = |(dtype, relu): Arithmetic| format!("{dtype}{}", if relu { " ReLU" } else { "" });
    for (&(arithmetic, kind), distance) in &*seen {
        lines.push(format!("{:10} {:12}{distance}", label(arithmetic), names[kind]));
        let worst = all.entry(arithmetic).or_default();
        *worst = worst.worst(*distance);
    }
    for (&arithmetic, distance) in &all {
        lines.push(format!("{:10} {:12}{distance}", label(arithmetic), "all"));
        lines.push(format!("{:10} {:12}{}", label(arithmetic), "allowed", bound(arithmetic)));
    }
    lines.join("\n")
}
