//! What a run computes on and in: the device, the number types, and the memory that this takes.

use candle_core::{DType, Device};
use relufy_model::{Buffers, Gradients, Params, Precision, Recompute, Trainable};
use relufy_ops::device;
use relufy_spec::memory::{AttentionScratch, TrainShape, least_recompute};
use relufy_spec::{DecoderSpec, Position};

use crate::Result;
use crate::config::{RecomputeChoice, Train};

/// Part of a GPU's free memory that a run may plan with: the driver, libraries and what the pool
/// cannot join take the rest.
const PLANNED_PART: f64 = 0.96;

/// A device, and what to hold on it in which number types.
#[derive(Clone, Debug)]
pub(crate) struct Machine {
    pub device: Device,
    /// Weights in use and activations.
    pub dtype: DType,
    /// Gradients.
    pub gradients: DType,
    /// Adam's moments.
    pub moments: DType,
    /// Whether each gradient is used as soon as it is final, and its buffer again.
    pub buffers: Buffers,
    /// Bytes that were free when the device was opened; `None` on the CPU.
    pub free: Option<u64>,
}

/// What a machine is asked to be.
#[derive(Clone, Debug)]
pub(crate) struct Wish<'a> {
    pub device: &'a str,
    pub dtype: Precision,
    pub gradients: Precision,
    pub moments: Precision,
    pub deterministic: bool,
    /// Forward passes of one optimizer step.
    pub accumulation: usize,
    /// Whether no gradient may be used before all are known.
    pub clips: bool,
}

impl<'a> Wish<'a> {
    pub fn of(train: &'a Train, max_grad_norm: f64) -> Wish<'a> {
        Wish {
            device: &train.device,
            dtype: train.dtype,
            gradients: train.grad_dtype,
            moments: train.moment_dtype,
            deterministic: train.deterministic,
            accumulation: train.gradient_accumulation_steps,
            clips: max_grad_norm > 0.0,
        }
    }
}

impl Machine {
    /// Opens the device.
    ///
    /// # Errors
    /// A device that is not there; types that it does not compute in.
    pub fn open(wish: &Wish<'_>) -> Result<Machine> {
        let device = device::open(wish.device)?;
        device::set_deterministic(wish.deterministic);
        let dtype = wish.dtype.on(&device)?;
        let accumulates = wish.accumulation > 1;
        let gradients = match wish.gradients {
            Precision::Auto if accumulates => DType::F32,
            Precision::Auto => dtype,
            other => other.on(&device)?,
        };
        if dtype == DType::F32 && gradients == DType::BF16 {
            let why = "gradients in bf16 need weights in bf16".to_owned();
            return Err(relufy_model::Error::Invalid(why).into());
        }
        let moments = match wish.moments {
            Precision::Auto => DType::F32,
            other => other.on(&device)?,
        };
        let eager = !device.is_cpu() && !wish.clips && !accumulates;
        let buffers = if eager { Buffers::Shared } else { Buffers::Own };
        let free = device::memory(&device)?.map(|memory| memory.free);
        Ok(Machine { device, dtype, gradients, moments, buffers, free })
    }

    /// What a step is asked to do, as far as its memory goes; nothing is computed again.
    ///
    /// # Errors
    /// A library that is to be used and is not there.
    pub fn shape(
        &self,
        spec: &DecoderSpec,
        params: &Params,
        trainable: &Trainable,
        (batch, seq_len): (usize, usize),
        teacher: bool,
    ) -> Result<TrainShape> {
        let (tokens, element_bytes) = (batch * seq_len, self.dtype.size_in_bytes());
        let logits_rows = match self.device {
            Device::Cpu => relufy_ops::loss::chunk_rows(spec.vocab),
            _ => relufy_ops::loss::device_chunk_rows(spec.vocab, element_bytes, tokens),
        };
        Ok(TrainShape {
            batch,
            seq_len,
            element_bytes,
            gradient_bytes: self.gradients.size_in_bytes(),
            moment_bytes: self.moments.size_in_bytes(),
            recompute: Recompute::None,
            logits_rows,
            teacher,
            attention: self.attention(spec)?,
            trained: trainable.held(params),
            gradients: Gradients::buffer_elements(params, trainable, self.buffers),
        })
    }

    /// What is computed again: as asked, or the least that fits beside `others` bytes.
    pub fn recompute(
        &self,
        choice: RecomputeChoice,
        spec: &DecoderSpec,
        shape: &TrainShape,
        others: u64,
    ) -> Recompute {
        match (choice.fixed(), self.free) {
            (Some(fixed), _) => fixed,
            (None, None) => Recompute::None,
            (None, Some(free)) => {
                let room = (free as f64 * PLANNED_PART) as u64;
                least_recompute(spec, shape, room.saturating_sub(others))
            }
        }
    }

    /// What computes the attention of a model.
    fn attention(&self, spec: &DecoderSpec) -> Result<AttentionScratch> {
        if self.device.is_cpu() {
            return Ok(AttentionScratch::None);
        }
        let plain = !matches!(spec.position, Position::Alibi { .. })
            && spec.layers.iter().all(|layer| layer.attention.softcap.is_none());
        Ok(match device::cudnn()? {
            Some(_) if plain && self.dtype == DType::BF16 => match device::deterministic() {
                true => AttentionScratch::CudnnDeterministic,
                false => AttentionScratch::Cudnn,
            },
            _ => AttentionScratch::Own,
        })
    }
}

/// A type's name as configurations have it.
pub(crate) fn type_name(dtype: DType) -> &'static str {
    match dtype {
        DType::BF16 => Precision::Bf16.name(),
        _ => Precision::F32.name(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WISH: Wish<'static> = Wish {
        device: "cpu",
        dtype: Precision::Auto,
        gradients: Precision::Auto,
        moments: Precision::F32,
        deterministic: true,
        accumulation: 1,
        clips: false,
    };

    #[test]
    fn the_cpu_computes_in_f32_and_keeps_its_gradients() {
        let machine = Machine::open(&WISH).unwrap();
        let types = (machine.dtype, machine.gradients, machine.moments);
        assert_eq!(types, (DType::F32, DType::F32, DType::F32));
        assert_eq!((machine.buffers, machine.free), (Buffers::Own, None));
        for wish in [
            Wish { dtype: Precision::Bf16, ..WISH },
            Wish { gradients: Precision::Bf16, ..WISH },
            Wish { moments: Precision::Bf16, ..WISH },
        ] {
            let error = Machine::open(&wish).unwrap_err().to_string();
            assert!(error.contains("bf16 needs a GPU"), "{error}");
        }
    }

    #[test]
    fn nothing_is_computed_again_on_the_cpu_unless_asked() {
        let machine = Machine::open(&WISH).unwrap();
        let llama = serde_json::json!({"model_type": "llama"});
        let spec = relufy_spec::family::parse(&llama).unwrap().spec;
        let shape = TrainShape::cpu(&spec, 1, 16, 128);
        let chosen = |choice| machine.recompute(choice, &spec, &shape, 0);
        assert_eq!(chosen(RecomputeChoice::Auto), Recompute::None);
        assert_eq!(chosen(RecomputeChoice::Block), Recompute::Block);
        let gpu = Machine { free: Some(120 << 30), ..machine.clone() };
        assert_eq!(gpu.recompute(RecomputeChoice::Auto, &spec, &shape, 0), Recompute::None);
        assert_eq!(
            gpu.recompute(RecomputeChoice::Auto, &spec, &shape, 120 << 30),
            Recompute::Block
        );
    }
}
