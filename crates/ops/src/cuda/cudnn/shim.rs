//! The calls of `cu/cudnn.cpp`, with their answers as Rust's.

use std::ffi::{CStr, c_char, c_void};

use super::OP;
use crate::cuda::Gpu;
use crate::error::Error;

pub(super) const DO_WITHOUT: &str = "RELUFY_ATTENTION=own does without cuDNN";

/// What the shim answers when it did not do a thing.
pub(super) enum Refusal {
    Unsupported(String),
    Failed(String),
}

impl Refusal {
    pub(super) fn why(self) -> String {
        let (Refusal::Unsupported(why) | Refusal::Failed(why)) = self;
        why
    }
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Error {
        Error::Cuda { op: OP, message: format!("cuDNN: {} ({DO_WITHOUT})", refusal.why()) }
    }
}

/// Opens the library; its version.
pub(super) fn open(path: &CStr) -> Result<usize, Refusal> {
    let mut version = 0;
    // SAFETY: the call reads a path that ends with a 0, and writes one number.
    told(|text, room| unsafe { relufy_cudnn_open(path.as_ptr(), &mut version, text, room) })?;
    Ok(version)
}

/// cuDNN on a GPU's stream.
pub(super) struct Handle(*mut c_void);

/// Attention of one shape.
pub(super) struct Plan {
    pointer: *mut c_void,
    /// Bytes that it works in.
    pub(super) workspace: usize,
}

// SAFETY: cuDNN's objects belong to no thread; the lock around sessions lets one in at a time.
unsafe impl Send for Handle {}
// SAFETY: as for a handle.
unsafe impl Send for Plan {}

impl Handle {
    /// The library is open and the GPU's context that of this thread.
    pub(super) fn new(gpu: &Gpu) -> Result<Handle, Refusal> {
        let mut handle = std::ptr::null_mut();
        // SAFETY: the call writes one pointer. The stream lives as long as the GPU, which is never
        // dropped, and so does the handle.
        told(|text, room| unsafe {
            relufy_cudnn_handle(gpu.stream.cu_stream().cast(), &mut handle, text, room)
        })?;
        Ok(Handle(handle))
    }

    /// The GPU's context is that of this thread.
    pub(super) fn plan(&self, shape: &RawShape) -> Result<Plan, Refusal> {
        let (mut pointer, mut workspace) = (std::ptr::null_mut(), 0);
        // SAFETY: the handle is alive; the call reads the shape and writes a pointer and a number.
        told(|text, room| unsafe {
            relufy_cudnn_plan(self.0, shape, &mut pointer, &mut workspace, text, room)
        })?;
        Ok(Plan { pointer, workspace })
    }

    /// Queues a plan.
    ///
    /// # Safety
    /// The GPU's context is that of this thread. `tensors` are addresses on it, as many as the
    /// plan's direction takes and of its shape's sizes; `workspace` has the bytes that it wants.
    /// All are freed on the handle's stream at the earliest.
    pub(super) unsafe fn run(
        &self,
        plan: &Plan,
        tensors: &[u64],
        workspace: u64,
    ) -> Result<(), Refusal> {
        // SAFETY: handle and plan are alive, and the caller vouches for the addresses.
        told(|text, room| unsafe {
            relufy_cudnn_run(self.0, plan.pointer, tensors.as_ptr(), workspace, text, room)
        })
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: the plan was made by the shim, and nobody else has it.
        unsafe { relufy_cudnn_free(self.pointer) };
    }
}

/// Calls the shim with room for a text.
fn told(call: impl FnOnce(*mut c_char, usize) -> i32) -> Result<(), Refusal> {
    let mut text = [0u8; 2048];
    let status = call(text.as_mut_ptr().cast(), text.len());
    let end = text.iter().position(|byte| *byte == 0).unwrap_or(text.len());
    let why = || String::from_utf8_lossy(&text[..end]).trim().to_string();
    match status {
        0 => Ok(()),
        1 => Err(Refusal::Unsupported(why())),
        _ => Err(Refusal::Failed(why())),
    }
}

/// `RelufyCudnnShape` of `cu/cudnn.cpp`.
#[repr(C)]
pub(super) struct RawShape {
    pub(super) batch: i64,
    pub(super) len: i64,
    pub(super) heads: i64,
    pub(super) kv_heads: i64,
    pub(super) head_dim: i64,
    pub(super) scale: f32,
    pub(super) capability: i32,
    pub(super) backward: i32,
    pub(super) deterministic: i32,
}

// Each returns 0, 1 (not supported) or 2 (failed), and writes a reason that ends with a 0.
unsafe extern "C" {
    fn relufy_cudnn_open(
        file: *const c_char,
        version: *mut usize,
        text: *mut c_char,
        room: usize,
    ) -> i32;
    fn relufy_cudnn_handle(
        stream: *mut c_void,
        handle: *mut *mut c_void,
        text: *mut c_char,
        room: usize,
    ) -> i32;
    fn relufy_cudnn_plan(
        handle: *mut c_void,
        shape: *const RawShape,
        plan: *mut *mut c_void,
        workspace: *mut usize,
        text: *mut c_char,
        room: usize,
    ) -> i32;
    fn relufy_cudnn_free(plan: *mut c_void);
    /// `tensors` and `workspace` are addresses on the GPU.
    fn relufy_cudnn_run(
        handle: *mut c_void,
        plan: *mut c_void,
        tensors: *const u64,
        workspace: u64,
        text: *mut c_char,
        room: usize,
    ) -> i32;
}
