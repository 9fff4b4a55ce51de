//! Which way to read a decoder's weights is the fastest: measured.

use std::time::Instant;

use relufy_model::Decoder;
use relufy_spec::flops::{Densities, SiteDensities};

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
    /// Packs a decoder in the way that decodes `batch` sequences fastest. Few sequences skip most of the
    /// weights, the union of many skips little; and what is not zero says which layers read `up` by
    /// input ([`GpuEngine::calibrated`]). All compute the same, but for rounding; which it was say
    /// [`GpuEngine::reads`] and [`GpuEngine::up_by_input`].
    ///
    /// Measured by greedy continuations of different tokens, with the zeros that they have. No two
    /// are on the GPU at the same time.
    ///
    /// # Errors
    /// As [`GpuEngine::new`] and [`GpuSession::new`].
    pub fn fastest(decoder: Decoder, options: &Options, batch: usize) -> Result<GpuEngine> {
        // The parameters are shared.
        let again = || Decoder::new(decoder.spec().clone(), decoder.params().clone());
        let all = measure(&GpuEngine::reading(again()?, options, Reads::All)?, batch)?.seconds;
        let plain = GpuEngine::new(again()?, options)?;
        let Measured { seconds: skipping, densities } = measure(&plain, batch)?;
        if skipping <= all && plain.suits(&densities) {
            return Ok(plain);
        }
        if !plain.suits(&densities) {
            drop(plain);
            let laid_out = GpuEngine::calibrated(again()?, options, &densities)?;
            if measure(&laid_out, batch)?.seconds <= all.min(skipping) {
                return Ok(laid_out);
            }
        }
        let reads = if skipping <= all { Reads::Needed } else { Reads::All };
        GpuEngine::reading(decoder, options, reads)
    }
}

/// How an engine decodes.
struct Measured {
    /// The median time of a short chain.
    seconds: f64,
    /// The mean of its tokens.
    densities: Densities,
}

fn measure(engine: &GpuEngine, batch: usize) -> Result<Measured> {
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
    session.truncate(0);
    let (mut next, mut seen) = (tokens, Vec::new());
    for _ in 0..steps {
        next = session.greedy(&next, 1)?;
        seen.push(session.densities()?);
    }
    Ok(Measured { seconds: times[ROUNDS / 2], densities: mean(&seen) })
}

/// Layer by layer.
fn mean(seen: &[Densities]) -> Densities {
    let layers = (0..seen.first().map_or(0, |first| first.layers.len())).map(|n| {
        let all: Vec<SiteDensities> = seen.iter().map(|each| each.layers[n]).collect();
        SiteDensities::mean(&all)
    });
    Densities { layers: layers.collect() }
}
