//! The head with its loss, chunk after chunk of rows: product, loss and gradient in place, products
//! back. What a chunk holds is bounded by [`crate::loss::device_chunk_rows`].

use std::sync::Arc;

use candle_core::{DType, Tensor};

use super::gemm::{Mat, gemm};
use super::later::Later;
use super::linear::column_sums;
use super::{Arg, Elem, Gpu, Grid, Module, Operand, Scratch, empty, module, operand};
use crate::buffer::Accum;
use crate::error::Result;
use crate::loss::{Backward, Head, Queued, Sums, Teacher, TokenScore, device_chunk_rows};
use crate::{reduce, rows};

const OP: &str = "cross_entropy";

static MODULE: Module = module!("loss");

/// Threads of the block that works on a row.
const THREADS: u32 = 1024;

/// Hidden states and the head that reads them, on the GPU.
struct Source {
    hidden: Operand,
    weight: Operand,
    bias: Option<Operand>,
    softcap: f32,
    vocab: usize,
    width: usize,
}

impl Source {
    fn new(hidden: &Tensor, head: &Head<'_>) -> Result<Source> {
        let (vocab, width) = head.weight.dims2()?;
        let at = operand(hidden, OP)?;
        Ok(Source {
            hidden: at,
            weight: operand(head.weight, OP)?.like(&at, head.weight, OP)?,
            bias: head.bias.map(|bias| operand(bias, OP)?.like(&at, bias, OP)).transpose()?,
            softcap: head.softcap.unwrap_or(0.0),
            vocab,
            width,
        })
    }

    fn elem(&self) -> Elem {
        self.hidden.elem
    }

    /// The products of rows `first..first+n` with the head, rows `stride` apart, f32 or as the
    /// hidden states.
    fn multiply(
        &self,
        gpu: &Gpu,
        (first, n): (usize, usize),
        products: &Operand,
        stride: usize,
    ) -> Result<()> {
        let h = Mat::at(&self.hidden, first * self.width, n, self.width, self.width);
        let weight = Mat::new(&self.weight, self.vocab, self.width);
        let products = Mat::at(products, 0, n, self.vocab, stride);
        gemm(gpu, OP, 1.0, h, weight.t(), products, Accum::Overwrite)
    }

    fn bias_ptr(&self) -> u64 {
        self.bias.map_or(0, |bias| bias.ptr)
    }
}

/// Elements between rows of products: whole vectors.
fn stride_of(vocab: usize) -> usize {
    vocab.next_multiple_of(8)
}

/// How the losses of rows are computed, with one read of each row: the kernel, and how many rows
/// have room in a block's shared memory. `None` where not even one has.
fn once(gpu: &Gpu, student: &Source) -> Result<Option<(&'static str, usize)>> {
    /// Vectors of a row that a block of [`THREADS`] keeps in registers, as in `cu/loss.cu`.
    const REGISTERS: usize = THREADS as usize * 32;
    // The kernels know neither bias nor cap.
    if student.bias.is_some() || student.softcap > 0.0 {
        return Ok(None);
    }
    // What the kernel has besides is below 1 KiB.
    let slots = gpu.shared_memory(OP)?.saturating_sub(1 << 10) / row_bytes(student);
    let name = match student.vocab <= REGISTERS {
        true => "cross_entropy_once",
        false => "cross_entropy_long",
    };
    Ok((slots > 0).then_some((name, slots.min(2))))
}

/// Bytes of a row's vectors.
fn row_bytes(source: &Source) -> usize {
    source.vocab.next_multiple_of(source.elem().per_vector()) * source.elem().bytes()
}

/// [`crate::loss::cross_entropy`] on the GPU; arguments are checked, `active` are the rows with a
/// target.
pub(crate) fn cross_entropy(
    h: &Tensor,
    head: &Head<'_>,
    targets: &[i64],
    active: &[usize],
    teacher: Option<&Teacher<'_>>,
    backward: Option<&Backward<'_>>,
) -> Result<Queued> {
    let n = targets.len();
    // Few of the rows have a target: the others' products would be for nothing.
    if active.len() * 8 < n * 7 {
        return over_active_rows(h, head, targets, active, teacher, backward);
    }
    let gpu = Gpu::of(h)?;
    let student = Source::new(h, head)?;
    let taught = match teacher {
        Some(teacher) => Some((Source::new(teacher.hidden, &teacher.head)?, teacher)),
        None => None,
    };
    let (vocab, width, elem) = (student.vocab, student.width, student.elem());
    let stride = stride_of(vocab);
    let chunk_rows = device_chunk_rows(vocab, elem.bytes(), n);
    let products = gpu.scratch(chunk_rows * stride * elem.bytes(), OP)?;
    let of_teacher = match &taught {
        Some(_) => Some(gpu.scratch(chunk_rows * stride * elem.bytes(), OP)?),
        None => None,
    };
    let losses = gpu.scratch(2 * n * size_of::<f32>(), OP)?;
    let ids: Vec<i32> = targets.iter().map(|id| *id as i32).collect();
    let ids = gpu.upload(&ids, OP)?;
    let once = if teacher.is_none() { once(&gpu, &student)? } else { None };
    let dh = backward.map(|_| empty((n, width), h.dtype(), h.device(), OP)).transpose()?;

    let mut first = 0;
    while first < n {
        let len = chunk_rows.min(n - first);
        let logits = Operand { ptr: products.ptr, elem, len: len * stride };
        student.multiply(&gpu, (first, len), &logits, stride)?;
        let scale = backward.map_or(0.0, |backward| backward.scale);
        let of_row = |base: u64, row: usize| base + (row * size_of::<f32>()) as u64;
        let mut args: Vec<Arg> = vec![
            (&logits).into(),
            stride.into(),
            (vocab as i32).into(),
            student.bias_ptr().into(),
            student.softcap.into(),
        ];
        let rest: [Arg; 3] =
            [of_row(ids.ptr, first).into(), scale.into(), i32::from(backward.is_some()).into()];
        let grid = Grid::new(len, THREADS);
        match (&taught, &of_teacher) {
            (Some((source, teacher)), Some(room)) => {
                let taught = Operand { ptr: room.ptr, elem: source.elem(), len: len * stride };
                source.multiply(&gpu, (first, len), &taught, stride)?;
                args.extend([
                    (&taught).into(),
                    source.bias_ptr().into(),
                    Arg::from(source.softcap),
                ]);
                args.extend(rest);
                args.extend([
                    teacher.temperature.into(),
                    teacher.weight.into(),
                    of_row(losses.ptr, first).into(),
                    Arg::from(of_row(losses.ptr, n + first)),
                ]);
                gpu.launch(OP, &MODULE, "distil", Some(elem), grid, &args)?;
            }
            _ => match once {
                Some((kernel, slots)) => {
                    let [ids, scale, gradient] = rest;
                    let args = [
                        (&logits).into(),
                        len.into(),
                        stride.into(),
                        (vocab as i32).into(),
                        ids,
                        scale,
                        gradient,
                        (slots as i32).into(),
                        of_row(losses.ptr, first).into(),
                    ];
                    // A block goes from row to row, and has its multiprocessor for itself.
                    let grid = Grid::new(len.min(gpu.processors as usize), THREADS)
                        .shared(slots * row_bytes(&student));
                    gpu.launch(OP, &MODULE, kernel, Some(elem), grid, &args)?;
                }
                None => {
                    args.extend(rest);
                    args.push(of_row(losses.ptr, first).into());
                    gpu.launch(OP, &MODULE, "cross_entropy", Some(elem), grid, &args)?;
                }
            },
        }
        if let (Some(backward), Some(dh)) = (backward, &dh) {
            let chunk = Chunk { first, len, stride, dlogits: logits };
            chunk.products_back(&gpu, &student, dh, backward)?;
        }
        first += len;
    }
    if n == 0
        && let Some(backward) = backward
    {
        nothing_back(backward)?;
    }
    // Of the losses, and of what a teacher adds.
    let kinds = if teacher.is_some() { 2 } else { 1 };
    let sums = gpu.scratch(2 * size_of::<f64>(), OP)?;
    gpu.zero(sums.ptr, 2 * size_of::<f64>(), OP)?;
    let args = [losses.ptr.into(), n.into(), sums.ptr.into()];
    gpu.launch(OP, &MODULE, "sum_losses", None, Grid::new(kinds, 1024), &args)?;
    let sums = Later::queue(gpu, sums.ptr, OP)?;
    Ok(Queued { sums: Sums::Later(sums), count: active.len(), dh })
}

/// Rows of logits that were turned into their gradient.
struct Chunk {
    first: usize,
    len: usize,
    stride: usize,
    dlogits: Operand,
}

impl Chunk {
    /// `dh = dlogits W`, `dW (+)= dlogits^T h`, `db (+)=` the column sums.
    fn products_back(
        &self,
        gpu: &Gpu,
        student: &Source,
        dh: &Tensor,
        backward: &Backward<'_>,
    ) -> Result<()> {
        let (vocab, width) = (student.vocab, student.width);
        let d = |columns: std::ops::Range<usize>| {
            Mat::at(&self.dlogits, columns.start, self.len, columns.len(), self.stride)
        };
        let weight = Mat::new(&student.weight, vocab, width);
        let dh = Mat::at(&operand(dh, OP)?, self.first * width, self.len, width, width);
        gemm(gpu, OP, 1.0, d(0..vocab), weight, dh, Accum::Overwrite)?;
        // The first chunk overwrites, if that was asked for; the others add.
        let accum = |wanted| if self.first == 0 { wanted } else { Accum::Add };
        if let Some((rows, (dw, wanted))) = &backward.dweight
            && !rows.is_empty()
        {
            let to = operand(dw, OP)?;
            let to = Mat::at(&to, rows.start * width, rows.len(), width, width);
            let h = Mat::at(&student.hidden, self.first * width, self.len, width, width);
            gemm(gpu, OP, 1.0, d(rows.clone()).t(), h, to, accum(*wanted))?;
        }
        if let Some((db, wanted)) = backward.dbias {
            let to = (&operand(db, OP)?, accum(wanted));
            column_sums(gpu, &self.dlogits, (self.len, self.stride), 0..vocab, to, OP)?;
        }
        Ok(())
    }
}

/// Gradients of no row: what is to be overwritten becomes 0.
fn nothing_back(backward: &Backward<'_>) -> Result<()> {
    if let Some((rows, (dw, Accum::Overwrite))) = &backward.dweight {
        reduce::fill(&dw.narrow(0, rows.start, rows.len())?, 0.0)?;
    }
    if let Some((db, Accum::Overwrite)) = backward.dbias {
        reduce::fill(db, 0.0)?;
    }
    Ok(())
}

/// The same over a copy of the rows that have a target.
fn over_active_rows(
    h: &Tensor,
    head: &Head<'_>,
    targets: &[i64],
    active: &[usize],
    teacher: Option<&Teacher<'_>>,
    backward: Option<&Backward<'_>>,
) -> Result<Queued> {
    let some = rows::gather(h, active)?;
    let some_targets: Vec<i64> = active.iter().map(|row| targets[*row]).collect();
    let all: Vec<usize> = (0..active.len()).collect();
    let hidden = teacher.map(|teacher| rows::gather(teacher.hidden, active)).transpose()?;
    let teacher = match (teacher, &hidden) {
        (Some(teacher), Some(hidden)) => Some(Teacher { hidden, ..*teacher }),
        _ => None,
    };
    let out = cross_entropy(&some, head, &some_targets, &all, teacher.as_ref(), backward)?;
    let dh = match out.dh {
        None => None,
        Some(some) => {
            let dh = h.zeros_like()?;
            rows::scatter(&some, 0..h.dim(1)?, &dh, active)?;
            Some(dh)
        }
    };
    Ok(Queued { dh, ..out })
}

/// What [`summarise`] finds in a row.
struct Summary {
    lse: f32,
    /// -1 where a logit is NaN.
    largest: i32,
}

/// f32 products of rows of hidden states with the head, a chunk at a time: `then` is called with
/// the chunk's first row, the products and the summaries of its rows.
fn over_products(
    gpu: &Gpu,
    source: &Source,
    n: usize,
    mut then: impl FnMut(usize, &Operand, usize, Vec<Summary>) -> Result<()>,
) -> Result<()> {
    let (vocab, stride) = (source.vocab, stride_of(source.vocab));
    let chunk_rows = device_chunk_rows(vocab, size_of::<f32>(), n);
    let products = gpu.scratch(chunk_rows * stride * size_of::<f32>(), OP)?;
    let found: Scratch = gpu.scratch(2 * chunk_rows * size_of::<f32>(), OP)?;
    let mut first = 0;
    while first < n {
        let len = chunk_rows.min(n - first);
        let logits = Operand { ptr: products.ptr, elem: Elem::F32, len: len * stride };
        source.multiply(gpu, (first, len), &logits, stride)?;
        let largest = found.ptr + (chunk_rows * size_of::<f32>()) as u64;
        let args = [
            (&logits).into(),
            stride.into(),
            (vocab as i32).into(),
            source.bias_ptr().into(),
            source.softcap.into(),
            found.ptr.into(),
            largest.into(),
        ];
        let grid = Grid::new(len, THREADS);
        gpu.launch(OP, &MODULE, "summarise", Some(source.elem()), grid, &args)?;
        let lses: Vec<f32> = gpu.download(found.ptr, len, OP)?;
        let largest: Vec<i32> = gpu.download(largest, len, OP)?;
        let summaries =
            lses.into_iter().zip(largest).map(|(lse, largest)| Summary { lse, largest }).collect();
        then(first, &logits, stride, summaries)?;
        first += len;
    }
    Ok(())
}

/// [`crate::loss::score_tokens`] on the GPU; `wanted` is checked. Products are f32 also where the
/// hidden states are bf16.
pub(crate) fn score_tokens(
    h: &Tensor,
    head: &Head<'_>,
    wanted: &[(u32, u32)],
) -> Result<Vec<TokenScore>> {
    let gpu = Gpu::of(h)?;
    // The rows that are named, once each, and where what is wanted of them stands.
    let mut order: Vec<usize> = (0..wanted.len()).collect();
    order.sort_by_key(|&index| wanted[index].0);
    let mut named: Vec<usize> = Vec::new();
    let mut row_of = Vec::with_capacity(wanted.len());
    for &index in &order {
        let row = wanted[index].0 as usize;
        if named.last() != Some(&row) {
            named.push(row);
        }
        row_of.push(named.len() - 1);
    }
    let some = if named.len() == h.dim(0)? { h.clone() } else { rows::gather(h, &named)? };
    let source = Source::new(&some, head)?;
    let mut scores = vec![TokenScore { logprob: 0.0, greedy: false }; wanted.len()];
    let mut next = 0;
    over_products(&gpu, &source, named.len(), |first, logits, stride, summaries| {
        let until = next + row_of[next..].partition_point(|row| *row < first + summaries.len());
        let here = next..until;
        let local: Vec<i32> = row_of[here.clone()].iter().map(|row| (row - first) as i32).collect();
        let tokens: Vec<i32> =
            order[here.clone()].iter().map(|&index| wanted[index].1 as i32).collect();
        let (rows_at, tokens_at): (Arc<Scratch>, Arc<Scratch>) =
            (gpu.upload(&local, OP)?, gpu.upload(&tokens, OP)?);
        let picked = gpu.scratch(local.len() * size_of::<f32>(), OP)?;
        let args = [
            logits.into(),
            stride.into(),
            source.bias_ptr().into(),
            source.softcap.into(),
            rows_at.ptr.into(),
            tokens_at.ptr.into(),
            (local.len() as i32).into(),
            picked.ptr.into(),
        ];
        let grid = Grid::over(local.len(), 128);
        gpu.launch(OP, &MODULE, "pick", Some(source.elem()), grid, &args)?;
        let picked: Vec<f32> = gpu.download(picked.ptr, local.len(), OP)?;
        for (k, at) in here.enumerate() {
            let summary = &summaries[local[k] as usize];
            scores[order[at]] = TokenScore {
                logprob: picked[k] - summary.lse,
                greedy: summary.largest == tokens[k],
            };
        }
        next = until;
        Ok(())
    })?;
    Ok(scores)
}

/// [`crate::loss::greedy_tokens`] on the GPU.
pub(crate) fn greedy_tokens(h: &Tensor, head: &Head<'_>) -> Result<Vec<Option<u32>>> {
    let (gpu, source) = (Gpu::of(h)?, Source::new(h, head)?);
    let mut tokens = Vec::with_capacity(h.dim(0)?);
    over_products(&gpu, &source, h.dim(0)?, |_, _, _, summaries| {
        tokens.extend(summaries.into_iter().map(|row| u32::try_from(row.largest).ok()));
        Ok(())
    })?;
    Ok(tokens)
}

/// [`crate::loss::logits`] on the GPU: f32.
pub(crate) fn logits(h: &Tensor, head: &Head<'_>) -> Result<Tensor> {
    let (gpu, source) = (Gpu::of(h)?, Source::new(h, head)?);
    let n = h.dim(0)?;
    let logits = empty((n, source.vocab), DType::F32, h.device(), OP)?;
    let at = operand(&logits, OP)?;
    source.multiply(&gpu, (0, n), &at, source.vocab)?;
    let args = [
        (&at).into(),
        n.into(),
        (source.vocab as i32).into(),
        source.bias_ptr().into(),
        source.softcap.into(),
    ];
    if source.bias.is_some() || source.softcap > 0.0 {
        let grid = Grid::new(at.len.div_ceil(1024).min(4096), 256);
        gpu.launch(OP, &MODULE, "adjust_all", Some(source.elem()), grid, &args)?;
    }
    Ok(logits)
}
