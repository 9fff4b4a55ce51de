//! Attention: on the tensor cores in bf16 for the usual head sizes, in plain f32 arithmetic else.

mod plan;

use std::sync::Arc;

use candle_core::cuda_backend::cudarc::driver::sys;
use candle_core::{DType, Tensor};

use self::plan::{Plain, Tiles};
use super::gpu::failed;
use super::{Arg, Elem, Gpu, Grid, Module, Operand, Scratch, empty, module, operand};
use crate::attention::{Heads, Qkv, Saved, Segment};
use crate::buffer::no_kernel;
use crate::error::{Error, Result};

const OP: &str = "attention";

static FORWARD: Module = module!("attention_forward");
static BACKWARD: Module = module!("attention_backward");
static EXACT: Module = module!("attention_exact");

/// Bytes of keys and values that are gathered at a time for segments with a prefix.
const GATHERED: usize = 256 << 20;

/// Bytes of the sums of several parts of a group of heads.
const MOST_SPLITS: usize = 512 << 20;

/// Checked by the caller.
pub(crate) fn forward(qkv: &Qkv<'_>, segments: &[Segment], heads: &Heads) -> Result<Saved> {
    #[cfg(feature = "cudnn")]
    if let Some(saved) = super::cudnn::forward(qkv, segments, heads)? {
        return Ok(saved);
    }
    forward_here(qkv, segments, heads)
}

/// Checked by the caller.
pub(crate) fn backward(
    qkv: &Qkv<'_>,
    segments: &[Segment],
    heads: &Heads,
    saved: &Saved,
    dout: &Tensor,
) -> Result<Tensor> {
    #[cfg(feature = "cudnn")]
    if let Some(grad) = super::cudnn::backward(qkv, segments, heads, saved, dout)? {
        return Ok(grad);
    }
    backward_here(qkv, segments, heads, saved, dout)
}

/// With this crate's kernels.
fn forward_here(qkv: &Qkv<'_>, segments: &[Segment], heads: &Heads) -> Result<Saved> {
    let problem = Problem::new(qkv, heads)?;
    let Problem { gpu, elem, n_q, .. } = &problem;
    let (device, dtype) = (qkv.q.tensor.device(), qkv.q.tensor.dtype());
    let out = empty((*n_q, heads.heads * heads.head_dim), dtype, device, OP)?;
    let lse = empty((heads.heads, *n_q), DType::F32, device, OP)?;
    let to = Output { out: operand(&out, OP)?, lse: operand(&lse, OP)? };
    if segments.iter().map(|segment| segment.q_len).sum::<usize>() < *n_q {
        gpu.zero(to.out.ptr, to.out.byte_len(), OP)?;
        gpu.zero(to.lse.ptr, to.lse.byte_len(), OP)?;
    }
    let (with_prefix, without): (Vec<_>, Vec<_>) = segments
        .iter()
        .filter(|segment| segment.q_len > 0)
        .partition(|segment| !segment.prefix.is_empty());
    let plain = without
        .iter()
        .map(|segment| plan::plain(segment, segment.kv_start, segment.kv_len))
        .collect::<Result<Vec<Plain>>>()?;
    problem.forward(&problem.k, &problem.v, &plain, &to)?;

    // Runs of keys become one, for as many segments as there is room.
    let row = 2 * heads.kv_heads * heads.head_dim * elem.bytes();
    let mut rest = with_prefix.as_slice();
    while !rest.is_empty() {
        let (mut plain, mut rows) = (Vec::new(), Vec::<i32>::new());
        while let Some((segment, others)) = rest.split_first() {
            let keys = segment.keys().unwrap_or(0);
            if !plain.is_empty() && (rows.len() + keys) * row > GATHERED {
                break;
            }
            plain.push(plan::plain(segment, rows.len(), keys)?);
            rows.extend(
                segment.runs().flat_map(|run| run.start as i32..(run.start + run.len) as i32),
            );
            rest = others;
        }
        let (k, v, _room) = problem.gather(&rows)?;
        problem.forward(&k, &v, &plain, &to)?;
    }
    Ok(Saved { out, lse })
}

/// With this crate's kernels.
fn backward_here(
    qkv: &Qkv<'_>,
    segments: &[Segment],
    heads: &Heads,
    saved: &Saved,
    dout: &Tensor,
) -> Result<Tensor> {
    let problem = Problem::new(qkv, heads)?;
    let packed = qkv.q.tensor;
    let like = operand(packed, OP)?;
    let grad = empty(packed.shape(), packed.dtype(), packed.device(), OP)?;
    let to = operand(&grad, OP)?;
    let sum = |len: fn(&Segment) -> usize| segments.iter().map(len).sum::<usize>();
    let columns = (heads.heads + 2 * heads.kv_heads) * heads.head_dim;
    if sum(|segment| segment.q_len) < problem.n_q
        || sum(|segment| segment.kv_len) < problem.n_q
        || columns < problem.q.width
    {
        problem.gpu.zero(to.ptr, to.byte_len(), OP)?;
    }
    let plain = segments
        .iter()
        .map(|segment| plan::plain(segment, segment.kv_start, segment.kv_len))
        .collect::<Result<Vec<Plain>>>()?;
    let lse = operand(&saved.lse, OP)?;
    if lse.elem != Elem::F32 {
        return Err(no_kernel(&saved.lse, OP));
    }
    let given = Given {
        out: operand(&saved.out, OP)?.like(&like, &saved.out, OP)?,
        dout: operand(dout, OP)?.like(&like, dout, OP)?,
        lse,
        dq: to.at(qkv.q.start_col),
        dk: to.at(qkv.k.start_col),
        dv: to.at(qkv.v.start_col),
    };
    problem.backward(&plain, &given)?;
    Ok(grad)
}

/// Whose tiles blocks own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Queries,
    Keys,
}

/// Columns of a tensor.
#[derive(Clone, Copy, Debug)]
struct Columns {
    /// Address of the first in row 0.
    ptr: u64,
    /// Elements from a row to the next.
    width: usize,
}

impl Columns {
    /// Whether heads of whole vectors begin and end at whole vectors.
    fn vectorise(self, elem: Elem) -> bool {
        self.ptr.is_multiple_of(16) && self.width.is_multiple_of(elem.per_vector())
    }
}

/// Where forward writes.
struct Output {
    out: Operand,
    lse: Operand,
}

/// What backward reads besides the inputs, and the addresses that it writes to.
struct Given {
    out: Operand,
    dout: Operand,
    lse: Operand,
    dq: u64,
    dk: u64,
    dv: u64,
}

/// The tiles of the tensor cores' kernels for a head size, as in `cu/attention_*.cu`.
struct Fast {
    head_dim: usize,
    /// Threads of a block forward, for the gradients of keys, and of queries.
    threads: [u32; 3],
    /// Keys of a tile that forward walks, queries of one for the keys, keys of one for the queries.
    walked: [usize; 3],
    /// Blocks that share the columns of the keys' gradients.
    parts: usize,
    /// Blocks for the gradients of keys that a multiprocessor runs at a time.
    resident: usize,
}

impl Fast {
    /// Rows that a block owns.
    const OWNED: usize = 128;
    const FORWARD: usize = 0;
    const KEYS: usize = 1;
    const QUERIES: usize = 2;

    /// A kernel's blocks: their threads and shared memory, for two stages of what it walks.
    fn grid(&self, kernel: usize, blocks: (usize, usize)) -> Grid {
        let row = (self.head_dim + 8) * 2;
        let owned = if kernel == Fast::FORWARD { Fast::OWNED } else { 2 * Fast::OWNED };
        let sums = if kernel == Fast::KEYS { 4 * self.walked[kernel] * 4 } else { 0 };
        let grid = Grid {
            blocks: (blocks.0 as u32, blocks.1 as u32, 1),
            ..Grid::new(0, self.threads[kernel])
        };
        grid.shared((owned + 4 * self.walked[kernel]) * row + sums)
    }
}

const FAST: [Fast; 5] = [
    Fast { head_dim: 64, threads: [128, 128, 128], walked: [64, 64, 64], parts: 1, resident: 2 },
    Fast { head_dim: 80, threads: [128, 256, 128], walked: [64, 64, 32], parts: 1, resident: 1 },
    Fast { head_dim: 96, threads: [128, 256, 128], walked: [64, 64, 32], parts: 1, resident: 1 },
    Fast { head_dim: 128, threads: [128, 256, 128], walked: [64, 64, 32], parts: 1, resident: 1 },
    Fast { head_dim: 256, threads: [256, 256, 256], walked: [64, 32, 32], parts: 2, resident: 1 },
];

/// The other kernels' blocks for a head size.
struct Exact {
    /// Columns in units of 32, as kernels are named.
    units: usize,
}

impl Exact {
    const WALKED: usize = 32;
    /// The widest heads that have kernels.
    const WIDEST: usize = 512;

    fn new(head_dim: usize) -> Result<Exact> {
        if head_dim > Exact::WIDEST {
            let what = format!("heads of {head_dim} columns on a GPU");
            return Err(Error::Unsupported { op: OP, what });
        }
        Ok(Exact { units: head_dim.div_ceil(32).next_power_of_two() })
    }

    /// Rows that a block owns.
    fn owned(&self) -> usize {
        if self.units <= 8 { 32 } else { 16 }
    }

    /// Blocks that hold `tiles` tiles of their own rows.
    fn grid(&self, tiles: usize, blocks: (usize, usize)) -> Grid {
        let width = self.units * 32;
        let floats = tiles * self.owned() * width + 2 * Exact::WALKED * (width + 1);
        let grid = Grid { blocks: (blocks.0 as u32, blocks.1 as u32, 1), ..Grid::new(0, 256) };
        grid.shared(floats * 4)
    }
}

/// The inputs on their GPU.
struct Problem<'a> {
    gpu: Arc<Gpu>,
    heads: &'a Heads,
    elem: Elem,
    n_q: usize,
    n_k: usize,
    q: Columns,
    k: Columns,
    v: Columns,
    /// How products become scores, as kernels take it.
    score: [Arg; 6],
    /// What the last kernels' arguments point to.
    _slopes: Option<Arc<Scratch>>,
}

impl<'a> Problem<'a> {
    fn new(qkv: &Qkv<'_>, heads: &'a Heads) -> Result<Self> {
        for cols in [&qkv.q, &qkv.k, &qkv.v] {
            plan::count(cols.tensor.dim(0)?)?;
        }
        let gpu = Gpu::of(qkv.q.tensor)?;
        let first = operand(qkv.q.tensor, OP)?;
        let columns = |cols: &crate::attention::Cols<'_>| -> Result<Columns> {
            let all = operand(cols.tensor, OP)?.like(&first, cols.tensor, OP)?;
            Ok(Columns { ptr: all.at(cols.start_col), width: cols.tensor.dim(1)? })
        };
        let slopes = match &heads.alibi {
            Some(alibi) => Some(gpu.upload(&alibi.slopes, OP)?),
            None => None,
        };
        let alibi = heads.alibi.as_ref();
        let score = [
            heads.scale.into(),
            plan::window(heads.window).into(),
            heads.softcap.unwrap_or(0.0).into(),
            slopes.as_ref().map_or(0, |slopes| slopes.ptr).into(),
            alibi.map_or(0.0, |alibi| alibi.factor).into(),
            i32::from(alibi.is_some_and(|alibi| alibi.bf16)).into(),
        ];
        Ok(Problem {
            heads,
            elem: first.elem,
            n_q: qkv.q.tensor.dim(0)?,
            n_k: qkv.k.tensor.dim(0)?,
            q: columns(&qkv.q)?,
            k: columns(&qkv.k)?,
            v: columns(&qkv.v)?,
            score,
            _slopes: slopes,
            gpu,
        })
    }

    fn group(&self) -> usize {
        self.heads.heads / self.heads.kv_heads
    }

    /// The tensor cores' kernels, if they know the problem and the GPU has room for them.
    fn fast(&self, all: &[Columns], kernels: &[usize]) -> Result<Option<&'static Fast>> {
        let known = FAST.iter().find(|fast| fast.head_dim == self.heads.head_dim);
        let Some(fast) = known.filter(|_| {
            self.elem == Elem::Bf16 && all.iter().all(|columns| columns.vectorise(self.elem))
        }) else {
            return Ok(None);
        };
        let attribute =
            sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        let most = self.gpu.stream.context().attribute(attribute).map_err(|e| failed(OP, e))?;
        let fits =
            |&kernel: &usize| i64::from(fast.grid(kernel, (1, 1)).shared_bytes) <= i64::from(most);
        Ok(kernels.iter().all(fits).then_some(fast))
    }

    /// The kernel of a head size, or its twin for everything that makes a score more than a product
    /// times a positive factor.
    fn name(&self, kernel: &str) -> String {
        let Heads { head_dim, scale, softcap, alibi, .. } = self.heads;
        let plain = softcap.is_none() && alibi.is_none() && *scale > 0.0;
        format!("attention_{kernel}_{head_dim}{}", if plain { "" } else { "_extras" })
    }

    fn window(&self) -> i32 {
        plan::window(self.heads.window)
    }

    /// Key heads whose blocks run together: their walks over `rows` of two tensors, of as many
    /// heads a key head, shall stay in the cache.
    fn heads_at_a_time(&self, rows: usize, heads: usize) -> usize {
        let bytes = 2 * heads * self.heads.head_dim * self.elem.bytes();
        plan::heads_at_a_time(self.heads.kv_heads, rows, bytes)
    }

    /// Keys and values of the listed rows, one behind the other.
    fn gather(&self, rows: &[i32]) -> Result<(Columns, Columns, Scratch)> {
        let width = self.heads.kv_heads * self.heads.head_dim;
        let room = self.gpu.scratch(rows.len() * 2 * width * self.elem.bytes(), OP)?;
        let list = self.gpu.upload(rows, OP)?;
        let vectors = self.k.vectorise(self.elem)
            && self.v.vectorise(self.elem)
            && width.is_multiple_of(self.elem.per_vector());
        let (name, elem, per) = match vectors {
            true => ("attention_gather_vectors", None, self.elem.per_vector()),
            false => ("attention_gather", Some(self.elem), 1),
        };
        let args = [
            self.k.ptr.into(),
            self.v.ptr.into(),
            room.ptr.into(),
            list.ptr.into(),
            (self.k.width / per).into(),
            (self.v.width / per).into(),
            ((width / per) as i32).into(),
        ];
        self.gpu.launch(OP, &EXACT, name, elem, Grid::new(rows.len(), 128), &args)?;
        let k = Columns { ptr: room.ptr, width: 2 * width };
        let v = Columns { ptr: room.ptr + (width * self.elem.bytes()) as u64, width: 2 * width };
        Ok((k, v, room))
    }

    fn forward(&self, k: &Columns, v: &Columns, segments: &[Plain], to: &Output) -> Result<()> {
        if segments.is_empty() {
            return Ok(());
        }
        let (gpu, heads) = (&self.gpu, self.heads);
        let list = gpu.upload(segments, OP)?;
        let fast = self.fast(&[self.q, *k, *v], &[Fast::FORWARD])?;
        let exact = Exact::new(heads.head_dim);
        let owned = match &fast {
            Some(_) => Fast::OWNED,
            None => exact?.owned(),
        };
        let tiles = plan::tiles(segments, Side::Queries, owned, self.window());
        let items = gpu.upload(&tiles.items, OP)?;
        let mut args: Vec<Arg> = vec![
            self.q.ptr.into(),
            k.ptr.into(),
            v.ptr.into(),
            (&to.out).into(),
            (&to.lse).into(),
            list.ptr.into(),
            items.ptr.into(),
            self.q.width.into(),
            k.width.into(),
            v.width.into(),
            (self.n_q as i32).into(),
            (heads.heads as i32).into(),
            (self.group() as i32).into(),
        ];
        let Some(fast) = fast else {
            let exact = Exact::new(heads.head_dim)?;
            args.push((heads.head_dim as i32).into());
            args.extend(self.score);
            let name = format!("attention_exact_forward_{}", exact.units);
            let grid = exact.grid(1, (tiles.items.len(), heads.heads));
            return gpu.launch(OP, &EXACT, &name, Some(self.elem), grid, &args);
        };
        let keys = segments.iter().map(|segment| segment[3] as usize).sum();
        let together = self.heads_at_a_time(keys, 1);
        args.push(((together * self.group()) as i32).into());
        args.extend(self.score);
        let blocks =
            (tiles.items.len() * together * self.group(), heads.kv_heads.div_ceil(together));
        let grid = fast.grid(Fast::FORWARD, blocks);
        gpu.launch(OP, &FORWARD, &self.name("forward"), None, grid, &args)
    }

    fn backward(&self, segments: &[Plain], given: &Given) -> Result<()> {
        if segments.is_empty() {
            return Ok(());
        }
        let (gpu, heads) = (&self.gpu, self.heads);
        let list = gpu.upload(segments, OP)?;
        let delta = self.delta(given)?;
        let dout = Columns { ptr: given.dout.ptr, width: heads.heads * heads.head_dim };
        let fast = self.fast(&[self.q, self.k, self.v, dout], &[Fast::KEYS, Fast::QUERIES])?;
        let read: [Arg; 6] = [
            self.q.ptr.into(),
            self.k.ptr.into(),
            self.v.ptr.into(),
            (&given.dout).into(),
            (&given.lse).into(),
            delta.ptr.into(),
        ];
        let counts: [Arg; 4] = [
            self.q.width.into(),
            (self.n_q as i32).into(),
            (heads.heads as i32).into(),
            (self.group() as i32).into(),
        ];
        let Some(fast) = fast else {
            return self.backward_exact(segments, given, &list, &read, &counts);
        };
        self.backward_keys(fast, segments, given, &list, &read)?;

        let tiles = plan::tiles(segments, Side::Queries, Fast::OWNED, self.window());
        let items = gpu.upload(&tiles.items, OP)?;
        let keys = segments.iter().map(|segment| segment[3] as usize).sum();
        let together = self.heads_at_a_time(keys, 1);
        let mut args = read.to_vec();
        args.extend([given.dq, list.ptr, items.ptr].map(Arg::from));
        args.extend(counts);
        args.push(((together * self.group()) as i32).into());
        args.extend(self.score);
        let blocks =
            (tiles.items.len() * together * self.group(), heads.kv_heads.div_ceil(together));
        let grid = fast.grid(Fast::QUERIES, blocks);
        gpu.launch(OP, &BACKWARD, &self.name("queries"), None, grid, &args)
    }

    /// dK and dV, in parts that are summed after where few tiles see many heads.
    fn backward_keys(
        &self,
        fast: &Fast,
        segments: &[Plain],
        given: &Given,
        list: &Scratch,
        read: &[Arg; 6],
    ) -> Result<()> {
        let (gpu, heads) = (&self.gpu, self.heads);
        let tiles = plan::tiles(segments, Side::Keys, Fast::OWNED, self.window());
        let items = gpu.upload(&tiles.items, OP)?;
        let queries = segments.iter().map(|segment| segment[1] as usize).sum();
        let together = self.heads_at_a_time(queries, self.group());
        let sums = 2 * heads.kv_heads * self.n_k * heads.head_dim * 4;
        let splits = self.splits(fast, &tiles, sums);
        let room = gpu.scratch(if splits > 1 { splits * sums } else { 0 }, OP)?;
        let mut args = read.to_vec();
        args.extend([given.dk, given.dv, room.ptr, list.ptr, items.ptr].map(Arg::from));
        args.push(self.k.width.into());
        let counts = [self.n_q, self.n_k, heads.kv_heads, self.group(), together, splits];
        args.extend(counts.map(|count| Arg::from(count as i32)));
        args.extend(self.score);
        let blocks =
            (tiles.items.len() * together * splits * fast.parts, heads.kv_heads.div_ceil(together));
        let grid = fast.grid(Fast::KEYS, blocks);
        gpu.launch(OP, &BACKWARD, &self.name("keys"), None, grid, &args)?;
        if splits == 1 {
            return Ok(());
        }
        let mut args: Vec<Arg> =
            [room.ptr, given.dk, given.dv, list.ptr, items.ptr].map(Arg::from).to_vec();
        args.push(self.k.width.into());
        let counts = [self.n_k, heads.kv_heads, heads.head_dim, splits, Fast::OWNED];
        args.extend(counts.map(|count| Arg::from(count as i32)));
        let blocks = (tiles.items.len() as u32, heads.kv_heads as u32, 1);
        let grid = Grid { blocks, ..Grid::new(0, 256) };
        gpu.launch(OP, &BACKWARD, "attention_sum_splits", None, grid, &args)
    }

    fn splits(&self, fast: &Fast, tiles: &Tiles, bytes: usize) -> usize {
        let slots = self.gpu.processors as usize * fast.resident / fast.parts;
        let wanted = plan::splits(tiles, self.group(), self.heads.kv_heads, slots);
        wanted.min(MOST_SPLITS / bytes.max(1)).max(1)
    }

    fn backward_exact(
        &self,
        segments: &[Plain],
        given: &Given,
        list: &Scratch,
        read: &[Arg; 6],
        counts: &[Arg; 4],
    ) -> Result<()> {
        let heads = self.heads;
        let exact = Exact::new(heads.head_dim)?;
        let kinds = [
            (Side::Keys, "keys", vec![given.dk, given.dv], heads.kv_heads),
            (Side::Queries, "queries", vec![given.dq], heads.heads),
        ];
        for (side, kernel, written, heads_of_side) in kinds {
            let tiles = plan::tiles(segments, side, exact.owned(), self.window());
            let items = self.gpu.upload(&tiles.items, OP)?;
            let mut args = read.to_vec();
            args.extend(written.into_iter().map(Arg::from));
            args.extend([list.ptr, items.ptr].map(Arg::from));
            args.extend(counts);
            args.push((heads.head_dim as i32).into());
            args.extend(self.score);
            let name = format!("attention_exact_{kernel}_{}", exact.units);
            let grid = exact.grid(2, (tiles.items.len(), heads_of_side));
            self.gpu.launch(OP, &EXACT, &name, Some(self.elem), grid, &args)?;
        }
        Ok(())
    }

    /// `rowsum(dO * O)`, `[heads, n_q]`.
    fn delta(&self, given: &Given) -> Result<Scratch> {
        const THREADS: usize = 256;
        /// Threads of a product.
        const LANES: usize = 8;
        let Heads { heads, head_dim, .. } = *self.heads;
        let delta = self.gpu.scratch(heads * self.n_q * 4, OP)?;
        let vectors = given.out.vectorises(head_dim) && given.dout.vectorises(head_dim);
        let args = [
            (&given.out).into(),
            (&given.dout).into(),
            delta.ptr.into(),
            (self.n_q as i32).into(),
            (heads as i32).into(),
            (head_dim as i32).into(),
            i32::from(vectors).into(),
        ];
        let blocks = (heads * self.n_q).div_ceil(THREADS / LANES);
        let grid = Grid::new(blocks, THREADS as u32);
        self.gpu.launch(OP, &EXACT, "attention_delta", Some(self.elem), grid, &args)?;
        Ok(delta)
    }
}
