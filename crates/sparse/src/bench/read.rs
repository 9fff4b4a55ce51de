//! A plain read of memory: what decoding could reach.

use std::time::Instant;

use memmap2::MmapMut;
use multiversion::multiversion;

use crate::matrix::anonymous_large;
use crate::{Engine, Result};

/// Memory that is read as fast as it can be, by the threads of an engine.
pub struct RawRead {
    memory: MmapMut,
}

impl RawRead {
    /// So many bytes; more than all caches hold.
    ///
    /// # Errors
    /// No memory.
    pub fn new(bytes: usize) -> Result<RawRead> {
        let mut memory = anonymous_large(bytes)?;
        // Untouched pages would all be one page of zeros.
        memory.fill(1);
        Ok(RawRead { memory })
    }

    /// Reads all of it once: bytes a second.
    pub fn bandwidth(&self, engine: &Engine) -> f64 {
        let pool = &engine.packed.pool;
        let lines = self.memory.len() / LINES;
        let start = Instant::now();
        pool.run(|worker| {
            let from = lines * worker / pool.workers() * LINES;
            let to = lines * (worker + 1) / pool.workers() * LINES;
            std::hint::black_box(sum(&self.memory[from..to]));
        });
        (lines * LINES) as f64 / start.elapsed().as_secs_f64()
    }
}

/// Bytes that one turn of the reading loop takes of each stream.
const LINES: usize = 256;

/// Streams that a thread reads side by side: one alone does not keep enough lines in flight.
const STREAMS: usize = 8;

/// How far ahead of its reading a stream is asked for, in bytes.
const AHEAD: usize = 1024;

/// The sum of all words.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
fn sum(bytes: &[u8]) -> u64 {
    // Two of the widest registers: more sums would not stay in them.
    let mut sums = [0u64; 16];
    let stream = bytes.len() / STREAMS / LINES * LINES;
    let (streams, rest) = bytes.split_at(stream * STREAMS);
    for at in (0..stream).step_by(LINES) {
        for n in 0..STREAMS {
            let block = &streams[n * stream + at..][..LINES];
            for line in block.chunks_exact(64) {
                ask_for(line.as_ptr().wrapping_add(AHEAD));
            }
            for words in block.as_chunks::<128>().0 {
                let words = words.as_chunks::<8>().0;
                for i in 0..16 {
                    sums[i] = sums[i].wrapping_add(u64::from_ne_bytes(words[i]));
                }
            }
        }
    }
    let rest = rest.as_chunks::<8>().0.iter().map(|word| u64::from_ne_bytes(*word));
    sums.into_iter().chain(rest).fold(0, u64::wrapping_add)
}

/// Asks for the cache line at an address, which need not exist.
#[inline(always)]
fn ask_for(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 has the instruction, and it does not fault.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(address.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reading_counts_every_byte() {
        assert_eq!(sum(&[1; 8 * 768 + 24]), 0x0101_0101_0101_0101u64.wrapping_mul(771));
    }
}
