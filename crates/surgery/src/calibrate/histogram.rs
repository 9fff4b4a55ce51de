//! Counts of values over a fixed grid, and the quantiles that follow from them.
//!
//! The grid is fine near zero and coarse far away: 32 bins an octave of `|x|` between
//! `2^-12` and `2^8`, on both sides, one bin around zero and one beyond each end. So counts
//! of any two runs can be added, and nothing has to be known of the values beforehand.

use std::sync::{Arc, LazyLock};

use serde::{Deserialize, Serialize};

const PER_OCTAVE: i32 = 32;
const LOWEST: i32 = -12;
const HIGHEST: i32 = 8;

/// The edges, ascending.
pub(super) static EDGES: LazyLock<Arc<[f32]>> = LazyLock::new(|| {
    let positive: Vec<f32> = (LOWEST * PER_OCTAVE..=HIGHEST * PER_OCTAVE)
        .map(|step| 2f64.powf(f64::from(step) / f64::from(PER_OCTAVE)) as f32)
        .collect();
    positive.iter().rev().map(|edge| -edge).chain(positive.iter().copied()).collect()
});

/// How many values fell between successive edges of the grid: one count below the first
/// edge and one from the last on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Histogram {
    counts: Vec<u64>,
}

impl Default for Histogram {
    fn default() -> Histogram {
        Histogram { counts: vec![0; EDGES.len() + 1] }
    }
}

impl Histogram {
    /// The grid's edges; bin `i` holds `edges[i - 1] <= x < edges[i]`.
    pub fn edges() -> &'static [f32] {
        &EDGES
    }

    /// The counts, one more than there are edges.
    pub fn counts(&self) -> &[u64] {
        &self.counts
    }

    /// All values counted.
    pub fn total(&self) -> u64 {
        self.counts.iter().sum()
    }

    pub(super) fn add(&mut self, counts: &[u64]) {
        self.counts.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
    }

    /// The value below which a share `q` of the values lies, interpolated inside its bin
    /// (whose ends differ by 2.2 %); the grid's end where it lies beyond. `None` without
    /// values.
    pub fn quantile(&self, q: f64) -> Option<f64> {
        let (edges, total) = (Histogram::edges(), self.total());
        let wanted = q.clamp(0.0, 1.0) * total as f64;
        let mut below = 0.0;
        for (bin, count) in self.counts.iter().enumerate().filter(|(_, count)| **count > 0) {
            let count = *count as f64;
            if below + count >= wanted {
                let ends = (bin.checked_sub(1).and_then(|i| edges.get(i)), edges.get(bin));
                return match ends {
                    (Some(low), Some(high)) => {
                        let (low, high) = (f64::from(*low), f64::from(*high));
                        Some(low + (high - low) * (wanted - below) / count)
                    }
                    (one, other) => one.or(other).map(|edge| f64::from(*edge)),
                };
            }
            below += count;
        }
        None
    }

    /// The least magnitude of `f(x)` that a share `q` of all values does not exceed, to the width of
    /// a bin (2.2 %); the grid's end where it lies beyond. `None` without values.
    pub fn magnitude_quantile(&self, q: f64, f: impl Fn(f32) -> f32) -> Option<f32> {
        let edges = Histogram::edges();
        let ends = |bin: usize| (bin.checked_sub(1).and_then(|i| edges.get(i)), edges.get(bin));
        let bins = self.counts.iter().enumerate().filter(|(_, count)| **count > 0);
        let mut magnitudes: Vec<(f32, u64)> = bins
            .filter_map(|(bin, count)| {
                // The end that is farther away: all of the bin is meant.
                let far = match ends(bin) {
                    (Some(low), Some(high)) => f(*low).abs().max(f(*high).abs()),
                    (one, other) => f(*one.or(other)?).abs(),
                };
                Some((far, *count))
            })
            .collect();
        magnitudes.sort_by(|a, b| a.0.total_cmp(&b.0));
        let wanted = q.clamp(0.0, 1.0) * self.total() as f64;
        let mut below = 0;
        let found = magnitudes.iter().find(|(_, count)| {
            below += count;
            below as f64 >= wanted
        });
        Some(found.or(magnitudes.last())?.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Tensor};

    fn of(values: &[f32]) -> Histogram {
        let tensor = Tensor::from_slice(values, values.len(), &Device::Cpu).unwrap();
        let mut histogram = Histogram::default();
        histogram.add(&relufy_ops::reduce::histogram(&tensor, &EDGES).unwrap());
        histogram
    }

    #[test]
    fn quantiles_are_those_of_the_sorted_values() {
        // A skewed distribution over several octaves and both signs.
        let mut values: Vec<f32> = (0..100_003)
            .map(|i| {
                let u = (i as f32 + 0.5) / 100_003.0;
                (u / (1.0 - u)).ln() * (1.0 + u)
            })
            .collect();
        let histogram = of(&values);
        values.sort_by(f32::total_cmp);
        assert_eq!(histogram.total(), values.len() as u64);
        for q in [0.001, 0.05, 0.3, 0.5, 0.62, 0.95, 0.999] {
            let exact = f64::from(values[(q * values.len() as f64) as usize]);
            let found = histogram.quantile(q).unwrap();
            // A tenth of a bin.
            assert!((found - exact).abs() <= 2.2e-3 * exact.abs() + 1e-3, "{q}: {found}, {exact}");
            let below = values.iter().filter(|value| f64::from(**value) < found).count();
            assert!((below as f64 / values.len() as f64 - q).abs() < 1e-3, "{q}");
        }
    }

    #[test]
    fn magnitudes_are_those_of_the_values_after_a_function() {
        let values: Vec<f32> = (0..10_000).map(|i| (i as f32 * 0.37).sin() * 3.0 + 0.4).collect();
        let histogram = of(&values);
        let silu = |x: f32| x / (1.0 + (-x).exp());
        type Function<'a> = &'a dyn Fn(f32) -> f32;
        let functions: [Function<'_>; 3] = [&|x| x, &silu, &|x| x.max(0.0)];
        for (n, f) in functions.into_iter().enumerate() {
            for q in [0.05, 0.3, 0.5, 0.9] {
                let threshold = histogram.magnitude_quantile(q, f).unwrap();
                let small = values.iter().filter(|x| f(**x).abs() <= threshold).count();
                let share = small as f64 / values.len() as f64;
                // Half of the values are negative: a ReLU makes zeros of more than 5 or 30 %.
                let at_most = if n == 2 { q.max(0.46) } else { q } + 0.02;
                assert!(share >= q && share <= at_most, "function {n}, {q}: {share}");
            }
        }
        assert_eq!(histogram.magnitude_quantile(0.3, |x| x.max(0.0)), Some(0.0));
        assert_eq!(Histogram::default().magnitude_quantile(0.5, |x| x), None);
    }

    #[test]
    fn the_ends_are_finite_and_nothing_has_no_quantile() {
        assert_eq!(Histogram::default().quantile(0.5), None);
        let far = of(&[-1e9, 1e9]);
        assert_eq!(far.quantile(0.25), Some(-256.0));
        assert_eq!(far.quantile(0.75), Some(256.0));
    }
}
