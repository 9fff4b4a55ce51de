//! LayerNorm and RMSNorm with an optional activation fused on the output: `y = post(xhat g + b)`.
//!
//! `xhat = (x - mean) r` with `r = 1 / sqrt(mean((x - mean)^2) + eps)`; RMSNorm has no mean. Backward,
//! with `dz = post'(xhat g + b) dy` and `c = g dz`:
//! `dx = r (c - mean(c) - xhat mean(c xhat))` (RMSNorm without `mean(c)`), `dg = sum dz xhat`,
//! `db = sum dz`. Only `r` and `mean` are kept from the forward pass; the rest is computed again.

use candle_core::Tensor;

use crate::buffer::{
    Accum, Dest, as_uninit, dims2, ensure_distinct, ensure_shape, fill_vec, from_vec, view,
    write_f32,
};
use crate::curve::with_curve;
use crate::error::{Error, Result};
use crate::norm_rows::{Row, backward_rows, forward_rows};
use crate::par::{CHUNK, for_chunks, grain};
use crate::pointwise::Pointwise;

pub use crate::norm_heads::{backward_heads, forward_heads};

/// Which norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// LayerNorm: the mean is subtracted.
    Layer,
    /// RMSNorm.
    Rms {
        /// The stored weight is the gain less 1 (Gemma).
        unit_offset: bool,
    },
}

/// A norm with its parameters.
#[derive(Clone, Copy, Debug)]
pub struct Norm<'a> {
    /// Which norm.
    pub kind: NormKind,
    /// Added to the variance.
    pub eps: f32,
    /// `[width]`.
    pub weight: &'a Tensor,
    /// `[width]`.
    pub bias: Option<&'a Tensor>,
    /// Applied to the output: `Identity`, or a ReLU at the entrance of the matrices that follow.
    pub post: Pointwise,
}

/// What backward needs of a forward pass.
#[derive(Clone, Debug)]
pub struct NormStats {
    /// Per row (or head): the mean; empty for RMSNorm.
    pub(crate) mean: Vec<f32>,
    /// Per row (or head): `1 / sqrt(variance + eps)`.
    pub(crate) rstd: Vec<f32>,
    /// A copy of the input, where the forward pass has overwritten it.
    pub(crate) input: Vec<f32>,
    /// The same on a GPU; then the others are empty.
    #[cfg(feature = "cuda")]
    pub(crate) gpu: Option<crate::cuda::norm::Kept>,
}

/// `post(norm(x))` and what [`backward`] needs: `x` `[n, width]`.
///
/// # Errors
/// [`Error::Shape`], [`Error::Rank`], [`Error::NoKernel`], [`Error::NotContiguous`].
pub fn forward(x: &Tensor, norm: &Norm<'_>) -> Result<(Tensor, NormStats)> {
    const OP: &str = "norm";
    let (n, width) = dims2(x, OP, "x")?;
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return crate::cuda::norm::forward(x, norm, (n, width), OP);
    }
    let gain = Gain::new(norm, width, OP)?;
    let row = gain.row(norm);
    let data = view(x, OP)?;
    let x_all = &*data;
    let mut stats = NormStats::new(norm.kind, n);
    let NormStats { mean, rstd, .. } = &mut stats;
    // SAFETY: `forward_rows` writes each element of each row of each chunk.
    let y = unsafe {
        fill_vec(n * width, |y| {
            with_curve!(norm.post, c => {
                let items = ((x_all, width), (y, width), (&mut mean[..], 1), (&mut rstd[..], 1));
                for_chunks(items, n, grain(width), &|((x, _), (y, _), (mean, _), (rstd, _))| {
                    forward_rows(c, row, x, y, mean, rstd);
                });
            });
        })
    };
    Ok((from_vec(y, (n, width), x.device())?, stats))
}

/// The output of [`forward`] again, bit by bit, from its input and statistics.
///
/// A trainer that drops a norm's output after the forward pass saves its memory and pays with one
/// more pass over `x` when the gradients of what follows need it.
///
/// # Errors
/// As [`forward`], and [`Error::Shape`] for the statistics of other rows.
pub fn again(x: &Tensor, norm: &Norm<'_>, stats: &NormStats) -> Result<Tensor> {
    const OP: &str = "norm again";
    let size = dims2(x, OP, "x")?;
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return crate::cuda::norm::again(x, norm, stats, size, OP);
    }
    stats.ensure_rows(norm.kind, size.0, OP)?;
    Ok(forward(x, norm)?.0)
}

/// The gradients of a norm: `x` and `dy` `[n, width]`, `dx` the same, `dweight` and `dbias` `[width]`.
///
/// `dx` with [`Accum::Add`] adds into the gradient of the residual stream.
///
/// # Errors
/// As [`forward`]; [`Error::Aliased`]; [`Error::Unsupported`] for `dbias` of a norm without bias.
pub fn backward(
    x: &Tensor,
    norm: &Norm<'_>,
    stats: &NormStats,
    dy: &Tensor,
    dx: Dest<'_>,
    dweight: Option<Dest<'_>>,
    dbias: Option<Dest<'_>>,
) -> Result<()> {
    const OP: &str = "norm backward";
    let (n, width) = dims2(x, OP, "x")?;
    let (dx, accum) = dx;
    ensure_shape(dy, OP, "dy", &[n, width])?;
    ensure_shape(dx, OP, "dx", &[n, width])?;
    ensure_distinct(OP, dx, &[("x", x), ("dy", dy), ("weight", norm.weight)])?;
    if dbias.is_some() && norm.bias.is_none() {
        return Err(Error::Unsupported { op: OP, what: "dbias of a norm without bias".into() });
    }
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        let dx = (dx, accum);
        let size = (n, width);
        return crate::cuda::norm::backward(x, norm, stats, dy, dx, dweight, dbias, size, OP);
    }
    stats.ensure_rows(norm.kind, n, OP)?;
    let gain = Gain::new(norm, width, OP)?;
    let row = gain.row(norm);
    let rows = rows_per_partial(n, width);
    let chunks = n.div_ceil(rows);
    let (mut dgain, mut dshift) = (vec![0f32; chunks * width], vec![0f32; chunks * width]);
    {
        let (x_data, dy_data) = (view(x, OP)?, view(dy, OP)?);
        let (x_all, dy_all) = (&*x_data, &*dy_data);
        write_f32(dx, OP, |dx| {
            with_curve!(norm.post, c => {
                let items = (
                    (0..chunks),
                    (x_all, rows * width),
                    (dy_all, rows * width),
                    (dx, rows * width),
                    (&mut dgain[..], width),
                    (&mut dshift[..], width),
                );
                for_chunks(items, chunks, 1, &|(i, (x, _), (dy, _), (dx, _), (dgain, _), (dshift, _))| {
                    let stats = stats.slice(i.start * rows, n.min(i.end * rows));
                    backward_rows(c, row, stats, x, dy, dx, accum, dgain, dshift);
                });
            });
        })?;
    }
    deposit(dweight, &dgain, width, OP, "dweight")?;
    deposit(dbias, &dshift, width, OP, "dbias")
}

/// A norm with its parameters in plain slices: for decoders that work without tensors.
#[derive(Clone, Debug)]
pub struct RowNorm {
    gain: Gain,
    centred: bool,
    eps: f32,
    post: Pointwise,
}

impl RowNorm {
    /// Copies the parameters of a norm on the CPU.
    ///
    /// # Errors
    /// As [`forward`].
    pub fn new(norm: &Norm<'_>) -> Result<RowNorm> {
        let gain = Gain::new(norm, norm.weight.elem_count(), "norm of a row")?;
        let centred = norm.kind == NormKind::Layer;
        Ok(RowNorm { gain, centred, eps: norm.eps, post: norm.post })
    }

    /// `post(norm(x))` of one row, the same numbers as [`forward`]. `x` and `y` are as long as the
    /// norm's weight; what is longer is left alone.
    pub fn apply(&self, x: &[f32], y: &mut [f32]) {
        let width = self.gain.gain.len().min(x.len()).min(y.len());
        let row = Row {
            centred: self.centred,
            eps: self.eps,
            gain: &self.gain.gain,
            bias: &self.gain.bias,
        };
        // SAFETY: `forward_rows` stores initialised elements only.
        let y = unsafe { as_uninit(&mut y[..width]) };
        with_curve!(self.post, c => forward_rows(c, row, &x[..width], y, &mut [], &mut [0.0]));
    }
}

impl NormStats {
    pub(crate) fn new(kind: NormKind, rows: usize) -> Self {
        let mean = if kind == NormKind::Layer { vec![0.0; rows] } else { Vec::new() };
        Self {
            mean,
            rstd: vec![0.0; rows],
            input: Vec::new(),
            #[cfg(feature = "cuda")]
            gpu: None,
        }
    }

    /// The means (empty for RMSNorm) and factors of some rows.
    pub(crate) fn slice(&self, from: usize, to: usize) -> (&[f32], &[f32]) {
        (self.mean.get(from..to).unwrap_or(&[]), &self.rstd[from..to])
    }

    /// Demands that these are the statistics of `rows` rows under such a norm.
    pub(crate) fn ensure_rows(&self, kind: NormKind, rows: usize, op: &'static str) -> Result<()> {
        let means = if kind == NormKind::Layer { rows } else { 0 };
        if self.rstd.len() == rows && self.mean.len() == means {
            return Ok(());
        }
        let found = vec![self.mean.len(), self.rstd.len()];
        Err(Error::Shape { op, tensor: "stats", expected: vec![means, rows], found })
    }
}

/// The parameters as the rows need them.
#[derive(Clone, Debug)]
pub(crate) struct Gain {
    gain: Vec<f32>,
    bias: Vec<f32>,
}

impl Gain {
    pub(crate) fn new(norm: &Norm<'_>, width: usize, op: &'static str) -> Result<Self> {
        ensure_shape(norm.weight, op, "weight", &[width])?;
        let offset = if norm.kind == (NormKind::Rms { unit_offset: true }) { 1.0 } else { 0.0 };
        let gain = view(norm.weight, op)?.iter().map(|w| w + offset).collect();
        let bias = match norm.bias {
            Some(b) => {
                ensure_shape(b, op, "bias", &[width])?;
                view(b, op)?.to_vec()
            }
            None => vec![0.0; width],
        };
        Ok(Self { gain, bias })
    }

    pub(crate) fn row(&self, norm: &Norm<'_>) -> Row<'_> {
        Row {
            centred: norm.kind == NormKind::Layer,
            eps: norm.eps,
            gain: &self.gain,
            bias: &self.bias,
        }
    }
}

/// Rows whose parameter gradients are summed in one go: enough work, and not too many sums to add up.
pub(crate) fn rows_per_partial(n: usize, width: usize) -> usize {
    const MOST: usize = 64;
    (CHUNK / width.max(1)).max(n.div_ceil(MOST)).max(1)
}

/// Adds partial sums (rows of `width`) in order into a parameter's gradient.
pub(crate) fn deposit(
    to: Option<Dest<'_>>,
    partial: &[f32],
    width: usize,
    op: &'static str,
    tensor: &'static str,
) -> Result<()> {
    let Some((to, accum)) = to else { return Ok(()) };
    ensure_shape(to, op, tensor, &[width])?;
    write_f32(to, op, |to| {
        if accum == Accum::Overwrite {
            to.fill(0.0);
        }
        for row in partial.chunks_exact(width.max(1)) {
            for (to, &v) in to.iter_mut().zip(row) {
                *to += v;
            }
        }
    })
}
