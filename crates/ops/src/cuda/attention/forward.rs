//! The output and log-sum-exps, with this crate's kernels.

use candle_core::DType;

use super::kernels::{Kernel, Kernels};
use super::plan::{self, Plain, Side};
use super::prefix::{self, Batch};
use super::problem::{Columns, Problem};
use super::{EXACT, FORWARD, OP};
use crate::attention::{Heads, Qkv, Saved, Segment};
use crate::cuda::{Arg, Operand, empty, operand};
use crate::error::Result;

/// Where forward writes.
struct Output {
    out: Operand,
    lse: Operand,
}

/// Checked by the caller.
pub(super) fn forward(qkv: &Qkv<'_>, segments: &[Segment], heads: &Heads) -> Result<Saved> {
    let problem = Problem::new(qkv, heads)?;
    let Problem { gpu, n_q, .. } = &problem;
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
    queue(&problem, (&problem.k, &problem.v), &plain, &to)?;
    let mut rest = with_prefix.as_slice();
    while !rest.is_empty() {
        let batch = Batch::next(&mut rest, &problem)?;
        let (k, v, _room) = prefix::gather(&problem, &batch)?;
        queue(&problem, (&k, &v), &batch.segments, &to)?;
    }
    Ok(Saved { out, lse })
}

/// Queues the kernel for segments of these keys and values.
fn queue(
    problem: &Problem<'_>,
    (k, v): (&Columns, &Columns),
    segments: &[Plain],
    to: &Output,
) -> Result<()> {
    if segments.is_empty() {
        return Ok(());
    }
    let Problem { gpu, heads, elem, n_q, q, .. } = problem;
    let kernels = problem.kernels(&[*q, *k, *v], &[Kernel::Forward])?;
    let work = problem.work(segments, Side::Queries, kernels.owned())?;
    let mut args: Vec<Arg> =
        vec![q.ptr.into(), k.ptr.into(), v.ptr.into(), (&to.out).into(), (&to.lse).into()];
    args.extend(work.args());
    args.extend([q.width, k.width, v.width].map(Arg::from));
    args.extend([*n_q, heads.heads, problem.group()].map(|count| Arg::from(count as i32)));
    match kernels {
        Kernels::Fast(fast) => {
            let (grid, together) = problem.query_blocks(fast, Kernel::Forward, segments, &work);
            args.push(together.into());
            args.extend(problem.score);
            let name = problem.fast_name(Kernel::Forward);
            gpu.launch(OP, &FORWARD, &name, None, grid, &args)
        }
        Kernels::Exact(exact) => {
            args.push((heads.head_dim as i32).into());
            args.extend(problem.score);
            let name = format!("attention_exact_forward_{}", exact.units);
            let grid = exact.grid(Kernel::Forward, (work.tiles.items.len(), heads.heads));
            gpu.launch(OP, &EXACT, &name, Some(*elem), grid, &args)
        }
    }
}
