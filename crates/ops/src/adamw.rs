//! AdamW in one pass over parameter, gradient and both moments (Loshchilov and Hutter, 2019), as
//! PyTorch computes it.

use std::ops::Range;

use candle_core::{DType, Tensor};
use multiversion::multiversion;
use rayon::prelude::*;

use crate::buffer::{ensure_distinct, ensure_range, ensure_shape, no_kernel, view, write_f32};
use crate::error::{Error, Result};
use crate::reduce;

const OP: &str = "adamw";

/// Elements of one task.
const CHUNK: usize = 1 << 15;

/// The numbers of AdamW; the names are PyTorch's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate of this step.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment, after bias correction.
    pub eps: f64,
    /// Decoupled: the parameter itself shrinks by `lr * weight_decay`.
    pub weight_decay: f64,
}

/// A parameter's tensors, of one shape, for [`step_all`].
#[derive(Clone, Copy, Debug)]
pub struct Item<'a> {
    /// What the model computes with.
    pub param: &'a Tensor,
    /// Its f32 master copy, where `param` is bf16: the step is the master's, and `param` gets it
    /// rounded.
    pub master: Option<&'a Tensor>,
    /// The gradient, f32 or bf16.
    pub grad: &'a Tensor,
    /// The first moment.
    pub m: &'a Tensor,
    /// The second moment, of the first one's type.
    pub v: &'a Tensor,
    /// As [`AdamW::weight_decay`], in its stead.
    pub weight_decay: f64,
    /// The only indices of the leading dimension that move, moments included; the ranges must
    /// ascend and not overlap.
    pub rows: Option<&'a [Range<usize>]>,
}

/// One step of one parameter: [`step_all`] with `hp`'s own weight decay and no master.
///
/// # Errors
/// As [`step_all`].
#[allow(clippy::too_many_arguments, reason = "the optimizer's four tensors and its numbers")]
pub fn step(
    param: &Tensor,
    grad: &Tensor,
    m: &Tensor,
    v: &Tensor,
    hp: &AdamW,
    t: u64,
    grad_scale: f32,
    rows: Option<&[Range<usize>]>,
) -> Result<()> {
    let item = Item { param, master: None, grad, m, v, weight_decay: hp.weight_decay, rows };
    step_all(&[item], hp, t, grad_scale)
}

/// One step of all parameters, in place on `param`, `master`, `m` and `v` of each:
///
/// ```text
/// g = grad * grad_scale;  p *= 1 - lr*wd
/// m += (1-beta1)*(g - m);  v = beta2*v + (1-beta2)*g*g
/// p -= lr/(1-beta1^t) * m / (sqrt(v)/sqrt(1-beta2^t) + eps)
/// ```
///
/// `t` counts steps from 1. `grad_scale` is the factor of gradient clipping. All tensors are on one
/// device. On the CPU they are f32, without masters; on a GPU each may be f32 or bf16, and the
/// arithmetic is in f32.
///
/// # Errors
/// Shapes that differ, `t` = 0, rows out of range or not ascending, tensors that share memory, a
/// master that is not f32 or whose parameter is not bf16, or no kernel for the device or dtype.
/// Nothing is changed then.
pub fn step_all(items: &[Item<'_>], hp: &AdamW, t: u64, grad_scale: f32) -> Result<()> {
    let ranges = check_all(items, t)?;
    #[cfg(feature = "cuda")]
    if let Some(first) = items.first().filter(|item| item.param.device().is_cuda()) {
        let factors = &Factors::of(first, hp, t, grad_scale);
        let step = crate::cuda::adamw::Step { lr: hp.lr, factors };
        return crate::cuda::adamw::step_all(items, &ranges, &step, OP);
    }
    all_on_cpu(items, ranges, hp, t, grad_scale)
}

/// As [`step_all`], with gradients scaled so that their L2 norm, over all that moves, is `max_norm`
/// at most (torch's `clip_grad_norm_`); 0 is no limit. Gives the norm before. Where that is no
/// finite number nothing is changed.
///
/// A GPU does all of it without waiting for the host: this returns when the norm is known, and the
/// step may still be queued.
///
/// # Errors
/// As [`step_all`].
pub fn step_clipped(items: &[Item<'_>], hp: &AdamW, t: u64, max_norm: f64) -> Result<f64> {
    let ranges = check_all(items, t)?;
    #[cfg(feature = "cuda")]
    if let Some(first) = items.first().filter(|item| item.param.device().is_cuda()) {
        let factors = &Factors::of(first, hp, t, 1.0);
        let step = crate::cuda::adamw::Step { lr: hp.lr, factors };
        return crate::cuda::adamw::step_clipped(items, &ranges, &step, max_norm, OP);
    }
    let mut squares = 0.0;
    for (item, ranges) in items.iter().zip(&ranges) {
        let flat = item.grad.flatten_all()?;
        for range in ranges {
            squares += reduce::sum_of_squares(&flat.narrow(0, range.start, range.len())?)?;
        }
    }
    let norm = squares.sqrt();
    if norm.is_finite() {
        all_on_cpu(items, ranges, hp, t, clip_factor(norm, max_norm) as f32)?;
    }
    Ok(norm)
}

/// What brings gradients of L2 norm `norm` down to `max_norm`, unless that is 0; 1 where they are
/// below (torch's `clip_grad_norm_`, with its 1e-6 in the divisor).
pub fn clip_factor(norm: f64, max_norm: f64) -> f64 {
    if max_norm == 0.0 { 1.0 } else { (max_norm / (norm + 1e-6)).min(1.0) }
}

/// The elements that move, of each item.
fn check_all(items: &[Item<'_>], t: u64) -> Result<Vec<Vec<Range<usize>>>> {
    if t == 0 {
        return Err(Error::Invalid { op: OP, message: "steps count from 1".into() });
    }
    items.iter().map(check).collect()
}

fn all_on_cpu(
    items: &[Item<'_>],
    ranges: Vec<Vec<Range<usize>>>,
    hp: &AdamW,
    t: u64,
    grad_scale: f32,
) -> Result<()> {
    // Fail before the first write if one of them cannot be written.
    for item in items {
        if let Some(master) = item.master {
            return Err(no_kernel(master, OP));
        }
        for tensor in [item.param, item.grad, item.m, item.v] {
            view(tensor, OP)?;
        }
    }
    for (item, ranges) in items.iter().zip(ranges) {
        step_on_cpu(item, ranges, &Factors::of(item, hp, t, grad_scale))?;
    }
    Ok(())
}

fn step_on_cpu(item: &Item<'_>, ranges: Vec<Range<usize>>, factors: &Factors) -> Result<()> {
    let grad = view(item.grad, OP)?;
    write_f32(item.param, OP, |p| {
        write_f32(item.m, OP, |m| {
            write_f32(item.v, OP, |v| {
                for range in ranges {
                    p[range.clone()]
                        .par_chunks_mut(CHUNK)
                        .zip(m[range.clone()].par_chunks_mut(CHUNK))
                        .zip(v[range.clone()].par_chunks_mut(CHUNK))
                        .zip(grad[range].par_chunks(CHUNK))
                        .for_each(|(((p, m), v), g)| update(p, m, v, g, factors));
                }
            })
        })
    })??
}

/// Demands tensors that fit one another; gives the elements that move.
fn check(item: &Item<'_>) -> Result<Vec<Range<usize>>> {
    let Item { param, master, grad, m, v, .. } = *item;
    for (name, tensor) in [("grad", grad), ("m", m), ("v", v)] {
        ensure_shape(tensor, OP, name, param.dims())?;
    }
    ensure_distinct(OP, param, &[("grad", grad), ("m", m), ("v", v)])?;
    ensure_distinct(OP, m, &[("grad", grad), ("v", v)])?;
    ensure_distinct(OP, v, &[("grad", grad)])?;
    if let Some(master) = master {
        ensure_shape(master, OP, "master", param.dims())?;
        ensure_distinct(OP, master, &[("param", param), ("grad", grad), ("m", m), ("v", v)])?;
        if (param.dtype(), master.dtype()) != (DType::BF16, DType::F32) {
            let message =
                format!("a {:?} master of a {:?} parameter", master.dtype(), param.dtype());
            return Err(Error::Invalid { op: OP, message });
        }
    }
    element_ranges(param, item.rows)
}

/// The elements that move.
fn element_ranges(param: &Tensor, rows: Option<&[Range<usize>]>) -> Result<Vec<Range<usize>>> {
    let Some(rows) = rows else {
        return Ok(std::iter::once(0..param.elem_count()).collect());
    };
    let leading = param.dims().first().copied().unwrap_or(1);
    let width = param.elem_count().checked_div(leading).unwrap_or(0);
    let mut end = 0;
    for range in rows {
        ensure_range(range, leading, OP, "rows")?;
        if range.start < end {
            let message = format!("rows {range:?} begin before {end}, where others ended");
            return Err(Error::Invalid { op: OP, message });
        }
        end = range.end;
    }
    Ok(rows.iter().map(|r| r.start * width..r.end * width).collect())
}

/// What the loop multiplies with, made in f64 once a step.
pub(crate) struct Factors {
    pub(crate) grad_scale: f32,
    pub(crate) decay: f32,
    pub(crate) beta1_rest: f32,
    pub(crate) beta2: f32,
    pub(crate) beta2_rest: f32,
    pub(crate) step_size: f32,
    pub(crate) root_scale: f32,
    pub(crate) eps: f32,
}

impl Factors {
    /// With an item's own weight decay.
    fn of(item: &Item<'_>, hp: &AdamW, t: u64, grad_scale: f32) -> Self {
        Self::new(&AdamW { weight_decay: item.weight_decay, ..*hp }, t, grad_scale)
    }

    fn new(hp: &AdamW, t: u64, grad_scale: f32) -> Self {
        let correction = |beta: f64| 1.0 - beta.powf(t as f64);
        Self {
            grad_scale,
            decay: (1.0 - hp.lr * hp.weight_decay) as f32,
            beta1_rest: (1.0 - hp.beta1) as f32,
            beta2: hp.beta2 as f32,
            beta2_rest: (1.0 - hp.beta2) as f32,
            step_size: (hp.lr / correction(hp.beta1)) as f32,
            root_scale: correction(hp.beta2).sqrt().recip() as f32,
            eps: hp.eps as f32,
        }
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn update(p: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32], f: &Factors) {
    for (((p, m), v), g) in p.iter_mut().zip(m).zip(v).zip(g) {
        let g = g * f.grad_scale;
        *m += f.beta1_rest * (g - *m);
        *v = f.beta2 * *v + f.beta2_rest * g * g;
        *p = *p * f.decay - f.step_size * *m / (v.sqrt() * f.root_scale + f.eps);
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    const HP: AdamW = AdamW { lr: 0.02, beta1: 0.9, beta2: 0.95, eps: 1e-6, weight_decay: 0.1 };

    fn tensor(values: &[f32], width: usize) -> Tensor {
        Tensor::from_slice(values, (values.len() / width, width), &Device::Cpu).unwrap()
    }

    fn values(t: &Tensor) -> Vec<f32> {
        t.flatten_all().unwrap().to_vec1().unwrap()
    }

    fn wave(n: usize, phase: f32) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * 0.37 + phase).sin()).collect()
    }

    /// The textbook form in f64: bias-corrected moments first.
    fn reference(p: &mut f64, m: &mut f64, v: &mut f64, g: f64, t: i32) {
        *p *= 1.0 - HP.lr * HP.weight_decay;
        *m = HP.beta1 * *m + (1.0 - HP.beta1) * g;
        *v = HP.beta2 * *v + (1.0 - HP.beta2) * g * g;
        let (m_hat, v_hat) = (*m / (1.0 - HP.beta1.powi(t)), *v / (1.0 - HP.beta2.powi(t)));
        *p -= HP.lr * m_hat / (v_hat.sqrt() + HP.eps);
    }

    #[test]
    fn five_steps_agree_with_the_textbook() {
        let n = 3 * 37;
        let p = tensor(&wave(n, 0.0), 37);
        let (m, v) = (p.zeros_like().unwrap(), p.zeros_like().unwrap());
        let mut expected: Vec<[f64; 3]> =
            wave(n, 0.0).iter().map(|&p| [f64::from(p), 0.0, 0.0]).collect();
        for t in 1..=5 {
            let g = wave(n, t as f32);
            step(&p, &tensor(&g, 37), &m, &v, &HP, t as u64, 0.5, None).unwrap();
            for ([p, m, v], g) in expected.iter_mut().zip(g) {
                reference(p, m, v, 0.5 * f64::from(g), t);
            }
        }
        for (found, [expected, ..]) in values(&p).into_iter().zip(expected) {
            assert!((f64::from(found) - expected).abs() < 1e-6, "{found} {expected}");
        }
    }

    #[test]
    fn clipping_scales_to_the_norm_of_what_moves() {
        let n = 4 * 5;
        let g = tensor(&wave(n, 1.0), 5);
        let run = |gradients: &Tensor, limit: f64| {
            let p = tensor(&wave(n, 0.0), 5);
            let (m, v) = (p.zeros_like().unwrap(), p.zeros_like().unwrap());
            let item = Item {
                param: &p,
                master: None,
                grad: gradients,
                m: &m,
                v: &v,
                weight_decay: 0.1,
                rows: Some(&[0..1, 2..4]),
            };
            (step_clipped(&[item], &HP, 1, limit).unwrap(), values(&p), values(&m))
        };
        let squares: f64 =
            (0..n).filter(|i| i / 5 != 1).map(|i| f64::from(wave(n, 1.0)[i]).powi(2)).sum();
        let (free, _, m_free) = run(&g, 0.0);
        assert!((free - squares.sqrt()).abs() < 1e-12);
        let (clipped, _, m) = run(&g, 0.5 * squares.sqrt());
        assert_eq!(clipped, free);
        for (m, free) in m.iter().zip(m_free) {
            assert!((m - 0.5 * free).abs() < 1e-6);
        }
        let mut broken = wave(n, 1.0);
        broken[12] = f32::INFINITY;
        let (norm, p, m) = run(&tensor(&broken, 5), 1.0);
        assert!(!norm.is_finite());
        assert_eq!((p, m), (wave(n, 0.0), vec![0.0; n]));
    }

    #[test]
    fn only_the_given_rows_move() {
        let n = 6 * 5;
        let make = || (tensor(&wave(n, 0.0), 5), tensor(&wave(n, 1.0), 5));
        let ((all, g), (some, _)) = (make(), make());
        let zeros = || all.zeros_like().unwrap();
        step(&all, &g, &zeros(), &zeros(), &HP, 1, 1.0, None).unwrap();
        let (m, v) = (zeros(), zeros());
        step(&some, &g, &m, &v, &HP, 1, 1.0, Some(&[1..2, 2..2, 4..6])).unwrap();
        let (before, all, some, m) = (wave(n, 0.0), values(&all), values(&some), values(&m));
        for i in 0..n {
            let moves = [1, 4, 5].contains(&(i / 5));
            assert_eq!(some[i], if moves { all[i] } else { before[i] });
            assert_eq!(m[i] != 0.0, moves);
        }
    }

    #[test]
    fn any_number_of_threads_gives_the_same_bits() {
        let n = 3 * CHUNK + 5;
        let run = |threads| {
            let (p, g) = (tensor(&wave(n, 0.0), n), tensor(&wave(n, 1.0), n));
            let (m, v) = (p.zeros_like().unwrap(), p.zeros_like().unwrap());
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| step(&p, &g, &m, &v, &HP, 1, 1.0, None)).unwrap();
            values(&p)
        };
        assert_eq!(run(1), run(2));
        assert_eq!(run(1), run(3));
    }

    #[test]
    fn bad_arguments_change_nothing() {
        let (p, g) = (tensor(&wave(6, 0.0), 3), tensor(&wave(6, 1.0), 3));
        let (m, v) = (p.zeros_like().unwrap(), p.zeros_like().unwrap());
        let short = tensor(&wave(3, 0.0), 3);
        let half = v.to_dtype(DType::F16).unwrap();
        let overlap: &[Range<usize>] = &[0..2, 1..2];
        assert!(step(&p, &short, &m, &v, &HP, 1, 1.0, None).is_err());
        assert!(step(&p, &g, &m, &v, &HP, 0, 1.0, None).is_err());
        assert!(step(&p, &g, &m, &half, &HP, 1, 1.0, None).is_err());
        assert!(step(&p, &g, &p, &v, &HP, 1, 1.0, None).is_err());
        assert!(step(&p, &g, &m, &m, &HP, 1, 1.0, None).is_err());
        assert!(step(&p, &g, &m, &v, &HP, 1, 1.0, Some(overlap)).is_err());
        assert!(step(&p, &g, &m, &v, &HP, 1, 1.0, Some(std::slice::from_ref(&(0..3)))).is_err());
        assert_eq!(values(&p), wave(6, 0.0));
        assert_eq!(values(&m), [0.0; 6]);
    }
}
