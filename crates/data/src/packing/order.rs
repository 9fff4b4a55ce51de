//! In which order sequences come: functions of a seed and a number, so that nothing has to
//! be remembered to resume.
//!
//! ChaCha is used as a counter-based generator: a key made of seed, purpose and number
//! gives the random words of that number alone. Its output is fixed by RFC 8439, and the
//! shuffle stands here, so no library's new version changes an order.

use std::sync::{Arc, Mutex, PoisonError};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// What random words are for; each purpose has streams of its own.
#[derive(Clone, Copy)]
enum Purpose {
    Epoch = 1,
    Mixture = 2,
}

fn generator(seed: u64, purpose: Purpose, a: u64, b: u64) -> ChaCha8Rng {
    let mut key = [0; 32];
    for (bytes, word) in key.chunks_exact_mut(8).zip([seed, purpose as u64, a, b]) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    ChaCha8Rng::from_seed(key)
}

/// Fisher and Yates. The bias of a 64-bit word scaled to `0..=i` is below 2^-32 here.
fn shuffle<T>(items: &mut [T], rng: &mut ChaCha8Rng) {
    for i in (1..items.len()).rev() {
        let j = (u128::from(rng.next_u64()) * (i as u128 + 1)) >> 64;
        items.swap(i, j as usize);
    }
}

/// The order of a pool's sequences in each epoch.
#[derive(Debug)]
pub(super) struct Permutations {
    seed: u64,
    pool: u64,
    len: u32,
    /// The epoch asked for last: a step asks for neighbours.
    last: Mutex<Option<(u64, Arc<[u32]>)>>,
}

impl Permutations {
    pub(super) fn new(seed: u64, pool: u64, len: u32) -> Self {
        Permutations { seed, pool, len, last: Mutex::new(None) }
    }

    /// Which sequence stands at `place < len` of an epoch.
    pub(super) fn at(&self, epoch: u64, place: u32) -> u32 {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let order = match &*last {
            Some((known, order)) if *known == epoch => order.clone(),
            _ => {
                let mut order: Vec<u32> = (0..self.len).collect();
                // The pool's number in the upper half leaves 2^32 epochs.
                let stream = self.pool << 32 | epoch & u64::from(u32::MAX);
                shuffle(&mut order, &mut generator(self.seed, Purpose::Epoch, stream, epoch >> 32));
                let order: Arc<[u32]> = order.into();
                *last = Some((epoch, order.clone()));
                order
            }
        };
        order.get(place as usize).copied().unwrap_or(0)
    }
}

/// Which pool each sequence comes from. In every block of [`BLOCK`] sequences each pool has
/// a fixed number of places, so that its count up to any index is a formula; where in the
/// block they are is random.
#[derive(Debug)]
pub(super) struct Schedule {
    seed: u64,
    /// Places of each pool in a block.
    places: Vec<u16>,
}

/// The finest step of weights is one in so many.
const BLOCK: u64 = 4096;

impl Schedule {
    /// One weight a pool; none for a single pool.
    pub(super) fn new(seed: u64, weights: &[f64]) -> Self {
        let places = if weights.len() > 1 { apportion(weights) } else { vec![BLOCK as u16] };
        Schedule { seed, places }
    }

    /// The pool of sequence `index`, and how many of that pool came before it.
    pub(super) fn at(&self, index: u64) -> (usize, u64) {
        if self.places.len() == 1 {
            return (0, index);
        }
        let (block, place) = (index / BLOCK, (index % BLOCK) as usize);
        let mut order: Vec<usize> = Vec::with_capacity(BLOCK as usize);
        for (pool, places) in self.places.iter().enumerate() {
            order.extend(std::iter::repeat_n(pool, usize::from(*places)));
        }
        shuffle(&mut order, &mut generator(self.seed, Purpose::Mixture, block, 0));
        let pool = order.get(place).copied().unwrap_or(0);
        let before = order.iter().take(place).filter(|p| **p == pool).count() as u64;
        (pool, block * u64::from(self.places.get(pool).copied().unwrap_or(0)) + before)
    }
}

/// [`BLOCK`] places by largest remainders, at least one for each weight.
fn apportion(weights: &[f64]) -> Vec<u16> {
    let sum: f64 = weights.iter().sum();
    let ideal: Vec<f64> = weights.iter().map(|w| w / sum * BLOCK as f64).collect();
    let mut places: Vec<u16> = ideal.iter().map(|i| (i.floor() as u16).max(1)).collect();
    let gap = |places: &[u16], i: usize| ideal[i] - f64::from(places[i]);
    loop {
        let total: u64 = places.iter().map(|p| u64::from(*p)).sum();
        let all = 0..places.len();
        if total < BLOCK {
            let most = all.max_by(|a, b| gap(&places, *a).total_cmp(&gap(&places, *b)));
            most.into_iter().for_each(|i| places[i] += 1);
        } else if total > BLOCK {
            let least = all
                .filter(|i| places[*i] > 1)
                .min_by(|a, b| gap(&places, *a).total_cmp(&gap(&places, *b)));
            let Some(i) = least else { return places };
            places[i] -= 1;
        } else {
            return places;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_order_is_this_one_for_ever() {
        let permutations = Permutations::new(7, 0, 8);
        let order = |epoch| (0..8).map(|i| permutations.at(epoch, i)).collect::<Vec<_>>();
        assert_eq!(order(0), [4, 2, 5, 1, 3, 7, 0, 6]);
        assert_eq!(order(1), [7, 1, 2, 0, 4, 3, 6, 5]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn an_epoch_is_a_permutation(seed: u64, pool in 0u64..4, len in 1u32..300, epoch: u64) {
            let permutations = Permutations::new(seed, pool, len);
            let mut order: Vec<u32> = (0..len).map(|i| permutations.at(epoch, i)).collect();
            order.sort_unstable();
            prop_assert!(order.into_iter().eq(0..len));
        }

        #[test]
        fn a_mixture_counts_without_gaps(
            seed: u64, weights in prop::collection::vec(0.001f64..100.0, 2..6), start in 0u64..9000,
        ) {
            let schedule = Schedule::new(seed, &weights);
            let mut next: Vec<Option<u64>> = vec![None; weights.len()];
            for index in start..start + 40 {
                let (pool, nth) = schedule.at(index);
                if let Some(expected) = next[pool] {
                    prop_assert_eq!(nth, expected);
                }
                next[pool] = Some(nth + 1);
            }
        }
    }

    #[test]
    fn a_block_holds_the_weights() {
        assert_eq!(apportion(&[3.0, 1.0]), [3072, 1024]);
        assert_eq!(apportion(&[1.0, 1e-9]), [4095, 1]);
        assert_eq!(apportion(&[1.0, 1.0, 1.0]).iter().sum::<u16>(), 4096);
        let schedule = Schedule::new(1, &[3.0, 1.0]);
        let first = (4096..8192).filter(|i| schedule.at(*i).0 == 0).count();
        assert_eq!(first, 3072);
    }
}
