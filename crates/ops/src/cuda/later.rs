//! Numbers on their way to the host, so that the queue need not stop for them.
//!
//! The copy goes into page-locked memory, for only that is copied while the host goes on, and an
//! event tells when it is there: whoever waits for it waits for the work before it, not for what
//! was queued since.

use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::cuda_backend::cudarc::driver::{CudaEvent, result, sys};

use super::gpu::{Gpu, failed};
use crate::error::Result;

/// The most numbers of one copy.
const MOST: usize = 8;

/// Page-locked memory, which is slow to come by: it is kept for the next copy.
struct Locked(NonNull<[f64; MOST]>);

// SAFETY: the memory belongs to no thread, and a `Locked` has one owner at a time.
unsafe impl Send for Locked {}

static FREE: Mutex<Vec<Locked>> = Mutex::new(Vec::new());

impl Locked {
    /// The calling thread must have a GPU's context.
    fn new(op: &'static str) -> Result<Locked> {
        let free = FREE.lock().unwrap_or_else(PoisonError::into_inner).pop();
        if let Some(locked) = free {
            return Ok(locked);
        }
        let bytes = size_of::<[f64; MOST]>();
        // SAFETY: the memory is kept until the process ends, and zeroed before it is read.
        let start = unsafe { result::malloc_host(bytes, sys::CU_MEMHOSTALLOC_PORTABLE) }
            .map_err(|e| failed(op, e))?;
        let Some(start) = NonNull::new(start.cast::<[f64; MOST]>()) else {
            return Err(crate::error::Error::OutOfMemory { op });
        };
        // SAFETY: the call above gave room for this array, aligned to a page.
        unsafe { start.write([0.0; MOST]) };
        Ok(Locked(start))
    }
}

/// `N` numbers that a GPU was told to copy to the host.
pub(crate) struct Later<const N: usize> {
    gpu: Arc<Gpu>,
    /// `None` once it was handed back.
    memory: Option<Locked>,
    there: CudaEvent,
}

impl<const N: usize> Later<N> {
    /// Queues the copy of the `N` numbers at `ptr`, at most 8.
    pub(crate) fn queue(gpu: Arc<Gpu>, ptr: u64, op: &'static str) -> Result<Later<N>> {
        const { assert!(N <= MOST, "more numbers than a copy takes") };
        gpu.bind(op)?;
        let mut memory = Locked::new(op)?;
        // SAFETY: nobody else has the memory; as long as the copy may write to it, it is neither
        // read nor handed on: `wait` and `drop` wait for the event first.
        let copied = unsafe {
            let room = memory.0.as_mut();
            result::memcpy_dtoh_async(&mut room[..N], ptr, gpu.stream.cu_stream())
        };
        copied.map_err(|e| failed(op, e))?;
        let there = match gpu.stream.record_event(None) {
            Ok(there) => there,
            Err(error) => {
                // Without an event the whole queue is waited for before the memory is let go.
                gpu.synchronize(op)?;
                return Err(failed(op, error));
            }
        };
        Ok(Later { gpu, memory: Some(memory), there })
    }

    /// The numbers, once they are there.
    pub(crate) fn wait(mut self, op: &'static str) -> Result<[f64; N]> {
        let mut numbers = [0.0; N];
        self.there.synchronize().map_err(|e| failed(op, e))?;
        if let Some(memory) = self.memory.take() {
            // SAFETY: the copy is done, and nobody else has the memory.
            numbers.copy_from_slice(unsafe { &memory.0.as_ref()[..N] });
            FREE.lock().unwrap_or_else(PoisonError::into_inner).push(memory);
        }
        Ok(numbers)
    }
}

impl<const N: usize> Drop for Later<N> {
    fn drop(&mut self) {
        // Memory that a failed GPU may still write to is not used again.
        if let Some(memory) = self.memory.take()
            && self.gpu.bind("waiting for a copy").is_ok()
            && self.there.synchronize().is_ok()
        {
            FREE.lock().unwrap_or_else(PoisonError::into_inner).push(memory);
        }
    }
}
