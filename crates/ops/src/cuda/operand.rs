//! Tensors as kernels see them: an address, a number of elements and their type.

use candle_core::cuda_backend::cudarc::driver::DevicePtr;
use candle_core::cuda_backend::{CudaStorageSlice, cudarc::driver::CudaSlice};
use candle_core::{DType, Device, Shape, Storage, Tensor};

use super::gpu::Gpu;
use crate::buffer::no_kernel;
use crate::error::{Error, Result};

/// The element types that kernels know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Elem {
    F32,
    Bf16,
}

impl Elem {
    pub(crate) fn bytes(self) -> usize {
        match self {
            Elem::F32 => 4,
            Elem::Bf16 => 2,
        }
    }

    /// Elements of a 16-byte vector.
    pub(crate) fn per_vector(self) -> usize {
        16 / self.bytes()
    }

    pub(crate) fn suffix(self) -> &'static str {
        match self {
            Elem::F32 => "f32",
            Elem::Bf16 => "bf16",
        }
    }
}

/// The elements of a contiguous tensor on a GPU.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Operand {
    /// Address of the first element.
    pub(crate) ptr: u64,
    pub(crate) elem: Elem,
    pub(crate) len: usize,
}

impl Operand {
    /// The address of element `at`.
    pub(crate) fn at(&self, at: usize) -> u64 {
        self.ptr + (at * self.elem.bytes()) as u64
    }

    pub(crate) fn byte_len(&self) -> usize {
        self.len * self.elem.bytes()
    }

    /// Demands another operand's element type.
    pub(crate) fn like(self, other: &Operand, t: &Tensor, op: &'static str) -> Result<Operand> {
        if self.elem == other.elem { Ok(self) } else { Err(no_kernel(t, op)) }
    }

    /// Whether rows of `width` elements can be read and written 16 bytes at a time.
    pub(crate) fn vectorises(&self, width: usize) -> bool {
        self.ptr.is_multiple_of(16) && width.is_multiple_of(self.elem.per_vector())
    }
}

/// The elements of `t`, to be read or written by work queued on its GPU's stream.
///
/// Work is queued in order, so the tensor may be dropped as soon as the work is queued: its memory
/// returns to the pool on the same stream. Who writes calls [`crate::buffer::ensure_distinct`]
/// first, as on the CPU.
///
/// # Errors
/// [`Error::NoKernel`] off the GPU or for another type than f32 and bf16,
/// [`Error::NotContiguous`].
pub(crate) fn operand(t: &Tensor, op: &'static str) -> Result<Operand> {
    if !t.device().is_cuda() {
        return Err(no_kernel(t, op));
    }
    let gpu = Gpu::of(t)?;
    let (storage, layout) = t.storage_and_layout();
    let (start, _) = layout.contiguous_offsets().ok_or_else(|| Error::NotContiguous {
        op,
        shape: layout.dims().to_vec(),
        stride: layout.stride().to_vec(),
    })?;
    fn address<T>(slice: &CudaSlice<T>, gpu: &Gpu) -> u64 {
        slice.device_ptr(&gpu.stream).0
    }
    let (base, elem) = match &*storage {
        Storage::Cuda(storage) => match &storage.slice {
            CudaStorageSlice::F32(slice) => (address(slice, &gpu), Elem::F32),
            CudaStorageSlice::BF16(slice) => (address(slice, &gpu), Elem::Bf16),
            _ => return Err(no_kernel(t, op)),
        },
        _ => return Err(no_kernel(t, op)),
    };
    let operand = Operand { ptr: base, elem, len: t.elem_count() };
    Ok(Operand { ptr: operand.at(start), ..operand })
}

/// An uninitialised tensor.
///
/// # Errors
/// [`Error::OutOfMemory`].
pub(crate) fn empty(
    shape: impl Into<Shape>,
    dtype: DType,
    device: &Device,
    op: &'static str,
) -> Result<Tensor> {
    let shape = shape.into();
    if shape.elem_count() == 0 {
        // The driver does not promise to allocate nothing.
        return Ok(Tensor::zeros(1, dtype, device)?.narrow(0, 0, 0)?.reshape(shape)?);
    }
    // SAFETY: the operation writes every element before anything reads one.
    unsafe { Tensor::empty(shape, dtype, device) }.map_err(|error| {
        // candle wraps the driver's error in text.
        match error.to_string().contains("OUT_OF_MEMORY") {
            true => Error::OutOfMemory { op },
            false => error.into(),
        }
    })
}

/// An uninitialised tensor of `t`'s shape, type and device.
///
/// # Errors
/// [`Error::OutOfMemory`].
pub(crate) fn empty_like(t: &Tensor, op: &'static str) -> Result<Tensor> {
    empty(t.shape(), t.dtype(), t.device(), op)
}
