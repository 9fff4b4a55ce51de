//! A gated MLP's first half by input: the columns of a neuron's gate and of its `up` lie side by side.

use candle_core::Tensor;

use super::super::pointwise::curve_code;
use super::super::{Grid, Module, module};
use super::launch::queue;
use super::{
    COUNTS, Format, GpuMatrix, Input, Output, Room, Words, activations, numbers_or_null,
    project_by_input,
};
use crate::buffer::{dims2, ensure_shape};
use crate::error::{Error, Result};
use crate::pointwise::Pointwise;

static MODULE: Module = module!("decode_pairs");
const OP: &str = "gate times up";

/// `Pairs` of `cu/decode_pairs.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Pairs {
    sums: u64,
    products: u64,
    gate_bias: u64,
    up_bias: u64,
    mask: u64,
    counts: u64,
    ffn: i32,
    columns: i32,
    half: i32,
    act: i32,
    act_p: f32,
    then: i32,
    then_p: f32,
    pad: i32,
}

/// A gated MLP's first half, whose one list of inputs serves gate and `up`. Every gate is computed and
/// so is every `up`: the better way where inputs are about as sparse as gates.
#[derive(Clone, Copy)]
pub struct PairsByInput<'a> {
    /// What enters both.
    pub input: Input<'a>,
    /// [`GpuMatrix::pack_pairs`].
    pub matrix: &'a GpuMatrix,
    /// Biases of the gate and of `up`, `[ffn]` f32.
    pub biases: [Option<&'a Tensor>; 2],
    /// The gate's activation.
    pub activation: Pointwise,
    /// `[ffn]` f32, on the gate after its activation: as [`Input::mask`].
    pub mask: Option<&'a Tensor>,
    /// On the products.
    pub then: Pointwise,
    /// Room for sums, `[batch, columns]` f32 with the columns of the matrix.
    pub sums: &'a Tensor,
    /// `[batch, ffn]` f32: 0 where the gate is 0.
    pub products: &'a Tensor,
    /// Where [`COUNTS`] words are written: how many gates are open.
    pub counts: Option<(&'a Words, usize)>,
}

/// `products = then(activation(gate in(x) + bias) * (up in(x) + bias))`. Rows of inputs that are zero in
/// the whole batch are not read.
///
/// # Errors
/// Shapes that do not fit; a batch other than 1, 2, 4 or 8; tensors that are not f32 on a GPU.
pub fn pairs_by_input(it: &PairsByInput<'_>, room: &Room) -> Result<()> {
    const THREADS: usize = 512;
    let (products, batch, ffn) = activations(it.products, "products", OP)?;
    it.check()?;
    project_by_input(&it.input, it.matrix, &Output::new(it.sums, None), room)?;
    let (act, act_p) = curve_code(it.activation);
    let (then, then_p) = curve_code(it.then);
    let pairs = Pairs {
        sums: activations(it.sums, "sums", OP)?.0,
        products,
        gate_bias: numbers_or_null(it.biases[0], ffn, "bias of the gate", OP)?,
        up_bias: numbers_or_null(it.biases[1], ffn, "bias of up", OP)?,
        mask: numbers_or_null(it.mask, ffn, "mask", OP)?,
        counts: it.counts.map_or(Ok(0), |(words, at)| words.at(at, COUNTS, OP))?,
        ffn: ffn as i32,
        columns: it.matrix.cols() as i32,
        half: GpuMatrix::pair_half(it.matrix.format()) as i32,
        act,
        act_p,
        then,
        then_p,
        pad: 0,
    };
    // One block more, which counts.
    let grid = Grid::new(ffn.div_ceil(THREADS) + 1, THREADS as u32);
    queue(&it.matrix.gpu, OP, (&MODULE, &format!("pairs_{batch}")), grid, &pairs)
}

impl PairsByInput<'_> {
    /// Demands a matrix and room for as many pairs as there are products.
    pub(super) fn check(&self) -> Result<()> {
        let (batch, ffn) = dims2(self.products, OP, "products")?;
        let columns = GpuMatrix::pair_columns(self.matrix.format(), ffn);
        if self.matrix.cols() != columns {
            let message = format!("{} columns for {ffn} pairs", self.matrix.cols());
            return Err(Error::Invalid { op: OP, message });
        }
        ensure_shape(self.sums, OP, "sums", &[batch, columns])
    }
}

impl GpuMatrix {
    /// Gates side by side in a row of pairs, behind which their `up` is: half of 16 bytes.
    pub(super) fn pair_half(format: Format) -> usize {
        8 / format.bytes()
    }

    /// Columns of the pairs of so many neurons: two each, and zeros behind the last.
    pub fn pair_columns(format: Format, ffn: usize) -> usize {
        2 * ffn.next_multiple_of(GpuMatrix::pair_half(format))
    }

    /// Packs a gate and its `up`, each f32 or bf16 on a GPU, `[ffn, hidden]`, by input, so that 16 bytes
    /// of a row have some gates and then their `up`.
    ///
    /// # Errors
    /// As [`GpuMatrix::pack`]; two shapes or types.
    pub fn pack_pairs(gate: &Tensor, up: &Tensor, format: Format) -> Result<GpuMatrix> {
        let half = GpuMatrix::pair_half(format);
        let (ffn, hidden) = dims2(gate, "packing weights", "gate")?;
        let groups = ffn.div_ceil(half);
        let grouped = |t: &Tensor| {
            t.pad_with_zeros(0, 0, groups * half - ffn)?.reshape((groups, half, hidden))
        };
        let both = Tensor::stack(&[grouped(gate)?, grouped(up)?], 1)?;
        GpuMatrix::pack(&both.reshape((2 * groups * half, hidden))?, true, format)
    }
}
