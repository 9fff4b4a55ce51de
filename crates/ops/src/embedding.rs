//! Rows of a table by id: `x[i] = m table[ids[i]]`, learned positions, and the gradient of the table.
//!
//! Backward: `dtable[t] (+)= m` times the sum of `dx[i]` over the places `i` where `t` stands, added in
//! the order of the places, so that the result is the same each time.

use std::ops::Range;

use candle_core::Tensor;
use multiversion::multiversion;

use crate::buffer::{
    Accum, Dest, dims2, ensure_distinct, ensure_shape, fill_vec, from_vec, view, write_f32,
};
use crate::error::{Error, Result};
use crate::par::{for_chunks, grain};

/// `m table[ids]`: `table` `[rows, width]`, result `[ids, width]`; `m` = `multiplier`, or 1.
///
/// # Errors
/// [`Error::TokenOutOfRange`], [`Error::Rank`], [`Error::NoKernel`], [`Error::NotContiguous`].
pub fn forward(table: &Tensor, ids: &[u32], multiplier: Option<f32>) -> Result<Tensor> {
    const OP: &str = "embedding";
    let (rows, width) = dims2(table, OP, "table")?;
    ensure_ids(ids, rows, OP)?;
    #[cfg(feature = "cuda")]
    if table.device().is_cuda() {
        return crate::cuda::embedding::forward(table, ids, multiplier, width, OP);
    }
    let data = view(table, OP)?;
    let (all, m) = (&*data, multiplier.unwrap_or(1.0));
    // SAFETY: the chunks cover all rows, and each element of each row is written.
    let x = unsafe {
        fill_vec(ids.len() * width, |x| {
            let items = ((ids, 1), (x, width));
            for_chunks(items, ids.len(), grain(width), &|((ids, _), (x, _))| {
                for (&id, x) in ids.iter().zip(x.chunks_exact_mut(width.max(1))) {
                    for (x, &v) in x.iter_mut().zip(&all[row(id, width)]) {
                        x.write(m * v);
                    }
                }
            });
        })
    };
    from_vec(x, (ids.len(), width), table.device())
}

/// `x[i] += table[ids[i]]` in place (learned positions): `x` `[ids, width]`, `table` `[rows, width]`.
///
/// # Errors
/// As [`forward`], and [`Error::Shape`], [`Error::Aliased`].
pub fn add_rows(x: &Tensor, table: &Tensor, ids: &[u32]) -> Result<()> {
    const OP: &str = "add_rows";
    let (rows, width) = dims2(table, OP, "table")?;
    ensure_shape(x, OP, "x", &[ids.len(), width])?;
    ensure_ids(ids, rows, OP)?;
    ensure_distinct(OP, x, &[("table", table)])?;
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return crate::cuda::embedding::add_rows(x, table, ids, width, OP);
    }
    let data = view(table, OP)?;
    let all = &*data;
    write_f32(x, OP, |x| {
        for_chunks(((ids, 1), (x, width)), ids.len(), grain(width), &|((ids, _), (x, _))| {
            for (&id, x) in ids.iter().zip(x.chunks_exact_mut(width.max(1))) {
                add_scaled(x, 1.0, &all[row(id, width)]);
            }
        });
    })
}

/// The gradient of the table from that of its rows: `dx` `[ids, width]`, `dtable` `[rows, width]`.
///
/// # Errors
/// As [`add_rows`].
pub fn backward(ids: &[u32], dx: &Tensor, multiplier: Option<f32>, dtable: Dest<'_>) -> Result<()> {
    const OP: &str = "embedding backward";
    let (dtable, accum) = dtable;
    let (rows, width) = dims2(dtable, OP, "dtable")?;
    ensure_shape(dx, OP, "dx", &[ids.len(), width])?;
    ensure_ids(ids, rows, OP)?;
    ensure_distinct(OP, dtable, &[("dx", dx)])?;
    #[cfg(feature = "cuda")]
    if dx.device().is_cuda() {
        let dtable = (dtable, accum);
        return crate::cuda::embedding::backward(ids, dx, multiplier, dtable, width, OP);
    }
    let data = view(dx, OP)?;
    let (dx_all, m) = (&*data, multiplier.unwrap_or(1.0));
    // The places sorted by id, and by place among equal ids.
    let mut places: Vec<(u32, usize)> = ids.iter().copied().zip(0..).collect();
    places.sort_unstable();
    write_f32(dtable, OP, |dtable| {
        for_chunks((0..rows, (dtable, width)), rows, grain(width), &|(chunk, (dtable, _))| {
            if accum == Accum::Overwrite {
                dtable.fill(0.0);
            }
            let from = places.partition_point(|&(id, _)| (id as usize) < chunk.start);
            let to = places.partition_point(|&(id, _)| (id as usize) < chunk.end);
            for &(id, place) in &places[from..to] {
                let at = (id as usize - chunk.start) * width;
                add_scaled(&mut dtable[at..at + width], m, &dx_all[place * width..][..width]);
            }
        });
    })
}

fn row(id: u32, width: usize) -> Range<usize> {
    id as usize * width..(id as usize + 1) * width
}

fn ensure_ids(ids: &[u32], rows: usize, op: &'static str) -> Result<()> {
    match ids.iter().position(|&id| id as usize >= rows) {
        Some(index) => Err(Error::TokenOutOfRange { op, index, id: i64::from(ids[index]), rows }),
        None => Ok(()),
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+fma", "x86_64+avx2+fma"))]
fn add_scaled(to: &mut [f32], m: f32, from: &[f32]) {
    for (to, &from) in to.iter_mut().zip(from) {
        *to += m * from;
    }
}
