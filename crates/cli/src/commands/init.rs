//! `relufy init`: a checkpoint with random weights.

use std::path::PathBuf;
use std::process::ExitCode;

use relufy_model::StoredDtype;
use relufy_trainer::InitOptions;

use crate::{human, out};

/// Make a checkpoint with random weights from any family's config; it trains like any other.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:
  relufy init configs/micro/donor-model.json --tokenizer crates/recipe/donor -o runs/donor-init
The config is a Hugging Face config.json, or the same keys as TOML.")]
pub struct Init {
    /// A Hugging Face config.json, or the same keys as TOML.
    config: PathBuf,
    /// The folder to make.
    #[arg(short, long)]
    output: PathBuf,
    /// Take the tokenizer's files from this folder.
    #[arg(long, value_name = "DIR")]
    tokenizer: Option<PathBuf>,
    /// Seed of the weights.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Standard deviation of the matrices; by default the config's `initializer_range`, else 0.02.
    #[arg(long, allow_negative_numbers = true)]
    std: Option<f64>,
    /// Number type of the weights.
    #[arg(long, value_enum, default_value_t = Dtype::F32)]
    dtype: Dtype,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Dtype {
    F32,
    F16,
    Bf16,
}

impl Init {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let made = relufy_trainer::init(&InitOptions {
            config: self.config,
            output: self.output,
            tokenizer: self.tokenizer,
            seed: self.seed,
            std: self.std,
            dtype: match self.dtype {
                Dtype::F32 => StoredDtype::F32,
                Dtype::F16 => StoredDtype::F16,
                Dtype::Bf16 => StoredDtype::Bf16,
            },
        })?;
        let parameters = human::count(made.parameters as f64);
        out::line(format_args!(
            "{}: {} with {parameters} random parameters",
            made.path.display(),
            made.family
        ))?;
        Ok(ExitCode::SUCCESS)
    }
}
