//! Starting kernels that overlap with the one before.

use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::cuda_backend::cudarc::driver::{DriverError, sys};

use super::super::{Gpu, Grid, Module};
use crate::error::Result;

static OVERLAP: AtomicBool = AtomicBool::new(true);

/// Whether a kernel of decoding may start while the one before ends, which is how a program
/// starts: to see what that gives. Only GPUs since Hopper can.
pub fn set_overlap(yes: bool) {
    OVERLAP.store(yes, Ordering::Relaxed);
}

/// The error of a call of the driver.
pub(super) fn check(result: sys::CUresult, op: &'static str) -> Result<()> {
    result.result().map_err(|e: DriverError| super::super::failed(op, e))
}

/// Queues a kernel whose one parameter is a struct. It waits for the kernel before by itself.
pub(super) fn queue<P: Copy>(
    gpu: &Gpu,
    op: &'static str,
    kernel: (&Module, &str),
    grid: Grid,
    params: &P,
) -> Result<()> {
    let overlap = gpu.overlaps && OVERLAP.load(Ordering::Relaxed);
    let attribute = sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
    };
    queue_with(gpu, op, kernel, grid, params, overlap.then_some(attribute))
}

/// The same for one whose blocks meet, so that all must run at the same time. It starts behind the
/// kernel before.
pub(super) fn queue_together<P: Copy>(
    gpu: &Gpu,
    op: &'static str,
    kernel: (&Module, &str),
    grid: Grid,
    params: &P,
) -> Result<()> {
    let attribute = sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_COOPERATIVE,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue { cooperative: 1 },
    };
    queue_with(gpu, op, kernel, grid, params, Some(attribute))
}

fn queue_with<P: Copy>(
    gpu: &Gpu,
    op: &'static str,
    (module, name): (&Module, &str),
    grid: Grid,
    params: &P,
    mut attribute: Option<sys::CUlaunchAttribute>,
) -> Result<()> {
    if grid.blocks.0 == 0 || grid.blocks.1 == 0 || grid.blocks.2 == 0 {
        return Ok(());
    }
    let kernel = gpu.kernel(module, name)?;
    /// What a block has without asking is 48 KB, of which kernels name up to 40 by themselves.
    const FREE_SHARED: u32 = 8 << 10;
    if grid.shared_bytes > FREE_SHARED {
        let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        let set = kernel.set_attribute(attribute, grid.shared_bytes as i32);
        set.map_err(|e| super::super::failed(op, e))?;
    }
    gpu.bind(op)?;
    let count = u32::from(attribute.is_some());
    let attrs = attribute.as_mut().map_or(std::ptr::null_mut(), |it| &raw mut *it);
    let config = sys::CUlaunchConfig {
        gridDimX: grid.blocks.0,
        gridDimY: grid.blocks.1,
        gridDimZ: grid.blocks.2,
        blockDimX: grid.threads,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: grid.shared_bytes,
        hStream: gpu.stream.cu_stream(),
        attrs,
        numAttrs: count,
    };
    let mut list: [*mut c_void; 1] = [(&raw const *params).cast_mut().cast()];
    gpu.timed(
        || (format!("{}: {name}", module.name), 0.0),
        || {
            // SAFETY: the kernel takes this one struct, and its addresses are of memory of the
            // sizes that it names; configuration and attribute outlive the call.
            let result = unsafe {
                sys::cuLaunchKernelEx(
                    &config,
                    kernel.cu_function(),
                    list.as_mut_ptr(),
                    std::ptr::null_mut(),
                )
            };
            check(result, op)
        },
    )
}
