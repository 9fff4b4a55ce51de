//! A projection whose outputs are shared out over the threads.

use std::ops::Range;

use crate::counts::Work;
use crate::kernels::{Isa, add_rows, dot_rows, fold_scales};
use crate::matrix::{Matrix, PAD, padded};
use crate::weights::{Part, Weights};
use crate::{Format, Result};

/// A vector that enters matrices: dense and padded, and the list of what is not zero in it.
#[derive(Default)]
pub(crate) struct Input {
    /// Padded with zeros to whole lines.
    pub x: Vec<f32>,
    /// The places of the non-zeros, ascending.
    pub list: Vec<u32>,
    /// Their values.
    pub values: Vec<f32>,
    /// Room for values times scales.
    scaled: Vec<f32>,
}

impl Input {
    /// Room for a width.
    pub fn new(width: usize) -> Input {
        let capacity = padded(width);
        Input {
            x: vec![0.0; capacity],
            list: Vec::with_capacity(capacity),
            values: Vec::with_capacity(capacity),
            scaled: Vec::with_capacity(capacity),
        }
    }

    /// Lists the non-zeros of the first `width` elements.
    pub fn list_nonzeros(&mut self, width: usize) {
        compact(&self.x[..width], 0, &mut self.list, &mut self.values);
    }
}

/// Lists what is not zero in `x`, counted from `start`.
pub(crate) fn compact(x: &[f32], start: usize, list: &mut Vec<u32>, values: &mut Vec<f32>) {
    list.resize(x.len(), 0);
    values.resize(x.len(), 0.0);
    let mut count = 0;
    for (i, &x) in x.iter().enumerate() {
        // Written always and counted where it is not zero: no branch to guess.
        list[count] = (start + i) as u32;
        values[count] = x;
        count += usize::from(x != 0.0);
    }
    list.truncate(count);
    values.truncate(count);
}

/// The part of `n` outputs that a worker computes, in whole lines; the last is not rounded up.
pub(crate) fn share(n: usize, worker: usize, workers: usize) -> Range<usize> {
    let lines = n.div_ceil(PAD);
    let start = (lines * worker / workers * PAD).min(n);
    start..(lines * (worker + 1) / workers * PAD).min(n)
}

/// A projection.
pub(crate) struct Linear {
    matrix: Matrix,
    /// Rows are inputs, so that zeros among them are skipped; else rows are outputs.
    by_input: bool,
    inputs: usize,
    pub outputs: usize,
    /// Empty where there is none.
    bias: Vec<f32>,
}

impl Linear {
    /// Takes some rows of a parameter, its outputs.
    pub fn pack(
        weights: &Weights<'_>,
        format: Format,
        part: Part,
        bias: Vec<f32>,
    ) -> Result<Linear> {
        let (by_input, inputs, outputs) = (part.by_input, part.inputs, part.rows.len());
        Ok(Linear { matrix: weights.pack(format, &[part])?, by_input, inputs, outputs, bias })
    }

    /// The outputs `share` (from [`share`]) into `y`, which is padded.
    pub fn forward(
        &self,
        isa: Isa,
        input: &mut Input,
        identity: &[u32],
        share: Range<usize>,
        y: &mut [f32],
    ) -> Work {
        if share.is_empty() {
            return Work::default();
        }
        let rows = self.matrix.all();
        let active = input.list.len();
        let needed = (active * share.len()) as u64;
        if self.by_input {
            let y = &mut y[..padded(share.len())];
            y.fill(0.0);
            if let Some(bias) = self.bias.get(share.clone()) {
                y[..share.len()].copy_from_slice(bias);
            }
            let values = fold_scales(&rows, &input.list, &input.values, &mut input.scaled);
            add_rows(isa, &rows, &input.list, values, share.clone(), y);
            let bytes = rows.row_bytes(share.len()) * active as u64;
            return Work { needed, done: needed, bytes };
        }
        let y = &mut y[..share.len()];
        dot_rows(isa, &rows, &identity[share.clone()], &input.x, y);
        if let Some(bias) = self.bias.get(share.clone()) {
            y.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
        }
        let done = (share.len() * self.inputs) as u64;
        Work { needed, done, bytes: rows.row_bytes(self.inputs) * share.len() as u64 }
    }

    /// The work of `count` inputs (rows of `inputs`) at so many outputs where nothing is skipped
    /// and each weight is read once.
    pub fn dense_work(&self, inputs: &[f32], outputs: usize, count: usize) -> Work {
        let active = inputs.iter().filter(|x| **x != 0.0).count();
        let rows = self.matrix.all();
        let bytes = match self.by_input {
            true => rows.row_bytes(outputs) * self.inputs as u64,
            false => rows.row_bytes(self.inputs) * outputs as u64,
        };
        Work {
            needed: (active * outputs) as u64,
            done: (count * self.inputs * outputs) as u64,
            bytes: if outputs == 0 { 0 } else { bytes },
        }
    }

    /// Whether rows are inputs.
    pub fn by_input(&self) -> bool {
        self.by_input
    }

    /// Empty where there is none.
    pub fn bias(&self) -> &[f32] {
        &self.bias
    }

    /// The weights; a head's rows are outputs, and where it is tied the embedding's.
    pub fn matrix(&self) -> &Matrix {
        &self.matrix
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_cover_every_output_once() {
        for n in [1, 63, 64, 65, 200, 5632, 32_000] {
            for workers in 1..9 {
                let mut next = 0;
                for worker in 0..workers {
                    let share = share(n, worker, workers);
                    assert!(
                        share.start == next
                            && (share.start.is_multiple_of(PAD) || share.is_empty())
                    );
                    next = share.end;
                }
                assert_eq!(next, n);
            }
        }
    }

    #[test]
    fn only_zeros_are_left_out() {
        let (mut list, mut values) = (Vec::new(), Vec::new());
        compact(&[0.0, -1.0, f32::NAN, -0.0, 2.0], 10, &mut list, &mut values);
        assert_eq!(list, [11, 12, 14]);
        assert!(values[0] == -1.0 && values[1].is_nan() && values[2] == 2.0);
    }
}
