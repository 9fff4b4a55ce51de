//! Where the weights come from while they are packed: rows of a parameter, or random numbers.

use std::ops::Range;

/// The values of a matrix `[outputs, inputs]`.
pub(crate) enum Source<'a> {
    /// Row-major values.
    Values(&'a [f32]),
    /// Numbers of a seed, uniform with such a standard deviation: for measurements, where only the
    /// shape matters.
    Random { seed: u64, std: f32 },
}

impl Source<'_> {
    /// Some rows of outputs.
    pub fn rows(&self, rows: Range<usize>, inputs: usize, out: &mut [f32]) {
        match self {
            Source::Values(values) => {
                out.copy_from_slice(&values[rows.start * inputs..rows.end * inputs]);
            }
            Source::Random { seed, std } => random(*seed, rows.start, *std, out),
        }
    }

    /// Some columns, each with its element of every row.
    pub fn columns(&self, columns: Range<usize>, inputs: usize, out: &mut [f32]) {
        match self {
            Source::Values(values) => {
                let outputs = values.len() / inputs.max(1);
                for (i, row) in values.chunks_exact(inputs.max(1)).enumerate() {
                    for (j, value) in row[columns.clone()].iter().enumerate() {
                        out[j * outputs + i] = *value;
                    }
                }
            }
            Source::Random { seed, std } => random(*seed, columns.start, *std, out),
        }
    }
}

/// Numbers that depend on the seed and on the first row.
fn random(seed: u64, start: usize, std: f32, out: &mut [f32]) {
    let mut state = mix(seed ^ mix(start as u64 + 1));
    // A uniform number in -1..1 has a standard deviation of 1/sqrt(3).
    let scale = std * 3f32.sqrt() / (1u32 << 23) as f32;
    for out in out {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        *out = ((state >> 40) as i32 - (1 << 23)) as f32 * scale;
    }
}

/// A number whose bits all depend on all bits of another (the finaliser of SplitMix64).
pub(crate) fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
