//! Forward: the scores of one block of queries at once, softmax in place, times the values.

use rayon::prelude::*;

use super::few::{self, FEW};
use super::matrix::{Shared, View};
use super::rows::{self, Band};
use super::{Problem, Segment};
use crate::scratch;

/// Queries of one task. Larger blocks waste more above the diagonal, smaller ones starve the
/// products.
pub(super) const BLOCK: usize = 64;

/// `rows` queries of a segment, from `first` on, of one head; or all of the few queries of a
/// segment and of the heads that share a key head.
enum Task<'a> {
    Block { segment: &'a Segment, head: usize, first: usize, rows: usize },
    Few { segment: &'a Segment, kv_head: usize },
}

/// Output `[n_q, heads * head_dim]` and log-sum-exp `[heads, n_q]`.
pub(super) fn run(problem: &Problem<'_>, segments: &[Segment], n_q: usize) -> (Vec<f32>, Vec<f32>) {
    let heads = problem.heads;
    let mut out = vec![0.0; n_q * heads.heads * heads.head_dim];
    let mut lse = vec![0.0; heads.heads * n_q];
    let mut tasks = Vec::new();
    for segment in segments {
        if segment.q_len <= FEW && segment.q_len > 0 {
            tasks.extend((0..heads.kv_heads).map(|kv_head| Task::Few { segment, kv_head }));
            continue;
        }
        for head in 0..heads.heads {
            tasks.extend((0..segment.q_len).step_by(BLOCK).map(|first| {
                let rows = BLOCK.min(segment.q_len - first);
                Task::Block { segment, head, first, rows }
            }));
        }
    }
    let (shared_out, shared_lse) = (Shared::new(&mut out), Shared::new(&mut lse));
    tasks.par_iter().for_each(|task| match task {
        Task::Few { segment, kv_head } => {
            // SAFETY: segments share no queries, and tasks of a segment share no query head.
            unsafe { few::run(problem, segment, *kv_head, n_q, (shared_out, shared_lse)) }
        }
        Task::Block { segment, head, first, rows } => {
            // SAFETY: segments share no queries, and tasks of a segment and head no rows.
            unsafe {
                let lse = shared_lse.slice(head * n_q + segment.q_start + first, *rows);
                block(problem, (segment, *head), (*first, *rows), lse, shared_out);
            }
        }
    });
    (out, lse)
}

/// One block of queries.
///
/// # Safety
/// Nobody else reads or writes the head's columns of these rows of `out` meanwhile.
unsafe fn block(
    problem: &Problem<'_>,
    (segment, head): (&Segment, usize),
    (first, rows): (usize, usize),
    lse: &mut [f32],
    out: Shared,
) {
    let head_dim = problem.heads.head_dim;
    let band = Band::new(segment, first, rows, problem.heads.window);
    let kv_head = problem.kv_head(head);
    let row = segment.q_start + first;
    let q = View::rows(problem.q.head(head, row), problem.q.stride);
    let stride = problem.heads.heads * head_dim;
    let at = row * stride + head * head_dim;

    scratch::with(rows * band.keys + rows, |buffer| {
        let (scores, inverse) = buffer.split_at_mut(rows * band.keys);
        let products = Shared::new(scores);
        for piece in band.pieces(segment) {
            let k = View::rows(problem.k.head(kv_head, piece.row), problem.k.stride);
            let sizes = (rows, head_dim, piece.keys);
            // SAFETY: `scores` is borrowed exclusively.
            unsafe { products.product(piece.column, band.keys, sizes, q, k.t(), false) }
        }
        rows::softmax(scores, &band, &problem.scoring(head), lse, inverse);
        for piece in band.pieces(segment) {
            let p = View::rows(&scores[piece.column..], band.keys);
            let v = View::rows(problem.v.head(kv_head, piece.row), problem.v.stride);
            let sizes = (rows, piece.keys, head_dim);
            // SAFETY: by the caller's promise.
            unsafe { out.product(at, stride, sizes, p, v, piece.column > 0) }
        }
        for (i, &inverse) in inverse.iter().enumerate() {
            // SAFETY: by the caller's promise.
            let out = unsafe { out.slice(at + i * stride, head_dim) };
            out.iter_mut().for_each(|x| *x *= inverse);
        }
    });
}
