//! `relufy table`: results side by side, accuracy against FLOPs, and each against a baseline.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::bail;
use relufy_eval::RunResult;
use relufy_eval::table::{Format, Grid, Run, accuracy_vs_flops, against_baseline, paper_flops};
use relufy_spec::flops::Convention;
use serde_json::Value;

use crate::out;

/// Lay evaluations side by side as the paper's Table 1 does: sparsity, FLOPs, accuracy.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  relufy table runs/dense runs/s1 runs/s2
  relufy table runs/s1 runs/s2 --baseline runs/dense   # differences with intervals and p
  relufy table runs/* --format markdown
  relufy table --paper           # the paper's eleven rows: our FLOPs beside the printed ones
A folder stands for the newest results_*.json in or below it. --baseline needs evaluations with
--log_samples: models are compared on the same documents, with a paired bootstrap.")]
pub struct Table {
    /// Folders of `relufy eval -o`, or their results_*.json.
    #[arg(required_unless_present = "paper")]
    runs: Vec<PathBuf>,
    /// Compare each run with this one, document by document.
    #[arg(long, value_name = "RUN", conflicts_with = "paper")]
    baseline: Option<PathBuf>,
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
        if self.paper {
            out::print(paper_flops()?.render(self.format))?;
            return Ok(ExitCode::SUCCESS);
        }
        let runs = self.runs.iter().map(|path| Ok(Run::read(path)?));
        let mut runs = runs.collect::<anyhow::Result<Vec<Run>>>()?;
        if runs.is_empty() {
            bail!("no runs given");
        }
        let differences = match &self.baseline {
            None => None,
            Some(path) => {
                let baseline = Run::read(path)?;
                let differences = against_baseline(&runs, &baseline)?;
                if !runs.iter().any(|run| run.file() == baseline.file()) {
                    runs.insert(0, baseline);
                }
                Some(differences)
            }
        };
        let results: Vec<RunResult> = runs.into_iter().map(|run| run.result).collect();
        let table = accuracy_vs_flops(&results, convention);
        out::print(both(&table, differences.as_ref(), self.format)?)?;
        Ok(ExitCode::SUCCESS)
    }
}

/// Two tables in one text; in JSON the second is a field of the first.
fn both(table: &Grid, differences: Option<&Grid>, format: Format) -> anyhow::Result<String> {
    let Some(differences) = differences else { return Ok(table.render(format)) };
    if format != Format::Json {
        return Ok(format!("{}\n{}", table.render(format), differences.render(format)));
    }
    let mut whole: Value = serde_json::from_str(&table.render(format))?;
    whole["differences"] = serde_json::from_str(&differences.render(format))?;
    Ok(format!("{whole:#}\n"))
}
