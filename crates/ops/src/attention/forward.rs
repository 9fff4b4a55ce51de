//! Forward: the scores of one block of queries at once, softmax in place, times the values.

use rayon::prelude::*;

use super::matrix::{Shared, View, product};
use super::rows::{self, Band};
use super::{Problem, Segment};
use crate::scratch;

/// Queries of one task. Larger blocks waste more above the diagonal, smaller ones starve the products.
pub(super) const BLOCK: usize = 64;

/// Up to this many queries (decoding) the products are bound by reading keys and values once, and packing
/// them for a matrix product would double the traffic.
const FEW: usize = 4;

/// One task: queries `rows` of a segment, of one head.
struct Task {
    segment: Segment,
    head: usize,
    first: usize,
    rows: usize,
}

/// Output `[n_q, heads * head_dim]` and log-sum-exp `[heads, n_q]`.
pub(super) fn run(problem: &Problem<'_>, segments: &[Segment], n_q: usize) -> (Vec<f32>, Vec<f32>) {
    let heads = problem.heads;
    let mut out = vec![0.0; n_q * heads.heads * heads.head_dim];
    let mut lse = vec![0.0; heads.heads * n_q];
    let mut tasks = Vec::new();
    for &segment in segments {
        for head in 0..heads.heads {
            tasks.extend((0..segment.q_len).step_by(BLOCK).map(|first| Task {
                segment,
                head,
                first,
                rows: BLOCK.min(segment.q_len - first),
            }));
        }
    }
    let (shared_out, shared_lse) = (Shared::new(&mut out), Shared::new(&mut lse));
    tasks.par_iter().for_each(|task| {
        let row = task.segment.q_start + task.first;
        // SAFETY: a task owns `rows` entries of its head's row of `lse`: queries of segments are disjoint.
        let lse = unsafe { shared_lse.slice(task.head * n_q + row, task.rows) };
        block(problem, task, lse, shared_out);
    });
    (out, lse)
}

fn block(problem: &Problem<'_>, task: &Task, lse: &mut [f32], out: Shared) {
    let (segment, head_dim) = (&task.segment, problem.heads.head_dim);
    let (head, rows) = (task.head, task.rows);
    let band = Band::new(segment, task.first, rows, problem.heads.window);
    let kv_head = problem.kv_head(head);
    let q = problem.q.head(head, segment.q_start + task.first);
    let k = problem.k.head(kv_head, segment.kv_start + band.first_key);
    let v = problem.v.head(kv_head, segment.kv_start + band.first_key);
    let out_stride = problem.heads.heads * head_dim;
    let out_at = (segment.q_start + task.first) * out_stride + head * head_dim;
    let few = rows <= FEW;

    scratch::with(rows * band.keys + rows, |buffer| {
        let (scores, inverse) = buffer.split_at_mut(rows * band.keys);
        if few {
            rows::few_scores(scores, &band, head_dim, (q, problem.q.stride), (k, problem.k.stride));
        } else {
            let q = View::rows(q, problem.q.stride);
            let k = View::rows(k, problem.k.stride);
            product(scores, (rows, head_dim, band.keys), q, k.t());
        }
        rows::softmax(scores, &band, &problem.scoring(head), lse, inverse);
        if !few {
            let v = View::rows(v, problem.v.stride);
            let p = View::rows(scores, band.keys);
            // SAFETY: a task owns its head's columns of its rows of `out`.
            unsafe { out.product(out_at, out_stride, (rows, band.keys, head_dim), p, v, false) }
        }
        for (i, &inverse) in inverse.iter().enumerate() {
            // SAFETY: as above.
            let out = unsafe { out.slice(out_at + i * out_stride, head_dim) };
            if few {
                let visible = band.visible(i);
                let p = &scores[i * band.keys..][visible.clone()];
                rows::weighted_sum(
                    out,
                    p,
                    &v[visible.start * problem.v.stride..],
                    problem.v.stride,
                );
            }
            out.iter_mut().for_each(|x| *x *= inverse);
        }
    });
}
