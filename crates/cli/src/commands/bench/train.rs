//! `relufy bench train`: training steps.

use clap::builder::PossibleValuesParser;
use relufy_model::Precision;
use relufy_spec::Stage;
use relufy_spec::memory::Recompute;
use relufy_trainer::bench::{Measured, Options, Shape, train_steps};
use relufy_trainer::config::RecomputeChoice;

use crate::compute::Compute;
use crate::{human, out};

/// Time training steps on random weights and tokens: forward, backward, clipping, AdamW.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  relufy bench train --shape small
  relufy bench train --shape 1b --device cuda                    # bf16, with f32 masters and moments
  relufy bench train --shape 1b --device cuda --stage 1 --parts
  relufy bench train --shape 7b --device cuda --recompute inputs --steps 12 --json
  python3 scripts/bench_torch_cpu.py        # the same steps in PyTorch, in turn with these
Shapes: hidden, layers, heads, ffn, vocabulary, sequences x tokens
  small     Llama    256   4   4    704   4096   4 x 128
  medium    Llama    512   8   8   1408   4096   8 x 256
  130m      Llama    768  12  12   2048  32000  32 x 1024
  1b        Llama   2048  16  16   5632  32000   8 x 2048
  7b        Llama   4096  32  32  11008  32000   4 x 2048
  13b       Llama   5120  40  40  13824  32000   2 x 2048
  opt125m   OPT      768  12  12   3072  50272  32 x 1024
  opt1b     OPT     2048  24  32   8192  50272   8 x 2048
  falcon1b  Falcon  2048  24  32   8192  50304   8 x 2048  (one head of keys)
Model TFLOP/s count 6 for each token and element of a matrix, and causal attention; what is
computed again counts for nothing. MFU is their share of the data sheet's dense bf16 rate, where
the GPU is known, or of --peak-tflops.")]
pub struct Train {
    /// What is trained.
    #[arg(long, default_value = Shape::SMALL.name,
        value_parser = PossibleValuesParser::new(Shape::ALL.map(|shape| shape.name)))]
    shape: String,
    /// Sequences of a step; by default the shape's.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65_536))]
    batch: Option<u32>,
    /// Tokens of a sequence; by default the shape's.
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(2..=1_048_576))]
    seq_len: Option<u32>,
    #[command(flatten)]
    compute: Compute,
    /// Number type of the gradients: auto is that of the weights.
    #[arg(long, value_name = "TYPE", default_value = "auto")]
    grad_dtype: Precision,
    /// Number type of Adam's moments: f32, or bf16 on a GPU.
    #[arg(long, value_name = "TYPE", default_value = "f32")]
    moment_dtype: Precision,
    /// Let cuDNN add in any order, which is faster: the losses then differ from run to run.
    #[arg(long)]
    nondeterministic: bool,
    /// What is computed again instead of kept: none, inputs, block or auto (the least that fits).
    #[arg(long, value_name = "WHAT", default_value = "auto")]
    recompute: RecomputeChoice,
    /// The MLP's activation: relu, silu, gelu, ...; by default relu, and Falcon's own gelu.
    #[arg(long, value_name = "NAME")]
    activation: Option<String>,
    /// Surgery on the model: 0 (none), 1 or 2.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=2))]
    stage: u8,
    /// Steps to time.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    /// Steps before, which are not timed; by default 1 on the CPU and 3 on a GPU.
    #[arg(long, value_name = "STEPS", value_parser = clap::value_parser!(u32).range(1..))]
    warmup: Option<u32>,
    /// Largest norm of the gradients. With 0 there is no clipping, and a GPU steps each layer as
    /// soon as its gradients are final.
    #[arg(long, value_name = "NORM", default_value_t = 1.0, value_parser = norm)]
    clip: f64,
    /// Time the parts of a step on a GPU too, which costs the whole a little.
    #[arg(long)]
    parts: bool,
    /// List what one more step does on a GPU, kernel by kernel.
    #[arg(long)]
    profile: bool,
    /// TFLOP/s that the device can do at most.
    #[arg(long, value_name = "TFLOPS", value_parser = rate)]
    peak_tflops: Option<f64>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

fn norm(text: &str) -> Result<f64, String> {
    let norm = text.parse::<f64>().ok().filter(|norm| norm.is_finite() && *norm >= 0.0);
    norm.ok_or_else(|| "expected a number of at least 0".to_owned())
}

fn rate(text: &str) -> Result<f64, String> {
    let rate = text.parse::<f64>().ok().filter(|rate| rate.is_finite() && *rate > 0.0);
    rate.ok_or_else(|| "expected a number above 0".to_owned())
}

impl Train {
    pub fn run(&self) -> anyhow::Result<()> {
        let measured = train_steps(&self.options()?)?;
        if self.json {
            out::line(serde_json::to_value(&measured)?)?;
        } else {
            text(&measured).into_iter().try_for_each(out::line)?;
        }
        Ok(())
    }

    fn options(&self) -> anyhow::Result<Options> {
        let shape = Shape::named(&self.shape).unwrap_or(Shape::SMALL);
        let on_cpu = self.compute.device == "cpu";
        Ok(Options {
            shape: Shape {
                batch: self.batch.map_or(shape.batch, |batch| batch as usize),
                seq_len: self.seq_len.map_or(shape.seq_len, |tokens| tokens as usize),
                ..shape
            },
            activation: self.activation.clone(),
            stage: Stage::try_from(self.stage).map_err(anyhow::Error::msg)?,
            device: self.compute.device.clone(),
            dtype: self.compute.dtype,
            grad_dtype: self.grad_dtype,
            moment_dtype: self.moment_dtype,
            deterministic: !self.nondeterministic,
            recompute: self.recompute,
            clip: self.clip,
            steps: self.steps as usize,
            warmup: self.warmup.unwrap_or(if on_cpu { 1 } else { 3 }) as usize,
            parts: self.parts || on_cpu,
            profile: self.profile,
            peak_tflops: self.peak_tflops,
        })
    }
}

fn text(found: &Measured) -> Vec<String> {
    let mut lines = Vec::new();
    let mut line = |name: &str, value: String| lines.push(format!("{name:<18}{value}"));
    line(
        "shape",
        format!(
            "{} ({} tokens a step, {} parameters, {})",
            found.shape,
            found.batch * found.seq_len,
            human::count(found.parameters as f64),
            found.activation,
        ),
    );
    match found.peak_bytes {
        None => line("threads", rayon::current_num_threads().to_string()),
        Some(_) => line(
            "device",
            format!(
                "{} ({}, gradients {}, moments {}, {} attention)",
                found.device,
                found.dtype,
                found.grad_dtype,
                found.moment_dtype,
                found.attention.unwrap_or("own"),
            ),
        ),
    }
    line("tokens/s", format!("{:.0}", found.tokens_per_second));
    let steps = found.step_ms.len();
    line("step", format!("{:.2} ms (median of {steps})", found.median_ms));
    if let Some(parts) = &found.parts {
        let forward_backward = parts.forward_backward;
        line("  forward+backward", format!(" {forward_backward:.2} ms (mean)"));
        line("    forward, loss", format!(" {:.2} ms", parts.forward));
        line("    backward", format!(" {:.2} ms", parts.backward));
        line("  gradient norm", format!(" {:.2} ms", parts.clip));
        line("  AdamW", format!(" {:.2} ms", parts.adamw));
    }
    line(
        "model",
        match (&found.peak_rate, found.mfu) {
            (Some(peak), Some(mfu)) => format!(
                "{:.1} TFLOP/s, {} of {:.0} ({})",
                found.model_tflops,
                human::percent(mfu),
                peak.tflops,
                peak.source,
            ),
            _ => format!("{:.3} TFLOP/s", found.model_tflops),
        },
    );
    line("memory", memory(found));
    if let Some(peak) = found.peak_bytes {
        let used = &found.used_after_step;
        let after = |step: usize| used.get(step).or(used.last()).copied().unwrap_or(0);
        line(
            "  measured",
            format!(
                "{} at the peak, {} after step 2, {} at the end",
                human::bytes(peak),
                human::bytes(after(1)),
                human::bytes(after(usize::MAX)),
            ),
        );
    }
    line("loss", format!("{:.4} at the end", found.last_loss));
    let all: f64 = found.profile.iter().map(|work| work.ms).sum();
    for work in &found.profile {
        let rate = work.tflops.map_or(String::new(), |rate| format!("  {rate:.0} TFLOP/s"));
        lines.push(format!(
            "  {:>9.3} ms {:>5.1} % {:>5} x  {}{rate}",
            work.ms,
            100.0 * work.ms / all,
            work.calls,
            work.label
        ));
    }
    lines
}

/// What was planned, by part.
fn memory(found: &Measured) -> String {
    let planned = &found.planned;
    format!(
        "{} planned (weights {}, masters {}, moments {}, gradients {}, saved {}, other {}), {}",
        human::bytes(found.planned_bytes),
        human::bytes(planned.weights),
        human::bytes(planned.masters),
        human::bytes(planned.moments),
        human::bytes(planned.gradients),
        human::bytes(planned.activations),
        human::bytes(planned.transient),
        match found.recompute {
            Recompute::None => "nothing recomputed",
            Recompute::Inputs => "inputs recomputed",
            Recompute::Block => "blocks recomputed",
        },
    )
}
