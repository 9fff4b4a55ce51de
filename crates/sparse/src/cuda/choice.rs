//! Which of two ways to read a decoder's weights is the faster one: measured.

use std::time::Instant;

use relufy_model::Decoder;

use super::engine::GpuEngine;
use super::session::GpuSession;
use crate::{Options, Result};

/// Which rows an engine on a GPU reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reads {
    /// Only those of what is not zero.
    Needed,
    /// All, of matrices that lie by output.
    All,
}

/// Tokens that are decoded at once, and how often.
const CHAIN: usize = 12;
const ROUNDS: usize = 5;

impl GpuEngine {
    /// Packs a decoder in the way that decodes `batch` sequences faster: few sequences skip most of
    /// the weights, the union of many skips little. Both compute the same, but for rounding; which
    /// it was says [`GpuEngine::reads`].
    ///
    /// Measured by greedy continuations of different tokens, with the zeros that they have. The two
    /// are not on the GPU at the same time.
    ///
    /// # Errors
    /// As [`GpuEngine::new`] and [`GpuSession::new`].
    pub fn fastest(decoder: Decoder, options: &Options, batch: usize) -> Result<GpuEngine> {
        // The parameters are shared.
        let again = || Decoder::new(decoder.spec().clone(), decoder.params().clone());
        let all = seconds(&GpuEngine::reading(again()?, options, Reads::All)?, batch)?;
        let needed = GpuEngine::reading(again()?, options, Reads::Needed)?;
        if seconds(&needed, batch)? <= all {
            return Ok(needed);
        }
        drop(needed);
        GpuEngine::reading(decoder, options, Reads::All)
    }
}

/// The median time of a short chain.
fn seconds(engine: &GpuEngine, batch: usize) -> Result<f64> {
    let mut session = GpuSession::new(engine, batch)?;
    let vocab = engine.spec().vocab;
    let tokens: Vec<u32> = (0..batch).map(|n| ((n + 1) * vocab / (batch + 1)) as u32).collect();
    let steps = CHAIN.min(engine.context());
    let mut times = Vec::new();
    // The first one loads what the others have.
    for round in 0..=ROUNDS {
        session.truncate(0);
        session.begin_greedy(&tokens, steps)?;
        session.synchronize()?;
        let start = Instant::now();
        session.queue_greedy(steps)?;
        session.synchronize()?;
        if round > 0 {
            times.push(start.elapsed().as_secs_f64());
        }
    }
    times.sort_by(f64::total_cmp);
    Ok(times[ROUNDS / 2])
}
