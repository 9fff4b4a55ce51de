//! `relufy bench decode`: tokens a second, and what the bytes allow.

mod curves;
mod lineup;
mod machine;
mod reading;
mod report;
mod zeros;

use std::path::PathBuf;

use anyhow::bail;
use relufy_sparse::Format;
use relufy_sparse::bench::{Pace, take_turns};

use super::subject::Subject;
use crate::calibration::Target;
use crate::compute::device;
use crate::engine::has_zeros;
use lineup::Lineup;
use report::Report;
use zeros::Forced;

/// Time decoding token by token, dense and with zeros skipped, beside a plain read of memory.
#[derive(Debug, clap::Args)]
#[command(
    group = clap::ArgGroup::new("what").required(true).args(["model", "shape"]),
    after_help = "Examples:
  relufy bench decode --shape m                              # dense, and the paper's densities
  relufy bench decode --shape m --format f16,int8 --densities 30,30,10 --densities llama
  relufy bench decode --shape m --batch 4                    # four sequences side by side
  relufy bench decode --shape m --curves                     # each kind of matrix, 5 to 100 %
  relufy bench decode MODEL-S2 --prompt 'Once upon a time'   # the zeros that it has there
  relufy bench decode MODEL-S2 --corpus text.jsonl --tokens 2000 --format f16,int8 --decoder
  relufy bench decode MODEL-S2 --corpus text.jsonl --batch 8     # the union that texts read
  relufy calibrate MODEL --corpus train.jsonl -o measured.json   # a model without zeros:
  relufy bench decode MODEL --corpus text.jsonl --calibration measured.json \\
      --density-target 0.7 --density-target 0.5              # what thresholds gain and cost
  python3 scripts/bench_llama_cpp.py                         # llama.cpp in turn with these
Shapes have random weights; m is 1b, the others are those of `relufy bench train --help`.

All rows decode in turns, and each turn begins with a plain read of memory. Tokens/s are the median
token's. Dense rows have the same weights and read them all; `bytes allow` is how many times fewer
bytes a row reads, and the last column what its speed-up is of that. A model reads a text, the same
tokens in every row, with the zeros that it really has; --densities forces them instead: of each
list that a site reads exactly that share, at random places, is not zero. Gated MLPs are laid out
for densities that are known, forced or with --calibration.

--density-target is no exact decoding: activations below thresholds count as zero. Its rows say the
densities that were reached and the perplexity beside the exact model's, which is always there too."
)]
pub struct Decode {
    /// Folder or hub id.
    model: Option<String>,
    /// Random weights of this shape instead of a model.
    #[arg(long, value_parser = Subject::shapes())]
    shape: Option<String>,
    /// Surgery in memory before: 0 (none), 1 or 2; by default 2 for a shape and 0 for a model.
    #[arg(long, value_parser = clap::value_parser!(u8).range(0..=2))]
    stage: Option<u8>,
    /// Force densities: per cent at queries/keys/values, up and down, or llama, or falcon (the
    /// paper's, stage 2); may be repeated. By default a shape has both.
    #[arg(long, value_name = "Q,U,D")]
    densities: Vec<Forced>,
    /// Only dense (everything is read), or only sparse.
    #[arg(long, value_enum)]
    engine: Option<Choice>,
    /// How weights are stored: f32, f16, bf16, int8; may be several.
    #[arg(long, value_name = "FORMAT", value_delimiter = ',')]
    format: Vec<Format>,
    /// Where to compute: cpu, cuda (the first GPU) or cuda:N.
    #[arg(long, value_name = "DEVICE", default_value = "cpu", value_parser = device)]
    device: String,
    /// Tokens that are there before; of a text, of each document. By default 16, and 0 of a text.
    #[arg(long, value_name = "TOKENS")]
    context: Option<usize>,
    /// Tokens to time of each row, or rounds of curves; by default 60, or 15.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    tokens: Option<u32>,
    /// Sequences that are decoded together, each with zeros of its own or in another part of --corpus;
    /// tokens/s are those of all. A GPU takes 1, 2, 4 or 8.
    #[arg(long, value_name = "N", default_value_t = 1,
        value_parser = clap::value_parser!(u16).range(1..=64))]
    batch: u16,
    /// A model decodes this prompt's greedy continuation; by default that of an empty one.
    #[arg(long, conflicts_with_all = ["corpus", "shape", "densities"])]
    prompt: Option<String>,
    /// A model reads this text instead: txt, jsonl or parquet; a file, glob or folder. Says the
    /// perplexity too.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["shape", "densities"])]
    corpus: Option<String>,
    /// What `relufy calibrate -o FILE` measured of this model at this stage: each gated MLP is then
    /// laid out for its densities.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["shape", "curves"])]
    calibration: Option<PathBuf>,
    /// Inexact: also time it with activations counted as zero whose magnitude is below a threshold,
    /// chosen by site and layer for this density: D for all, or qkv=D,o=D,up=D,down=D; may be
    /// repeated. On the CPU.
    #[arg(long, value_name = "D", requires = "calibration",
        conflicts_with_all = ["densities", "engine"])]
    density_target: Vec<Target>,
    /// Also time what `generate --engine dense` runs, with f32 weights.
    #[arg(long, conflicts_with_all = ["shape", "densities", "engine"])]
    decoder: bool,
    /// Time each kind of matrix alone at densities 5, 10, ... 100 % instead of tokens.
    #[arg(long, conflicts_with_all = ["prompt", "corpus", "densities", "decoder", "engine", "context"])]
    curves: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Choice {
    Dense,
    Sparse,
}

impl Decode {
    pub fn run(&self) -> anyhow::Result<()> {
        let formats = self.formats()?;
        if !self.density_target.is_empty() && self.device != "cpu" {
            bail!("--density-target is for the CPU; leave --device {} out", self.device);
        }
        if self.calibration.is_some() && self.engine == Some(Choice::Dense) {
            bail!("--calibration is for the sparse engine; leave --engine dense out");
        }
        let subject =
            Subject::open(self.model.as_deref(), self.shape.as_deref(), self.stage, &self.device)?;
        let zeros = has_zeros(subject.spec());
        if !zeros && self.calibration.is_some() && self.density_target.is_empty() {
            bail!(
                "{} has no zeros to lay out for: --density-target takes small activations as zero",
                subject.name()
            );
        }
        if !zeros
            && (self.curves || self.engine == Some(Choice::Sparse) || !self.densities.is_empty())
        {
            bail!("{} has no zeros to skip: --stage 1 or 2 puts ReLUs in", subject.name());
        }
        if self.curves {
            let rounds = self.tokens.unwrap_or(15) as usize;
            return curves::run(&subject, &formats, rounds, self.json);
        }
        let tokens = self.tokens.unwrap_or(60) as usize;
        let pace = Pace::new(tokens);
        let mut lineup = Lineup::new(self, &subject, &formats, zeros, &pace)?;
        let pace = Pace { tokens: lineup.tokens, ..pace };
        let turns = take_turns(&mut lineup.timed, &mut lineup.read, &pace)?;
        let report = Report::new(self, &subject, &lineup, &turns);
        if self.json { report.json() } else { report.text() }
    }

    /// The formats, each once; f16 on the CPU and bf16 on a GPU where none is asked for.
    fn formats(&self) -> anyhow::Result<Vec<Format>> {
        let on_cpu = self.device == "cpu";
        if !on_cpu && self.curves {
            bail!("--curves are measured on the CPU");
        }
        if !on_cpu && self.format.contains(&Format::F16) {
            bail!("--format f16 is for the CPU; on a GPU weights are bf16, f32 or int8");
        }
        let usual = if on_cpu { Format::F16 } else { Format::Bf16 };
        let mut formats = Vec::new();
        for format in &self.format {
            if !formats.contains(format) {
                formats.push(*format);
            }
        }
        if formats.is_empty() {
            formats.push(usual);
        }
        Ok(formats)
    }

    /// The densities to force; none for a model that has its own.
    fn forced(&self, subject: &Subject) -> Vec<Forced> {
        match (subject, self.densities.is_empty()) {
            (Subject::Shape { .. }, true) => vec![Forced::llama(), Forced::falcon()],
            _ => self.densities.clone(),
        }
    }
}
