//! How fast decoding is at given densities, and how fast it could be.
//!
//! Weights are random ([`Engine::random`]) and the zeros are forced: masks with an exact number of
//! ones, drawn anew for every token, take the place of what the activations say. Listing the
//! non-zeros and all else is done as in earnest. Whoever measures takes turns between what is to
//! be compared, because a machine's speed drifts, and reports ratios.

use std::time::Instant;

use memmap2::MmapMut;
use multiversion::multiversion;
use relufy_spec::flops::SiteDensities;
use relufy_spec::{DecoderSpec, ReluPlan, Stage, family};
use serde_json::json;

use crate::force::Forced;
use crate::matrix::anonymous_large;
use crate::{Counts, Engine, Result, Session};

/// A Llama of hidden size 2048 with 16 layers, 16 heads, 5632 neurons and 32,000 tokens (0.95
/// billion weights): the shape of which decoding speeds are reported.
///
/// # Errors
/// None: the config is complete, and the plan of a stage fits any spec.
pub fn shape_m(stage: Stage) -> Result<DecoderSpec> {
    let config = family::parse(&json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu",
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 16,
        "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 32_000,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": false,
    }))
    .map_err(relufy_model::Error::from)?;
    let plan = ReluPlan::stage(stage);
    plan.apply(&config.spec).map_err(|error| relufy_model::Error::from(error).into())
}

/// An engine that decodes one token again and again, with or without forced densities.
pub struct Timer {
    session: Session,
    context: usize,
}

impl Timer {
    /// Fills `context` positions and forces `densities`, where some are given: at queries, keys and
    /// values, at up, and at the gate (`down`). Only sites that have an operation, and gates whose
    /// activation is sparse, are made so; the density of `o` is not forced.
    ///
    /// # Errors
    /// A context without room for another token.
    pub fn new(engine: &Engine, densities: Option<SiteDensities>, context: usize) -> Result<Timer> {
        let mut session = Session::new(engine)?;
        session.forced = densities.map(|each| Forced::new(&engine.packed, each, 1));
        if context > 0 {
            session.prefill(&vec![1; context])?;
        }
        Ok(Timer { session, context })
    }

    /// Decodes a token after the filled positions, with new masks: the seconds it took.
    ///
    /// # Errors
    /// As [`Session::step`].
    pub fn step(&mut self) -> Result<f64> {
        self.session.truncate(self.context);
        if let Some(forced) = &mut self.session.forced {
            forced.draw();
        }
        let start = Instant::now();
        self.session.step(1)?;
        Ok(start.elapsed().as_secs_f64())
    }

    /// What the last step did.
    pub fn counts(&self) -> Counts {
        self.session.counts()
    }
}

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

/// The median; NaN of nothing.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Format, Options};

    #[test]
    fn forced_densities_are_what_is_counted() {
        let mut spec = shape_m(Stage::Two).unwrap();
        spec.layers.truncate(2);
        spec.vocab = 64;
        (spec.hidden, spec.max_positions) = (256, 16);
        spec.layers.iter_mut().for_each(|layer| layer.mlp.ffn = 512);
        let options = Options { format: Format::Int8, threads: 2, context: 0 };
        let engine = Engine::random(&spec, &options, 1).unwrap();
        let densities = SiteDensities { qkv: 0.5, o: 1.0, up: 0.25, down: 0.125 };
        let mut timer = Timer::new(&engine, Some(densities), 3).unwrap();
        for _ in 0..3 {
            assert!(timer.step().unwrap() > 0.0);
            let counts = timer.counts();
            assert_eq!(counts.qkv.done, 2 * 128 * 3 * 2048);
            assert_eq!(counts.up.done, 2 * (64 * 512 + 64 * 256));
            assert_eq!(counts.up.needed, 2 * (64 * 512 + 64 * 64));
            assert_eq!(counts.down.done, 2 * 64 * 256);
            // A byte a weight, and four for each row's scale in each worker's share.
            let gate = 64 * (512 + 2 * 4);
            assert_eq!(counts.up.bytes, 2 * (gate + 64 * (256 + 4)));
        }
    }

    #[test]
    fn reading_counts_every_byte() {
        assert_eq!(sum(&[1; 8 * 768 + 24]), 0x0101_0101_0101_0101u64.wrapping_mul(771));
        assert_eq!((median(&[3.0, 1.0, 2.0]), median(&[1.0, 2.0])), (2.0, 1.5));
    }
}
