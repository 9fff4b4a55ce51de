//! The gradients of queries, keys and values, with this crate's kernels.

use candle_core::Tensor;

use super::kernels::{self, Exact, Fast, Kernel, Kernels};
use super::plan::{self, Plain, Side, Tiles};
use super::problem::{Columns, Problem};
use super::{BACKWARD, EXACT, OP};
use crate::attention::{Heads, Qkv, Saved, Segment};
use crate::buffer::no_kernel;
use crate::cuda::{Arg, Elem, Grid, Operand, Scratch, empty, operand};
use crate::error::Result;

/// Bytes of the sums of several parts of a group of heads.
const MOST_SPLITS: usize = 512 << 20;

/// Checked by the caller.
pub(super) fn backward(
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
    let (out, dout) = (
        operand(&saved.out, OP)?.like(&like, &saved.out, OP)?,
        operand(dout, OP)?.like(&like, dout, OP)?,
    );
    if plain.is_empty() {
        return Ok(grad);
    }
    Pass {
        delta: delta(&problem, &out, &dout)?,
        problem: &problem,
        segments: &plain,
        dout,
        lse,
        dq: to.at(qkv.q.start_col),
        dk: to.at(qkv.k.start_col),
        dv: to.at(qkv.v.start_col),
    }
    .queue()?;
    Ok(grad)
}

/// What the kernels read, and the addresses that they write to.
struct Pass<'a> {
    problem: &'a Problem<'a>,
    segments: &'a [Plain],
    dout: Operand,
    lse: Operand,
    delta: Scratch,
    dq: u64,
    dk: u64,
    dv: u64,
}

impl Pass<'_> {
    fn queue(&self) -> Result<()> {
        let Problem { heads, q, k, v, .. } = *self.problem;
        let dout = Columns { ptr: self.dout.ptr, width: heads.heads * heads.head_dim };
        match self.problem.kernels(&[q, k, v, dout], &[Kernel::Keys, Kernel::Queries])? {
            Kernels::Fast(fast) => {
                self.fast_keys(fast)?;
                self.fast_queries(fast)
            }
            Kernels::Exact(exact) => {
                self.exact(&exact, Kernel::Keys)?;
                self.exact(&exact, Kernel::Queries)
            }
        }
    }

    /// The first arguments of every kernel.
    fn read(&self) -> Vec<Arg> {
        let Problem { q, k, v, .. } = self.problem;
        vec![
            q.ptr.into(),
            k.ptr.into(),
            v.ptr.into(),
            (&self.dout).into(),
            (&self.lse).into(),
            self.delta.ptr.into(),
        ]
    }

    /// What follows where all heads of queries are walked.
    fn counts(&self) -> [Arg; 4] {
        let Problem { heads, q, n_q, .. } = self.problem;
        [
            q.width.into(),
            (*n_q as i32).into(),
            (heads.heads as i32).into(),
            (self.problem.group() as i32).into(),
        ]
    }

    fn fast_queries(&self, fast: &Fast) -> Result<()> {
        let problem = self.problem;
        let work = problem.work(self.segments, Side::Queries, Fast::OWNED)?;
        let (grid, together) = problem.query_blocks(fast, Kernel::Queries, self.segments, &work);
        let mut args = self.read();
        args.push(self.dq.into());
        args.extend(work.args());
        args.extend(self.counts());
        args.push(together.into());
        args.extend(problem.score);
        let name = problem.fast_name(Kernel::Queries);
        problem.gpu.launch(OP, &BACKWARD, &name, None, grid, &args)
    }

    /// In parts that are summed after where few tiles see many heads.
    fn fast_keys(&self, fast: &Fast) -> Result<()> {
        let problem = self.problem;
        let Problem { gpu, heads, n_q, n_k, k, .. } = problem;
        let work = problem.work(self.segments, Side::Keys, Fast::OWNED)?;
        let tiles = work.tiles.items.len();
        let queries = self.segments.iter().map(|segment| segment[1] as usize).sum();
        let together = problem.heads_at_a_time(queries, problem.group());
        let sums = 2 * heads.kv_heads * n_k * heads.head_dim * 4;
        let splits = splits(problem, fast, &work.tiles, sums);
        let room = gpu.scratch(if splits > 1 { splits * sums } else { 0 }, OP)?;
        let mut args = self.read();
        args.extend([self.dk, self.dv, room.ptr].map(Arg::from));
        args.extend(work.args());
        args.push(k.width.into());
        let counts = [*n_q, *n_k, heads.kv_heads, problem.group(), together, splits];
        args.extend(counts.map(|count| Arg::from(count as i32)));
        args.extend(problem.score);
        let blocks = (tiles * together * splits * fast.parts, heads.kv_heads.div_ceil(together));
        let grid = fast.grid(Kernel::Keys, blocks);
        gpu.launch(OP, &BACKWARD, &problem.fast_name(Kernel::Keys), None, grid, &args)?;
        if splits == 1 {
            return Ok(());
        }
        let mut args: Vec<Arg> = [room.ptr, self.dk, self.dv].map(Arg::from).to_vec();
        args.extend(work.args());
        args.push(k.width.into());
        let counts = [*n_k, heads.kv_heads, heads.head_dim, splits, Fast::OWNED];
        args.extend(counts.map(|count| Arg::from(count as i32)));
        let grid = kernels::grid((tiles, heads.kv_heads), 256);
        gpu.launch(OP, &BACKWARD, "attention_sum_splits", None, grid, &args)
    }

    fn exact(&self, exact: &Exact, kernel: Kernel) -> Result<()> {
        let Problem { gpu, heads, elem, score, .. } = self.problem;
        let (side, written, blocks) = match kernel {
            Kernel::Keys => (Side::Keys, vec![self.dk, self.dv], heads.kv_heads),
            _ => (Side::Queries, vec![self.dq], heads.heads),
        };
        let work = self.problem.work(self.segments, side, exact.owned())?;
        let mut args = self.read();
        args.extend(written.into_iter().map(Arg::from));
        args.extend(work.args());
        args.extend(self.counts());
        args.push((heads.head_dim as i32).into());
        args.extend(*score);
        let name = format!("attention_exact_{}_{}", kernel.name(), exact.units);
        let grid = exact.grid(kernel, (work.tiles.items.len(), blocks));
        gpu.launch(OP, &EXACT, &name, Some(*elem), grid, &args)
    }
}

/// Into how many parts the heads of a group are cut, whose sums take `bytes` each.
fn splits(problem: &Problem<'_>, fast: &Fast, tiles: &Tiles, bytes: usize) -> usize {
    let slots = problem.gpu.processors as usize * fast.resident / fast.parts;
    let wanted = plan::splits(tiles, problem.group(), problem.heads.kv_heads, slots);
    wanted.min(MOST_SPLITS / bytes.max(1)).max(1)
}

/// `rowsum(dO * O)`, `[heads, n_q]`.
fn delta(problem: &Problem<'_>, out: &Operand, dout: &Operand) -> Result<Scratch> {
    const THREADS: usize = 256;
    /// Threads of a product.
    const LANES: usize = 8;
    let Problem { gpu, elem, n_q, .. } = problem;
    let Heads { heads, head_dim, .. } = *problem.heads;
    let delta = gpu.scratch(heads * n_q * 4, OP)?;
    let vectors = out.vectorises(head_dim) && dout.vectorises(head_dim);
    let args = [
        out.into(),
        dout.into(),
        delta.ptr.into(),
        (*n_q as i32).into(),
        (heads as i32).into(),
        (head_dim as i32).into(),
        i32::from(vectors).into(),
    ];
    let grid = Grid::new((heads * n_q).div_ceil(THREADS / LANES), THREADS as u32);
    gpu.launch(OP, &EXACT, "attention_delta", Some(*elem), grid, &args)?;
    Ok(delta)
}
