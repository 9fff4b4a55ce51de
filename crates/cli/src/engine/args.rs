//! `--engine`, `--format` and what else chooses an engine.

use anyhow::bail;
use candle_core::DType;
use relufy_model::{Checkpoint, Precision};
use relufy_sparse::{Format, Options, Sessions};
use relufy_spec::{Activation, DecoderSpec, ReluPlan, SiteOp};

use super::Engine;
use super::dense::Dense;
use super::sparse::Alone;
use crate::compute::Compute;
use crate::packing::Packing;

/// How many texts an engine that can do several continues at a time, where nobody says.
const PLACES: usize = 4;

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

    /// Reads a model into the engine that was asked for, with so many places; by default as many as
    /// suit the engine.
    ///
    /// # Errors
    /// A format without the sparse engine, or one that the device does not take; more places than
    /// the engine can have; as [`Compute::load`].
    pub fn load(
        &self,
        checkpoint: &Checkpoint,
        plan: &ReluPlan,
        places: Option<usize>,
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
        if let Some(several) = places.filter(|places| *places > 1 && (on_gpu || !sparse)) {
            bail!(
                "{several} texts side by side are for the sparse engine on the CPU; this one continues one at a time"
            );
        }
        if !sparse {
            if let Some(format) = self.format {
                bail!("--format {format} is for the sparse engine, which --engine sparse takes");
            }
            if let Some(flag) = self.packing.given() {
                bail!("{flag} is for the sparse engine, which --engine sparse takes");
            }
            return Ok(Box::new(Dense::new(compute.load(checkpoint, plan)?)?));
        }
        if !on_gpu {
            // Refuses a type that the CPU does not compute in.
            compute.open()?;
            let format = self.format.unwrap_or(Format::F16);
            let options = Options { format, ..Options::default() };
            let engine = self.packing.engine(checkpoint, plan, &spec, &options)?;
            return Ok(Box::new(Sessions::new(&engine, places.unwrap_or(PLACES))?));
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
        let fastest = self.engine == Choice::Auto;
        Ok(Box::new(Alone::new(relufy_sparse::sequence(decoder, &options, fastest)?)))
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
