//! Forward for a few queries (decoding): bound by reading keys and values, so each is read once for
//! all the query heads that share it, and nothing is packed.

use super::matrix::Shared;
use super::rows::{self, Band};
use super::{Problem, Segment};
use crate::scratch;

/// Up to this many queries go this way.
pub(super) const FEW: usize = 4;

/// All queries of a segment and of the query heads that read `kv_head`.
///
/// # Safety
/// Nobody else reads or writes these queries' and heads' parts of `out` and `lse` meanwhile.
pub(super) unsafe fn run(
    problem: &Problem<'_>,
    segment: &Segment,
    kv_head: usize,
    n_q: usize,
    (out, lse): (Shared, Shared),
) {
    let (heads, rows) = (problem.heads, segment.q_len);
    let group = heads.heads / heads.kv_heads;
    let first_head = kv_head * group;
    let band = Band::new(segment, 0, rows, heads.window);
    let queries = rows::Grouped {
        data: problem.q.head(first_head, segment.q_start),
        stride: problem.q.stride,
        group,
        len: heads.head_dim,
    };
    let (cells, n) = (rows * band.keys, group * rows);

    scratch::with(group * cells + n + n * heads.head_dim, |buffer| {
        let (scores, rest) = buffer.split_at_mut(group * cells);
        let (inverse, sums) = rest.split_at_mut(n);
        for piece in band.pieces(segment) {
            let k = (problem.k.head(kv_head, piece.row), problem.k.stride);
            rows::few_scores(scores, &band, piece, &queries, k);
        }
        for g in 0..group {
            let at = (first_head + g) * n_q + segment.q_start;
            // SAFETY: by the caller's promise.
            let lse = unsafe { lse.slice(at, rows) };
            let scores = &mut scores[g * cells..(g + 1) * cells];
            let inverse = &mut inverse[g * rows..(g + 1) * rows];
            rows::softmax(
                (scores, band.keys),
                &band,
                &problem.scoring(first_head + g),
                lse,
                inverse,
            );
        }
        sums.fill(0.0);
        for piece in band.pieces(segment) {
            let v = (problem.v.head(kv_head, piece.row), problem.v.stride);
            rows::few_outputs(sums, (scores, band.keys), piece, v, heads.head_dim);
        }
        for (c, (sum, inverse)) in sums.chunks_exact(heads.head_dim).zip(inverse).enumerate() {
            let (g, i) = (c / rows, c % rows);
            let at = ((segment.q_start + i) * heads.heads + first_head + g) * heads.head_dim;
            // SAFETY: by the caller's promise.
            let out = unsafe { out.slice(at, heads.head_dim) };
            out.iter_mut().zip(sum).for_each(|(out, sum)| *out = sum * *inverse);
        }
    });
}
