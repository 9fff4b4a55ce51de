//! Segments whose keys lie in several runs: the runs are copied one behind the other, so that
//! kernels know one run only.

use super::plan::{self, Plain};
use super::problem::{Columns, Problem};
use super::{EXACT, OP};
use crate::attention::Segment;
use crate::cuda::{Grid, Scratch};
use crate::error::Result;

/// Bytes of keys and values that are gathered at a time.
const MOST_BYTES: usize = 256 << 20;

/// As many of the next segments as there is room for.
pub(super) struct Batch {
    /// With their keys in the gathered rows.
    pub(super) segments: Vec<Plain>,
    rows: Vec<i32>,
}

impl Batch {
    /// Takes segments off `rest`, at least one if there is one.
    pub(super) fn next(rest: &mut &[&Segment], problem: &Problem<'_>) -> Result<Batch> {
        let heads = problem.heads;
        let row = 2 * heads.kv_heads * heads.head_dim * problem.elem.bytes();
        let mut batch = Batch { segments: Vec::new(), rows: Vec::new() };
        while let Some((segment, others)) = rest.split_first() {
            let keys = segment.keys().unwrap_or(0);
            if !batch.segments.is_empty() && (batch.rows.len() + keys) * row > MOST_BYTES {
                break;
            }
            batch.segments.push(plan::plain(segment, batch.rows.len(), keys)?);
            batch.rows.extend(
                segment.runs().flat_map(|run| run.start as i32..(run.start + run.len) as i32),
            );
            *rest = others;
        }
        Ok(batch)
    }
}

/// Keys and values of a batch, and the memory that they are in.
pub(super) fn gather(problem: &Problem<'_>, batch: &Batch) -> Result<(Columns, Columns, Scratch)> {
    let Problem { gpu, heads, elem, k, v, .. } = problem;
    let width = heads.kv_heads * heads.head_dim;
    let room = gpu.scratch(batch.rows.len() * 2 * width * elem.bytes(), OP)?;
    let list = gpu.upload(&batch.rows, OP)?;
    let vectors =
        k.vectorise(*elem) && v.vectorise(*elem) && width.is_multiple_of(elem.per_vector());
    let (name, suffix, per) = match vectors {
        true => ("attention_gather_vectors", None, elem.per_vector()),
        false => ("attention_gather", Some(*elem), 1),
    };
    let args = [
        k.ptr.into(),
        v.ptr.into(),
        room.ptr.into(),
        list.ptr.into(),
        (k.width / per).into(),
        (v.width / per).into(),
        ((width / per) as i32).into(),
    ];
    gpu.launch(OP, &EXACT, name, suffix, Grid::new(batch.rows.len(), 128), &args)?;
    let k = Columns { ptr: room.ptr, width: 2 * width };
    let v = Columns { ptr: room.ptr + (width * elem.bytes()) as u64, width: 2 * width };
    Ok((k, v, room))
}
