//! The engine on a GPU, timed.

use std::time::Instant;

use candle_core::Device;
use relufy_ops::decode::read_bandwidth;
use relufy_ops::device::synchronize;
use relufy_spec::flops::SiteDensities;

use super::text::{Cursor, Text, mean_surprise};
use super::{Timed, union};
use crate::cuda::Masks;
use crate::force::Forced;
use crate::{Counts, Error, GpuEngine, GpuSession, Result};

/// Tokens of a chain that is timed as one: queueing the first of them is no part of decoding.
const CHAIN: usize = 4;

/// Sequences on a GPU whose steps are timed.
pub struct GpuTimer {
    session: GpuSession,
    feed: Feed,
    forced: Option<Forced>,
    surprise: Option<f64>,
}

/// Which tokens go in.
enum Feed {
    /// The same one in each sequence and the likeliest after it, always after so many positions.
    Again(usize),
    /// A text, each sequence in another part of it.
    Text(Vec<Cursor>),
}

impl GpuTimer {
    /// Decodes a short greedy chain again and again in `batch` sequences, after `context` positions
    /// that it fills first. `densities` are forced, where some are given: at queries, keys and
    /// values, at up, and at the gate (`down`). They skip something only where the site has an
    /// operation, or the gate's activation is a ReLU; the density of `o` is not forced.
    ///
    /// Of several sequences each is taken to have zeros of its own: what is forced, in all of them,
    /// is the union of independent sets. Real sequences agree more than that, as a text shows.
    ///
    /// # Errors
    /// A context without room for a chain; as [`GpuSession::new`].
    pub fn new(
        engine: &GpuEngine,
        densities: Option<SiteDensities>,
        context: usize,
        batch: usize,
    ) -> Result<GpuTimer> {
        if context + CHAIN > engine.context() {
            return Err(Error::ContextFull { len: context + CHAIN, context: engine.context() });
        }
        let forced = densities.map(|each| Forced::new(engine.spec(), union(each, batch), 1));
        let masks = forced.as_ref().map(|_| Masks::new(engine)).transpose()?;
        let mut session = GpuSession::masked(engine, batch, masks, true)?;
        let tokens = vec![1; batch];
        if context > 0 {
            session.greedy(&tokens, context)?;
        }
        Ok(GpuTimer { session, feed: Feed::Again(context), forced, surprise: None })
    }

    /// Reads a text with the zeros that the model has, in several sequences side by side; logits come
    /// to the host after each token, as where text is sampled.
    ///
    /// # Errors
    /// As [`GpuSession::new`].
    pub fn reading(engine: &GpuEngine, text: &Text, batch: usize) -> Result<GpuTimer> {
        let session = GpuSession::new(engine, batch)?;
        let feed = Feed::Text(Cursor::side_by_side(text, batch));
        Ok(GpuTimer { session, feed, forced: None, surprise: None })
    }
}

impl Timed for GpuTimer {
    /// The seconds of a token: of a chain of some, or of one of a text.
    fn step(&mut self) -> Result<f64> {
        let session = &mut self.session;
        match &mut self.feed {
            Feed::Again(context) => {
                session.truncate(*context);
                if let (Some(forced), Some(masks)) = (&mut self.forced, session.masks()) {
                    forced.draw();
                    masks.write(forced)?;
                }
                let tokens = vec![1; session.batch()];
                session.begin_greedy(&tokens, CHAIN)?;
                session.synchronize()?;
                let start = Instant::now();
                session.queue_greedy(CHAIN)?;
                session.synchronize()?;
                Ok(start.elapsed().as_secs_f64() / CHAIN as f64)
            }
            Feed::Text(cursors) => {
                let (mut tokens, mut follows) = (Vec::new(), Vec::new());
                for (row, cursor) in cursors.iter_mut().enumerate() {
                    let next = cursor.advance();
                    if let Some(first) = next.begin {
                        session.begin(row, first)?;
                    }
                    tokens.push(next.token);
                    follows.push(next.follows);
                }
                let start = Instant::now();
                let logits = session.step(&tokens)?;
                let seconds = start.elapsed().as_secs_f64();
                let each = logits.chunks(logits.len() / follows.len());
                self.surprise = mean_surprise(each, &follows);
                Ok(seconds)
            }
        }
    }

    fn counts(&mut self) -> Result<Counts> {
        self.session.counts()
    }

    fn surprise(&self) -> Option<f64> {
        self.surprise
    }

    fn batch(&self) -> usize {
        self.session.batch()
    }
}

/// Bytes a second at which a GPU reads `bytes` of its memory, which should be many times what its
/// caches hold.
///
/// # Errors
/// A device that is no GPU; no memory.
pub fn gpu_bandwidth(device: &Device, bytes: usize) -> Result<f64> {
    synchronize(device)?;
    Ok(read_bandwidth(device, bytes, 3)?)
}
