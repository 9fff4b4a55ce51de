//! The paired bootstrap: is one model better than another on the same documents?
//!
//! Documents are drawn with replacement, each with the answers of both models, and the
//! difference is computed anew (Efron and Tibshirani, An Introduction to the Bootstrap,
//! chapters 13 and 16). The interval is that between the 2.5 % and 97.5 % quantiles of these
//! replicates. `p` is twice the smaller share of replicates on one side of zero, zero
//! included on both sides: the level at which the percentile interval would just reach zero.
//! Both counts are raised by one, as if the data themselves were a replicate at zero, so that
//! `p` is never 0.

use rand_mt::Mt;
use rayon::prelude::*;

/// Replicates of a comparison.
pub const REPLICATES: usize = 10_000;

/// Replicates that share a stream of random numbers.
const CHUNK: usize = 100;

/// What a document says of the difference: a sum's part, and what it weighs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pair {
    /// Its part in the difference's numerator.
    pub difference: f64,
    /// Its part in the denominator: 1, or words or bytes.
    pub weight: f64,
}

/// Documents of one task. The difference in a task is the sum of differences over the sum of
/// weights, and of several tasks the sum of these, each times its share.
#[derive(Clone, Debug, PartialEq)]
pub struct Stratum {
    /// The documents.
    pub pairs: Vec<Pair>,
    /// What the task counts for in the whole.
    pub share: f64,
}

/// How two models differ.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Difference {
    /// On the documents themselves.
    pub value: f64,
    /// The 95 % interval's lower end.
    pub low: f64,
    /// The 95 % interval's upper end.
    pub high: f64,
    /// Two-sided; see the module.
    pub p: f64,
}

/// The difference over some tasks, each resampled by itself. The same seed draws the same
/// documents, whatever the number of threads. `None` where a task has no document.
pub fn paired_bootstrap(strata: &[Stratum], replicates: usize, seed: u32) -> Option<Difference> {
    if strata.is_empty() || replicates == 0 || strata.iter().any(|part| part.pairs.is_empty()) {
        return None;
    }
    let value = strata.iter().map(|part| part.share * ratio(part.pairs.iter())).sum();
    let mut drawn: Vec<f64> = (0..replicates.div_ceil(CHUNK))
        .into_par_iter()
        .flat_map_iter(|chunk| {
            let mut random = Mt::new_with_key([seed, chunk as u32]);
            let left = replicates - chunk * CHUNK;
            (0..left.min(CHUNK)).map(move |_| {
                strata.iter().map(|part| part.share * resampled(&part.pairs, &mut random)).sum()
            })
        })
        .collect();
    drawn.sort_unstable_by(f64::total_cmp);
    let below = drawn.partition_point(|x| *x <= 0.0);
    let above = drawn.len() - drawn.partition_point(|x| *x < 0.0);
    let p = 2.0 * (below.min(above) + 1) as f64 / (drawn.len() + 1) as f64;
    Some(Difference {
        value,
        low: quantile(&drawn, 0.025),
        high: quantile(&drawn, 0.975),
        p: p.min(1.0),
    })
}

fn ratio<'a>(pairs: impl Iterator<Item = &'a Pair>) -> f64 {
    let (sum, weight) =
        pairs.fold((0.0, 0.0), |(sum, weight), pair| (sum + pair.difference, weight + pair.weight));
    sum / weight
}

fn resampled(pairs: &[Pair], random: &mut Mt) -> f64 {
    let n = pairs.len() as u64;
    // 32 random bits, scaled: off from uniform by less than n / 2^32.
    let mut draw = || &pairs[((u64::from(random.next_u32()) * n) >> 32) as usize];
    ratio(std::iter::repeat_with(&mut draw).take(pairs.len()))
}

/// Between the two nearest of some sorted values, in proportion.
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let at = share * (sorted.len() - 1) as f64;
    let (below, above) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    below + (above - below) * at.fract()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stratum(differences: impl IntoIterator<Item = f64>) -> Stratum {
        let pair = |difference| Pair { difference, weight: 1.0 };
        Stratum { pairs: differences.into_iter().map(pair).collect(), share: 1.0 }
    }

    fn close(found: f64, expected: f64, by: f64) -> bool {
        (found - expected).abs() <= by
    }

    #[test]
    fn of_two_documents_all_is_known() {
        // Means 0, 1/2 and 1 with chances 1/4, 1/2 and 1/4.
        let found = paired_bootstrap(&[stratum([0.0, 1.0])], 40_000, 1).unwrap();
        assert_eq!((found.value, found.low, found.high), (0.5, 0.0, 1.0));
        // Four standard deviations of a share of 40,000.
        assert!(close(found.p, 0.5, 2.0 * 4.0 * (0.1875f64 / 40_000.0).sqrt()), "{found:?}");
    }

    #[test]
    fn no_difference_has_p_one_and_a_clear_one_the_least() {
        let same = paired_bootstrap(&[stratum(vec![0.0; 50])], REPLICATES, 1).unwrap();
        assert_eq!(same, Difference { value: 0.0, low: 0.0, high: 0.0, p: 1.0 });
        let better = paired_bootstrap(&[stratum(vec![0.25; 50])], REPLICATES, 1).unwrap();
        assert_eq!((better.value, better.low, better.high), (0.25, 0.25, 0.25));
        assert_eq!(better.p, 2.0 / 10_001.0);
    }

    #[test]
    fn of_many_documents_it_is_the_normal_interval() {
        // 1000 documents: 230 gained, 190 lost.
        let sizes = [(1.0, 230), (-1.0, 190), (0.0, 580)];
        let all = sizes.into_iter().flat_map(|(value, n)| vec![value; n]);
        let found = paired_bootstrap(&[stratum(all)], REPLICATES, 3).unwrap();
        let (mean, error) = (0.04, ((0.42 - 0.04f64 * 0.04) / 1000.0).sqrt());
        assert!(close(found.value, mean, 1e-12));
        // Quantiles of 10,000 replicates err by about 0.03 standard errors.
        assert!(close(found.low, mean - 1.959964 * error, 0.1 * error), "{found:?}");
        assert!(close(found.high, mean + 1.959964 * error, 0.1 * error), "{found:?}");
        // 2 * (1 - Phi(mean / error)) = 2 * (1 - Phi(1.9547)), a little more since zero counts
        // on both sides: the replicates' steps are 1/1000.
        assert!(close(found.p, 0.0506, 0.009), "{found:?}");
    }

    #[test]
    fn weights_and_shares_count() {
        let heavy = Stratum {
            pairs: vec![
                Pair { difference: 1.0, weight: 1.0 },
                Pair { difference: 1.0, weight: 3.0 },
            ],
            share: 0.25,
        };
        let light = Stratum { share: 0.75, ..stratum([2.0, 2.0]) };
        let found = paired_bootstrap(&[heavy, light], REPLICATES, 5).unwrap();
        assert_eq!(found.value, 0.25 * 0.5 + 0.75 * 2.0);
        // The first alone is 1, 1/2 or 1/3; the second always 2.
        assert_eq!((found.low, found.high), (0.25 / 3.0 + 1.5, 0.25 + 1.5));
    }

    #[test]
    fn threads_change_nothing() {
        let part = stratum((0..37).map(|n| f64::from(n % 5) - 1.9));
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| paired_bootstrap(std::slice::from_ref(&part), 1234, 9).unwrap())
        };
        assert_eq!(run(1), run(3));
    }

    #[test]
    fn nothing_has_no_difference() {
        assert_eq!(paired_bootstrap(&[], 10, 1), None);
        assert_eq!(paired_bootstrap(&[stratum([])], 10, 1), None);
    }
}
