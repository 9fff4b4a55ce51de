//! `relufy calibrate`: what a model's activations look like, and which shifts they suggest.

use std::path::PathBuf;
use std::process::ExitCode;

use relufy_eval::table::{Cell, Column, Format, Grid};
use relufy_model::Checkpoint;
use relufy_model::checkpoint::write_atomic;
use relufy_spec::{ReluPlan, Stage};
use relufy_surgery::{Calibration, Options, calibrate};

use crate::commands::surgery::text;
use crate::compute::Compute;
use crate::out;
use crate::progress::Bars;

/// Measure densities and pre-activations per layer and site on text, and the shift of a
/// ReLU that would give a wanted sparsity.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  relufy calibrate MODEL --corpus text.jsonl
  relufy calibrate MODEL --corpus text.jsonl --sparsity 0.9,0.95 -o calibration.json
  relufy calibrate MODEL --corpus text.jsonl --device cuda
The file holds quantiles and histograms as well.")]
pub struct Calibrate {
    /// Folder or hub id.
    model: String,
    /// txt, jsonl or parquet, plain or zst/gz; a file, glob or folder.
    #[arg(long, value_name = "FILE")]
    corpus: String,
    /// Tokens to measure on.
    #[arg(long, default_value_t = 20_000)]
    tokens: u64,
    /// The sparsities to report a shift for.
    #[arg(long, value_delimiter = ',', default_values_t = Options::default().sparsities)]
    sparsity: Vec<f64>,
    /// Surgery in memory before measuring: 0 (none), 1 or 2.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=2))]
    stage: u8,
    /// terminal, markdown, csv, latex or json.
    #[arg(short, long, default_value = "terminal")]
    format: Format,
    /// Write everything, histograms too, to this JSON file.
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    #[command(flatten)]
    compute: Compute,
}

impl Calibrate {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let bars = Bars::default();
        let checkpoint = Checkpoint::resolve(&self.model, &bars)?;
        let sequences = text(&checkpoint, &self.corpus, self.tokens)?;
        let stage = Stage::try_from(self.stage).map_err(anyhow::Error::msg)?;
        let decoder = self.compute.load(&checkpoint, &ReluPlan::stage(stage))?;
        let options = Options { sparsities: self.sparsity, ..Options::default() };
        let found = calibrate(&decoder, &sequences, &options, &bars)?;
        if let Some(path) = &self.output {
            write_atomic(path, serde_json::to_string_pretty(&found)?.as_bytes())?;
        }
        out::print(grid(&found, &options).render(self.format))?;
        Ok(ExitCode::SUCCESS)
    }
}

/// Densities at each site, and the MLP activation's quantiles and shifts, a row a layer.
fn grid(found: &Calibration, options: &Options) -> Grid {
    let mut columns = vec![Column::number("layer", "layer")];
    columns.extend(
        ["qkv", "o", "up", "down"]
            .map(|site| Column::number(format!("density_{site}"), format!("{site} density %"))),
    );
    columns.extend([0.5, 0.95].map(|q| Column::number(format!("q{q}"), format!("pre-act. q{q}"))));
    columns.extend(
        options
            .sparsities
            .iter()
            .map(|s| Column::number(format!("shift_{s}"), format!("shift for {s}"))),
    );
    let rows = found.layers.iter().enumerate().map(|(n, layer)| {
        let mut row = vec![Cell::Count(n as u64)];
        row.extend(
            [&layer.qkv, &layer.o, &layer.up, &layer.down]
                .map(|site| Cell::number(100.0 * site.density, 1)),
        );
        row.extend([0.5, 0.95].map(|q| {
            let found = layer.down.quantiles.iter().find(|quantile| quantile.q == q);
            found.map_or(Cell::Empty, |quantile| Cell::number(quantile.value, 3))
        }));
        row.extend(layer.down.shifts.iter().map(|shift| Cell::number(shift.value, 3)));
        row
    });
    let notes = vec![format!(
        "measured on {} tokens; pre-activations are what the MLP's activation sees",
        found.tokens
    )];
    Grid { rows: rows.collect(), columns, notes }
}
