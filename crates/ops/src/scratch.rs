//! Working memory of a thread, kept from task to task.

use std::cell::Cell;

/// What a thread keeps for its next task; larger buffers are given back (64 MiB).
const KEEP: usize = 16 << 20;

thread_local! {
    static BUFFER: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Calls `f` with `len` elements of unspecified content. A call inside `f` gets other memory.
pub(crate) fn with<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    let mut buffer = BUFFER.take();
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    let result = f(&mut buffer[..len]);
    if buffer.len() <= KEEP {
        BUFFER.set(buffer);
    }
    result
}
