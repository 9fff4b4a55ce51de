//! What makes the tokens: the decoder, or the engine that skips the zeros. `generate` and `serve`
//! know no more of a model than this.

use anyhow::bail;
use relufy_model::{Checkpoint, Decoder, generate};
use relufy_sparse::{Format, Options, Session};
use relufy_spec::{Activation, DecoderSpec, ReluPlan, SiteOp};

use crate::compute::Compute;

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
impl Engine for Session {
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
    /// sparse skips zeros exactly, on the CPU; auto takes it there for models that have zeros.
    #[arg(long, value_enum, default_value_t = Choice::Auto)]
    engine: Choice,
    /// How the sparse engine stores weights: f32, f16 (the default), bf16 or int8.
    #[arg(long, value_name = "FORMAT")]
    format: Option<Format>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Choice {
    Auto,
    Dense,
    Sparse,
}

impl EngineArgs {
    /// Reads a model into the engine that was asked for.
    ///
    /// # Errors
    /// A sparse engine elsewhere than on the CPU, a format without it; as [`Compute::load`].
    pub fn load(
        &self,
        checkpoint: &Checkpoint,
        plan: &ReluPlan,
    ) -> anyhow::Result<Box<dyn Engine>> {
        let on_cpu = self.compute.device == "cpu";
        if self.engine == Choice::Sparse && !on_cpu {
            bail!(
                "--engine sparse computes on the CPU; leave --device {} out",
                self.compute.device
            );
        }
        let decoder = self.compute.load(checkpoint, plan)?;
        let sparse = match self.engine {
            Choice::Auto => on_cpu && has_zeros(decoder.spec()),
            choice => choice == Choice::Sparse,
        };
        if !sparse {
            if let Some(format) = self.format {
                bail!("--format {format} is for the sparse engine, which --engine sparse takes");
            }
            return Ok(Box::new(decoder));
        }
        let mut options = Options::default();
        options.format = self.format.unwrap_or(options.format);
        let engine = relufy_sparse::Engine::new(&decoder, &options)?;
        Ok(Box::new(Session::new(&engine)?))
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
