//! AdamW over the parameters of a decoder: the moments, one step, and the file that makes
//! a resumed run bit-equal (`optimizer.safetensors`: f32 masters and both moments).

use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use candle_core::Tensor;
use relufy_model::{Gradients, LayerParam, ParamId, Params};
use relufy_ops::adamw::{self, AdamW};
use relufy_ops::buffer;
use safetensors::{Dtype, SafeTensors, View};

use crate::config::Optim;
use crate::{Error, Result};

const OP: &str = "optimizer";

/// What weight decay applies to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decay {
    /// Matrices; norms and biases are left alone.
    Matrices,
    /// Every parameter (plain `torch.optim.AdamW`).
    All,
}

/// The moments of everything that is trained, and the step count.
pub struct Optimizer {
    slots: Vec<Slot>,
    steps: u64,
    settings: Optim,
    decay: Decay,
}

struct Slot {
    id: ParamId,
    rows: Vec<Range<usize>>,
    m: Tensor,
    v: Tensor,
}

impl Optimizer {
    /// Moments of zero for every parameter that has a gradient.
    ///
    /// # Errors
    /// A device without room.
    pub fn new(gradients: &Gradients, settings: &Optim, decay: Decay) -> Result<Optimizer> {
        let slots = gradients
            .iter()
            .map(|(id, gradient, rows)| {
                let (m, v) = (gradient.zeros_like()?, gradient.zeros_like()?);
                Ok(Slot { id, rows: rows.to_vec(), m, v })
            })
            .collect::<Result<_>>()?;
        Ok(Optimizer { slots, steps: 0, settings: settings.clone(), decay })
    }

    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The factor that brings gradients of L2 norm `norm` down to `max_grad_norm`; 1 where
    /// they are below (torch's `clip_grad_norm_`, with its 1e-6 in the divisor).
    pub fn clip_factor(&self, norm: f64) -> f64 {
        match self.settings.max_grad_norm {
            0.0 => 1.0,
            limit => (limit / (norm + 1e-6)).min(1.0),
        }
    }

    /// One step: every trained row moves along its gradient, which `grad_scale` multiplies.
    ///
    /// # Errors
    /// Parameters or gradients of another model.
    pub fn step(
        &mut self,
        params: &Params,
        gradients: &Gradients,
        learning_rate: f64,
        grad_scale: f64,
    ) -> Result<()> {
        self.steps += 1;
        for slot in &self.slots {
            let missing = || relufy_model::Error::Invalid(format!("no parameter {:?}", slot.id));
            let at = params.index_of(slot.id).ok_or_else(missing)?;
            let param = params.iter().nth(at).ok_or_else(missing)?;
            let gradient = gradients.get(slot.id).ok_or_else(missing)?;
            let decays = self.decay == Decay::All || param.is_matrix();
            let numbers = AdamW {
                lr: learning_rate,
                beta1: self.settings.adam_beta1,
                beta2: self.settings.adam_beta2,
                eps: self.settings.adam_epsilon,
                weight_decay: if decays { self.settings.weight_decay } else { 0.0 },
            };
            let rows = Some(slot.rows.as_slice());
            let scale = grad_scale as f32;
            adamw::step(
                &param.tensor,
                gradient,
                &slot.m,
                &slot.v,
                &numbers,
                self.steps,
                scale,
                rows,
            )?;
        }
        Ok(())
    }

    /// Writes masters, moments and the step count.
    ///
    /// # Errors
    /// A full disk, and whatever else the system says.
    pub fn save(&self, path: &Path, params: &Params) -> Result<()> {
        let mut views = Vec::new();
        for slot in &self.slots {
            for (kind, tensor) in self.tensors(slot, params)? {
                views.push((name(kind, slot.id), F32View(tensor, buffer::view(tensor, OP)?)));
            }
        }
        let metadata = HashMap::from([("step".to_string(), self.steps.to_string())]);
        safetensors::serialize_to_file(views, Some(metadata), path).map_err(|error| match error {
            safetensors::SafeTensorError::IoError(source) => Error::io(path, source),
            other => Error::damaged(path, other),
        })
    }

    /// Reads back what [`Optimizer::save`] wrote, into `params` too.
    ///
    /// # Errors
    /// A file that is damaged, or of another model or choice of trained tensors.
    pub fn load(&mut self, path: &Path, params: &Params) -> Result<()> {
        let file = std::fs::File::open(path).map_err(|source| Error::io(path, source))?;
        // SAFETY: the map is private to this function; should another process cut the file
        // meanwhile, reading it ends this one, as with any mapped weight file.
        let bytes =
            unsafe { memmap2::Mmap::map(&file) }.map_err(|source| Error::io(path, source))?;
        let (_, header) =
            SafeTensors::read_metadata(&bytes).map_err(|error| Error::damaged(path, error))?;
        let file = SafeTensors::deserialize(&bytes).map_err(|error| Error::damaged(path, error))?;
        let step = header.metadata().as_ref().and_then(|metadata| metadata.get("step"));
        self.steps = step
            .and_then(|step| step.parse().ok())
            .ok_or_else(|| Error::damaged(path, "no step count"))?;
        let expected = 3 * self.slots.len();
        if file.len() != expected {
            let why = format!("{} tensors instead of {expected}", file.len());
            return Err(Error::damaged(path, why));
        }
        for slot in &self.slots {
            for (kind, tensor) in self.tensors(slot, params)? {
                let name = name(kind, slot.id);
                let stored = file
                    .tensor(&name)
                    .map_err(|error| Error::damaged(path, format!("{name}: {error}")))?;
                if stored.dtype() != Dtype::F32 || stored.shape() != tensor.dims() {
                    let (expected, found) = (tensor.dims(), stored.shape());
                    let why = format!(
                        "{name}: expected F32 {expected:?}, found {} {found:?}",
                        stored.dtype()
                    );
                    return Err(Error::damaged(path, why));
                }
                buffer::write_f32(tensor, OP, |target| {
                    for (value, bytes) in target.iter_mut().zip(stored.data().as_chunks().0) {
                        *value = f32::from_le_bytes(*bytes);
                    }
                })?;
            }
        }
        Ok(())
    }

    fn tensors<'a>(
        &'a self,
        slot: &'a Slot,
        params: &'a Params,
    ) -> Result<[(&'static str, &'a Tensor); 3]> {
        let master = params
            .get(slot.id)
            .ok_or_else(|| relufy_model::Error::Invalid(format!("no parameter {:?}", slot.id)))?;
        Ok([("master", master), ("m", &slot.m), ("v", &slot.v)])
    }
}

/// The name of a tensor in the file, such as `m.layers.3.qkv`.
fn name(kind: &str, id: ParamId) -> String {
    let part = |part: LayerParam| format!("{part:?}").to_lowercase();
    match id {
        ParamId::Layer(layer, param) => format!("{kind}.layers.{layer}.{}", part(param)),
        other => format!("{kind}.{}", format!("{other:?}").to_lowercase()),
    }
}

/// A tensor on its way into the file.
struct F32View<'a>(&'a Tensor, buffer::View<'a>);

impl View for F32View<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        self.0.dims()
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let mut bytes = vec![0; self.data_len()];
        for (bytes, value) in bytes.as_chunks_mut().0.iter_mut().zip(self.1.iter()) {
            *bytes = value.to_le_bytes();
        }
        Cow::Owned(bytes)
    }

    fn data_len(&self) -> usize {
        4 * self.1.len()
    }
}
