//! Where the time of a GPU goes: an event before and after each piece of queued work.

use std::collections::HashMap;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use candle_core::cuda_backend::cudarc::driver::{CudaEvent, sys};

use super::gpu::{Gpu, failed};
use crate::device::Span;
use crate::error::Result;

const OP: &str = "profiling";

/// A piece of work between two events.
pub(super) struct Timed {
    label: String,
    flops: f64,
    begin: CudaEvent,
    end: CudaEvent,
}

impl Gpu {
    /// Queues work, timed while a profile is being taken. `label` says what it is and how many
    /// floating-point operations it does, if these matter.
    pub(crate) fn timed<R>(
        &self,
        label: impl FnOnce() -> (String, f64),
        work: impl FnOnce() -> Result<R>,
    ) -> Result<R> {
        if !self.profiling.load(Ordering::Relaxed) {
            return work();
        }
        let event = || {
            let flags = sys::CUevent_flags::CU_EVENT_DEFAULT;
            self.stream.record_event(Some(flags)).map_err(|e| failed(OP, e))
        };
        let begin = event()?;
        let result = work()?;
        let ((label, flops), end) = (label(), event()?);
        let mut timed = self.timed.lock().unwrap_or_else(PoisonError::into_inner);
        timed.push(Timed { label, flops, begin, end });
        Ok(result)
    }

    pub(crate) fn begin_profile(&self) -> Result<()> {
        self.synchronize(OP)?;
        self.timed.lock().unwrap_or_else(PoisonError::into_inner).clear();
        self.profiling.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// What was queued since, by label, the longest first.
    pub(crate) fn end_profile(&self) -> Result<Vec<Span>> {
        self.profiling.store(false, Ordering::Relaxed);
        self.synchronize(OP)?;
        let timed = std::mem::take(&mut *self.timed.lock().unwrap_or_else(PoisonError::into_inner));
        let mut spans: HashMap<String, Span> = HashMap::new();
        for Timed { label, flops, begin, end } in timed {
            let ms = f64::from(begin.elapsed_ms(&end).map_err(|e| failed(OP, e))?);
            let span = spans.entry(label.clone()).or_insert_with(|| Span {
                label,
                calls: 0,
                ms: 0.0,
                flops: 0.0,
            });
            span.calls += 1;
            span.ms += ms;
            span.flops += flops;
        }
        let mut spans: Vec<Span> = spans.into_values().collect();
        spans.sort_by(|a, b| b.ms.total_cmp(&a.ms));
        Ok(spans)
    }
}
