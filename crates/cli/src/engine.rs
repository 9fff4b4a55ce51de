//! What makes the tokens: the decoder, or the engine that skips the zeros. `generate` and `serve`
//! know no more of a model than this.

use anyhow::bail;
use candle_core::DType;
use relufy_model::{Checkpoint, Decoder, Precision, generate};
use relufy_sparse::{Format, Options, Sequence, Session};
use relufy_spec::{Activation, DecoderSpec, ReluPlan, SiteOp};

use crate::compute::Compute;
use crate::packing::Packing;

/// A model that continues prompts, one after the other.
pub trait Engine {
    /// Continues `prompt` by at most `max_new` tokens; returns how many it made. `sample` picks a
    /// token from the logits `[vocab]`; `on_token` sees each token as it comes and ends the
    /// generation by returning `false`. A token of `stop` ends it too and is not shown.
    ///
    /// # Errors
    /// A prompt that the model cannot take, what `sample` returns, and a device that fails.
    fn generate(
        &mut self,
        prompt: &[u32],
        max_new: usize,
        stop: &[u32],
        sample: &mut dyn FnMut(&[f32]) -> anyhow::Result<u32>,
        on_token: &mut dyn FnMut(u32) -> bool,
    ) -> anyhow::Result<usize>;
}

/// The decoder that everything else in the program uses: every weight is read for every token.
impl Engine for Decoder {
    fn generate(
        &mut self,
        prompt: &[u32],
        max_new: usize,
        stop: &[u32],
        sample: &mut dyn FnMut(&[f32]) -> anyhow::Result<u32>,
        on_token: &mut dyn FnMut(u32) -> bool,
    ) -> anyhow::Result<usize> {
        Ok(generate(self, prompt, max_new, stop, sample, on_token)?.len())
    }
}

/// The engine that reads only the rows of inputs and neurons that are not zero.
impl Engine for Box<dyn Sequence> {
    fn generate(
        &mut self,
        prompt: &[u32],
        max_new: usize,
        stop: &[u32],
        sample: &mut dyn FnMut(&[f32]) -> anyhow::Result<u32>,
        on_token: &mut dyn FnMut(u32) -> bool,
    ) -> anyhow::Result<usize> {
        self.truncate(0);
        let room = max_new.min(self.left().saturating_sub(prompt.len()));
        let mut logits = self.prefill(prompt)?;
        let mut made = 0;
        while made < room {
            let token = sample(logits)?;
            if stop.contains(&token) {
                break;
            }
            made += 1;
            if !on_token(token) || made == room {
                break;
            }
            logits = self.step(token)?;
        }
        Ok(made)
    }
}

/// Which engine, and where it computes.
#[derive(Clone, Debug, clap::Args)]
pub struct EngineArgs {
    #[command(flatten)]
    compute: Compute,
    /// sparse skips zeros exactly; auto takes it for models that have zeros, on a GPU if it is faster.
    #[arg(long, value_enum, default_value_t = Choice::Auto)]
    engine: Choice,
    /// How the sparse engine stores weights: f32, f16 (the default on the CPU), bf16 (on a GPU) or
    /// int8.
    #[arg(long, value_name = "FORMAT")]
    format: Option<Format>,
    #[command(flatten)]
    packing: Packing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Choice {
    Auto,
    Dense,
    Sparse,
}

impl EngineArgs {
    /// What to say of answers that are not exactly the model's; `None` where they are.
    pub fn inexact(&self) -> Option<String> {
        self.packing.inexact()
    }

    /// Reads a model into the engine that was asked for.
    ///
    /// # Errors
    /// A format without the sparse engine, or one that the device does not take; as
    /// [`Compute::load`].
    pub fn load(
        &self,
        checkpoint: &Checkpoint,
        plan: &ReluPlan,
    ) -> anyhow::Result<Box<dyn Engine>> {
        let on_gpu = self.compute.device != "cpu";
        if on_gpu && self.format == Some(Format::F16) {
            bail!("--format f16 is for the CPU; on a GPU weights are bf16, f32 or int8");
        }
        let mut compute = self.compute.clone();
        if on_gpu && self.format == Some(Format::F32) {
            // Weights that were rounded to bf16 gain nothing in f32.
            compute.dtype = match compute.dtype {
                Precision::Bf16 => bail!("--format f32 and --dtype bf16 contradict each other"),
                _ => Precision::F32,
            };
        }
        let spec = plan.apply(&checkpoint.config().spec)?;
        let sparse = match self.engine {
            Choice::Auto => has_zeros(&spec) || self.packing.inexact().is_some(),
            choice => choice == Choice::Sparse,
        };
        if !sparse {
            if let Some(format) = self.format {
                bail!("--format {format} is for the sparse engine, which --engine sparse takes");
            }
            if let Some(flag) = self.packing.given() {
                bail!("{flag} is for the sparse engine, which --engine sparse takes");
            }
            return Ok(Box::new(compute.load(checkpoint, plan)?));
        }
        if !on_gpu {
            // Refuses a type that the CPU does not compute in.
            compute.open()?;
            let format = self.format.unwrap_or(Format::F16);
            let options = Options { format, ..Options::default() };
            let engine = self.packing.engine(checkpoint, plan, &spec, &options)?;
            let sequence: Box<dyn Sequence> = Box::new(Session::new(&engine)?);
            return Ok(Box::new(sequence));
        }
        if let Some(flag) = self.packing.given() {
            bail!("{flag} is for the CPU; leave --device {} out", self.compute.device);
        }
        let decoder = compute.load(checkpoint, plan)?;
        let usual = match decoder.params().dtype() {
            DType::F32 => Format::F32,
            _ => Format::Bf16,
        };
        let format = self.format.unwrap_or(usual);
        let options = Options { format, ..Options::default() };
        Ok(Box::new(relufy_sparse::sequence(decoder, &options, self.engine == Choice::Auto)?))
    }
}

/// Whether a model's activations are zero anywhere by construction.
pub fn has_zeros(spec: &DecoderSpec) -> bool {
    spec.layers.iter().any(|layer| {
        let sites = layer.sites;
        Activation::is_sparse(layer.mlp.activation)
            || [sites.qkv_in, sites.o_in, sites.up_in, sites.down_in]
                .into_iter()
                .any(|op| op != SiteOp::Identity)
    })
}
