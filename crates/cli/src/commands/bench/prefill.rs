//! `relufy bench prefill`: forward passes.

use clap::builder::PossibleValuesParser;
use relufy_spec::Stage;
use relufy_trainer::bench::{Shape, prefill};

use crate::compute::Compute;
use crate::{human, out};

/// Time forward passes on random weights and tokens, in turn with their matrix products alone.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  relufy bench prefill --shape small
  relufy bench prefill --shape 1b --device cuda
The shapes are those of `relufy bench train --help`.")]
pub struct Prefill {
    /// The model.
    #[arg(long, default_value = Shape::SMALL.name,
        value_parser = PossibleValuesParser::new(Shape::ALL.map(|shape| shape.name)))]
    shape: String,
    #[command(flatten)]
    compute: Compute,
    /// Surgery on the model: 0 (none), 1 or 2.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=2))]
    stage: u8,
    /// Passes to time, after one that is not.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    passes: u32,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

impl Prefill {
    pub fn run(&self) -> anyhow::Result<()> {
        let shape = Shape::named(&self.shape).unwrap_or(Shape::SMALL);
        let stage = Stage::try_from(self.stage).map_err(anyhow::Error::msg)?;
        let (device, dtype) = (&self.compute.device, self.compute.dtype);
        let found = prefill(&shape, device, dtype, stage, self.passes as usize)?;
        if self.json {
            return Ok(out::line(serde_json::to_value(&found)?)?);
        }
        let pass = 1e3 * shape.tokens() as f64 / found.tokens_per_second;
        for (name, value) in [
            ("shape", format!("{} ({} x {} tokens)", found.shape, found.batch, found.seq_len)),
            ("device", format!("{} ({})", found.device, found.dtype)),
            ("tokens/s", format!("{:.0}", found.tokens_per_second)),
            ("pass", format!("{pass:.2} ms (median of {})", found.pass_ms.len())),
            (
                "products alone",
                format!(
                    "{:.2} ms, {:.1} TFLOP/s: {} of the pass",
                    pass * found.share,
                    found.products_tflops,
                    human::percent(found.share)
                ),
            ),
        ] {
            out::line(format!("{name:<18}{value}"))?;
        }
        Ok(())
    }
}
