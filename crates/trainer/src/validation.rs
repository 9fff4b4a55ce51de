//! The validation split: always the same sequences, in order, without gradients.

use relufy_data::{Batch, Packed};
use relufy_model::{Decoder, Point, Segment, Side, Tap, Tokens, Want};
use relufy_ops::reduce;
use relufy_spec::{DecoderSpec, Site};

use crate::Result;
use crate::observer::Validation;

/// How the split is evaluated.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Sequences of one pass.
    pub rows: usize,
    /// At most so many sequences in all.
    pub sequences: Option<u64>,
    /// Count neurons that stay silent.
    pub dead_neurons: bool,
}

/// Evaluates `split`; `None` when it holds no target token. Stops early, without a result,
/// once `stop` says so.
///
/// # Errors
/// From data or model.
pub fn validate(
    decoder: &Decoder,
    split: &Packed,
    settings: Settings,
    stop: impl Fn() -> bool,
) -> Result<Option<Validation>> {
    let end = split.sequences().min(settings.sequences.unwrap_or(u64::MAX));
    let mut tap = DeadNeurons::new(decoder.spec(), settings.dead_neurons);
    let (mut sum, mut count, mut first) = (0.0, 0u64, 0);
    while first < end {
        if stop() {
            return Ok(None);
        }
        let rows = settings.rows.min((end - first) as usize);
        let batch = split.batch_in_order(first, rows)?;
        if batch.rows == 0 {
            break;
        }
        let loss = decoder.loss(&tokens(&batch), &batch.targets, &mut tap)?;
        sum += loss.sum;
        count += loss.count as u64;
        first += batch.rows as u64;
    }
    if count == 0 {
        return Ok(None);
    }
    let loss = sum / count as f64;
    let dead_neurons = settings.dead_neurons.then(|| tap.dead());
    Ok(Some(Validation { loss, perplexity: loss.exp(), tokens: count, dead_neurons }))
}

/// A batch as the decoder takes it.
pub fn tokens(batch: &Batch) -> Tokens {
    let segment = |&(start, len): &(usize, usize)| Segment::document(start, len);
    Tokens {
        ids: batch.ids.clone(),
        positions: batch.positions.clone(),
        segments: batch.segments.iter().map(segment).collect(),
    }
}

/// Remembers which neurons (columns of the down projections' inputs) were ever non-zero.
struct DeadNeurons {
    alive: Vec<Vec<bool>>,
    watching: bool,
}

impl DeadNeurons {
    fn new(spec: &DecoderSpec, watching: bool) -> DeadNeurons {
        let alive = spec.layers.iter().map(|layer| vec![false; layer.mlp.ffn]).collect();
        DeadNeurons { alive, watching }
    }

    fn dead(&self) -> Vec<usize> {
        self.alive.iter().map(|layer| layer.iter().filter(|alive| !**alive).count()).collect()
    }
}

impl Tap for DeadNeurons {
    fn want(&self, point: Point) -> Want {
        let here = point.site == Site::DownIn && point.side == Side::At;
        if self.watching && here { Want::Values } else { Want::Nothing }
    }

    fn values(&mut self, point: Point, values: &candle_core::Tensor) -> relufy_model::Result<()> {
        let counts = reduce::count_nonzero_columns(values)?;
        if let Some(layer) = self.alive.get_mut(point.layer) {
            layer.iter_mut().zip(counts).for_each(|(alive, count)| *alive |= count > 0);
        }
        Ok(())
    }
}
