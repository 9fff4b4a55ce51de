//! `relufy surgery`: a relufied copy of a model, without touching a weight.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use relufy_data::{Hub, SourceConfig};
use relufy_model::Checkpoint;
use relufy_spec::{Site, Stage};
use relufy_surgery::{
    Linked, Options, Report, Shift, SurgeryRequest, fit_shifts, sequences, surgery,
};

use crate::out;
use crate::progress::Bars;

/// Swap the MLP's activation for ReLU (stage 1), and insert ReLUs before the QKV and up
/// projections (stage 2).
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  relufy surgery MODEL --stage 1 -o model-s1
  relufy surgery MODEL --stage 2 -o model-s2
  relufy surgery MODEL --stage 1 --shift 1.0 -o model-shifted
  relufy surgery MODEL --stage 1 --shift-quantile 0.95 --corpus text.jsonl -o model-95
  relufy surgery MODEL --stage 2 --sites down,up -o model-no-qkv
Weights are linked where the file system can, else copied. A stage 1 model loads in transformers
as it is; stage 2 and shifted models bring a Python module (trust_remote_code=True).
The model loses quality until it is fine-tuned: see `relufy train`.")]
pub struct Surgery {
    /// Folder or hub id.
    model: String,
    /// 0 (a plain copy), 1 or 2.
    #[arg(long, value_parser = clap::value_parser!(u8).range(0..=2))]
    stage: u8,
    /// ReLU(x - B) in place of ReLU, the same B in every layer.
    #[arg(
        long,
        value_name = "B",
        conflicts_with = "shift_quantile",
        allow_negative_numbers = true
    )]
    shift: Option<f64>,
    /// ReLU(x - b) with a b for each layer that drops this share of the pre-activations;
    /// measured on --corpus.
    #[arg(long, value_name = "Q", requires = "corpus")]
    shift_quantile: Option<f64>,
    /// Text to measure the shifts on.
    #[arg(long, value_name = "FILE")]
    corpus: Option<String>,
    /// Tokens of that text.
    #[arg(long, default_value_t = 20_000)]
    tokens: u64,
    /// Only at these sites of the stage: qkv, o, up, down (`down` is the MLP's activation).
    #[arg(long, value_delimiter = ',', value_parser = site)]
    sites: Option<Vec<Site>>,
    /// The folder to make.
    #[arg(short, long)]
    output: PathBuf,
}

fn site(name: &str) -> Result<Site, String> {
    Site::from_short(name).ok_or_else(|| "expected qkv, o, up or down".to_owned())
}

impl Surgery {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let bars = Bars::default();
        let stage = Stage::try_from(self.stage).map_err(anyhow::Error::msg)?;
        let checkpoint = Checkpoint::resolve(&self.model, &bars)?;
        let mut request = SurgeryRequest {
            stage,
            shift: self.shift.map_or(Shift::None, Shift::Fixed),
            sites: self.sites,
        };
        if let (Some(quantile), Some(corpus)) = (self.shift_quantile, &self.corpus) {
            // Any shift will do to find the plan that the shifts belong to.
            request.shift = Shift::Fixed(0.0);
            let plan = request.plan(&checkpoint.config().spec)?;
            let text = text(&checkpoint, corpus, self.tokens)?;
            let found =
                fit_shifts(&checkpoint, &plan, quantile, &text, &Options::default(), &bars)?;
            for (layer, (shift, sparsity)) in found.shifts.iter().zip(&found.sparsity).enumerate() {
                out::line(format_args!(
                    "layer {layer:>3}  shift {shift:>8.4}  sparsity {:.1} %",
                    100.0 * sparsity
                ))?;
            }
            request.shift = Shift::PerLayer(found.shifts);
        }
        let report = surgery(&checkpoint, &request, &self.output, &bars)?;
        print_report(&report)?;
        Ok(ExitCode::SUCCESS)
    }
}

/// Token sequences of a corpus, as long as the model's positions allow (at most 2048).
pub fn text(checkpoint: &Checkpoint, corpus: &str, tokens: u64) -> anyhow::Result<Vec<Vec<u32>>> {
    if tokens < 2 {
        bail!("--tokens {tokens}: at least 2 tokens are needed");
    }
    let tokenizer = checkpoint.tokenizer()?;
    let length = checkpoint.config().spec.max_positions.min(2048);
    sequences(&SourceConfig::new(corpus), &Hub::from_env()?, &tokenizer, length, tokens)
        .context("calibration text")
}

fn print_report(report: &Report) -> std::io::Result<()> {
    out::line(report.path.display())?;
    for (file, how) in &report.weights {
        let how = match how {
            Linked::Reflink => "shares the original's blocks",
            Linked::HardLink => "hard link to the original",
            Linked::Copy => "copied",
        };
        out::line(format_args!("  {file}: {how}"))?;
    }
    if !report.changed {
        out::line(format_args!("  nothing to change: the model computes what it did before"))?;
    }
    if report.remote_code {
        out::line(format_args!("  in transformers: from_pretrained(..., trust_remote_code=True)"))?;
    }
    Ok(())
}
