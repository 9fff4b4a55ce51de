//! One source's share of a split, cut into rows.

use super::{Batch, Cache, IGNORE, PackingConfig};
use crate::{Error, Result};

/// Some documents of a source, one after the other.
#[derive(Debug)]
pub(crate) struct PackedSource {
    cache: Cache,
    /// Which documents.
    documents: Vec<u32>,
    /// Where each ends in the stream of these documents.
    ends: Vec<u64>,
}

/// Splits a source by documents: training, and the share held out for validation.
///
/// A document's side depends on its content alone: the held-out ones are those with the
/// smallest hashes, so copies of one text never stand on both sides.
///
/// # Errors
/// Where a side would be empty.
pub(crate) fn split(
    name: &str,
    cache: &Cache,
    fraction: f64,
) -> Result<(PackedSource, Option<PackedSource>)> {
    let count = u32::try_from(cache.documents())
        .map_err(|_| Error::config("sources", format!("{name} has more than 2^32 documents")))?;
    if fraction <= 0.0 {
        return Ok((PackedSource::new(cache, (0..count).collect()), None));
    }
    let mut hashes: Vec<u64> = (0..count).map(|i| cache.document_hash(i as usize)).collect();
    let held_out = (fraction * f64::from(count)).ceil().max(1.0) as usize - 1;
    let threshold = *hashes.select_nth_unstable(held_out.min(count as usize - 1)).1;
    let (validation, train): (Vec<u32>, Vec<u32>) =
        (0..count).partition(|i| cache.document_hash(*i as usize) <= threshold);
    if train.is_empty() {
        return Err(Error::config(
            "validation_fraction",
            format!("leaves nothing to train on of {name}, which has {count} document(s)"),
        ));
    }
    Ok((PackedSource::new(cache, train), Some(PackedSource::new(cache, validation))))
}

impl PackedSource {
    fn new(cache: &Cache, documents: Vec<u32>) -> Self {
        let mut end = 0;
        let ends = documents
            .iter()
            .map(|document| {
                end += cache.document(*document as usize).len() as u64;
                end
            })
            .collect();
        PackedSource { cache: cache.clone(), documents, ends }
    }

    /// Ids.
    pub(crate) fn tokens(&self) -> u64 {
        self.ends.last().copied().unwrap_or(0)
    }

    /// Rows of `length` positions. The last id predicts nothing, so it needs no position.
    pub(crate) fn sequences(&self, length: usize) -> u64 {
        self.tokens().saturating_sub(1).div_ceil(length as u64)
    }

    /// Adds row `index`, filled up with `pad`.
    pub(super) fn push_row(&self, index: u64, config: &PackingConfig, pad: u32, batch: &mut Batch) {
        let length = config.sequence_length;
        let start = index * length as u64;
        let end = (start + length as u64).min(self.tokens().saturating_sub(1));
        let mut at = start;
        let mut nth = self.ends.partition_point(|end| *end <= start);
        let used = end.saturating_sub(start) as usize;
        while at < end {
            let (Some(document), Some(document_end)) =
                (self.documents.get(nth), self.ends.get(nth))
            else {
                break;
            };
            let range = self.cache.document(*document as usize);
            // Counted from the document's end, which both numberings know.
            let from = range.end - (document_end - at) as usize;
            let piece = ((*document_end).min(end) - at) as usize;
            batch.ids.extend(self.cache.ids(from..from + piece));
            let inside = from + 1..(from + piece + 1).min(range.end);
            let ends_here = inside.len() < piece;
            batch.targets.extend(
                inside
                    .clone()
                    .zip(self.cache.ids(inside))
                    .map(|(at, id)| if self.cache.is_learnt(at) { i64::from(id) } else { IGNORE }),
            );
            if ends_here {
                batch.targets.push(self.after_end(nth, config));
            }
            if config.document_boundaries {
                batch.push_segment(piece);
            }
            at += piece as u64;
            nth += 1;
        }
        if !config.document_boundaries {
            batch.push_segment(used);
        }
        batch.push_segment(length - used);
        batch.ids.resize(batch.positions.len(), pad);
        batch.targets.resize(batch.positions.len(), IGNORE);
        batch.rows += 1;
    }

    /// What the last id of the `nth` document predicts.
    fn after_end(&self, nth: usize, config: &PackingConfig) -> i64 {
        if config.document_boundaries {
            return IGNORE;
        }
        let next = self.documents.get(nth + 1).map(|next| self.cache.document(*next as usize));
        match next {
            Some(next) if self.cache.is_learnt(next.start) => {
                let first = self.cache.ids(next.start..next.start + 1).next();
                first.map_or(IGNORE, i64::from)
            }
            _ => IGNORE,
        }
    }
}
