//! A token's kernels as one piece of work.

use std::sync::Arc;

use candle_core::Device;
use candle_core::cuda_backend::cudarc::driver::sys;

use super::super::Gpu;
use super::launch::check;
use crate::error::{Error, Result};

const OP: &str = "graph of decoding";

/// Queued work that was captured once and is replayed: a fraction of the time that queueing each
/// kernel takes. It reads and writes the same memory each time, which must outlive it.
pub struct Graph {
    gpu: Arc<Gpu>,
    exec: sys::CUgraphExec,
}

// SAFETY: the driver's handle may be used by any thread, and `replay` needs no more than it.
unsafe impl Send for Graph {}

impl Graph {
    /// Captures what `work` queues; nothing of it runs. Do the same work once directly before, so
    /// that kernels are loaded and lists uploaded. Nothing may be allocated, uploaded, downloaded
    /// or dropped inside.
    ///
    /// # Errors
    /// A device that is no GPU; what `work` fails with; work that cannot be captured.
    pub fn capture<E: From<Error>>(
        device: &Device,
        work: impl FnOnce() -> std::result::Result<(), E>,
    ) -> std::result::Result<Graph, E> {
        let gpu = Gpu::on(device)?;
        gpu.bind(OP)?;
        let stream = gpu.stream.cu_stream();
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is open.
        check(unsafe { sys::cuStreamBeginCapture_v2(stream, mode) }, OP)?;
        let done = work();
        let mut graph = std::ptr::null_mut();
        // SAFETY: the capture that began above ends, whatever the work did; one handle is written.
        let ended = check(unsafe { sys::cuStreamEndCapture(stream, &mut graph) }, OP);
        let mut exec = std::ptr::null_mut();
        let made = done.and_then(|()| {
            ended?;
            // SAFETY: the graph is whole; one handle is written.
            Ok(check(unsafe { sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0) }, OP)?)
        });
        if !graph.is_null() {
            // SAFETY: the graph is this function's, and what was made of it is complete.
            check(unsafe { sys::cuGraphDestroy(graph) }, OP)?;
        }
        made.map(|()| Graph { gpu, exec })
    }

    /// Queues the work.
    ///
    /// # Errors
    /// An error of the GPU.
    pub fn replay(&self) -> Result<()> {
        self.gpu.bind(OP)?;
        // SAFETY: the handle is this graph's; the caller keeps the memory that it names.
        check(unsafe { sys::cuGraphLaunch(self.exec, self.gpu.stream.cu_stream()) }, OP)
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // An error here would be one of earlier work, which others see as well.
        let _ = self.gpu.bind(OP);
        // SAFETY: nobody has the handle any more; the driver waits for a replay that is running.
        let _ = unsafe { sys::cuGraphExecDestroy(self.exec) };
    }
}
