//! Weights on a GPU, packed for decoding.

use std::sync::Arc;

use candle_core::{Device, Tensor};

use super::super::{Elem, Gpu, Grid, Module, Scratch, module, operand};
use super::launch::queue;
use crate::buffer::dims2;
use crate::error::{Error, Result};

static MODULE: Module = module!("decode_matrix");
const THREADS: u32 = 256;

/// How a weight is stored. Sums are f32 in each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// As it is.
    F32,
    /// The upper half of an f32.
    Bf16,
    /// Integers of 8 bits, with an f32 scale for each stored row.
    Int8,
}

impl Format {
    /// Every format.
    pub const ALL: [Format; 3] = [Format::F32, Format::Bf16, Format::Int8];

    /// Bytes of one weight.
    pub fn bytes(self) -> usize {
        match self {
            Format::F32 => 4,
            Format::Bf16 => 2,
            Format::Int8 => 1,
        }
    }

    /// Its name, as entry points have it.
    pub fn name(self) -> &'static str {
        match self {
            Format::F32 => "f32",
            Format::Bf16 => "bf16",
            Format::Int8 => "int8",
        }
    }
}

/// A matrix on a GPU whose rows can be read or skipped: each is contiguous, begins at a multiple
/// of 64 elements and is filled up with zeros.
pub struct GpuMatrix {
    pub(super) gpu: Arc<Gpu>,
    format: Format,
    rows: usize,
    cols: usize,
    data: Scratch,
    /// Of [`Format::Int8`] only: the value of one unit, row by row.
    scales: Option<Scratch>,
}

/// `Pack` of `cu/decode_matrix.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Pack {
    from: u64,
    to: u64,
    scales: u64,
    /// Elements between the source's rows, and between its columns.
    row_step: i64,
    col_step: i64,
    stride: i64,
    cols: i32,
    from_bf16: i32,
}

/// `Fill` of `cu/decode_matrix.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Fill {
    to: u64,
    scales: u64,
    stride: i64,
    cols: i32,
    seed: u32,
    bound: f32,
}

/// `Read` of `cu/decode_matrix.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Read {
    from: u64,
    vectors: i64,
    sums: u64,
}

const OP: &str = "packing weights";

impl GpuMatrix {
    /// Elements that rows are filled up to a multiple of.
    pub const PAD: usize = 64;

    /// Packs `t`, f32 or bf16 on a GPU, `[rows, cols]`; `transposed`: its columns become the rows.
    ///
    /// # Errors
    /// A tensor that is not there, of another type, not contiguous or no matrix; no memory.
    pub fn pack(t: &Tensor, transposed: bool, format: Format) -> Result<GpuMatrix> {
        let (rows, cols) = dims2(t, OP, "weights")?;
        let (steps, (rows, cols)) = match transposed {
            false => ((cols, 1), (rows, cols)),
            true => ((1, cols), (cols, rows)),
        };
        let from = operand(t, OP)?;
        let matrix = GpuMatrix::empty(t.device(), format, rows, cols)?;
        let pack = Pack {
            from: from.ptr,
            to: matrix.data.ptr,
            scales: matrix.scales(),
            row_step: steps.0 as i64,
            col_step: steps.1 as i64,
            stride: matrix.stride() as i64,
            cols: cols as i32,
            from_bf16: i32::from(from.elem == Elem::Bf16),
        };
        let name = format!("pack_{}", format.name());
        queue(&matrix.gpu, OP, (&MODULE, &name), Grid::new(rows, THREADS), &pack)?;
        Ok(matrix)
    }

    /// Random weights, uniform with this standard deviation: for measurements.
    ///
    /// # Errors
    /// A device that is no GPU; no memory.
    pub fn random(
        device: &Device,
        format: Format,
        rows: usize,
        cols: usize,
        std: f32,
        seed: u64,
    ) -> Result<GpuMatrix> {
        let matrix = GpuMatrix::empty(device, format, rows, cols)?;
        let fill = Fill {
            to: matrix.data.ptr,
            scales: matrix.scales(),
            stride: matrix.stride() as i64,
            cols: cols as i32,
            seed: (seed ^ (seed >> 32)) as u32,
            bound: std * 3f32.sqrt(),
        };
        let name = format!("fill_{}", format.name());
        queue(&matrix.gpu, OP, (&MODULE, &name), Grid::new(rows, THREADS), &fill)?;
        Ok(matrix)
    }

    fn empty(device: &Device, format: Format, rows: usize, cols: usize) -> Result<GpuMatrix> {
        /// Widths are 32-bit numbers in the kernels.
        const MOST: usize = 1 << 30;
        if rows == 0 || cols == 0 || rows > MOST || cols > MOST {
            let what = format!("a matrix of {rows} rows and {cols} columns");
            return Err(Error::Unsupported { op: OP, what });
        }
        let gpu = Gpu::on(device)?;
        let data =
            gpu.scratch(rows * cols.next_multiple_of(GpuMatrix::PAD) * format.bytes(), OP)?;
        let scales = match format {
            Format::Int8 => Some(gpu.scratch(4 * rows, OP)?),
            Format::F32 | Format::Bf16 => None,
        };
        Ok(GpuMatrix { gpu, format, rows, cols, data, scales })
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Elements of a row, without padding.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// How weights are stored.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Bytes of its weights and scales in memory.
    pub fn bytes(&self) -> usize {
        self.rows * (self.stride() * self.format.bytes() + self.scale_bytes())
    }

    /// Bytes of `cols` weights of a row, and of its scale where there is one.
    pub fn row_bytes(&self, cols: usize) -> u64 {
        (cols * self.format.bytes() + self.scale_bytes()) as u64
    }

    /// The weights as they are stored, scales applied, on the host: `[rows, cols]`.
    ///
    /// # Errors
    /// An error of the GPU.
    pub fn to_host(&self) -> Result<Vec<f32>> {
        const OP: &str = "reading packed weights";
        let bytes = self.rows * self.stride() * self.format.bytes();
        let bytes: Vec<u8> = self.gpu.download(self.data.ptr, bytes, OP)?;
        let scales: Vec<f32> = match &self.scales {
            Some(scales) => self.gpu.download(scales.ptr, self.rows, OP)?,
            None => vec![1.0; self.rows],
        };
        let rows = bytes.chunks_exact(self.stride() * self.format.bytes()).zip(scales);
        let row = |(row, scale): (&[u8], f32)| -> Vec<f32> {
            let row = &row[..self.cols * self.format.bytes()];
            match self.format {
                Format::F32 => row
                    .chunks_exact(4)
                    .map(|b| f32::from_ne_bytes([b[0], b[1], b[2], b[3]]))
                    .collect(),
                Format::Bf16 => row
                    .chunks_exact(2)
                    .map(|b| half::bf16::from_ne_bytes([b[0], b[1]]).to_f32())
                    .collect(),
                Format::Int8 => row.iter().map(|b| f32::from(*b as i8) * scale).collect(),
            }
        };
        Ok(rows.flat_map(row).collect())
    }

    /// Elements between the starts of two rows.
    pub(super) fn stride(&self) -> usize {
        self.cols.next_multiple_of(GpuMatrix::PAD)
    }

    pub(super) fn data(&self) -> u64 {
        self.data.ptr
    }

    /// The address of the scales, 0 where there are none.
    pub(super) fn scales(&self) -> u64 {
        self.scales.as_ref().map_or(0, |scales| scales.ptr)
    }

    fn scale_bytes(&self) -> usize {
        if self.scales.is_some() { 4 } else { 0 }
    }
}

/// Bytes a second at which this GPU reads `bytes` of memory once, in order: the best of `times`.
/// What decoding can be compared with, as weights are read once a token.
///
/// # Errors
/// A device that is no GPU; no memory.
pub fn read_bandwidth(device: &Device, bytes: usize, times: usize) -> Result<f64> {
    const OP: &str = "measuring memory";
    let row = 1 << 16;
    let matrix = GpuMatrix::random(device, Format::Int8, bytes.div_ceil(row).max(1), row, 1.0, 1)?;
    let gpu = &matrix.gpu;
    let blocks = gpu.processors as usize * 4;
    let sums = gpu.scratch(4 * blocks, OP)?;
    let bytes = matrix.rows * row;
    let read = Read { from: matrix.data.ptr, vectors: (bytes / 16) as i64, sums: sums.ptr };
    let mut best = f64::INFINITY;
    for _ in 0..=times.max(1) {
        gpu.synchronize(OP)?;
        let start = std::time::Instant::now();
        queue(gpu, OP, (&MODULE, "read"), Grid::new(blocks, 512), &read)?;
        gpu.synchronize(OP)?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(bytes as f64 / best)
}

/// Demands matrices of one shape and format.
pub(super) fn ensure_alike(one: &GpuMatrix, other: &GpuMatrix, op: &'static str) -> Result<()> {
    let of = |m: &GpuMatrix| (m.format, m.rows, m.cols);
    if of(one) == of(other) {
        return Ok(());
    }
    let message = format!("matrices of two kinds: {:?} and {:?}", of(one), of(other));
    Err(Error::Invalid { op, message })
}
