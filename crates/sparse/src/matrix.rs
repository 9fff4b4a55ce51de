//! Matrices packed for decoding: rows of weights, each contiguous, that can be read or skipped.
//!
//! What a row is, the owner decides: an input's weights to all outputs where inputs are skipped
//! (input-major), an output's weights from all inputs where outputs are (output-major). A row may
//! have two parts side by side: a neuron's row of `up` and its row of `down`.

use std::ops::Range;

use half::{bf16, f16};
use memmap2::MmapMut;
use rayon::prelude::*;

use crate::{Error, Format, Result};

/// Rows and vectors are padded to so many elements, so that loops have no rest and every row
/// starts on a cache line.
pub(crate) const PAD: usize = 64;

/// Rows that are packed at a time: enough to transpose by cache lines.
const BLOCK: usize = 32;

/// `n` rounded up to whole lines.
pub(crate) fn padded(n: usize) -> usize {
    n.next_multiple_of(PAD)
}

/// Bytes of the weights of a matrix of such a shape, with padding.
pub(crate) fn data_bytes(format: Format, (rows, cols, parts): (usize, usize, usize)) -> usize {
    rows * padded(cols) * parts * format.bytes()
}

/// A packed matrix.
pub(crate) struct Matrix {
    /// Which weights it holds, and which way round: what it is called in files.
    pub name: String,
    pub format: Format,
    rows: usize,
    /// Elements of one part of a row, without padding.
    cols: usize,
    /// How many parts a row has.
    parts: usize,
    data: MmapMut,
    /// For each part, of [`Format::Int8`] only: the value of one unit, row by row.
    scales: Vec<Vec<f32>>,
}

/// One part of all rows of a matrix, as the kernels read it.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    pub format: Format,
    /// Bytes from row 0 on; they reach to the end of the last row's part.
    pub data: &'a [u8],
    /// Elements between the starts of two rows.
    pub stride: usize,
    pub rows: usize,
    pub cols: usize,
    /// Empty except for [`Format::Int8`].
    pub scales: &'a [f32],
}

impl Matrix {
    /// Packs `rows` rows of `parts` parts with `cols` elements each. `fill(part, rows, buffer)`
    /// gives the values of some rows of a part, one after the other.
    pub fn pack(
        name: String,
        format: Format,
        (rows, cols, parts): (usize, usize, usize),
        fill: impl Fn(usize, Range<usize>, &mut [f32]) + Sync,
    ) -> Result<Matrix> {
        let part_bytes = padded(cols) * format.bytes();
        let row_bytes = part_bytes * parts;
        let mut data = anonymous_large(rows * row_bytes)?;
        let units = if format == Format::Int8 { rows } else { 0 };
        let mut scales = vec![vec![0.0f32; units]; parts];
        for (part, scales) in scales.iter_mut().enumerate() {
            let pack = |block: usize, out: &mut [u8], scales: &mut [f32]| {
                let rows = block * BLOCK..(block * BLOCK + out.len() / row_bytes);
                let mut values = vec![0f32; rows.len() * cols];
                fill(part, rows, &mut values);
                let rows = out.chunks_exact_mut(row_bytes).zip(values.chunks_exact(cols));
                for (i, (out, values)) in rows.enumerate() {
                    let scale = store(format, values, &mut out[part * part_bytes..]);
                    if let Some(slot) = scales.get_mut(i) {
                        *slot = scale;
                    }
                }
            };
            if rows * row_bytes == 0 {
                continue;
            }
            let blocks = data[..rows * row_bytes].par_chunks_mut(BLOCK * row_bytes);
            if units > 0 {
                let blocks = blocks.zip(scales.par_chunks_mut(BLOCK)).enumerate();
                blocks.for_each(|(block, (out, scales))| pack(block, out, scales));
            } else {
                blocks.enumerate().for_each(|(block, out)| pack(block, out, &mut []));
            }
        }
        Ok(Matrix { name, format, rows, cols, parts, data, scales })
    }

    /// A matrix that was packed before, of which `data` and `scales` have the right lengths.
    pub fn packed(
        name: String,
        format: Format,
        (rows, cols, parts): (usize, usize, usize),
        data: MmapMut,
        scales: Vec<Vec<f32>>,
    ) -> Matrix {
        Matrix { name, format, rows, cols, parts, data, scales }
    }

    /// Rows, elements of one part of a row, and parts.
    pub fn shape(&self) -> (usize, usize, usize) {
        (self.rows, self.cols, self.parts)
    }

    /// Its weights as they are stored.
    pub fn data(&self) -> &[u8] {
        &self.data[..data_bytes(self.format, self.shape())]
    }

    /// Its scales, for each part those of its rows.
    pub fn scales(&self) -> &[Vec<f32>] {
        &self.scales
    }

    /// One part of all rows.
    pub fn part(&self, part: usize) -> Rows<'_> {
        let part_elements = padded(self.cols);
        let stride = part_elements * self.parts;
        let end = self.rows * stride * self.format.bytes();
        Rows {
            format: self.format,
            data: self.data[..end].get(part * part_elements * self.format.bytes()..).unwrap_or(&[]),
            stride,
            rows: self.rows,
            cols: self.cols,
            scales: &self.scales[part],
        }
    }

    /// The only part of a matrix with one.
    pub fn all(&self) -> Rows<'_> {
        self.part(0)
    }

    /// Bytes of its weights and scales in memory.
    pub fn bytes(&self) -> usize {
        data_bytes(self.format, self.shape()) + 4 * self.scales.iter().map(Vec::len).sum::<usize>()
    }
}

impl<'a> Rows<'a> {
    /// The values of a row's first elements.
    pub fn decode(&self, row: usize, out: &mut [f32]) {
        let from = row * self.stride * self.format.bytes();
        let data = &self.data[from..][..out.len() * self.format.bytes()];
        match self.format {
            Format::F32 => {
                let values: &[f32] = bytemuck::cast_slice(data);
                out.copy_from_slice(values);
            }
            Format::F16 => {
                let bits: &[u16] = bytemuck::cast_slice(data);
                out.iter_mut().zip(bits).for_each(|(o, &b)| *o = f16::from_bits(b).to_f32());
            }
            Format::Bf16 => {
                let bits: &[u16] = bytemuck::cast_slice(data);
                out.iter_mut().zip(bits).for_each(|(o, &b)| *o = bf16::from_bits(b).to_f32());
            }
            Format::Int8 => {
                let scale = self.scales[row];
                let units: &[i8] = bytemuck::cast_slice(data);
                out.iter_mut().zip(units).for_each(|(o, &u)| *o = f32::from(u) * scale);
            }
        }
    }

    /// Bytes of `cols` weights of a row, and of its scale where there is one.
    pub fn row_bytes(&self, cols: usize) -> u64 {
        let scale = if self.format == Format::Int8 { 4 } else { 0 };
        (cols * self.format.bytes() + scale) as u64
    }
}

/// Writes values in a format from the start of `out`; the row's scale, 1 where it has none.
pub(crate) fn store(format: Format, values: &[f32], out: &mut [u8]) -> f32 {
    let out = &mut out[..values.len() * format.bytes()];
    match format {
        Format::F32 => bytemuck::cast_slice_mut::<u8, f32>(out).copy_from_slice(values),
        Format::F16 => {
            let out: &mut [u16] = bytemuck::cast_slice_mut(out);
            out.iter_mut().zip(values).for_each(|(o, &v)| *o = f16::from_f32(v).to_bits());
        }
        Format::Bf16 => {
            let out: &mut [u16] = bytemuck::cast_slice_mut(out);
            out.iter_mut().zip(values).for_each(|(o, &v)| *o = bf16::from_f32(v).to_bits());
        }
        Format::Int8 => {
            let largest = values.iter().fold(0f32, |most, v| most.max(v.abs()));
            let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
            let out: &mut [i8] = bytemuck::cast_slice_mut(out);
            out.iter_mut().zip(values).for_each(|(o, v)| *o = (v * inverse).round() as i8);
            return largest / 127.0;
        }
    }
    1.0
}

/// Zeroed memory, which takes room when it is written.
pub(crate) fn anonymous(bytes: usize) -> Result<MmapMut> {
    MmapMut::map_anon(bytes.max(1))
        .map_err(|source| Error::System { what: "memory for decoding", source })
}

/// The same in pages as large as the system gives: rows that are skipped to would otherwise miss in
/// the table of pages each time.
pub(crate) fn anonymous_large(bytes: usize) -> Result<MmapMut> {
    let map = anonymous(bytes)?;
    #[cfg(target_os = "linux")]
    // A wish: a system without huge pages says no, and nothing is lost.
    let _ = map.advise(memmap2::Advice::HugePage);
    Ok(map)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(part: usize, row: usize, col: usize) -> f32 {
        ((row * 37 + col * 11 + part * 5) % 97) as f32 / 97.0 - 0.4
    }

    #[test]
    fn rows_come_back_within_the_formats_rounding() {
        for (format, bound) in
            [(Format::F32, 0.0), (Format::F16, 4.9e-4), (Format::Bf16, 4e-3), (Format::Int8, 4e-3)]
        {
            for (rows, cols, parts) in [(1, 1, 1), (70, 65, 2), (33, 64, 1), (5, 200, 2)] {
                let matrix =
                    Matrix::pack(String::new(), format, (rows, cols, parts), |part, rows, out| {
                        for (i, row) in rows.enumerate() {
                            (0..cols).for_each(|col| out[i * cols + col] = value(part, row, col));
                        }
                    })
                    .unwrap();
                let mut out = vec![0.0; cols];
                for part in 0..parts {
                    for row in 0..rows {
                        matrix.part(part).decode(row, &mut out);
                        for (col, out) in out.iter().enumerate() {
                            let expected = value(part, row, col);
                            assert!((out - expected).abs() <= bound, "{format} {row} {col}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_row_of_zeros_stays_one() {
        let zeros = |_, _: Range<usize>, out: &mut [f32]| out.fill(0.0);
        let matrix = Matrix::pack(String::new(), Format::Int8, (1, 8, 1), zeros).unwrap();
        let mut out = [1.0; 8];
        matrix.all().decode(0, &mut out);
        assert_eq!(out, [0.0; 8]);
    }
}
