//! `--curves`: each kind of matrix alone, by density.

use anyhow::Context;
use relufy_eval::table::{Cell, Column, Format as Rendered, Grid};
use relufy_sparse::bench::{Curve, Curves, Part, RawRead};
use relufy_sparse::{Format, Options};
use relufy_spec::MlpKind;
use serde_json::{Value, json};

use super::super::subject::Subject;
use super::machine::{Machine, READ};
use crate::out;

/// Measures and prints.
pub fn run(
    subject: &Subject,
    formats: &[Format],
    rounds: usize,
    as_json: bool,
) -> anyhow::Result<()> {
    let densities: Vec<f64> = (1..=20).map(|n| f64::from(n) / 20.0).collect();
    let raw = RawRead::new(READ)?;
    let threads = rayon::current_num_threads();
    let mut all: Vec<Value> = Vec::new();
    for format in formats {
        let options = Options { format: *format, threads, context: 1 };
        let engine = |skip| {
            let machine = Machine::new(subject, skip, &options)?;
            machine.cpu().context("--curves are measured on the CPU")
        };
        let (sparse, dense) = (engine(true)?, engine(false)?);
        let curves = Curves::new(&sparse, &dense, &raw, &densities).measure(rounds)?;
        if as_json {
            all.push(json!({"format": format, "curves": curves}));
            continue;
        }
        for curve in &curves {
            out::line(format_args!(
                "{}, {format}, {}: dense {:.2} ms for {:.1} MB, {threads} threads, {rounds} rounds",
                subject.name(),
                name(curve.part, subject),
                curve.dense_ms,
                curve.dense_bytes as f64 / 1e6
            ))?;
            out::print(grid(curve).render(Rendered::Terminal))?;
        }
    }
    if as_json {
        out::line(json!({
            "subject": subject.name(), "stage": subject.stage(), "device": "cpu",
            "threads": threads, "rounds": rounds, "formats": all,
        }))?;
    }
    Ok(())
}

/// What the part is called.
fn name(part: Part, subject: &Subject) -> &'static str {
    let gated = subject.spec().layers.iter().all(|layer| layer.mlp.kind == MlpKind::Gated);
    match (part, gated) {
        (Part::Qkv, _) => "queries, keys and values by input",
        (Part::Gate, true) => "gate by input",
        (Part::Gate, false) => "up by input",
        (Part::Neurons, true) => "up and down by neuron",
        (Part::Neurons, false) => "down by neuron",
    }
}

fn grid(curve: &Curve) -> Grid {
    let columns = vec![
        Column::number("density", "density %"),
        Column::number("ms", "ms"),
        Column::number("gb_per_second", "GB/s"),
        Column::number("share_of_read", "of plain read %"),
        Column::number("share_of_dense", "of dense time %"),
        Column::number("ideal", "of dense bytes %"),
    ];
    let rows = curve.points.iter().map(|point| {
        vec![
            Cell::number(100.0 * point.density, 0),
            Cell::number(point.ms, 2),
            Cell::number(point.bytes as f64 / point.ms / 1e6, 1),
            Cell::number(100.0 * point.share_of_read, 1),
            Cell::number(100.0 * point.share_of_dense, 1),
            Cell::number(100.0 * point.ideal, 1),
        ]
    });
    Grid { columns, rows: rows.collect(), notes: Vec::new() }
}
