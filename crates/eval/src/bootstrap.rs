//! The bootstrap of lm-evaluation-harness, number for number.
//!
//! The harness gives metrics that are no plain mean (perplexity) a standard error by
//! resampling: chunks of 1000 replicates, chunk `i` drawn with Python's
//! `random.Random(i).choices`, and the sample standard deviation of all replicates. The
//! same generator and the same order of draws give the same standard error.

use rayon::prelude::*;

use crate::python::Random;

/// Replicates of one chunk, if there are so many.
const CHUNK: u32 = 1000;

/// How many replicates the harness draws by default.
pub const REPLICATES: u32 = 100_000;

/// Standard error of `exp(-mean(x))` over `values`, from `replicates` resamples, or as
/// many of them as make whole chunks.
///
/// `None` where there is nothing to resample: fewer than two values, or no replicates.
pub fn perplexity_stderr(values: &[f64], replicates: u32) -> Option<f64> {
    let n = values.len();
    if n < 2 || replicates == 0 {
        return None;
    }
    let size = replicates.min(CHUNK);
    let replicas: Vec<f64> = (0..replicates / size)
        .into_par_iter()
        .flat_map_iter(|chunk| {
            let mut random = Random::new(chunk.into());
            (0..size).map(move |_| {
                let sum: f64 = (0..n).map(|_| values[random.choice(n)]).sum();
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
    fn too_little_has_no_stderr() {
        assert_eq!(perplexity_stderr(&[-1.0], REPLICATES), None);
        assert_eq!(perplexity_stderr(&[-1.0, -2.0], 0), None);
    }

    #[test]
    fn only_whole_chunks_are_drawn() {
        let stderr = |replicates| perplexity_stderr(&[-1.0, -2.0, -4.0], replicates);
        assert_eq!(stderr(1999), stderr(1000));
        assert!(stderr(50).is_some() && stderr(50) != stderr(1000));
    }

    #[test]
    fn equal_values_have_no_spread() {
        assert!(perplexity_stderr(&[-1.5; 9], 2000).unwrap() < 1e-12);
    }
}
