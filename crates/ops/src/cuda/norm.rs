//! Norms over rows or heads.

use std::ops::Range;

use candle_core::{DType, Tensor};

use super::pointwise::curve_code;
use super::{Arg, Elem, Gpu, Grid, Module, Operand, empty, empty_like, module, operand};
use crate::buffer::{Accum, Dest, ensure_shape};
use crate::error::{Error, Result};
use crate::norm::{Norm, NormKind, NormStats};
use crate::pointwise::Pointwise;

static FORWARD: Module = module!("norm_forward");
static BACKWARD: Module = module!("norm_backward");
/// For rows that cannot be cut into vectors, or are too wide.
static LOOP: Module = module!("norm_loop");

/// What a forward pass keeps on the GPU.
#[derive(Clone, Debug)]
pub(crate) struct Kept {
    /// `[rows]`; none for RMSNorm.
    mean: Option<Tensor>,
    /// `[rows]`.
    rstd: Tensor,
    /// `[rows, head_dim]`, where the forward pass has overwritten it.
    input: Option<Tensor>,
}

/// The output and what backward needs; `x` is `[n, width]`.
pub(crate) fn forward(
    x: &Tensor,
    norm: &Norm<'_>,
    (n, width): (usize, usize),
    op: &'static str,
) -> Result<(Tensor, NormStats)> {
    let rows = Rows::whole(n, width, op)?;
    let kept = Kept::new(x, norm.kind, &rows, op)?;
    let y = empty_like(x, op)?;
    normalise(x, &y, norm, &rows, &kept, false, op)?;
    Ok((y, kept.into()))
}

/// The output again.
pub(crate) fn again(
    x: &Tensor,
    norm: &Norm<'_>,
    stats: &NormStats,
    (n, width): (usize, usize),
    op: &'static str,
) -> Result<Tensor> {
    let rows = Rows::whole(n, width, op)?;
    let kept = Kept::of(stats, norm.kind, &rows, op)?;
    let y = empty_like(x, op)?;
    normalise(x, &y, norm, &rows, kept, true, op)?;
    Ok(y)
}

/// The gradients; shapes other than those of the parameters are checked.
#[allow(clippy::too_many_arguments, reason = "as the public function")]
pub(crate) fn backward(
    x: &Tensor,
    norm: &Norm<'_>,
    stats: &NormStats,
    dy: &Tensor,
    dx: Dest<'_>,
    dweight: Option<Dest<'_>>,
    dbias: Option<Dest<'_>>,
    (n, width): (usize, usize),
    op: &'static str,
) -> Result<()> {
    let rows = Rows::whole(n, width, op)?;
    let kept = Kept::of(stats, norm.kind, &rows, op)?;
    differentiate(x, norm, kept, dy, dx, [dweight, dbias], &rows, op)
}

/// Normalises the heads of some columns in place.
pub(crate) fn forward_heads(
    x: &Tensor,
    cols: Range<usize>,
    head_dim: usize,
    norm: &Norm<'_>,
    (n, width): (usize, usize),
    op: &'static str,
) -> Result<NormStats> {
    let rows = Rows::heads(n, width, &cols, head_dim, op)?;
    let mut kept = Kept::new(x, norm.kind, &rows, op)?;
    kept.input = Some(empty((rows.count, head_dim), x.dtype(), x.device(), op)?);
    normalise(x, x, norm, &rows, &kept, false, op)?;
    Ok(kept.into())
}

/// Turns the gradient of the heads' output into that of their input, in place.
#[allow(clippy::too_many_arguments, reason = "as the public function")]
pub(crate) fn backward_heads(
    dy: &Tensor,
    cols: Range<usize>,
    head_dim: usize,
    norm: &Norm<'_>,
    stats: &NormStats,
    dweight: Option<Dest<'_>>,
    (n, width): (usize, usize),
    op: &'static str,
) -> Result<()> {
    let rows = Rows::heads(n, width, &cols, head_dim, op)?;
    let kept = Kept::of(stats, norm.kind, &rows, op)?;
    let Some(input) = &kept.input else {
        let (expected, found) = (vec![rows.count, head_dim], vec![0]);
        return Err(Error::Shape { op, tensor: "stats", expected, found });
    };
    ensure_shape(input, op, "stats", &[rows.count, head_dim])?;
    differentiate(input, norm, kept, dy, (dy, Accum::Overwrite), [dweight, None], &rows, op)
}

impl From<Kept> for NormStats {
    fn from(kept: Kept) -> NormStats {
        NormStats { mean: Vec::new(), rstd: Vec::new(), input: Vec::new(), gpu: Some(kept) }
    }
}

impl Kept {
    fn new(x: &Tensor, kind: NormKind, rows: &Rows, op: &'static str) -> Result<Kept> {
        let numbers = || empty(rows.count, DType::F32, x.device(), op);
        let mean = (kind == NormKind::Layer).then(numbers).transpose()?;
        Ok(Kept { mean, rstd: numbers()?, input: None })
    }

    /// The statistics, which must be those of these rows under such a norm.
    fn of<'a>(
        stats: &'a NormStats,
        kind: NormKind,
        rows: &Rows,
        op: &'static str,
    ) -> Result<&'a Kept> {
        let means = if kind == NormKind::Layer { rows.count } else { 0 };
        let (kept, found) = match &stats.gpu {
            Some(kept) => {
                let len = |t: &Tensor| t.elem_count();
                (Some(kept), vec![kept.mean.as_ref().map_or(0, len), len(&kept.rstd)])
            }
            None => (None, vec![0, 0]),
        };
        let expected = vec![means, rows.count];
        match kept {
            Some(kept) if found == expected => Ok(kept),
            _ => Err(Error::Shape { op, tensor: "stats", expected, found }),
        }
    }

    /// The addresses of the means (0 if there are none) and factors.
    fn addresses(&self, op: &'static str) -> Result<(u64, u64)> {
        let mean = match &self.mean {
            Some(mean) => operand(mean, op)?.ptr,
            None => 0,
        };
        Ok((mean, operand(&self.rstd, op)?.ptr))
    }
}

/// Which stretches of a matrix are normalised: row `r` begins `(r % heads) * width` elements after
/// `start + (r / heads) * stride`.
struct Rows {
    count: usize,
    heads: usize,
    stride: usize,
    start: usize,
    width: usize,
}

impl Rows {
    fn whole(n: usize, width: usize, op: &'static str) -> Result<Rows> {
        Rows { count: n, heads: 1, stride: width, start: 0, width }.checked(op)
    }

    fn heads(
        n: usize,
        stride: usize,
        cols: &Range<usize>,
        head_dim: usize,
        op: &'static str,
    ) -> Result<Rows> {
        let heads = cols.len() / head_dim;
        Rows { count: n * heads, heads, stride, start: cols.start, width: head_dim }.checked(op)
    }

    /// Kernels count rows and columns in 32 bits.
    fn checked(self, op: &'static str) -> Result<Rows> {
        const MOST: usize = 1 << 30;
        if self.count <= MOST && self.width <= MOST {
            return Ok(self);
        }
        Err(Error::Unsupported { op, what: format!("{} rows of {}", self.count, self.width) })
    }

    fn args(&self) -> [Arg; 4] {
        [
            (self.count as u32).into(),
            (self.heads as u32).into(),
            self.stride.into(),
            (self.width as u32).into(),
        ]
    }

    /// Whether the rows can be read in vectors from all these places.
    fn vectorise(&self, places: &[u64], elem: Elem) -> bool {
        let whole = |elements: usize| elements.is_multiple_of(elem.per_vector());
        whole(self.width) && whole(self.stride) && places.iter().all(|p| p.is_multiple_of(16))
    }
}

/// How the vectors of a row are dealt out.
struct Split {
    /// Threads of a row: a multiple of 32, or a smaller power of 2.
    lanes: usize,
    /// Vectors of a thread, at most: one of those that kernels are compiled for.
    each: usize,
}

impl Split {
    /// `each` vectors a thread.
    fn new(vectors: usize, each: usize) -> Split {
        let threads = vectors.div_ceil(each);
        let lanes =
            if threads <= 32 { threads.next_power_of_two() } else { threads.next_multiple_of(32) };
        Split { lanes, each }
    }

    /// For the kernels that write a norm; nothing for a row that is too wide.
    fn forward(vectors: usize, post: Pointwise) -> Option<Split> {
        // Two loads a thread, where no thread is left without.
        let each = match vectors {
            0..=512 if vectors.is_multiple_of(64) => 2,
            0..=512 => 1,
            513..=1024 => 2,
            1025..=2048 if curve_class(post) != "any" => 4,
            _ => return None,
        };
        Some(Split::new(vectors, each))
    }

    /// For the kernels that write a norm's gradients.
    fn backward(vectors: usize, post: Pointwise) -> Option<Split> {
        match vectors {
            0..=1024 => Some(Split::new(vectors, 1)),
            1025..=2048 if curve_class(post) != "any" => Some(Split::new(vectors, 4)),
            _ => None,
        }
    }

    /// Rows that a block has at a time.
    fn rows(&self) -> usize {
        (512 / self.lanes).max(1)
    }

    /// Blocks which share `count` rows evenly: as many as run at a time if a processor has
    /// `resident` threads, but none without a row.
    fn grid(&self, count: usize, processors: u32, resident: usize) -> Grid {
        let threads = self.rows() * self.lanes;
        let blocks = processors as usize * (resident / threads).max(1);
        Grid::new(blocks.min(count.div_ceil(self.rows())), threads as u32)
    }
}

/// The name of the kernels for a curve which costs nothing, or for the others.
fn curve_class(post: Pointwise) -> &'static str {
    match post {
        Pointwise::Identity => "identity",
        Pointwise::Relu => "relu",
        _ => "any",
    }
}

/// Addresses and numbers of a norm's parameters.
struct Params {
    class: &'static str,
    weight: u64,
    /// 0 if there is none.
    bias: u64,
    offset: f32,
    centred: i32,
    kind: i32,
    p: f32,
}

impl Params {
    fn new(norm: &Norm<'_>, width: usize, like: &Operand, op: &'static str) -> Result<Params> {
        let address = |t: &Tensor, name| {
            ensure_shape(t, op, name, &[width])?;
            Ok::<_, Error>(operand(t, op)?.like(like, t, op)?.ptr)
        };
        let (kind, p) = curve_code(norm.post);
        Ok(Params {
            class: curve_class(norm.post),
            weight: address(norm.weight, "weight")?,
            bias: norm.bias.map_or(Ok(0), |bias| address(bias, "bias"))?,
            offset: if norm.kind == (NormKind::Rms { unit_offset: true }) { 1.0 } else { 0.0 },
            centred: i32::from(norm.kind == NormKind::Layer),
            kind,
            p,
        })
    }
}

impl Params {
    /// What a kernel's name says of the norm: whether it is RMSNorm without bias, or any.
    fn complexity(&self) -> &'static str {
        if self.centred == 0 && self.bias == 0 { "plain" } else { "full" }
    }
}

/// Writes the rows of `y`, and the statistics unless they are `known`; `y` may be `x`.
fn normalise(
    x: &Tensor,
    y: &Tensor,
    norm: &Norm<'_>,
    rows: &Rows,
    kept: &Kept,
    known: bool,
    op: &'static str,
) -> Result<()> {
    let gpu = Gpu::of(x)?;
    let x = operand(x, op)?;
    let params = Params::new(norm, rows.width, &x, op)?;
    let (x_at, y_at) = (x.at(rows.start), operand(y, op)?.at(rows.start));
    let copy = match &kept.input {
        Some(input) => operand(input, op)?.ptr,
        None => 0,
    };
    let (mean, rstd) = kept.addresses(op)?;
    let mut args: Vec<Arg> = vec![
        params.kind.into(),
        params.p.into(),
        x_at.into(),
        y_at.into(),
        copy.into(),
        params.weight.into(),
        params.bias.into(),
        params.offset.into(),
        norm.eps.into(),
        params.centred.into(),
        mean.into(),
        rstd.into(),
        i32::from(known).into(),
    ];
    args.extend(rows.args());
    let places = [x_at, y_at, copy, params.weight, params.bias];
    let split = match rows.vectorise(&places, x.elem) {
        true => Split::forward(rows.width / x.elem.per_vector(), norm.post),
        false => None,
    };
    let Some(split) = split else {
        let grid = Grid::new(rows.count, loop_threads(rows.width));
        return gpu.launch(op, &LOOP, "forward", Some(x.elem), grid, &args);
    };
    args.push((split.lanes as i32).into());
    let (class, each, complexity) = (params.class, split.each, params.complexity());
    // As many as the kernels' registers allow.
    let resident = if each == 1 && complexity == "plain" { 3 * 512 } else { 2 * 512 };
    let grid = split.grid(rows.count, gpu.processors, resident);
    let name = format!("{class}_{each}_{complexity}");
    gpu.launch(op, &FORWARD, &name, Some(x.elem), grid, &args)
}

/// The gradients: the rows of `x` lie one after the other, those of `dy` and `dx` as `rows` says;
/// `dx` may be `dy`.
#[allow(clippy::too_many_arguments, reason = "what a gradient takes")]
fn differentiate(
    x: &Tensor,
    norm: &Norm<'_>,
    kept: &Kept,
    dy: &Tensor,
    (dx, accum): Dest<'_>,
    dparams: [Option<Dest<'_>>; 2],
    rows: &Rows,
    op: &'static str,
) -> Result<()> {
    let gpu = Gpu::of(x)?;
    let (dy_t, dx_t) = (dy, dx);
    let x = operand(x, op)?;
    let dy = operand(dy_t, op)?.like(&x, dy_t, op)?.at(rows.start);
    let dx = operand(dx_t, op)?.like(&x, dx_t, op)?.at(rows.start);
    let params = Params::new(norm, rows.width, &x, op)?;
    let (mean, rstd) = kept.addresses(op)?;
    let add = i32::from(accum == Accum::Add);
    let curve: [Arg; 2] = [params.kind.into(), params.p.into()];
    let known: [Arg; 5] =
        [params.weight.into(), params.bias.into(), params.offset.into(), mean.into(), rstd.into()];
    let places = [x.ptr, dy, dx, params.weight, params.bias];
    let split = match rows.vectorise(&places, x.elem) {
        true => Split::backward(rows.width / x.elem.per_vector(), norm.post),
        false => None,
    };
    let (partial, blocks) = if let Some(split) = split {
        let (class, each, complexity) = (params.class, split.each, params.complexity());
        // As many as the kernels' registers allow.
        let resident = if each == 1 { 1024 } else { 512 };
        let mut grid = split.grid(rows.count, gpu.processors, resident);
        let blocks = grid.blocks.0 as usize;
        let sets = if complexity == "plain" { 1 } else { 2 };
        let bytes = sets * rows.width * size_of::<f32>();
        let partial = gpu.scratch(blocks * bytes, op)?;
        let mut args = curve.to_vec();
        args.extend::<[Arg; 4]>([x.ptr.into(), dy.into(), dx.into(), add.into()]);
        args.extend(known);
        args.push(partial.ptr.into());
        args.extend(rows.args());
        args.push((split.lanes as i32).into());
        if split.rows() > 1 {
            grid = grid.shared(bytes);
        }
        let name = format!("{class}_{each}_{complexity}");
        gpu.launch(op, &BACKWARD, &name, Some(x.elem), grid, &args)?;
        (partial, blocks)
    } else {
        let across = rows.width.div_ceil(32);
        let wanted = (8 * gpu.processors as usize).div_ceil(across.max(1)).max(1);
        let share = rows.count.div_ceil(wanted).max(8);
        let blocks = rows.count.div_ceil(share);
        let partial = gpu.scratch(2 * blocks * rows.width * size_of::<f32>(), op)?;
        let mut args = curve.to_vec();
        args.extend::<[Arg; 2]>([x.ptr.into(), dy.into()]);
        args.extend(known);
        args.extend::<[Arg; 2]>([partial.ptr.into(), (share as u32).into()]);
        args.extend(rows.args());
        let grid =
            Grid { blocks: (across as u32, blocks as u32, 1), threads: 256, shared_bytes: 0 };
        gpu.launch(op, &LOOP, "params", Some(x.elem), grid, &args)?;
        let mut args = curve.to_vec();
        args.extend::<[Arg; 4]>([x.ptr.into(), dy.into(), dx.into(), add.into()]);
        args.extend(known);
        args.extend(rows.args());
        let grid = Grid::new(rows.count, loop_threads(rows.width));
        gpu.launch(op, &LOOP, "backward", Some(x.elem), grid, &args)?;
        (partial, blocks)
    };
    if dparams.iter().all(Option::is_none) {
        return Ok(());
    }
    let mut args: Vec<Arg> =
        vec![partial.ptr.into(), (blocks as u32).into(), (rows.width as u32).into()];
    for (dest, name) in dparams.into_iter().zip(["dweight", "dbias"]) {
        let (ptr, how) = match dest {
            Some((to, accum)) => {
                ensure_shape(to, op, name, &[rows.width])?;
                let to = operand(to, op)?;
                let bits = [to.elem == Elem::Bf16, accum == Accum::Add];
                (to.ptr, i32::from(bits[0]) + 2 * i32::from(bits[1]))
            }
            None => (0, 0),
        };
        args.extend::<[Arg; 2]>([ptr.into(), how.into()]);
    }
    let grid = Grid {
        blocks: (rows.width.div_ceil(32) as u32, if params.bias == 0 { 1 } else { 2 }, 1),
        threads: 1024,
        shared_bytes: 0,
    };
    gpu.launch(op, &BACKWARD, "add_partials", None, grid, &args)
}

/// Threads of a block that has one row to go through.
fn loop_threads(width: usize) -> u32 {
    width.div_ceil(4).next_multiple_of(32).clamp(32, 256) as u32
}
