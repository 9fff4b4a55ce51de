//! The vector arithmetic between the matrix products: masks, softmax and its backward on a block of
//! scores.
//!
//! A block is `[rows, keys]`, dense. Columns that a row does not see become exact zeros.

use std::ops::Range;

use multiversion::multiversion;

use super::Segment;
use crate::math::exp;
use crate::vmath;

/// The keys that a block of queries sees: a band along the diagonal.
pub(super) struct Band {
    /// The first of them, counted through all runs of the segment.
    pub(super) first_key: usize,
    /// Their number: the columns of the block.
    pub(super) keys: usize,
    /// The block's queries.
    rows: usize,
    /// The key that stands where the first query stands.
    position: usize,
    window: usize,
}

impl Band {
    pub(super) fn new(segment: &Segment, first: usize, rows: usize, window: Option<usize>) -> Self {
        let position = segment.before() + segment.kv_len - segment.q_len + first;
        let window = window.unwrap_or(usize::MAX);
        let first_key = (position + 1).saturating_sub(window);
        Self { first_key, keys: position + rows - first_key, rows, position, window }
    }

    /// One query at the last of `keys` keys, all of which it sees.
    pub(super) fn one(first_key: usize, keys: usize) -> Self {
        let position = first_key + keys.saturating_sub(1);
        Self { first_key, keys, rows: 1, position, window: usize::MAX }
    }

    /// The runs' parts inside the band, from its first column to its last.
    pub(super) fn pieces<'a>(&self, segment: &'a Segment) -> impl Iterator<Item = Piece> + 'a {
        let (first, last) = (self.first_key, self.first_key + self.keys);
        let mut place = 0;
        segment.runs().filter_map(move |run| {
            let (from, to) = (place.max(first), (place + run.len).min(last));
            let row = run.start + from.saturating_sub(place);
            place += run.len;
            (from < to).then(|| Piece { column: from - first, row, keys: to - from })
        })
    }

    /// The parts of the prefix inside the band.
    pub(super) fn prefix(&self, segment: &Segment) -> Vec<Piece> {
        self.pieces(segment).filter(|piece| piece.column < self.own_column(segment)).collect()
    }

    /// The part of the segment's own keys inside the band: never empty, as each query sees itself.
    pub(super) fn own(&self, segment: &Segment) -> Piece {
        let (column, before) = (self.own_column(segment), segment.before());
        let row = segment.kv_start + self.first_key.saturating_sub(before);
        Piece { column, row, keys: self.keys - column }
    }

    /// The column of the first own key.
    fn own_column(&self, segment: &Segment) -> usize {
        segment.before().saturating_sub(self.first_key)
    }

    /// The columns that row `i` sees.
    #[inline(always)]
    pub(super) fn visible(&self, i: usize) -> Range<usize> {
        let end = self.position + i + 1;
        end.saturating_sub(self.window).max(self.first_key) - self.first_key..end - self.first_key
    }

    /// The keys' and the query's places that ALiBi's penalty of row `i` counts from.
    #[inline(always)]
    fn places(&self, i: usize) -> Places {
        Places {
            key: (self.first_key + self.visible(i).start) as f32,
            query: (self.position + i) as f32,
        }
    }
}

/// Keys of one run inside a band.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    /// The block's column of the first of them.
    pub(super) column: usize,
    /// Its row among the keys and values.
    pub(super) row: usize,
    pub(super) keys: usize,
}

/// From `q . k` to a score.
pub(super) struct Scoring {
    pub(super) scale: f32,
    pub(super) softcap: Option<f32>,
    /// ALiBi's penalty in this head.
    pub(super) alibi: Option<Penalty>,
}

/// ALiBi's penalty in one head (see [`super::Alibi`]).
#[derive(Clone, Copy)]
pub(super) struct Penalty {
    pub(super) slope: f32,
    pub(super) factor: f32,
    pub(super) bf16: bool,
}

impl Penalty {
    const NONE: Penalty = Penalty { slope: 0.0, factor: 0.0, bf16: false };
}

/// Places within a segment: of the first visible key, and of the query.
#[derive(Clone, Copy)]
struct Places {
    key: f32,
    query: f32,
}

/// Turns products into `exp(score - max)`, `inverse[i]` into one over the row's sum, `lse[i]` into
/// its log-sum-exp. Rows begin `stride` apart.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
pub(super) fn softmax(
    (scores, stride): (&mut [f32], usize),
    band: &Band,
    scoring: &Scoring,
    lse: &mut [f32],
    inverse: &mut [f32],
) {
    for i in 0..band.rows {
        let row = &mut scores[i * stride..i * stride + band.keys];
        let visible = band.visible(i);
        row[..visible.start].fill(0.0);
        row[visible.end..].fill(0.0);
        let places = band.places(i);
        let row = &mut row[visible];
        let scale = scoring.scale;
        let max = match (scoring.softcap, scoring.alibi) {
            (None, None) => vmath::map_max(row, |x, _| x * scale),
            (None, Some(penalty)) => {
                vmath::map_max(row, |x, j| x * scale + alibi(penalty, places, j))
            }
            (Some(cap), penalty) => {
                let penalty = penalty.unwrap_or(Penalty::NONE);
                let inner = scale / cap;
                vmath::map_max(row, |x, j| cap * vmath::tanh(x * inner) + alibi(penalty, places, j))
            }
        };
        let sum = vmath::map_sum(row, |x| exp(x - max));
        inverse[i] = 1.0 / sum;
        lse[i] = max + sum.ln();
    }
}

/// Turns products into probabilities `exp(score - lse)`. With a soft cap, `slopes` (as large as the
/// block, else empty) becomes its derivative.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
pub(super) fn probabilities(
    scores: &mut [f32],
    band: &Band,
    scoring: &Scoring,
    lse: &[f32],
    slopes: &mut [f32],
) {
    for (i, &lse) in lse.iter().enumerate().take(band.rows) {
        let at = i * band.keys;
        let row = &mut scores[at..at + band.keys];
        let visible = band.visible(i);
        row[..visible.start].fill(0.0);
        row[visible.end..].fill(0.0);
        let places = band.places(i);
        let row = &mut row[visible.clone()];
        let scale = scoring.scale;
        match (scoring.softcap, scoring.alibi) {
            (None, None) => row.iter_mut().for_each(|x| *x = exp(*x * scale - lse)),
            (None, Some(penalty)) => row.iter_mut().enumerate().for_each(|(j, x)| {
                *x = exp(*x * scale + alibi(penalty, places, j) - lse);
            }),
            (Some(cap), penalty) => {
                let penalty = penalty.unwrap_or(Penalty::NONE);
                let inner = scale / cap;
                let derivative = &mut slopes[at + visible.start..at + visible.end];
                for (j, (x, d)) in row.iter_mut().zip(derivative).enumerate() {
                    let t = vmath::tanh(*x * inner);
                    *d = 1.0 - t * t;
                    *x = exp(cap * t + alibi(penalty, places, j) - lse);
                }
            }
        }
    }
}

/// `dp` becomes the gradient of the products: `scale * slope * p * (dp - delta)`, 0 where a row
/// does not see.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
pub(super) fn score_gradient(
    p: &[f32],
    dp: &mut [f32],
    band: &Band,
    delta: &[f32],
    scale: f32,
    slopes: &[f32],
) {
    for (i, &delta) in delta.iter().enumerate().take(band.rows) {
        let (at, visible) = (i * band.keys, band.visible(i));
        let row = &mut dp[at..at + band.keys];
        row[..visible.start].fill(0.0);
        row[visible.end..].fill(0.0);
        let cells = at + visible.start..at + visible.end;
        let row = &mut row[visible];
        for (dp, &p) in row.iter_mut().zip(&p[cells.clone()]) {
            *dp = scale * p * (*dp - delta);
        }
        if !slopes.is_empty() {
            row.iter_mut().zip(&slopes[cells]).for_each(|(dp, &slope)| *dp *= slope);
        }
    }
}

/// `delta[i] = a_i . b_i` for rows `stride` apart.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
pub(super) fn row_dots(delta: &mut [f32], a: &[f32], b: &[f32], stride: usize, len: usize) {
    for (i, delta) in delta.iter_mut().enumerate() {
        let at = i * stride;
        *delta = vmath::dot(&a[at..at + len], &b[at..at + len]);
    }
}

/// Queries of the heads of one group: row `i` of head `g` at `i * stride + g * len`.
pub(super) struct Grouped<'a> {
    pub(super) data: &'a [f32],
    pub(super) stride: usize,
    pub(super) group: usize,
    pub(super) len: usize,
}

/// Products of a few queries with the keys of a piece, into its columns of `[group, rows, keys]`,
/// reading each key once.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
pub(super) fn few_scores(
    scores: &mut [f32],
    band: &Band,
    piece: Piece,
    q: &Grouped<'_>,
    (k, stride): (&[f32], usize),
) {
    for j in 0..piece.keys {
        let k = &k[j * stride..j * stride + q.len];
        for g in 0..q.group {
            for i in 0..band.rows {
                let at = i * q.stride + g * q.len;
                let score = &mut scores[(g * band.rows + i) * band.keys + piece.column + j];
                *score = vmath::dot(&q.data[at..at + q.len], k);
            }
        }
    }
}

/// `sums += p V` for a few rows of `p` `[n, keys]` and the values of a piece, reading each value
/// once; rows of `v` are `stride` apart.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
pub(super) fn few_outputs(
    sums: &mut [f32],
    (p, keys): (&[f32], usize),
    piece: Piece,
    (v, stride): (&[f32], usize),
    len: usize,
) {
    // Four values at a time, so that a sum is loaded and stored once for the four.
    let fours = piece.keys - piece.keys % 4;
    for j in (0..fours).step_by(4) {
        let row = |i: usize| &v[(j + i) * stride..(j + i) * stride + len];
        let (v0, v1, v2, v3) = (row(0), row(1), row(2), row(3));
        for (sums, p) in sums.chunks_exact_mut(len).zip(p.chunks_exact(keys)) {
            let p = &p[piece.column + j..piece.column + j + 4];
            for (c, sum) in sums.iter_mut().enumerate() {
                *sum += (p[0] * v0[c] + p[1] * v1[c]) + (p[2] * v2[c] + p[3] * v3[c]);
            }
        }
    }
    for j in fours..piece.keys {
        let v = &v[j * stride..j * stride + len];
        for (sums, p) in sums.chunks_exact_mut(len).zip(p.chunks_exact(keys)) {
            let p = p[piece.column + j];
            sums.iter_mut().zip(v).for_each(|(sum, v)| *sum += p * v);
        }
    }
}

#[inline(always)]
fn alibi(penalty: Penalty, places: Places, column: usize) -> f32 {
    let key = places.key + column as i32 as f32;
    let steep = if penalty.bf16 {
        round_to_bf16(penalty.slope * key)
    } else {
        penalty.slope * (key - places.query)
    };
    penalty.factor * steep
}

/// To the nearest bfloat16, ties to even; in a form that vectorises.
#[inline(always)]
fn round_to_bf16(x: f32) -> f32 {
    let bits = x.to_bits();
    f32::from_bits((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff_0000)
}
