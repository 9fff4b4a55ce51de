//! What was measured, for people and for programs.

use relufy_eval::table::{Cell, Column, Format as Rendered, Grid};
use relufy_sparse::bench::{Speed, Turns};
use relufy_spec::flops::SiteDensities;
use serde::Serialize;
use serde_json::{Value, json};

use super::super::subject::Subject;
use super::Decode;
use super::lineup::{Lineup, Row};
use crate::calibration::Target;
use crate::{human, out};

/// Everything that is printed.
#[derive(Serialize)]
pub struct Report<'a> {
    relufy: &'static str,
    subject: &'a str,
    parameters: usize,
    stage: u8,
    device: &'a str,
    /// `None` on a GPU.
    threads: Option<usize>,
    context: usize,
    tokens: usize,
    batch: u16,
    /// Tokens of a turn.
    run: usize,
    /// Bytes a second, median.
    read: f64,
    /// What a model's matrices read in the text.
    densities: Option<SiteDensities>,
    rows: Vec<Value>,
    #[serde(skip)]
    speeds: Vec<(&'a Row, Speed)>,
    #[serde(skip)]
    foreign: bool,
    /// Whether some rows have thresholds.
    #[serde(skip)]
    targets: bool,
}

impl<'a> Report<'a> {
    pub fn new(
        args: &'a Decode,
        subject: &'a Subject,
        lineup: &'a Lineup<'_>,
        turns: &Turns,
    ) -> Report<'a> {
        let rows = lineup.rows.iter().enumerate();
        let speeds: Vec<(&Row, Speed)> = rows
            .map(|(n, row)| {
                let mut speed = turns.speed(n, row.beside);
                // What a model without its zeros makes of a text says nothing, nor what a model
                // makes of its own.
                if (row.engine == "dense" && lineup.densities.is_some()) || !lineup.foreign {
                    speed.perplexity = None;
                }
                (row, speed)
            })
            .collect();
        let row = |(row, speed): &(&Row, Speed)| {
            let mut value = json!({
                "name": row.name, "engine": row.engine, "format": row.format,
                "forced": row.forced, "exact": row.exact,
                "target": row.target.map(|Target(densities)| densities),
                "times_exact_perplexity": times_exact(&speeds, row, speed),
            });
            if let (Value::Object(all), Ok(Value::Object(more))) =
                (&mut value, serde_json::to_value(speed))
            {
                all.extend(more);
            }
            value
        };
        Report {
            relufy: env!("CARGO_PKG_VERSION"),
            subject: subject.name(),
            parameters: subject.spec().parameter_count(),
            stage: subject.stage(),
            device: &args.device,
            threads: lineup.threads,
            context: lineup.context,
            tokens: lineup.tokens,
            batch: args.batch,
            run: turns.run,
            read: turns.read(),
            densities: lineup.densities,
            rows: speeds.iter().map(row).collect(),
            targets: lineup.rows.iter().any(|row| row.target.is_some()),
            speeds,
            foreign: lineup.foreign,
        }
    }

    pub fn json(&self) -> anyhow::Result<()> {
        Ok(out::line(serde_json::to_value(self)?)?)
    }

    pub fn text(&self) -> anyhow::Result<()> {
        let surgery = match self.stage {
            0 => String::new(),
            stage => format!(" put to stage {stage}"),
        };
        out::line(format_args!(
            "{} ({} parameters){surgery} on {}{}",
            self.subject,
            human::count(self.parameters as f64),
            self.device,
            self.threads.map_or(String::new(), |threads| format!(", {threads} threads")),
        ))?;
        let after = match (self.context, self.foreign) {
            (0, _) => String::new(),
            (context, true) => format!(", after {context} of each document"),
            (context, false) => format!(", after {context}"),
        };
        out::line(format_args!(
            "each row decodes {} tokens{after}, in turns of {}",
            self.tokens, self.run,
        ))?;
        out::line(format_args!("plain read {:.1} GB/s", self.read / 1e9))?;
        if let Some(SiteDensities { qkv, o, up, down }) = &self.densities {
            let [qkv, o, up, down] = [qkv, o, up, down].map(|density| human::percent(*density));
            out::line(format_args!("densities: QKV {qkv}, o {o}, up {up}, down {down}"))?;
        }
        Ok(out::print(self.grid().render(Rendered::Terminal))?)
    }

    fn grid(&self) -> Grid {
        let mut columns = vec![
            Column::text("name", ""),
            Column::number("tokens_per_second", "tokens/s"),
            Column::number("megabytes", "MB a token"),
            Column::number("share_of_read", "of plain read %"),
            Column::number("times", "times dense"),
            Column::number("allowed", "bytes allow"),
            Column::number("share", "of that %"),
        ];
        if self.foreign {
            columns.push(Column::number("perplexity", "perplexity"));
        }
        if self.foreign && self.targets {
            columns.push(Column::number("times_exact_perplexity", "times exact"));
        }
        if self.targets {
            let sites = ["qkv", "o", "up", "down"];
            columns.extend(sites.map(|site| Column::number(site, format!("{site} density %"))));
        }
        let some =
            |value: Option<f64>, digits| value.map_or(Cell::Empty, |v| Cell::number(v, digits));
        let rows = self.speeds.iter().map(|(row, speed)| {
            let mut cells = vec![
                Cell::Text(row.name.clone()),
                Cell::number(
                    speed.tokens_per_second,
                    if speed.tokens_per_second < 1e3 { 1 } else { 0 },
                ),
                Cell::number(speed.bytes / 1e6, if speed.bytes < 1e8 { 2 } else { 0 }),
                Cell::number(100.0 * speed.share_of_read, 1),
                some(speed.faster.map(|faster| faster.times), 2),
                some(speed.faster.map(|faster| faster.allowed), 2),
                some(speed.faster.map(|faster| 100.0 * faster.share), 1),
            ];
            if self.foreign {
                cells.push(some(speed.perplexity, 4));
            }
            if self.foreign && self.targets {
                cells.push(some(times_exact(&self.speeds, row, speed), 4));
            }
            if self.targets {
                let sites = speed.densities.map(|each| [each.qkv, each.o, each.up, each.down]);
                cells.extend((0..4).map(|n| some(sites.map(|sites| 100.0 * sites[n]), 1)));
            }
            cells
        });
        let mut notes = Vec::new();
        if self.speeds.iter().any(|(_, speed)| speed.share_of_read > 1.05) {
            notes.push("more than 100 % of a plain read: weights come from a cache".to_owned());
        }
        if self.speeds.iter().any(|(row, _)| !row.exact) {
            let inexact = "inexact: activations below thresholds count as zero";
            notes.push(inexact.to_owned());
        }
        Grid { columns, rows: rows.collect(), notes }
    }
}

/// A row's perplexity over that of the exact row of its format, where it is not exact itself.
fn times_exact(speeds: &[(&Row, Speed)], row: &Row, speed: &Speed) -> Option<f64> {
    if row.exact {
        return None;
    }
    let same = |other: &Row| other.exact && other.format == row.format;
    let mut engines = speeds.iter().filter(|(other, _)| same(other) && other.engine != "decoder");
    let exact = engines.find_map(|(_, other)| other.perplexity)?;
    Some(speed.perplexity? / exact)
}
