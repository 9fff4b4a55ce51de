//! Forward: the scores of one block of queries at once, softmax in place, times the values.
//!
//! A block is a piece of one segment, or of several siblings: branches with the same prefix whose
//! queries lie one behind the other. Short branches would starve the products with the prefix, so
//! these run over all rows of the block; each strip of it has its own keys to itself.

use rayon::prelude::*;

use super::few::{self, FEW};
use super::matrix::{Shared, View};
use super::rows::{self, Band};
use super::{Heads, Problem, Segment};
use crate::scratch;

/// Queries of one task. Larger blocks waste more above the diagonal, smaller ones starve the
/// products.
pub(super) const BLOCK: usize = 64;

/// The part of a block that belongs to one segment.
struct Strip<'a> {
    segment: &'a Segment,
    /// Its first query, counted within the segment.
    first: usize,
    rows: usize,
    band: Band,
}

/// A block of one head; or all of the few queries of a segment and of the heads that share a key
/// head.
enum Task<'a> {
    Block { strips: &'a [Strip<'a>], head: usize },
    Few { segment: &'a Segment, kv_head: usize },
}

/// Output `[n_q, heads * head_dim]` and log-sum-exp `[heads, n_q]`.
pub(super) fn run(problem: &Problem<'_>, segments: &[Segment], n_q: usize) -> (Vec<f32>, Vec<f32>) {
    let heads = problem.heads;
    let mut out = vec![0.0; n_q * heads.heads * heads.head_dim];
    let mut lse = vec![0.0; heads.heads * n_q];
    let (few, blocks) = plan(segments, heads);
    let few = few.iter().flat_map(|&segment| {
        (0..heads.kv_heads).map(move |kv_head| Task::Few { segment, kv_head })
    });
    let blocks = blocks
        .iter()
        .flat_map(|strips| (0..heads.heads).map(move |head| Task::Block { strips, head }));
    let tasks: Vec<Task<'_>> = few.chain(blocks).collect();
    let (shared_out, shared_lse) = (Shared::new(&mut out), Shared::new(&mut lse));
    tasks.par_iter().for_each(|task| match task {
        Task::Few { segment, kv_head } => {
            // SAFETY: segments share no queries, and tasks of a segment share no query head.
            unsafe { few::run(problem, segment, *kv_head, n_q, (shared_out, shared_lse)) }
        }
        Task::Block { strips, head } => {
            // SAFETY: segments share no queries, and blocks of a head no rows.
            unsafe { block(problem, strips, *head, n_q, (shared_out, shared_lse)) }
        }
    });
    (out, lse)
}

/// Segments of few queries, and blocks of the others'.
fn plan<'a>(segments: &'a [Segment], heads: &Heads) -> (Vec<&'a Segment>, Vec<Vec<Strip<'a>>>) {
    // A window would show each sibling another part of the prefix.
    let siblings = |a: &Segment, b: &Segment| {
        heads.window.is_none()
            && !a.prefix.is_empty()
            && a.prefix == b.prefix
            && a.q_start + a.q_len == b.q_start
    };
    let (mut few, mut blocks) = (Vec::new(), Vec::new());
    for siblings in segments.chunk_by(siblings) {
        if siblings.iter().map(|segment| segment.q_len).sum::<usize>() <= FEW {
            few.extend(siblings.iter().filter(|segment| segment.q_len > 0));
            continue;
        }
        let (mut block, mut room) = (Vec::new(), BLOCK);
        for segment in siblings {
            let mut first = 0;
            while first < segment.q_len {
                let rows = room.min(segment.q_len - first);
                let band = Band::new(segment, first, rows, heads.window);
                block.push(Strip { segment, first, rows, band });
                (first, room) = (first + rows, room - rows);
                if room == 0 {
                    blocks.push(std::mem::take(&mut block));
                    room = BLOCK;
                }
            }
        }
        if !block.is_empty() {
            blocks.push(block);
        }
    }
    (few, blocks)
}

/// One block of queries.
///
/// # Safety
/// Nobody else reads or writes the head's columns of these rows of `out` and `lse` meanwhile.
unsafe fn block(
    problem: &Problem<'_>,
    strips: &[Strip<'_>],
    head: usize,
    n_q: usize,
    (out, lse): (Shared, Shared),
) {
    let Some(leader) = strips.first() else { return };
    let head_dim = problem.heads.head_dim;
    let rows: usize = strips.iter().map(|strip| strip.rows).sum();
    let row = leader.segment.q_start + leader.first;
    let columns = strips.iter().map(|strip| strip.band.keys).max().unwrap_or(0);
    let kv_head = problem.kv_head(head);
    let q = |i| View::rows(problem.q.head(head, row + i), problem.q.stride);
    let k = |row| View::rows(problem.k.head(kv_head, row), problem.k.stride);
    let v = |row| View::rows(problem.v.head(kv_head, row), problem.v.stride);
    let stride = problem.heads.heads * head_dim;
    let at = row * stride + head * head_dim;
    // What each product covers: the keys of the prefix every row, its own keys each strip.
    let prefix = leader.band.prefix(leader.segment);
    let mut first = 0;
    let own: Vec<_> = strips
        .iter()
        .map(|strip| {
            let rows = first..first + strip.rows;
            first = rows.end;
            (rows, strip.band.own(strip.segment))
        })
        .collect();
    let products = || prefix.iter().map(|&piece| (0..rows, piece)).chain(own.iter().cloned());

    scratch::with(rows * columns + rows, |buffer| {
        let (scores, inverse) = buffer.split_at_mut(rows * columns);
        let cells = Shared::new(scores);
        for (rows, piece) in products() {
            let to = rows.start * columns + piece.column;
            let sizes = (rows.len(), head_dim, piece.keys);
            // SAFETY: `scores` is borrowed exclusively.
            unsafe { cells.product(to, columns, sizes, q(rows.start), k(piece.row).t(), false) }
        }
        for (strip, (rows, _)) in strips.iter().zip(&own) {
            // SAFETY: by the caller's promise.
            let lse = unsafe { lse.slice(head * n_q + row + rows.start, rows.len()) };
            let scores = &mut scores[rows.start * columns..rows.end * columns];
            let inverse = &mut inverse[rows.clone()];
            rows::softmax((scores, columns), &strip.band, &problem.scoring(head), lse, inverse);
        }
        for (rows, piece) in products() {
            let p = View::rows(&scores[rows.start * columns + piece.column..], columns);
            let sizes = (rows.len(), piece.keys, head_dim);
            let to = at + rows.start * stride;
            // SAFETY: by the caller's promise.
            unsafe { out.product(to, stride, sizes, p, v(piece.row), piece.column > 0) }
        }
        for (i, &inverse) in inverse.iter().enumerate() {
            // SAFETY: by the caller's promise.
            let out = unsafe { out.slice(at + i * stride, head_dim) };
            out.iter_mut().for_each(|x| *x *= inverse);
        }
    });
}
