//! From tensors to slices and back: how an operation reads, writes in place and makes tensors.
//!
//! Reading takes the tensor's lock for as long as the [`View`] lives; writing takes it exclusively.
//! An operation which writes one tensor while it reads others must therefore call
//! [`ensure_distinct`] first: reading the memory under the pen would wait for ever.

use std::cell::Cell;
use std::mem::MaybeUninit;
use std::ops::{Deref, Range};

use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Shape, Storage, Tensor};

use crate::error::{Error, Result};

/// How a gradient is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accum {
    /// What was there is forgotten (it may be uninitialised or NaN).
    Overwrite,
    /// The gradient is added to what is there.
    Add,
}

/// Where a gradient goes and how it is written.
pub type Dest<'a> = (&'a Tensor, Accum);

/// The elements of a contiguous f32 tensor on the CPU, locked for reading.
pub struct View<'a> {
    guard: candle_core::StorageRef<'a>,
    range: Range<usize>,
}

impl Deref for View<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &*self.guard {
            // `view` has checked the range against the storage's length.
            Storage::Cpu(CpuStorage::F32(all)) => &all[self.range.clone()],
            _ => &[],
        }
    }
}

/// Locks `t` for reading.
///
/// # Errors
/// [`Error::NoKernel`] off the CPU or for another type than f32, [`Error::NotContiguous`].
pub fn view<'a>(t: &'a Tensor, op: &'static str) -> Result<View<'a>> {
    let (guard, layout) = t.storage_and_layout();
    let range = contiguous_range(layout, op)?;
    match &*guard {
        Storage::Cpu(CpuStorage::F32(all)) if range.end <= all.len() => Ok(View { guard, range }),
        _ => Err(no_kernel(t, op)),
    }
}

/// Calls `f` with the elements of `t`.
///
/// # Errors
/// As [`view`].
pub fn read_f32<R>(t: &Tensor, op: &'static str, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
    Ok(f(&view(t, op)?))
}

/// Calls `f` with the elements of `t`, to be changed in place. Every clone and view of `t` sees the change.
///
/// # Errors
/// As [`view`].
pub fn write_f32<R>(t: &Tensor, op: &'static str, f: impl FnOnce(&mut [f32]) -> R) -> Result<R> {
    if !t.device().is_cpu() || t.dtype() != DType::F32 {
        return Err(no_kernel(t, op));
    }
    contiguous_range(t.layout(), op)?;
    let pen = Pen { op, f: Cell::new(Some(f)), result: Cell::new(None) };
    t.inplace_op1(&pen)?;
    pen.result.into_inner().ok_or_else(|| no_kernel(t, op))
}

/// Refuses inputs that share memory with `written`.
///
/// # Errors
/// [`Error::Aliased`] names the first that does.
pub fn ensure_distinct(
    op: &'static str,
    written: &Tensor,
    inputs: &[(&'static str, &Tensor)],
) -> Result<()> {
    let target = storage_address(written);
    match inputs.iter().find(|(_, t)| storage_address(t) == target) {
        Some(&(tensor, _)) => Err(Error::Aliased { op, tensor }),
        None => Ok(()),
    }
}

/// A tensor of these elements.
///
/// # Errors
/// [`Error::Candle`] if `shape` has another number of elements.
pub fn from_vec(v: Vec<f32>, shape: impl Into<Shape>, device: &Device) -> Result<Tensor> {
    Ok(Tensor::from_vec(v, shape.into(), device)?)
}

/// A tensor of `t`'s shape, type and device, for who overwrites all of it: on a GPU it holds
/// whatever was there, on the CPU 0.
///
/// # Errors
/// No room on the device.
pub fn room_like(t: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if t.device().is_cuda() {
        return crate::cuda::empty_like(t, "room_like");
    }
    Ok(t.zeros_like()?)
}

/// A vector of `len` elements that `fill` writes, without zeroing them first.
///
/// # Safety
/// `fill` must have initialised every element when it returns.
pub(crate) unsafe fn fill_vec(len: usize, fill: impl FnOnce(&mut [MaybeUninit<f32>])) -> Vec<f32> {
    let mut v = Vec::with_capacity(len);
    fill(&mut v.spare_capacity_mut()[..len]);
    // SAFETY: the capacity is at least `len`, and the caller promises that all are initialised.
    unsafe { v.set_len(len) };
    v
}

/// The same elements, for a function which writes fresh memory.
///
/// # Safety
/// Only initialised elements may be stored through the result.
pub(crate) unsafe fn as_uninit(v: &mut [f32]) -> &mut [MaybeUninit<f32>] {
    let (start, len) = (v.as_mut_ptr().cast::<MaybeUninit<f32>>(), v.len());
    // SAFETY: same memory, lifetime and layout; the caller keeps it initialised.
    unsafe { std::slice::from_raw_parts_mut(start, len) }
}

/// The elements of a contiguous tensor on any device, f32 or bf16, copied to the host.
///
/// # Errors
/// [`Error::NoKernel`] for another type, [`Error::NotContiguous`], an error of the GPU.
pub fn to_host(t: &Tensor) -> Result<Vec<f32>> {
    const OP: &str = "to_host";
    #[cfg(feature = "cuda")]
    if t.device().is_cuda() {
        use crate::cuda::{Elem, Gpu, operand};
        let (gpu, from) = (Gpu::of(t)?, operand(t, OP)?);
        return match from.elem {
            Elem::F32 => gpu.download(from.ptr, from.len, OP),
            Elem::Bf16 => {
                let bits: Vec<u16> = gpu.download(from.ptr, from.len, OP)?;
                Ok(bits.into_iter().map(|bits| half::bf16::from_bits(bits).to_f32()).collect())
            }
        };
    }
    Ok(view(t, OP)?.to_vec())
}

/// Writes as many numbers as a contiguous tensor has, on any device, f32 or bf16 (rounded to the
/// nearest).
///
/// # Errors
/// [`Error::Shape`] for another number of them; as [`to_host`].
pub fn write_from_host(t: &Tensor, values: &[f32]) -> Result<()> {
    const OP: &str = "write_from_host";
    if values.len() != t.elem_count() {
        let (expected, found) = (vec![t.elem_count()], vec![values.len()]);
        return Err(Error::Shape { op: OP, tensor: "values", expected, found });
    }
    #[cfg(feature = "cuda")]
    if t.device().is_cuda() {
        use crate::cuda::{Elem, Gpu, operand};
        let (gpu, to) = (Gpu::of(t)?, operand(t, OP)?);
        return match to.elem {
            Elem::F32 => gpu.write(values, to.ptr, OP),
            Elem::Bf16 => {
                let bits: Vec<u16> =
                    values.iter().map(|value| half::bf16::from_f32(*value).to_bits()).collect();
                gpu.write(&bits, to.ptr, OP)
            }
        };
    }
    write_f32(t, OP, |to| to.copy_from_slice(values))
}

/// The same numbers in fresh memory, as f32 or bf16 (rounded to the nearest, ties to even).
///
/// # Errors
/// [`Error::NoKernel`] from or to another type, [`Error::NotContiguous`], an error of the GPU.
pub fn cast(t: &Tensor, dtype: DType) -> Result<Tensor> {
    const OP: &str = "cast";
    ensure_float(t, t.dtype(), OP)?;
    ensure_float(t, dtype, OP)?;
    contiguous_range(t.layout(), OP)?;
    #[cfg(feature = "cuda")]
    if t.device().is_cuda() {
        return crate::cuda::cast::cast(t, dtype, OP);
    }
    Ok(if t.dtype() == dtype { t.copy()? } else { t.to_dtype(dtype)? })
}

/// Copies the numbers of `src` into `dst`, of one shape and on one device; each may be f32 or bf16.
/// Every clone and view of `dst` sees them.
///
/// # Errors
/// [`Error::Shape`], [`Error::Aliased`], and as [`cast`].
pub fn copy_into(src: &Tensor, dst: &Tensor) -> Result<()> {
    const OP: &str = "copy_into";
    ensure_shape(src, OP, "src", dst.dims())?;
    ensure_distinct(OP, dst, &[("src", src)])?;
    for t in [src, dst] {
        ensure_float(t, t.dtype(), OP)?;
        contiguous_range(t.layout(), OP)?;
    }
    if !src.device().same_device(dst.device()) {
        return Err(no_kernel(src, OP));
    }
    #[cfg(feature = "cuda")]
    if dst.device().is_cuda() {
        return crate::cuda::cast::copy_into(src, dst, OP);
    }
    if dst.elem_count() > 0 {
        // Contiguous, so flattening gives a view of the same memory.
        let values = src.flatten_all()?.to_dtype(dst.dtype())?;
        dst.flatten_all()?.slice_set(&values, 0, 0)?;
    }
    Ok(())
}

/// Demands f32 or bf16, which conversions take.
fn ensure_float(t: &Tensor, dtype: DType, op: &'static str) -> Result<()> {
    match dtype {
        DType::F32 | DType::BF16 => Ok(()),
        _ => Err(Error::NoKernel { op, device: format!("{:?}", t.device().location()), dtype }),
    }
}

/// The width of the rows of a `[n, width]` tensor, and `n`.
///
/// # Errors
/// [`Error::Rank`] unless there are two dimensions.
pub fn dims2(t: &Tensor, op: &'static str, tensor: &'static str) -> Result<(usize, usize)> {
    match *t.dims() {
        [rows, cols] => Ok((rows, cols)),
        _ => Err(Error::Rank { op, tensor, expected: 2, found: t.dims().to_vec() }),
    }
}

/// Demands that `t` has the shape `expected`.
///
/// # Errors
/// [`Error::Shape`].
pub fn ensure_shape(
    t: &Tensor,
    op: &'static str,
    tensor: &'static str,
    expected: &[usize],
) -> Result<()> {
    if t.dims() == expected {
        return Ok(());
    }
    Err(Error::Shape { op, tensor, expected: expected.to_vec(), found: t.dims().to_vec() })
}

/// Demands that `range` lies in `0..len` and does not run backwards.
///
/// # Errors
/// [`Error::Range`].
pub fn ensure_range(
    range: &Range<usize>,
    len: usize,
    op: &'static str,
    what: &'static str,
) -> Result<()> {
    if range.start <= range.end && range.end <= len {
        return Ok(());
    }
    Err(Error::Range { op, what, range: range.clone(), len })
}

/// The error for a tensor that the CPU's f32 kernels cannot take.
pub fn no_kernel(t: &Tensor, op: &'static str) -> Error {
    Error::NoKernel { op, device: format!("{:?}", t.device().location()), dtype: t.dtype() }
}

fn contiguous_range(layout: &Layout, op: &'static str) -> Result<Range<usize>> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(start..end),
        None => Err(Error::NotContiguous {
            op,
            shape: layout.dims().to_vec(),
            stride: layout.stride().to_vec(),
        }),
    }
}

/// Where the storage of `t` lies: equal for all views of one allocation.
fn storage_address(t: &Tensor) -> *const Storage {
    let (guard, _) = t.storage_and_layout();
    &raw const *guard
}

/// Carries a closure into candle's in-place operations, whose trait takes `&self`.
struct Pen<F, R> {
    op: &'static str,
    f: Cell<Option<F>>,
    result: Cell<Option<R>>,
}

impl<R, F: FnOnce(&mut [f32]) -> R> InplaceOp1 for Pen<F, R> {
    fn name(&self) -> &'static str {
        self.op
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let range = layout.contiguous_offsets();
        if let (CpuStorage::F32(all), Some((start, end)), Some(f)) = (storage, range, self.f.take())
            && let Some(elements) = all.get_mut(start..end)
        {
            self.result.set(Some(f(elements)));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_change_their_type_and_place() {
        let x = Tensor::new(&[[1f32, 1.003_906_2], [-3.0, f32::NAN]], &Device::Cpu).unwrap();
        let half = cast(&x, DType::BF16).unwrap();
        let back = cast(&half, DType::F32).unwrap().flatten_all().unwrap();
        // The tie goes to the even neighbour.
        assert_eq!(back.to_vec1::<f32>().unwrap()[..3], [1.0, 1.0, -3.0]);
        assert!(back.to_vec1::<f32>().unwrap()[3].is_nan());
        let target = Tensor::zeros((3, 2), DType::BF16, &Device::Cpu).unwrap();
        copy_into(&x, &target.narrow(0, 1, 2).unwrap()).unwrap();
        let found: Vec<half::bf16> = target.flatten_all().unwrap().to_vec1().unwrap();
        assert_eq!(found[..5].iter().map(|x| x.to_f32()).sum::<f32>(), -1.0);
        // Fresh memory even without a change of type.
        let same = cast(&x, DType::F32).unwrap();
        assert!(copy_into(&x, &same).is_ok() && copy_into(&x, &x).is_err());
        assert!(cast(&x, DType::F64).is_err() && cast(&x.t().unwrap(), DType::F32).is_err());
        assert!(copy_into(&x, &target).is_err());
    }
}
