//! A projection whose outputs are shared out over the threads.

use std::ops::Range;

use crate::counts::Work;
use crate::kernels::{ADDED, Isa, add_rows, dot_rows, fold_scales};
use crate::matrix::{Matrix, PAD, padded};
use crate::side_by_side::{blocks, parts, union};
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

/// A sequence at a projection: what enters, what comes out (padded), and its counts.
pub(crate) struct Pass<'a> {
    pub input: &'a mut Input,
    pub y: &'a mut [f32],
    pub work: &'a mut Work,
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
        let mut work = Work::default();
        self.forward_all(isa, &mut [Pass { input, y, work: &mut work }], identity, share);
        work
    }

    /// The same for several sequences, and what was done is added to their counts: to the first one's the
    /// bytes, which they share.
    pub fn forward_all(
        &self,
        isa: Isa,
        passes: &mut [Pass<'_>],
        identity: &[u32],
        share: Range<usize>,
    ) {
        if share.is_empty() {
            return;
        }
        let bytes = match self.by_input {
            true => self.add_inputs(isa, passes, &share),
            false => self.dot_outputs(isa, passes, identity, &share),
        };
        for (n, pass) in passes.iter_mut().enumerate() {
            let needed = (pass.input.list.len() * share.len()) as u64;
            let done = if self.by_input { needed } else { (share.len() * self.inputs) as u64 };
            *pass.work += Work { needed, done, bytes: if n == 0 { bytes } else { 0 } };
        }
    }

    /// Rows are inputs: those that are not zero. The bytes that are read.
    fn add_inputs(&self, isa: Isa, passes: &mut [Pass<'_>], share: &Range<usize>) -> u64 {
        let rows = self.matrix.all();
        let row_bytes = rows.row_bytes(share.len());
        for pass in passes.iter_mut() {
            pass.y[..padded(share.len())].fill(0.0);
            if let Some(bias) = self.bias.get(share.clone()) {
                pass.y[..share.len()].copy_from_slice(bias);
            }
            let Input { list, values, scaled, .. } = &mut *pass.input;
            fold_scales(&rows, list, values, scaled);
        }
        let lists = || passes.iter().map(|pass| &pass.input.list[..]);
        let (bytes, parts) = (row_bytes * union(lists()) as u64, parts(lists(), ADDED, row_bytes));
        for (n, part) in parts {
            let Pass { input: Input { list, values, scaled, .. }, y, .. } = &mut passes[n];
            let values = if rows.scales.is_empty() { values } else { scaled };
            add_rows(isa, &rows, &list[part.clone()], &values[part], share.clone(), y);
        }
        bytes
    }

    /// Rows are outputs: all of the share. The bytes that are read.
    fn dot_outputs(
        &self,
        isa: Isa,
        passes: &mut [Pass<'_>],
        identity: &[u32],
        share: &Range<usize>,
    ) -> u64 {
        let rows = self.matrix.all();
        let row_bytes = rows.row_bytes(self.inputs);
        for block in blocks(share.clone(), row_bytes, passes.len()) {
            let to = block.start - share.start..block.end - share.start;
            for Pass { input, y, .. } in passes.iter_mut() {
                dot_rows(isa, &rows, &identity[block.clone()], &input.x, &mut y[to.clone()]);
            }
        }
        if let Some(bias) = self.bias.get(share.clone()) {
            for Pass { y, .. } in passes {
                y.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
            }
        }
        row_bytes * share.len() as u64
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
