//! Lists of 32-bit numbers that stay at one place of the GPU: tokens, positions, counts.

use std::sync::Arc;

use candle_core::Device;

use super::super::{Gpu, Scratch};
use crate::error::{Error, Result};

const OP: &str = "words on the GPU";

/// A list of `u32` on a GPU, at an address that does not change: graphs may read and write it.
pub struct Words {
    gpu: Arc<Gpu>,
    there: Scratch,
    len: usize,
}

impl Words {
    /// Zeros.
    ///
    /// # Errors
    /// A device that is no GPU; no memory.
    pub fn zeros(device: &Device, len: usize) -> Result<Words> {
        let gpu = Gpu::on(device)?;
        let there = gpu.scratch(4 * len, OP)?;
        gpu.zero(there.ptr, 4 * len, OP)?;
        Ok(Words { gpu, there, len })
    }

    /// Overwrites the list, after what is queued. Not while a graph is being captured.
    ///
    /// # Errors
    /// Another length; an error of the GPU.
    pub fn write(&self, words: &[u32]) -> Result<()> {
        if words.len() != self.len {
            let (expected, found) = (vec![self.len], vec![words.len()]);
            return Err(Error::Shape { op: OP, tensor: "words", expected, found });
        }
        self.gpu.write(words, self.there.ptr, OP)
    }

    /// The list, after waiting for what is queued.
    ///
    /// # Errors
    /// An error of the GPU, also of work that was queued.
    pub fn read(&self) -> Result<Vec<u32>> {
        self.gpu.download(self.there.ptr, self.len, OP)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(super) fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// The address of `len` words from `at` on.
    pub(super) fn at(&self, at: usize, len: usize, op: &'static str) -> Result<u64> {
        if at + len > self.len {
            return Err(Error::Range { op, what: "words", range: at..at + len, len: self.len });
        }
        Ok(self.there.ptr + 4 * at as u64)
    }
}
