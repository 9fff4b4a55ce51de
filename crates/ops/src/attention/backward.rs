//! Backward: blocks of queries of one head in turn, probabilities made again from the log-sum-exp.
//!
//! A task is a (segment, query head) and walks its blocks in order, so that the sums over queries
//! in dK and dV have a fixed order without locks. Where query heads share a key head, each sums
//! into buffers of its own, which are then added head after head.

use rayon::prelude::*;

use super::forward::BLOCK;
use super::matrix::{Shared, View, product};
use super::rows::{self, Band};
use super::{Problem, Segment};
use crate::scratch;

/// What forward saved and the gradient that comes in, both `[n_q, heads * head_dim]`; lse `[heads,
/// n_q]`.
pub(super) struct Given<'a> {
    pub(super) out: &'a [f32],
    pub(super) lse: &'a [f32],
    pub(super) dout: &'a [f32],
    pub(super) n_q: usize,
}

/// Where a task adds dK and dV: the element of its first key, and the distance of rows.
#[derive(Clone, Copy)]
struct KeyGrads {
    dk: (Shared, usize),
    dv: (Shared, usize),
    stride: usize,
}

/// The packed gradient `[n_q, width]`.
pub(super) fn run(problem: &Problem<'_>, segments: &[Segment], given: &Given<'_>) -> Vec<f32> {
    let heads = problem.heads;
    let (head_dim, width) = (heads.head_dim, problem.q.stride);
    let mut grad = vec![0.0; given.n_q * width];
    let group = heads.heads / heads.kv_heads;
    // Row `kv_start + j` of key head h, in dK and in dV, within the packed gradient.
    let place = |start: usize, row: usize, head: usize| row * width + start + head * head_dim;

    // Grouped heads: one private [kv_len, 2 * head_dim] panel (dK | dV) a task.
    let total_keys: usize = segments.iter().map(|s| s.kv_len).sum();
    let panel_width = 2 * head_dim;
    let mut panels = vec![0.0; if group > 1 { total_keys * heads.heads * panel_width } else { 0 }];
    let mut tasks = Vec::with_capacity(segments.len() * heads.heads);
    let mut panel_at = 0;
    for segment in segments {
        for head in 0..heads.heads {
            tasks.push((segment, head, panel_at));
            panel_at += segment.kv_len * panel_width;
        }
    }
    let (shared, shared_panels) = (Shared::new(&mut grad), Shared::new(&mut panels));
    tasks.par_iter().for_each(|&(segment, head, at)| {
        let keys = if group > 1 {
            KeyGrads {
                dk: (shared_panels, at),
                dv: (shared_panels, at + head_dim),
                stride: panel_width,
            }
        } else {
            KeyGrads {
                dk: (shared, place(problem.k.start, segment.kv_start, head)),
                dv: (shared, place(problem.v.start, segment.kv_start, head)),
                stride: width,
            }
        };
        for first in (0..segment.q_len).step_by(BLOCK) {
            let rows = BLOCK.min(segment.q_len - first);
            block(problem, given, (segment, head), (first, rows), shared, keys);
        }
    });
    if group > 1 {
        tasks.par_chunks(group).for_each(|tasks| {
            for &(segment, head, at) in tasks {
                let kv_head = head / group;
                for j in 0..segment.kv_len {
                    let panel = at + j * panel_width;
                    for (start, from) in
                        [(problem.k.start, panel), (problem.v.start, panel + head_dim)]
                    {
                        let to = place(start, segment.kv_start + j, kv_head);
                        // SAFETY: the heads of one group are added by one task; segments share no
                        // keys, and the columns of dK and dV are disjoint. The panels are only read
                        // by now.
                        let (to, from) = unsafe {
                            (shared.slice(to, head_dim), shared_panels.slice(from, head_dim))
                        };
                        to.iter_mut().zip(from).for_each(|(to, from)| *to += *from);
                    }
                }
            }
        });
    }
    grad
}

fn block(
    problem: &Problem<'_>,
    given: &Given<'_>,
    (segment, head): (&Segment, usize),
    (first, rows): (usize, usize),
    grad: Shared,
    keys: KeyGrads,
) {
    let head_dim = problem.heads.head_dim;
    let band = Band::new(segment, first, rows, problem.heads.window);
    let (n, row) = (band.keys, segment.q_start + first);
    let kv_head = problem.kv_head(head);
    let key_row = segment.kv_start + band.first_key;
    let q = View::rows(problem.q.head(head, row), problem.q.stride);
    let k = View::rows(problem.k.head(kv_head, key_row), problem.k.stride);
    let v = View::rows(problem.v.head(kv_head, key_row), problem.v.stride);
    let out_stride = problem.heads.heads * head_dim;
    let at = row * out_stride + head * head_dim;
    let (out, dout) = (&given.out[at..], &given.dout[at..]);
    let lse = &given.lse[head * given.n_q + row..][..rows];
    let scoring = problem.scoring(head);
    let capped = if scoring.softcap.is_some() { rows * n } else { 0 };

    scratch::with(2 * rows * n + rows + capped, |buffer| {
        let (p, rest) = buffer.split_at_mut(rows * n);
        let (ds, rest) = rest.split_at_mut(rows * n);
        let (delta, slopes) = rest.split_at_mut(rows);
        product(p, (rows, head_dim, n), q, k.t());
        rows::probabilities(p, &band, &scoring, lse, slopes);
        let dout_view = View::rows(dout, out_stride);
        product(ds, (rows, head_dim, n), dout_view, v.t());
        rows::row_dots(delta, out, dout, out_stride, head_dim);
        // SAFETY: this task alone adds to the rows of dV and dK of its segment and head, and alone
        // writes its head's columns of dQ.
        unsafe {
            let at = keys.dv.1 + band.first_key * keys.stride;
            let p = View::rows(p, n);
            keys.dv.0.product(at, keys.stride, (n, rows, head_dim), p.t(), dout_view, true);
        }
        rows::score_gradient(p, ds, &band, delta, problem.heads.scale, slopes);
        let ds = View::rows(ds, n);
        // SAFETY: as above.
        unsafe {
            let dq = row * problem.q.stride + problem.q.start + head * head_dim;
            grad.product(dq, problem.q.stride, (rows, n, head_dim), ds, k, false);
            let at = keys.dk.1 + band.first_key * keys.stride;
            keys.dk.0.product(at, keys.stride, (n, rows, head_dim), ds.t(), q, true);
        }
    });
}
