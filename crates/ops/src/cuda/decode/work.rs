//! What a token is made of: operations that are queued one by one, a kernel or two each, or become
//! the steps of one [`Program`](super::Program).

use candle_core::Tensor;

use super::{
    Attention, Embedding, GpuMatrix, Input, Output, PairsByInput, Room, UpRows, attend, embed,
    gate_and_up, pairs_by_input, project_by_input, project_by_output, up_rows,
};
use crate::error::Result;
use crate::pointwise::Pointwise;

/// One operation.
#[derive(Clone, Copy)]
pub enum Work<'a> {
    /// Into the residual stream.
    Embed(Embedding<'a>),
    /// `y = W in(x) + bias`.
    Project {
        /// What enters.
        input: Input<'a>,
        /// `[inputs, outputs]` where `by_input`, else `[outputs, inputs]`.
        matrix: &'a GpuMatrix,
        /// Rows of zero inputs are skipped.
        by_input: bool,
        /// Where the result goes.
        output: Output<'a>,
    },
    /// [`gate_and_up`].
    GateAndUp {
        /// What enters both.
        input: Input<'a>,
        /// The gate, `[ffn, hidden]`, and its bias.
        gate: (&'a GpuMatrix, Option<&'a Tensor>),
        /// `up`, the same.
        up: (&'a GpuMatrix, Option<&'a Tensor>),
        /// The gate's activation, and what comes behind the product.
        curves: (Pointwise, Pointwise),
        /// `[batch, ffn]` f32.
        products: &'a Tensor,
    },
    /// The gate, then [`up_rows`] where it is open.
    Neurons {
        /// What enters both, written to [`Input::h`].
        input: Input<'a>,
        /// `[hidden, ffn]` where `by_input`, else `[ffn, hidden]`.
        gate: &'a GpuMatrix,
        /// Rows of zero inputs are skipped.
        by_input: bool,
        /// `[ffn]` f32.
        bias: Option<&'a Tensor>,
        /// The second half.
        up: UpRows<'a>,
    },
    /// [`pairs_by_input`].
    PairsByInput(PairsByInput<'a>),
    /// A token's attention.
    Attend(Attention<'a>),
}

impl Work<'_> {
    /// Queues the operation's kernels.
    ///
    /// # Errors
    /// Shapes that do not fit; a batch other than 1, 2, 4 or 8; an error of the GPU.
    pub fn queue(&self, room: &Room) -> Result<()> {
        let project = |input: &Input<'_>, matrix, by_input, output: &Output<'_>| match by_input {
            true => project_by_input(input, matrix, output, room),
            false => project_by_output(input, matrix, output),
        };
        match self {
            Work::Embed(it) => embed(it),
            Work::Project { input, matrix, by_input, output } => {
                project(input, matrix, *by_input, output)
            }
            Work::GateAndUp { input, gate, up, curves, products } => {
                gate_and_up(input, *gate, *up, *curves, products)
            }
            Work::Neurons { input, gate, by_input, bias, up } => {
                project(input, gate, *by_input, &Output::new(up.gate, *bias))?;
                up_rows(up)
            }
            Work::PairsByInput(it) => pairs_by_input(it, room),
            Work::Attend(it) => attend(it, room),
        }
    }
}
