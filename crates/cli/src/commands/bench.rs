//! `relufy bench`: how fast it is here.

use std::process::ExitCode;

use relufy_trainer::bench::{Shape, train_steps};

use crate::out;

/// Measure speed on this machine.
#[derive(Debug, clap::Args)]
pub struct Bench {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    Train(Train),
}

/// Time training steps on random weights and tokens: forward, backward, clipping, AdamW.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  relufy bench train --shape small
  python3 scripts/bench_torch_cpu.py        # the same steps in PyTorch, in turn with these
Shapes (Llama, ReLU): small = hidden 256, 4 layers, 4 heads, ffn 704, vocab 4096, 4 x 128 tokens;
medium = hidden 512, 8 layers, 8 heads, ffn 1408, vocab 4096, 8 x 256 tokens.")]
struct Train {
    /// What is trained.
    #[arg(long, value_enum, default_value_t = ShapeName::Small)]
    shape: ShapeName,
    /// Steps to time, after one that is not.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum ShapeName {
    Small,
    Medium,
}

impl Bench {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let What::Train(args) = self.what;
        let shape = match args.shape {
            ShapeName::Small => Shape::SMALL,
            ShapeName::Medium => Shape::MEDIUM,
        };
        let measured = train_steps(shape, args.steps as usize)?;
        if args.json {
            let mut json = serde_json::to_value(&measured)?;
            json["shape"] = shape.name.into();
            out::line(json)?;
            return Ok(ExitCode::SUCCESS);
        }
        let median = 1e3 * shape.tokens() as f64 / measured.tokens_per_second;
        out::line(format_args!(
            "shape             {} ({} tokens a step)",
            shape.name,
            shape.tokens()
        ))?;
        out::line(format_args!("threads           {}", rayon::current_num_threads()))?;
        out::line(format_args!("tokens/s          {:.0}", measured.tokens_per_second))?;
        out::line(format_args!(
            "step              {median:.2} ms (median of {})",
            measured.step_ms.len()
        ))?;
        out::line(format_args!(
            "  forward+backward {:.2} ms (mean)",
            measured.parts.forward_backward
        ))?;
        out::line(format_args!("  gradient norm    {:.2} ms", measured.parts.clip))?;
        out::line(format_args!("  AdamW            {:.2} ms", measured.parts.adamw))?;
        Ok(ExitCode::SUCCESS)
    }
}
