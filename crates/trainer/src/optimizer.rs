//! AdamW over the parameters of a decoder: masters and moments, one step, and the file that makes
//! a resumed run bit-equal (`optimizer.safetensors`: f32 masters and both moments).

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::path::Path;

use candle_core::{DType, Tensor};
use relufy_model::{Gradients, LayerParam, Masters, ParamId, Params, Trainable};
use relufy_ops::adamw::{self, AdamW, Item};
use relufy_ops::buffer;
use safetensors::{Dtype, SafeTensors, View};

use crate::config::Optim;
use crate::{Error, Result};

/// What weight decay applies to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decay {
    /// Matrices; norms and biases are left alone.
    Matrices,
    /// Every parameter (plain `torch.optim.AdamW`).
    All,
}

/// The masters and moments of everything that is trained, and the step count.
pub struct Optimizer {
    slots: Vec<Slot>,
    index: HashMap<ParamId, usize>,
    steps: u64,
    settings: Optim,
    decay: Decay,
}

struct Slot {
    id: ParamId,
    rows: Vec<Range<usize>>,
    /// The f32 values; `None` where the weights in use are f32 themselves.
    master: Option<Tensor>,
    m: Tensor,
    v: Tensor,
}

impl Optimizer {
    /// Moments of zero, of type `moments`, for everything that is trained.
    ///
    /// # Errors
    /// A device without room.
    pub fn new(
        params: &Params,
        trainable: &Trainable,
        masters: &Masters,
        settings: &Optim,
        decay: Decay,
        moments: DType,
    ) -> Result<Optimizer> {
        let slots: Vec<Slot> = trainable
            .iter(params)
            .map(|(param, rows)| {
                let zeros = || Tensor::zeros(param.tensor.dims(), moments, param.tensor.device());
                let (m, v) = (zeros()?, zeros()?);
                let master = masters.get(param.id).cloned();
                Ok(Slot { id: param.id, rows: rows.to_vec(), master, m, v })
            })
            .collect::<Result<_>>()?;
        let index = slots.iter().enumerate().map(|(n, slot)| (slot.id, n)).collect();
        Ok(Optimizer { slots, index, steps: 0, settings: settings.clone(), decay })
    }

    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The factor that brings gradients of L2 norm `norm` down to `max_grad_norm`; 1 where
    /// they are below (torch's `clip_grad_norm_`, with its 1e-6 in the divisor).
    pub fn clip_factor(&self, norm: f64) -> f64 {
        adamw::clip_factor(norm, self.settings.max_grad_norm)
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
        self.apply(self.slots.iter(), params, gradients, learning_rate, grad_scale)?;
        self.steps += 1;
        Ok(())
    }

    /// One step along the gradients, clipped to `max_grad_norm`; their L2 norm before, over all
    /// that is trained. Where that is no finite number nothing moves and no step is counted. A GPU
    /// may still have the step to do when this returns.
    ///
    /// # Errors
    /// As [`Optimizer::step`].
    pub fn step_clipped(
        &mut self,
        params: &Params,
        gradients: &Gradients,
        learning_rate: f64,
    ) -> Result<f64> {
        let items = self.items(self.slots.iter(), params, gradients)?;
        let numbers = self.numbers(learning_rate);
        let limit = self.settings.max_grad_norm;
        let norm = adamw::step_clipped(&items, &numbers, self.steps + 1, limit)?;
        if norm.is_finite() {
            self.steps += 1;
        }
        Ok(norm)
    }

    /// Begins a step that is taken parameter by parameter, each as soon as its gradient is final.
    pub fn begin(&mut self) -> Piecewise<'_> {
        Piecewise { optimizer: self, done: HashSet::new() }
    }

    /// Moves parameters; the step itself is not counted yet.
    fn apply<'a>(
        &self,
        slots: impl Iterator<Item = &'a Slot>,
        params: &'a Params,
        gradients: &'a Gradients,
        learning_rate: f64,
        grad_scale: f64,
    ) -> relufy_model::Result<()> {
        let items = self.items(slots, params, gradients)?;
        let numbers = self.numbers(learning_rate);
        Ok(adamw::step_all(&items, &numbers, self.steps + 1, grad_scale as f32)?)
    }

    /// The tensors of some slots, for the arithmetic.
    fn items<'a>(
        &self,
        slots: impl Iterator<Item = &'a Slot>,
        params: &'a Params,
        gradients: &'a Gradients,
    ) -> relufy_model::Result<Vec<Item<'a>>> {
        slots
            .map(|slot| {
                let missing = || no_parameter(slot.id);
                let at = params.index_of(slot.id).ok_or_else(missing)?;
                let param = params.iter().nth(at).ok_or_else(missing)?;
                let decays = self.decay == Decay::All || param.is_matrix();
                Ok(Item {
                    param: &param.tensor,
                    master: slot.master.as_ref(),
                    grad: gradients.get(slot.id).ok_or_else(missing)?,
                    m: &slot.m,
                    v: &slot.v,
                    weight_decay: if decays { self.settings.weight_decay } else { 0.0 },
                    rows: Some(slot.rows.as_slice()),
                })
            })
            .collect()
    }

    fn numbers(&self, learning_rate: f64) -> AdamW {
        AdamW {
            lr: learning_rate,
            beta1: self.settings.adam_beta1,
            beta2: self.settings.adam_beta2,
            eps: self.settings.adam_epsilon,
            weight_decay: self.settings.weight_decay,
        }
    }

    /// The parameters as they are saved: with their f32 values where there are any.
    pub fn precise(&self, params: &Params) -> Params {
        params.with_masters(|id| self.slots[*self.index.get(&id)?].master.as_ref())
    }

    /// Writes masters, moments and the step count.
    ///
    /// # Errors
    /// A full disk, and whatever else the system says.
    pub fn save(&self, path: &Path, params: &Params) -> Result<()> {
        let failed = RefCell::new(None);
        let mut views = Vec::new();
        for slot in &self.slots {
            for (kind, tensor) in self.tensors(slot, params)? {
                views.push((name(kind, slot.id), F32View { tensor, failed: &failed }));
            }
        }
        let metadata = HashMap::from([("step".to_string(), self.steps.to_string())]);
        let written = safetensors::serialize_to_file(views, Some(metadata), path);
        if let Some(error) = failed.take() {
            return Err(error.into());
        }
        written.map_err(|error| match error {
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
                let bytes = stored.data().as_chunks().0;
                let values: Vec<f32> = bytes.iter().map(|b| f32::from_le_bytes(*b)).collect();
                buffer::write_from_host(tensor, &values)?;
                if kind == "master" && slot.master.is_some() {
                    let param = params.get(slot.id).ok_or_else(|| no_parameter(slot.id))?;
                    buffer::write_from_host(param, &values)?;
                }
            }
        }
        Ok(())
    }

    fn tensors<'a>(
        &'a self,
        slot: &'a Slot,
        params: &'a Params,
    ) -> Result<[(&'static str, &'a Tensor); 3]> {
        let master = match &slot.master {
            Some(master) => master,
            None => params.get(slot.id).ok_or_else(|| no_parameter(slot.id))?,
        };
        Ok([("master", master), ("m", &slot.m), ("v", &slot.v)])
    }
}

/// A step in pieces.
pub struct Piecewise<'a> {
    optimizer: &'a mut Optimizer,
    done: HashSet<ParamId>,
}

impl Piecewise<'_> {
    /// Moves these parameters, as far as they are trained.
    ///
    /// # Errors
    /// As [`Optimizer::step`]; a parameter for the second time.
    pub fn step(
        &mut self,
        ids: &[ParamId],
        params: &Params,
        gradients: &Gradients,
        learning_rate: f64,
    ) -> relufy_model::Result<()> {
        let slots = ids.iter().filter_map(|id| self.optimizer.index.get(id));
        let slots: Vec<&Slot> = slots.map(|n| &self.optimizer.slots[*n]).collect();
        if let Some(again) = slots.iter().find(|slot| !self.done.insert(slot.id)) {
            let why = format!("a second step of {:?} in one", again.id);
            return Err(relufy_model::Error::Invalid(why));
        }
        self.optimizer.apply(slots.into_iter(), params, gradients, learning_rate, 1.0)
    }

    /// Whether nothing has moved yet.
    pub fn is_untouched(&self) -> bool {
        self.done.is_empty()
    }

    /// Counts the step, once everything trained has moved.
    ///
    /// # Errors
    /// A parameter whose gradient was never final.
    pub fn finish(self) -> relufy_model::Result<()> {
        match self.optimizer.slots.iter().find(|slot| !self.done.contains(&slot.id)) {
            None => {
                self.optimizer.steps += 1;
                Ok(())
            }
            Some(slot) => {
                let why = format!("the gradient of {:?} was never final", slot.id);
                Err(relufy_model::Error::Invalid(why))
            }
        }
    }
}

fn no_parameter(id: ParamId) -> relufy_model::Error {
    relufy_model::Error::Invalid(format!("no parameter {id:?}"))
}

/// The name of a tensor in the file, such as `m.layers.3.qkv`.
fn name(kind: &str, id: ParamId) -> String {
    let part = |part: LayerParam| format!("{part:?}").to_lowercase();
    match id {
        ParamId::Layer(layer, param) => format!("{kind}.layers.{layer}.{}", part(param)),
        other => format!("{kind}.{}", format!("{other:?}").to_lowercase()),
    }
}

/// A tensor on its way into the file: fetched from its device when it is written.
struct F32View<'a> {
    tensor: &'a Tensor,
    /// Why a tensor could not be fetched: writing a file has no way to say so.
    failed: &'a RefCell<Option<relufy_ops::Error>>,
}

impl View for F32View<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        self.tensor.dims()
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let mut bytes = vec![0; self.data_len()];
        match buffer::to_host(self.tensor) {
            Ok(values) => {
                for (bytes, value) in bytes.as_chunks_mut().0.iter_mut().zip(values) {
                    *bytes = value.to_le_bytes();
                }
            }
            Err(error) => {
                self.failed.borrow_mut().get_or_insert(error);
            }
        }
        Cow::Owned(bytes)
    }

    fn data_len(&self) -> usize {
        4 * self.tensor.elem_count()
    }
}
