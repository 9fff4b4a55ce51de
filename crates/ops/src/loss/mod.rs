//! The head and its loss in one: `logits = h W^T`, cross-entropy and its gradient, a few rows at a
//! time.
//!
//! All logits of a batch are its largest tensor by far, so they never exist at once: a chunk of
//! rows is multiplied out, turned into its own gradient in place, and multiplied into `dh` and `dW`
//! before the next. Rows whose target is ignored are left out of the products. A teacher's logits
//! go through the same chunks (Hinton et al., 2015: `(1-w) CE + w T^2 KL(teacher || student)`).

mod rows;
mod score;
#[cfg(test)]
mod tests;

use std::ops::Range;

use candle_core::Tensor;
use rayon::prelude::*;

pub use self::score::{TokenScore, greedy_tokens, logits, score_tokens};
use crate::buffer::{
    Accum, Dest, View, dims2, ensure_distinct, ensure_range, ensure_shape, from_vec, view,
    write_f32,
};
use crate::error::{Error, Result};
use crate::gemm::{MatMut, MatRef, Threads, gemm};

const OP: &str = "cross_entropy";

/// The target of a row that takes no part in the loss.
pub const IGNORE: i64 = -100;

/// The matrix that turns hidden states into logits: `logits = cap(h W^T + b)`.
#[derive(Clone, Copy, Debug)]
pub struct Head<'a> {
    /// `[vocab, width]`.
    pub weight: &'a Tensor,
    /// `[vocab]`.
    pub bias: Option<&'a Tensor>,
    /// `cap * tanh(logit / cap)` (Gemma 2's `final_logit_softcapping`).
    pub softcap: Option<f32>,
}

/// Which gradients are wanted besides that of the hidden states.
#[derive(Clone, Debug)]
pub struct Backward<'a> {
    /// Gradients are `scale` times those of the summed loss: one over the number of target tokens
    /// gives the mean's.
    pub scale: f32,
    /// The gradient of these rows of the weight, written to the same rows of a tensor of the
    /// weight's shape.
    pub dweight: Option<(Range<usize>, Dest<'a>)>,
    /// The gradient of the bias, `[vocab]`.
    pub dbias: Option<Dest<'a>>,
}

/// The model to learn from.
#[derive(Clone, Copy, Debug)]
pub struct Teacher<'a> {
    /// Its hidden states of the same tokens, `[n, its width]`.
    pub hidden: &'a Tensor,
    /// Its head, over the same vocabulary.
    pub head: Head<'a>,
    /// Both models' logits are divided by this before the comparison.
    pub temperature: f32,
    /// From 0 (only the text) to 1 (only the teacher).
    pub weight: f32,
}

impl Teacher<'_> {
    /// The loss whose gradient is computed: `(1-w) CE + w T^2 KL`, for sums as for means.
    pub fn objective(&self, cross_entropy: f64, kl: f64) -> f64 {
        let (w, t) = (f64::from(self.weight), f64::from(self.temperature));
        (1.0 - w) * cross_entropy + w * t * t * kl
    }
}

/// The loss and the gradient of the hidden states.
#[derive(Clone, Debug)]
pub struct LossOut {
    /// Cross-entropy in nats, summed over the targets that are not [`IGNORE`].
    pub sum: f64,
    /// The number of those targets.
    pub count: usize,
    /// `KL(teacher || student)` at the temperature, summed over the same rows, without weight or
    /// `T^2`: see [`Teacher::objective`]. 0 without a teacher.
    pub kl_sum: f64,
    /// `[n, width]` if a backward was asked for; 0 in ignored rows.
    pub dh: Option<Tensor>,
}

/// A loss whose sums a GPU may still be computing.
#[must_use = "the loss is on its way"]
pub struct Queued {
    pub(crate) sums: Sums,
    /// As [`LossOut::count`].
    pub count: usize,
    /// As [`LossOut::dh`]; further work with it may be queued.
    pub dh: Option<Tensor>,
}

/// Cross-entropy and divergence.
pub(crate) enum Sums {
    Known([f64; 2]),
    #[cfg(feature = "cuda")]
    Later(crate::cuda::later::Later<2>),
}

impl Sums {
    fn wait(self) -> Result<[f64; 2]> {
        match self {
            Sums::Known(sums) => Ok(sums),
            #[cfg(feature = "cuda")]
            Sums::Later(sums) => sums.wait(OP),
        }
    }
}

impl Queued {
    /// Waits for the sums, not for what was queued after them.
    ///
    /// # Errors
    /// What the work failed with.
    pub fn wait(self) -> Result<LossOut> {
        let [sum, kl_sum] = self.sums.wait()?;
        Ok(LossOut { sum, count: self.count, kl_sum, dh: self.dh })
    }
}

/// Cross-entropy of the hidden states `h` `[n, width]` with one target a row, and its gradients.
///
/// # Errors
/// Shapes that do not fit, a target that is neither [`IGNORE`] nor below the vocabulary
/// ([`Error::TokenOutOfRange`]), a gradient destination that shares memory with an input, or no
/// kernel for the device or dtype.
pub fn cross_entropy(
    h: &Tensor,
    head: &Head<'_>,
    targets: &[i64],
    teacher: Option<&Teacher<'_>>,
    backward: Option<&Backward<'_>>,
) -> Result<LossOut> {
    queue_cross_entropy(h, head, targets, teacher, backward)?.wait()
}

/// As [`cross_entropy`], without waiting for the sums: a training step goes back through the model
/// meanwhile.
///
/// # Errors
/// As [`cross_entropy`].
pub fn queue_cross_entropy(
    h: &Tensor,
    head: &Head<'_>,
    targets: &[i64],
    teacher: Option<&Teacher<'_>>,
    backward: Option<&Backward<'_>>,
) -> Result<Queued> {
    let active = active_rows(h, head, targets)?;
    check_head(h, head)?;
    if let Some(teacher) = teacher {
        check_teacher(teacher, h, head)?;
    }
    if let Some(backward) = backward {
        check_backward(backward, h, head, teacher)?;
    }
    #[cfg(feature = "cuda")]
    if h.device().is_cuda() {
        return crate::cuda::loss::cross_entropy(h, head, targets, &active, teacher, backward);
    }
    let student = Source::new(h, head)?;
    let teaching = teacher.map(Teaching::new).transpose()?;
    let dweight = backward.and_then(|b| b.dweight.as_ref());
    let dbias = backward.and_then(|b| b.dbias);
    let n = targets.len();
    let mut dh = backward.map(|_| vec![0.0; n * student.width]);
    let (sum, kl_sum) = with_dest(dweight.map(|(_, (t, _))| *t), |dw| {
        with_dest(dbias.map(|(t, _)| t), |db| {
            let grads = backward.map(|b| Grads {
                scale: b.scale,
                dh: dh.as_deref_mut().unwrap_or_default(),
                dw: dw.zip(dweight.map(|(rows, (_, accum))| (rows.clone(), *accum))),
                db: db.zip(dbias.map(|(_, accum)| accum)),
            });
            run(&student, teaching.as_ref(), targets, &active, grads)
        })
    })???;
    let dh = dh.map(|dh| from_vec(dh, (n, student.width), h.device())).transpose()?;
    Ok(Queued { sums: Sums::Known([sum, kl_sum]), count: active.len(), dh })
}

/// The whole gradient of the weight, the rows of it to write, and how.
type WeightGrad<'a> = (&'a mut [f32], (Range<usize>, Accum));

/// Where the gradients of a run go.
struct Grads<'a> {
    scale: f32,
    dh: &'a mut [f32],
    dw: Option<WeightGrad<'a>>,
    db: Option<(&'a mut [f32], Accum)>,
}

/// The teacher's part of a run.
struct Teaching<'a> {
    source: Source<'a>,
    temperature: f32,
    weight: f32,
}

impl<'a> Teaching<'a> {
    fn new(teacher: &Teacher<'a>) -> Result<Self> {
        let Teacher { temperature, weight, .. } = *teacher;
        Ok(Teaching { source: Source::new(teacher.hidden, &teacher.head)?, temperature, weight })
    }
}

fn run(
    student: &Source<'_>,
    teaching: Option<&Teaching<'_>>,
    targets: &[i64],
    active: &[usize],
    mut grads: Option<Grads<'_>>,
) -> Result<(f64, f64)> {
    let (vocab, width) = (student.vocab, student.width);
    if let Some(grads) = &mut grads {
        grads.begin(width, active.is_empty());
    }
    let chunk_rows = chunk_rows(vocab).min(active.len().max(1));
    let mut logits = vec![0.0; chunk_rows * vocab];
    let mut taught = vec![0.0; if teaching.is_some() { chunk_rows * vocab } else { 0 }];
    let (mut sum, mut kl_sum) = (0.0, 0.0);
    for active in active.chunks(chunk_rows) {
        let logits = &mut logits[..active.len() * vocab];
        let h = Rows::gather(&student.hidden, width, active);
        student.multiply(&h, active.len(), logits)?;
        if let Some(teaching) = teaching {
            let h = Rows::gather(&teaching.source.hidden, teaching.source.width, active);
            let taught = &mut taught[..active.len() * vocab];
            teaching.source.multiply(&h, active.len(), taught)?;
            let by = teaching.source.adjust();
            taught.par_chunks_mut(vocab).for_each(|row| rows::adjust_row(row, by));
        }
        let losses: Vec<(f64, f64)> = logits
            .par_chunks_mut(vocab)
            .zip(active)
            .enumerate()
            .map(|(i, (logits, &row))| {
                let of_teacher = teaching.map(|teaching| rows::Lesson {
                    logits: &taught[i * vocab..(i + 1) * vocab],
                    temperature: teaching.temperature,
                    weight: teaching.weight,
                });
                let scale = grads.as_ref().map(|grads| grads.scale);
                // `active_rows` has checked that targets are in range.
                let target = targets[row] as usize;
                rows::loss(logits, student.adjust(), target, of_teacher.as_ref(), scale)
            })
            .collect();
        for (loss, kl) in losses {
            sum += loss;
            kl_sum += kl;
        }
        if let Some(grads) = &mut grads {
            grads.add_chunk(student, active, &h, logits)?;
        }
    }
    Ok((sum, kl_sum))
}

impl Grads<'_> {
    /// Prepares what is to be overwritten. The first chunk's product overwrites `dW`, unless there
    /// is none.
    fn begin(&mut self, width: usize, no_chunk: bool) {
        if let Some((dw, (rows, Accum::Overwrite))) = &mut self.dw
            && no_chunk
        {
            dw[rows.start * width..rows.end * width].fill(0.0);
        }
        if let Some((db, Accum::Overwrite)) = &mut self.db {
            db.fill(0.0);
        }
    }

    /// `dh = dlogits W`, `dW += dlogits^T h`, `db += column sums of dlogits`.
    fn add_chunk(
        &mut self,
        student: &Source<'_>,
        active: &[usize],
        h: &Rows<'_>,
        dlogits: &[f32],
    ) -> Result<()> {
        let (vocab, width, n) = (student.vocab, student.width, active.len());
        let d = MatRef::new(dlogits, n, vocab)?;
        let weight = MatRef::new(&student.weight, vocab, width)?;
        match h {
            Rows::Run(start, _) => {
                let dh = &mut self.dh[start * width..(start + n) * width];
                gemm(1.0, d, weight, MatMut::new(dh, n, width, Accum::Overwrite)?, Threads::All)?;
            }
            Rows::Copied(_) => {
                let mut dh = vec![0.0; n * width];
                let dst = MatMut::new(&mut dh, n, width, Accum::Overwrite)?;
                gemm(1.0, d, weight, dst, Threads::All)?;
                for (row, dh) in active.iter().zip(dh.chunks_exact(width.max(1))) {
                    self.dh[row * width..(row + 1) * width].copy_from_slice(dh);
                }
            }
        }
        if let Some((dw, (rows, accum))) = &mut self.dw
            && rows.start < rows.end
        {
            let d = MatRef::with_stride(&dlogits[rows.start..], n, rows.len(), vocab)?;
            let dw = &mut dw[rows.start * width..rows.end * width];
            let accum = std::mem::replace(accum, Accum::Add);
            let dst = MatMut::new(dw, rows.len(), width, accum)?;
            gemm(1.0, d.t(), MatRef::new(h.data(), n, width)?, dst, Threads::All)?;
        }
        if let Some((db, _)) = &mut self.db {
            db.par_chunks_mut(1024).enumerate().for_each(|(i, db)| {
                rows::add_columns(db, dlogits, vocab, i * 1024);
            });
        }
        Ok(())
    }
}

/// Hidden states and the head that reads them, as slices.
struct Source<'a> {
    hidden: View<'a>,
    weight: View<'a>,
    bias: Option<View<'a>>,
    softcap: Option<f32>,
    vocab: usize,
    width: usize,
}

impl<'a> Source<'a> {
    fn new(hidden: &'a Tensor, head: &Head<'a>) -> Result<Self> {
        let (vocab, width) = check_head(hidden, head)?;
        Ok(Self {
            hidden: view(hidden, OP)?,
            weight: view(head.weight, OP)?,
            bias: head.bias.map(|bias| view(bias, OP)).transpose()?,
            softcap: head.softcap,
            vocab,
            width,
        })
    }

    /// `h W^T` for `n` rows, without bias and cap.
    fn multiply(&self, h: &Rows<'_>, n: usize, logits: &mut [f32]) -> Result<()> {
        let h = MatRef::new(h.data(), n, self.width)?;
        let weight = MatRef::new(&self.weight, self.vocab, self.width)?;
        let dst = MatMut::new(logits, n, self.vocab, Accum::Overwrite)?;
        gemm(1.0, h, weight.t(), dst, Threads::All)
    }

    fn adjust(&self) -> rows::Adjust<'_> {
        rows::Adjust { bias: self.bias.as_deref(), softcap: self.softcap }
    }
}

/// The hidden states of a chunk, one after the other.
enum Rows<'a> {
    /// They lie together, from this row on.
    Run(usize, &'a [f32]),
    /// They were copied together.
    Copied(Vec<f32>),
}

impl<'a> Rows<'a> {
    fn gather(hidden: &'a [f32], width: usize, rows: &[usize]) -> Self {
        match rows {
            [first, .., last] if last - first + 1 == rows.len() => {
                Self::Run(*first, &hidden[first * width..(last + 1) * width])
            }
            _ => {
                let row = |&r: &usize| &hidden[r * width..(r + 1) * width];
                Self::Copied(rows.iter().flat_map(row).copied().collect())
            }
        }
    }

    fn data(&self) -> &[f32] {
        match self {
            Self::Run(_, data) => data,
            Self::Copied(data) => data,
        }
    }
}

/// Rows of a chunk: a function of the vocabulary alone, so that sums have one order. About 8 MiB of
/// logits, but never so few rows that the products starve.
pub fn chunk_rows(vocab: usize) -> usize {
    ((2 << 20) / vocab.max(1)).clamp(128, 512)
}

/// Rows of a chunk on a GPU, where products want many: all of `rows`, unless their logits would
/// take more than 1 GiB.
pub fn device_chunk_rows(vocab: usize, element_bytes: usize, rows: usize) -> usize {
    let most = (1 << 30) / (vocab.next_multiple_of(8) * element_bytes).max(1);
    most.max(128).min(rows).max(1)
}

/// The rows that have a target.
fn active_rows(h: &Tensor, head: &Head<'_>, targets: &[i64]) -> Result<Vec<usize>> {
    let (n, width) = dims2(h, OP, "h")?;
    let (vocab, _) = dims2(head.weight, OP, "weight")?;
    if targets.len() != n {
        return Err(Error::Shape {
            op: OP,
            tensor: "targets",
            expected: vec![n],
            found: vec![targets.len()],
        });
    }
    if width == 0 || vocab == 0 {
        let message = format!("a head of {vocab} tokens over {width} columns");
        return Err(Error::Invalid { op: OP, message });
    }
    let mut active = Vec::with_capacity(n);
    for (index, &id) in targets.iter().enumerate().filter(|(_, id)| **id != IGNORE) {
        if usize::try_from(id).is_ok_and(|id| id < vocab) {
            active.push(index);
        } else {
            return Err(Error::TokenOutOfRange { op: OP, index, id, rows: vocab });
        }
    }
    Ok(active)
}

/// The head's vocabulary and width, which must be that of the hidden states.
fn check_head(hidden: &Tensor, head: &Head<'_>) -> Result<(usize, usize)> {
    let (_, width) = dims2(hidden, OP, "h")?;
    let (vocab, head_width) = dims2(head.weight, OP, "weight")?;
    if head_width != width {
        ensure_shape(head.weight, OP, "weight", &[vocab, width])?;
    }
    if let Some(bias) = head.bias {
        ensure_shape(bias, OP, "bias", &[vocab])?;
    }
    if head.softcap.is_some_and(|cap| cap.is_nan() || cap <= 0.0) {
        return Err(Error::Invalid { op: OP, message: "the soft cap must be positive".into() });
    }
    Ok((vocab, width))
}

fn check_teacher(teacher: &Teacher<'_>, h: &Tensor, head: &Head<'_>) -> Result<()> {
    let Teacher { temperature, weight, .. } = *teacher;
    let (vocab, _) = check_head(h, head)?;
    let (_, width) = check_head(teacher.hidden, &teacher.head)?;
    ensure_shape(teacher.hidden, OP, "teacher.hidden", &[h.dims()[0], width])?;
    ensure_shape(teacher.head.weight, OP, "teacher.head.weight", &[vocab, width])?;
    if !(temperature > 0.0 && temperature.is_finite() && (0.0..=1.0).contains(&weight)) {
        let message = format!("a teacher's temperature {temperature} and weight {weight}");
        return Err(Error::Invalid { op: OP, message });
    }
    Ok(())
}

/// Shapes and memory of the gradient destinations.
fn check_backward(
    backward: &Backward<'_>,
    h: &Tensor,
    head: &Head<'_>,
    teacher: Option<&Teacher<'_>>,
) -> Result<()> {
    let mut inputs = vec![("h", h), ("weight", head.weight)];
    inputs.extend(head.bias.map(|bias| ("bias", bias)));
    if let Some(teacher) = teacher {
        inputs
            .extend([("teacher.hidden", teacher.hidden), ("teacher.weight", teacher.head.weight)]);
        inputs.extend(teacher.head.bias.map(|bias| ("teacher.bias", bias)));
    }
    let (vocab, _) = dims2(head.weight, OP, "weight")?;
    if let Some((rows, (dweight, _))) = &backward.dweight {
        ensure_shape(dweight, OP, "dweight", head.weight.dims())?;
        ensure_range(rows, vocab, OP, "rows")?;
        ensure_distinct(OP, dweight, &inputs)?;
        inputs.push(("dweight", dweight));
    }
    if let Some((dbias, _)) = backward.dbias {
        ensure_shape(dbias, OP, "dbias", &[vocab])?;
        ensure_distinct(OP, dbias, &inputs)?;
    }
    Ok(())
}

fn with_dest<R>(dest: Option<&Tensor>, f: impl FnOnce(Option<&mut [f32]>) -> R) -> Result<R> {
    match dest {
        Some(t) => write_f32(t, OP, |data| f(Some(data))),
        None => Ok(f(None)),
    }
}
