//! The bootstrap of lm-evaluation-harness, number for number.
//!
//! The harness gives metrics that are no plain mean (perplexity) a standard error by
//! resampling: 100 chunks of 1000 replicates, chunk `i` drawn with Python's
//! `random.Random(i).choices`, and the sample standard deviation of all replicates. The
//! same generator and the same order of draws give the same standard error.

use rand_mt::Mt;
use rayon::prelude::*;

/// Replicates of one chunk.
const CHUNK: u32 = 1000;

/// How many replicates the harness draws by default.
pub const REPLICATES: u32 = 100_000;

/// Python's `random.Random(seed)`, for seeds below 2^32.
struct PythonRandom(Mt);

impl PythonRandom {
    fn new(seed: u32) -> PythonRandom {
        PythonRandom(Mt::new_with_key([seed]))
    }

    /// `random()`: 53 bits from two outputs, in `[0, 1)`.
    fn unit(&mut self) -> f64 {
        let high = f64::from(self.0.next_u32() >> 5);
        let low = f64::from(self.0.next_u32() >> 6);
        (high * 67_108_864.0 + low) / 9_007_199_254_740_992.0
    }

    /// An index below `n`, as `choices` draws it.
    fn below(&mut self, n: usize) -> usize {
        // Truncation is Python's `floor`: the product is not negative and below `n`.
        (self.unit() * n as f64) as usize
    }
}

/// Standard error of `exp(-mean(x))` over `values`, from `replicates` resamples.
///
/// `None` where there is nothing to resample (fewer than two values) or no whole chunk
/// of 1000 replicates.
pub fn perplexity_stderr(values: &[f64], replicates: u32) -> Option<f64> {
    let n = values.len();
    if n < 2 || replicates < CHUNK {
        return None;
    }
    let replicas: Vec<f64> = (0..replicates / CHUNK)
        .into_par_iter()
        .flat_map_iter(|chunk| {
            let mut random = PythonRandom::new(chunk);
            (0..CHUNK).map(move |_| {
                let sum: f64 = (0..n).map(|_| values[random.below(n)]).sum();
                (-sum / n as f64).exp()
            })
        })
        .collect();
    Some(crate::metrics::sample_deviation(&replicas))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_are_those_of_cpython() {
        // [int(random.Random(s).random() * 2**53) for s in (0, 1, 99)], CPython 3.
        let drawn: Vec<u64> = [0, 1, 99]
            .into_iter()
            .map(|seed| (PythonRandom::new(seed).unit() * 9_007_199_254_740_992.0) as u64)
            .collect();
        assert_eq!(drawn, [7605875871743422, 1210245519433057, 3638711015564292]);
        // random.Random(7).choices(range(1000), k=8)
        let mut random = PythonRandom::new(7);
        let choices: Vec<usize> = (0..8).map(|_| random.below(1000)).collect();
        assert_eq!(choices, [323, 150, 650, 72, 535, 365, 57, 507]);
    }

    #[test]
    fn too_little_has_no_stderr() {
        assert_eq!(perplexity_stderr(&[-1.0], REPLICATES), None);
        assert_eq!(perplexity_stderr(&[-1.0, -2.0], 999), None);
    }

    #[test]
    fn equal_values_have_no_spread() {
        assert!(perplexity_stderr(&[-1.5; 9], 2000).unwrap() < 1e-12);
    }
}
