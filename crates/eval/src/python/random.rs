//! CPython's `random.Random`: the same generator, and the same draws from it.

use std::collections::HashSet;

use rand_mt::Mt;

/// CPython's `random.Random(seed)`.
pub(crate) struct Random(Mt);

impl Random {
    /// The generator that CPython seeds with a whole number: its 32-bit digits, the lowest
    /// first, are the key of `init_by_array`.
    pub(crate) fn new(seed: u64) -> Random {
        let digits = [seed as u32, (seed >> 32) as u32];
        let count = if digits[1] == 0 { 1 } else { 2 };
        Random(Mt::new_with_key(digits[..count].iter().copied()))
    }

    /// `random()`: 53 bits from two outputs, in `[0, 1)`.
    pub(crate) fn unit(&mut self) -> f64 {
        let high = f64::from(self.0.next_u32() >> 5);
        let low = f64::from(self.0.next_u32() >> 6);
        (high * 67_108_864.0 + low) / 9_007_199_254_740_992.0
    }

    /// An index below `n`, as `choices` draws it.
    pub(crate) fn choice(&mut self, n: usize) -> usize {
        // Truncation is Python's `floor`: the product is not negative and below `n`.
        (self.unit() * n as f64) as usize
    }

    /// `sample(range(n), count)`: distinct indices below `n`, in the order drawn. `None`
    /// where there are fewer than `count`.
    pub(crate) fn sample(&mut self, n: usize, count: usize) -> Option<Vec<usize>> {
        if count > n {
            return None;
        }
        // CPython copies what is drawn from where that is smaller than a set of the drawn.
        let mut copied_below = 21;
        if count > 5 {
            copied_below += 4usize.pow(((count * 3) as f64).log(4.0).ceil() as u32);
        }
        if n <= copied_below {
            let mut left: Vec<usize> = (0..n).collect();
            return Some(
                (0..count)
                    .map(|drawn| {
                        let at = self.below(n - drawn);
                        // The last one left fills the gap.
                        left.swap_remove(at)
                    })
                    .collect(),
            );
        }
        let mut seen = HashSet::new();
        let mut drawn = Vec::with_capacity(count);
        while drawn.len() < count {
            let index = self.below(n);
            if seen.insert(index) {
                drawn.push(index);
            }
        }
        Some(drawn)
    }

    /// `_randbelow(n)` for `n` of at least 1: as many bits as `n` has, until they are below.
    fn below(&mut self, n: usize) -> usize {
        let bits = usize::BITS - n.leading_zeros();
        loop {
            let drawn = self.bits(bits);
            if drawn < n as u64 {
                return drawn as usize;
            }
        }
    }

    /// `getrandbits(count)`, for up to 64: the lowest 32 come first.
    fn bits(&mut self, count: u32) -> u64 {
        let mut word = |bits: u32| u64::from(self.0.next_u32() >> (32 - bits));
        match count {
            0 => 0,
            1..=32 => word(count),
            _ => word(32) | word(count - 32) << 32,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_are_those_of_cpython() {
        // [int(random.Random(s).random() * 2**53) for s in (0, 1, 99)], CPython 3.
        let drawn: Vec<u64> = [0, 1, 99]
            .into_iter()
            .map(|seed| (Random::new(seed).unit() * 9_007_199_254_740_992.0) as u64)
            .collect();
        assert_eq!(drawn, [7605875871743422, 1210245519433057, 3638711015564292]);
        // random.Random(7).choices(range(1000), k=8)
        let mut random = Random::new(7);
        let choices: Vec<usize> = (0..8).map(|_| random.choice(1000)).collect();
        assert_eq!(choices, [323, 150, 650, 72, 535, 365, 57, 507]);
    }

    /// One stream through pools on both sides of the size where CPython changes its way.
    #[test]
    fn samples_are_those_of_cpython() {
        // r = random.Random(1234); [r.sample(range(n), k) for n, k in ...]
        let mut random = Random::new(1234);
        let expected: [(usize, &[usize]); 9] = [
            (5, &[3, 0]),
            (21, &[0, 2, 18]),
            (22, &[1, 21, 2]),
            (100, &[12, 98, 45, 30, 2, 3]),
            (85, &[2, 44, 82, 79, 61, 78]),
            (86, &[59, 19, 11, 23, 14, 1]),
            (1000, &[515, 498, 901, 988, 255]),
            (5, &[0, 3, 4, 2, 1]),
            (70000, &[35335, 8267, 39639, 63050]),
        ];
        for (n, drawn) in expected {
            assert_eq!(random.sample(n, drawn.len()).unwrap(), drawn, "of {n}");
        }
        assert_eq!(random.sample(4, 5), None);
        assert_eq!(random.sample(0, 0), Some(Vec::new()));
    }

    #[test]
    fn seeds_beyond_32_bits_and_wide_draws() {
        assert_eq!(Random::new((1 << 40) + 3).sample(1000, 5).unwrap(), [225, 62, 562, 853, 96]);
        // r = random.Random(5); [r.getrandbits(k) for k in (40, 32, 64)]
        let mut random = Random::new(5);
        let drawn = [random.bits(40), random.bits(32), random.bits(64)];
        assert_eq!(drawn, [281848216645, 3185950873, 14668732198480837564]);
    }
}
