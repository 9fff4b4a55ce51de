//! `relufy table`: results side by side, accuracy against FLOPs.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::bail;
use relufy_eval::RunResult;
use relufy_eval::table::{Format, accuracy_vs_flops, paper_flops};
use relufy_spec::flops::Convention;

use crate::out;

/// Lay evaluations side by side as the paper's Table 1 does: sparsity, FLOPs, accuracy.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  relufy table runs/dense runs/s1 runs/s2
  relufy table runs/* --format markdown
  relufy table --paper           # the paper's eleven rows: our FLOPs beside the printed ones")]
pub struct Table {
    /// Folders of `relufy eval -o`, or their results.json.
    #[arg(required_unless_present = "paper")]
    runs: Vec<PathBuf>,
    /// The paper's rows instead of runs.
    #[arg(long, conflicts_with = "runs")]
    paper: bool,
    /// terminal, markdown, csv, latex or json.
    #[arg(short, long, default_value = "terminal")]
    format: Format,
    /// What counts as FLOPs of a token.
    #[arg(long, value_enum, default_value_t = Flops::Paper)]
    flops: Flops,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Flops {
    /// The layers' matrices only.
    Blocks,
    /// The layers' matrices and the head.
    Head,
    /// As the paper counts.
    Paper,
}

impl Table {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let convention = match self.flops {
            Flops::Blocks => Convention::Blocks,
            Flops::Head => Convention::WithHead,
            Flops::Paper => Convention::PaperCompat,
        };
        let grid = if self.paper {
            paper_flops()?
        } else {
            let runs = self
                .runs
                .iter()
                .map(|path| Ok(RunResult::read(path)?))
                .collect::<anyhow::Result<Vec<_>>>()?;
            if runs.is_empty() {
                bail!("no runs given");
            }
            accuracy_vs_flops(&runs, convention)
        };
        out::print(grid.render(self.format))?;
        Ok(ExitCode::SUCCESS)
    }
}
