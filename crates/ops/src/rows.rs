//! Moving rows: picking some of a tensor's rows, and writing columns into rows of another.

use std::ops::Range;

use candle_core::Tensor;

use crate::buffer::{dims2, ensure_distinct, ensure_range, from_vec, view, write_f32};
use crate::error::{Error, Result};

/// The rows `rows` of `x` `[n, width]`, in that order: `[rows.len(), width]`.
///
/// # Errors
/// A row that `x` does not have.
pub fn gather(x: &Tensor, rows: &[usize]) -> Result<Tensor> {
    const OP: &str = "rows::gather";
    let (n, width) = dims2(x, OP, "x")?;
    check_rows(OP, rows, n)?;
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return crate::cuda::rows::gather(x, rows, width, OP);
    }
    let source = view(x, OP)?;
    let mut out = Vec::with_capacity(rows.len() * width);
    for row in rows {
        out.extend_from_slice(&source[row * width..(row + 1) * width]);
    }
    from_vec(out, (rows.len(), width), x.device())
}

/// Writes columns `cols` of `x` `[n, width]` into the rows `rows` of `target`
/// `[m, cols.len()]`: row `i` of `x` goes to row `rows[i]`.
///
/// # Errors
/// Shapes that do not fit, a row that `target` does not have.
pub fn scatter(x: &Tensor, cols: Range<usize>, target: &Tensor, rows: &[usize]) -> Result<()> {
    const OP: &str = "rows::scatter";
    let (n, width) = dims2(x, OP, "x")?;
    let (m, target_width) = dims2(target, OP, "target")?;
    ensure_range(&cols, width, OP, "columns")?;
    if target_width != cols.len() || rows.len() != n {
        let (expected, found) = (vec![rows.len(), target_width], vec![n, cols.len()]);
        return Err(Error::Shape { op: OP, tensor: "x", expected, found });
    }
    check_rows(OP, rows, m)?;
    ensure_distinct(OP, target, &[("x", x)])?;
    #[cfg(feature = "cuda")]
    if target.device().is_cuda() {
        return crate::cuda::rows::scatter((x, width), cols, target, rows, OP);
    }
    let source = view(x, OP)?;
    write_f32(target, OP, |out| {
        for (i, row) in rows.iter().enumerate() {
            out[row * target_width..(row + 1) * target_width]
                .copy_from_slice(&source[i * width + cols.start..i * width + cols.end]);
        }
    })
}

/// Moves runs of rows within `t` `[n, width]`: each (from, to, number) after the one before it.
/// What a run leaves behind keeps its content until another comes there.
///
/// # Errors
/// Rows that `t` does not have.
pub fn relocate(t: &Tensor, moves: &[(usize, usize, usize)]) -> Result<()> {
    const OP: &str = "rows::relocate";
    let (n, width) = dims2(t, OP, "t")?;
    for &(from, to, len) in moves {
        for start in [from, to] {
            ensure_range(&(start..start.saturating_add(len)), n, OP, "rows")?;
        }
    }
    #[cfg(feature = "cuda")]
    if t.device().is_cuda() {
        return crate::cuda::rows::relocate(t, moves, width, OP);
    }
    write_f32(t, OP, |data| {
        for &(from, to, len) in moves {
            data.copy_within(from * width..(from + len) * width, to * width);
        }
    })
}

fn check_rows(op: &'static str, rows: &[usize], len: usize) -> Result<()> {
    match rows.iter().find(|row| **row >= len) {
        Some(&row) => Err(Error::Range { op, what: "rows", range: row..row + 1, len }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn scatter_then_gather_gives_the_columns_back() {
        let x = Tensor::arange(0f32, 12., &Device::Cpu).unwrap().reshape((3, 4)).unwrap();
        let cache = Tensor::zeros((5, 2), candle_core::DType::F32, &Device::Cpu).unwrap();
        scatter(&x, 1..3, &cache, &[4, 0, 2]).unwrap();
        let picked = gather(&cache, &[4, 0, 2]).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(picked, [[1., 2.], [5., 6.], [9., 10.]]);
        assert_eq!(gather(&cache, &[1]).unwrap().to_vec2::<f32>().unwrap(), [[0., 0.]]);
        assert!(scatter(&x, 1..3, &cache, &[5, 0, 2]).is_err());
        assert!(scatter(&x, 1..4, &cache, &[4, 0, 2]).is_err());
        assert!(gather(&cache, &[5]).is_err());
    }

    #[test]
    fn runs_move_one_after_the_other() {
        let x = Tensor::arange(0f32, 12., &Device::Cpu).unwrap().reshape((6, 2)).unwrap();
        // The second reads rows that the first has written over; overlap is no harm.
        relocate(&x, &[(2, 0, 3), (1, 4, 2)]).unwrap();
        let found = x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(found, [4., 5., 6., 7., 8., 9., 6., 7., 6., 7., 8., 9.]);
        assert!(relocate(&x, &[(0, 4, 3)]).is_err());
        assert!(relocate(&x, &[(usize::MAX, 0, 2)]).is_err());
    }
}
