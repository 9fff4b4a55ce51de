//! What can go wrong in an operation: a wrong shape, a wrong index, a device without a kernel.

use std::ops::Range;

use candle_core::DType;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong in an operation.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operation is not written for this device and element type.
    #[error("{op}: no kernel for {dtype:?} on {device}")]
    NoKernel {
        /// The operation.
        op: &'static str,
        /// Where the tensor lives.
        device: String,
        /// Its element type.
        dtype: DType,
    },
    /// A tensor whose elements do not lie one after the other, row by row.
    #[error("{op}: expected a contiguous tensor, found shape {shape:?} with strides {stride:?}")]
    NotContiguous {
        /// The operation.
        op: &'static str,
        /// The tensor's shape.
        shape: Vec<usize>,
        /// The tensor's strides, in elements.
        stride: Vec<usize>,
    },
    /// A tensor or list of another shape than the others demand.
    #[error("{op}: {tensor}: expected shape {expected:?}, found {found:?}")]
    Shape {
        /// The operation.
        op: &'static str,
        /// The argument's name.
        tensor: &'static str,
        /// The shape that it should have.
        expected: Vec<usize>,
        /// The shape that it has.
        found: Vec<usize>,
    },
    /// A tensor with another number of dimensions than the operation takes.
    #[error("{op}: {tensor}: expected {expected} dimensions, found shape {found:?}")]
    Rank {
        /// The operation.
        op: &'static str,
        /// The argument's name.
        tensor: &'static str,
        /// The number of dimensions that it should have.
        expected: usize,
        /// The shape that it has.
        found: Vec<usize>,
    },
    /// A range of rows, columns or elements that is not inside its tensor.
    #[error("{op}: {what} {range:?} are not within 0..{len}")]
    Range {
        /// The operation.
        op: &'static str,
        /// What the range counts (`rows`, `columns`, `elements`).
        what: &'static str,
        /// The range that was asked for.
        range: Range<usize>,
        /// How many there are.
        len: usize,
    },
    /// A width that does not divide into equal parts.
    #[error("{op}: {what} {len} is no multiple of {part}")]
    Indivisible {
        /// The operation.
        op: &'static str,
        /// What the length measures.
        what: &'static str,
        /// The length.
        len: usize,
        /// The length of a part.
        part: usize,
    },
    /// A token or position id past the end of its table.
    #[error("{op}: token id {id} at index {index}, but the table has {rows} rows")]
    TokenOutOfRange {
        /// The operation.
        op: &'static str,
        /// Where in the list the id stands.
        index: usize,
        /// The id.
        id: i64,
        /// The number of rows of the table.
        rows: usize,
    },
    /// A position past the end of the rotary table.
    #[error("{op}: position {position} at index {index}, but the table ends at {max_pos}")]
    PositionOutOfRange {
        /// The operation.
        op: &'static str,
        /// Where in the list the position stands.
        index: usize,
        /// The position.
        position: u32,
        /// The number of positions of the table.
        max_pos: usize,
    },
    /// An input which shares its memory with the tensor that is written.
    #[error("{op}: {tensor} shares its memory with the tensor to be written")]
    Aliased {
        /// The operation.
        op: &'static str,
        /// The argument's name.
        tensor: &'static str,
    },
    /// Arguments that contradict one another.
    #[error("{op}: {message}")]
    Invalid {
        /// The operation.
        op: &'static str,
        /// What contradicts what.
        message: String,
    },
    /// Something that the operation does not do.
    #[error("{op}: not supported: {what}")]
    Unsupported {
        /// The operation.
        op: &'static str,
        /// What, in words.
        what: String,
    },
    /// A device that is not there, or not in this build.
    #[error("device {name}: {message}")]
    Device {
        /// What was asked for.
        name: String,
        /// Why it cannot be had.
        message: String,
    },
    /// The GPU's memory is full.
    #[error("{op}: the GPU has no memory left")]
    OutOfMemory {
        /// The operation that asked for more.
        op: &'static str,
    },
    /// An error of the GPU, its driver or a library for it.
    #[error("{op}: {message}")]
    Cuda {
        /// The operation.
        op: &'static str,
        /// What the library said.
        message: String,
    },
    /// An error of the tensor library.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}
