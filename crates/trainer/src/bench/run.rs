//! The steps themselves, and the clock.

use std::time::{Duration, Instant};

use candle_core::Device;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use relufy_model::{
    Buffers, Decoder, Gradients, Init, NoTap, Objective, Params, Recompute, Tokens, Trainable,
};
use relufy_ops::device;
use relufy_spec::memory::{TrainShape, train_memory};
use relufy_spec::{DecoderSpec, ReluPlan};

use super::{Measured, Options, Parts, PeakRate, Shape, Work, step_flops};
use crate::Result;
use crate::config::Optim;
use crate::machine::{Machine, Wish, type_name};
use crate::optimizer::{Decay, Optimizer};
use crate::pieces::InPieces;

/// Trains a shape for some steps.
///
/// # Errors
/// From the model; a shape that no model can have; a device that is not there or has no room.
pub fn train_steps(options: &Options) -> Result<Measured> {
    let shape = &options.shape;
    let machine = Machine::open(&Wish {
        device: &options.device,
        dtype: options.dtype,
        gradients: options.grad_dtype,
        moments: options.moment_dtype,
        deterministic: options.deterministic,
        accumulation: 1,
        clips: options.clip > 0.0,
    })?;
    // What others in this process hold is not this benchmark's.
    let others = device::memory(&machine.device)?.map_or(0, |memory| memory.used);
    let activation = options.activation.as_deref().unwrap_or(shape.activation());
    let spec = ReluPlan::stage(options.stage).apply(&shape.spec(activation)?)?;
    let flops = step_flops(&spec, shape.tokens(), shape.seq_len);

    let params = Params::random(&spec, &Init::default(), &machine.device)?;
    let trainable = Trainable::all(&params);
    let size = (shape.batch, shape.seq_len);
    let planned = machine.shape(&spec, &params, &trainable, size, false)?;
    let recompute = machine.recompute(options.recompute, &spec, &planned, 0);
    let planned = train_memory(&spec, &TrainShape { recompute, ..planned });
    let mut bench = Bench::new(options, &machine, spec, params, &trainable, recompute)?;

    device::reset_peak(&machine.device)?;
    let (mut step_ms, mut parts, mut used) = (Vec::new(), Parts::default(), Vec::new());
    let mut last_loss = f64::NAN;
    let warmup = options.warmup.max(1);
    for step in 0..warmup + options.steps.max(1) {
        let timed = bench.step()?;
        last_loss = timed.loss;
        used.extend(
            device::memory(&machine.device)?.map(|memory| memory.used.saturating_sub(others)),
        );
        // The first steps warm caches, allocator and tables.
        if step >= warmup {
            step_ms.push(timed.milliseconds);
            parts.add(timed.parts);
        }
    }
    let profile = if options.profile { bench.profile()? } else { Vec::new() };
    let median_ms = median(&step_ms);
    let model_tflops = flops / median_ms * 1e-9;
    let name = device::model_name(&machine.device)?;
    let peak_rate = match options.peak_tflops {
        Some(tflops) => Some(PeakRate::given(tflops)),
        None => name.as_deref().and_then(PeakRate::of),
    };
    Ok(Measured {
        shape: shape.name,
        batch: shape.batch,
        seq_len: shape.seq_len,
        parameters: bench.decoder.spec().parameter_count(),
        activation: activation.to_owned(),
        stage: options.stage,
        device: name.unwrap_or_else(|| options.device.clone()),
        dtype: type_name(machine.dtype),
        grad_dtype: type_name(machine.gradients),
        moment_dtype: type_name(machine.moments),
        recompute,
        attention: attention(&machine.device)?,
        deterministic: options.deterministic,
        clip: options.clip,
        tokens_per_second: shape.tokens() as f64 / median_ms * 1e3,
        median_ms,
        parts: options.parts.then(|| parts.over(step_ms.len())),
        step_ms,
        profile,
        model_tflops,
        mfu: peak_rate.as_ref().map(|peak| model_tflops / peak.tflops),
        peak_rate,
        planned,
        planned_bytes: planned.total(),
        peak_bytes: device::memory(&machine.device)?
            .map(|memory| memory.peak.saturating_sub(others)),
        used_after_step: used,
        last_loss,
    })
}

/// Everything that a step changes or reads.
struct Bench {
    clock: Clock,
    decoder: Decoder,
    gradients: Gradients,
    optimizer: Optimizer,
    buffers: Buffers,
    learning_rate: f64,
    recompute: Recompute,
    tokens: Tokens,
    targets: Vec<i64>,
}

/// One step on the clock.
struct Timed {
    milliseconds: f64,
    parts: Parts,
    loss: f64,
}

impl Bench {
    fn new(
        options: &Options,
        machine: &Machine,
        spec: DecoderSpec,
        params: Params,
        trainable: &Trainable,
        recompute: Recompute,
    ) -> Result<Bench> {
        let (params, masters) = params.into_use(machine.dtype, |_| true)?;
        let gradients = Gradients::held(&params, trainable, machine.gradients, machine.buffers)?;
        let settings =
            Optim { learning_rate: 1e-3, max_grad_norm: options.clip, ..Optim::default() };
        let (moments, decay) = (machine.moments, Decay::Matrices);
        let optimizer = Optimizer::new(&params, trainable, &masters, &settings, decay, moments)?;
        let (tokens, targets) = random_batch(&options.shape);
        Ok(Bench {
            clock: Clock { device: machine.device.clone(), waits: options.parts },
            decoder: Decoder::new(spec, params)?,
            gradients,
            optimizer,
            buffers: machine.buffers,
            learning_rate: settings.learning_rate,
            recompute,
            tokens,
            targets,
        })
    }

    fn step(&mut self) -> Result<Timed> {
        let Bench { clock, decoder, gradients, optimizer, learning_rate, .. } = self;
        let (params, learning_rate) = (decoder.params(), *learning_rate);
        let objective = Objective {
            scale: 1.0 / self.targets.len() as f32,
            recompute: self.recompute,
            ..Objective::default()
        };
        let began = Instant::now();
        gradients.begin_step();
        let mut pieces = match self.buffers {
            Buffers::Own => None,
            Buffers::Shared => Some(InPieces::new(params, optimizer.begin(), learning_rate, None)),
        };
        // The first gradients are final when the loss is known.
        let (mut known, mut stepping) = (None, Duration::ZERO);
        let loss = decoder.forward_backward_with(
            &self.tokens,
            &self.targets,
            &objective,
            gradients,
            &mut NoTap,
            &mut |gradients, ids| {
                known.get_or_insert(clock.now()?);
                if let Some(pieces) = &mut pieces {
                    let before = clock.now()?;
                    pieces.advance(gradients, ids)?;
                    stepping += clock.now()? - before;
                }
                Ok(())
            },
        )?;
        let differentiated = clock.now()?;
        let clipped = match pieces {
            Some(pieces) => {
                pieces.step.finish()?;
                differentiated
            }
            // The norm and the step apart, for their times.
            None if clock.waits => {
                let clip = optimizer.clip_factor(gradients.global_norm()?);
                let clipped = clock.now()?;
                optimizer.step(params, gradients, learning_rate, clip)?;
                clipped
            }
            None => {
                optimizer.step_clipped(params, gradients, learning_rate)?;
                differentiated
            }
        };
        device::synchronize(&clock.device)?;
        let ended = Instant::now();

        let ms = |duration: Duration| duration.as_secs_f64() * 1e3;
        let known = known.unwrap_or(differentiated);
        let parts = Parts {
            forward: ms(known - began),
            backward: ms((differentiated - known).saturating_sub(stepping)),
            forward_backward: ms((differentiated - began).saturating_sub(stepping)),
            clip: ms(clipped - differentiated),
            adamw: ms(ended - clipped) + ms(stepping),
        };
        Ok(Timed { milliseconds: ms(ended - began), parts, loss: loss.mean() })
    }
}

impl Bench {
    /// Where the time of one more step goes.
    fn profile(&mut self) -> Result<Vec<Work>> {
        let device = self.clock.device.clone();
        let (_, spans) = device::profile(&device, || self.step())?;
        let work = |span: device::Span| Work {
            tflops: (span.flops > 0.0).then(|| span.flops / span.ms * 1e-9),
            label: span.label,
            calls: span.calls,
            ms: span.ms,
        };
        Ok(spans.into_iter().map(work).collect())
    }
}

/// The time, once the work that is queued is done, if that is wanted.
struct Clock {
    device: Device,
    waits: bool,
}

impl Clock {
    fn now(&self) -> relufy_model::Result<Instant> {
        if self.waits {
            device::synchronize(&self.device)?;
        }
        Ok(Instant::now())
    }
}

impl Parts {
    fn each(&mut self) -> [&mut f64; 5] {
        let Parts { forward, backward, forward_backward, clip, adamw } = self;
        [forward, backward, forward_backward, clip, adamw]
    }

    fn add(&mut self, mut other: Parts) {
        self.each().into_iter().zip(other.each()).for_each(|(sum, part)| *sum += *part);
    }

    fn over(mut self, count: usize) -> Parts {
        self.each().into_iter().for_each(|part| *part /= count as f64);
        self
    }
}

/// Who computed attention; `None` on the CPU, where there is one way.
fn attention(device: &Device) -> Result<Option<&'static str>> {
    if device.is_cpu() {
        return Ok(None);
    }
    Ok(match device::cudnn()? {
        Some(cudnn) if cudnn.runs > 0 => Some("cudnn"),
        _ => Some("own"),
    })
}

/// Random tokens that predict one another in rows; the last of a row predicts nothing.
pub(super) fn random_batch(shape: &Shape) -> (Tokens, Vec<i64>) {
    let mut random = ChaCha8Rng::seed_from_u64(1);
    let ids: Vec<u32> =
        (0..shape.tokens()).map(|_| random.random_range(0..shape.vocab as u32)).collect();
    let last_of_row = |at: usize| (at + 1).is_multiple_of(shape.seq_len);
    let target = |at: usize| match ids.get(at + 1) {
        Some(next) if !last_of_row(at) => i64::from(*next),
        _ => relufy_model::IGNORE,
    };
    let targets = (0..ids.len()).map(target).collect();
    (Tokens::rows(ids, shape.seq_len), targets)
}

/// The middle value, or the mean of the two in the middle.
pub(super) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() % 2 {
        0 => (sorted[middle - 1] + sorted[middle]) / 2.0,
        _ => sorted[middle],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::RecomputeChoice;

    const TINY: Shape =
        Shape { hidden: 32, layers: 2, heads: 2, ffn: 48, vocab: 64, ..Shape::SMALL };

    #[test]
    fn what_is_timed_learns() {
        let first = train_steps(&Options { steps: 1, ..Options::new(TINY) }).unwrap();
        let later = train_steps(&Options { steps: 12, ..Options::new(TINY) }).unwrap();
        assert_eq!(later.step_ms.len(), 12);
        assert!(later.last_loss < first.last_loss - 0.05);
        assert!(later.tokens_per_second > 0.0 && later.model_tflops > 0.0);
        let parts = later.parts.unwrap();
        let sum = parts.forward + parts.backward + parts.clip + parts.adamw;
        let mean = later.step_ms.iter().sum::<f64>() / 12.0;
        assert!((sum - mean).abs() < 1e-6 * mean);
        assert!((parts.forward + parts.backward - parts.forward_backward).abs() < 1e-9 * mean);
        // There is no GPU to ask.
        assert_eq!((later.attention, later.peak_bytes, later.mfu), (None, None, None));
        assert!(later.used_after_step.is_empty() && later.planned_bytes > 0);
    }

    #[test]
    fn every_family_and_stage_trains() {
        let stages = [relufy_spec::Stage::Dense, relufy_spec::Stage::One, relufy_spec::Stage::Two];
        let families = ["small", "opt125m", "falcon1b"].map(|name| Shape::named(name).unwrap());
        for (stage, family) in stages.into_iter().zip(families) {
            let shape = Shape { name: family.name, family: family.family, ..TINY };
            let options = Options {
                stage,
                steps: 1,
                parts: false,
                clip: 0.0,
                recompute: RecomputeChoice::Inputs,
                peak_tflops: Some(1.0),
                ..Options::new(shape)
            };
            let found = train_steps(&options).unwrap();
            assert_eq!((found.recompute, found.parts), (Recompute::Inputs, None));
            assert_eq!(found.mfu, Some(found.model_tflops));
            assert!(found.last_loss.is_finite(), "{}", found.shape);
        }
        let options = Options { device: "gpu".to_owned(), ..Options::new(TINY) };
        assert!(matches!(train_steps(&options), Err(crate::Error::Ops(_))));
    }

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
    }
}
