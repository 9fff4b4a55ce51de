//! `relufy bench prompt`: how long a prompt takes until its first new token.

use std::time::Instant;

use relufy_eval::table::{Cell, Column, Format as Rendered, Grid};
use relufy_model::{Decoder, Init, KvCache, Params, next_logits};
use relufy_sparse::bench::median;
use relufy_sparse::{Engine, Format, Options, Session};
use serde_json::json;

use super::subject::Subject;
use crate::out;

/// Time prompts up to their first new token: the sparse engine's formats, and the decoder that
/// `--engine dense` runs.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  relufy bench prompt --shape m
  relufy bench prompt MODEL-S2 --format int8 --lengths 32,1000
All take turns, prompt by prompt, on the CPU; milliseconds are medians, and `times decoder` is the
median of the ratios within a turn. The decoder's weights are f32. Tokens are of no text, and zeros
are those that the model has: of a shape, whose weights are random, about half of what a ReLU sees.")]
pub struct Prompt {
    /// Folder or hub id.
    model: Option<String>,
    /// Random weights of this shape instead of a model; m, the default, is 1b.
    #[arg(long, conflicts_with = "model", value_parser = Subject::shapes())]
    shape: Option<String>,
    /// Surgery in memory before: 0 (none), 1 or 2; by default 2 for a shape and 0 for a model.
    #[arg(long, value_parser = clap::value_parser!(u8).range(0..=2))]
    stage: Option<u8>,
    /// How the engine's weights are stored: f32, f16, bf16, int8; may be several.
    #[arg(long, value_name = "FORMAT", value_delimiter = ',', default_values = ["f16", "int8"])]
    format: Vec<Format>,
    /// Tokens of the prompts.
    #[arg(long, value_name = "N", value_delimiter = ',',
        default_values = ["16", "32", "64", "256", "512"],
        value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    lengths: Vec<u32>,
    /// Turns to time, after one that is not.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Seconds of each turn, for each length.
type Times = Vec<Vec<f64>>;

impl Prompt {
    pub fn run(&self) -> anyhow::Result<()> {
        let (model, shape) = (self.model.as_deref(), self.shape.as_deref());
        let subject = Subject::open(model, shape, self.stage, "cpu")?;
        let decoder = match &subject {
            Subject::Model { real, .. } => &real.decoder,
            Subject::Shape { spec, device, .. } => {
                let params = Params::random(spec, &Init::default(), device)?;
                &Decoder::new((**spec).clone(), params)?
            }
        };
        let context = self.lengths.iter().max().map_or(0, |length| *length as usize);
        let mut sessions = Vec::new();
        for format in &self.format {
            let options = Options { format: *format, context, ..Options::default() };
            sessions.push(Session::new(&Engine::new(decoder, &options)?)?);
        }
        let (dense, sparse) = self.time(decoder, &mut sessions)?;
        if self.json {
            self.print_json(&subject, &dense, &sparse)
        } else {
            self.print(&dense, &sparse)
        }
    }

    /// Lets the decoder and the sessions take turns.
    fn time(
        &self,
        decoder: &Decoder,
        sessions: &mut [Session],
    ) -> anyhow::Result<(Times, Vec<Times>)> {
        let nothing = vec![Vec::new(); self.lengths.len()];
        let (mut dense, mut sparse) = (nothing.clone(), vec![nothing; sessions.len()]);
        let vocab = decoder.spec().vocab;
        for round in 0..=self.rounds {
            for (n, length) in self.lengths.iter().enumerate() {
                // No token is like the one before, and no round like another.
                let token = |at| (at as usize * 7919 + round as usize * 104_729) % vocab;
                let ids: Vec<u32> = (0..*length).map(|at| token(at) as u32).collect();
                let timed = |times: &mut Vec<f64>, read: &mut dyn FnMut() -> anyhow::Result<()>| {
                    let begun = Instant::now();
                    read()?;
                    // The first round fills caches.
                    times.extend((round > 0).then(|| begun.elapsed().as_secs_f64()));
                    anyhow::Ok(())
                };
                let mut cache = KvCache::new(decoder, 1, ids.len())?;
                timed(
                    &mut dense[n],
                    &mut || Ok(next_logits(decoder, &mut cache, &ids).map(drop)?),
                )?;
                for (session, times) in sessions.iter_mut().zip(&mut sparse) {
                    session.truncate(0);
                    timed(&mut times[n], &mut || Ok(session.prefill(&ids).map(drop)?))?;
                }
            }
        }
        Ok((dense, sparse))
    }

    fn print(&self, dense: &Times, sparse: &[Times]) -> anyhow::Result<()> {
        let columns = vec![
            Column::text("engine", "engine"),
            Column::number("tokens", "tokens"),
            Column::number("ms", "ms"),
            Column::number("tokens_per_second", "tokens/s"),
            Column::number("times_decoder", "times decoder"),
        ];
        let mut rows = Vec::new();
        for (n, &length) in self.lengths.iter().enumerate() {
            let row = |name: String, times: &Times, ratio: Cell| {
                let seconds = median(&times[n]);
                vec![
                    Cell::Text(name),
                    Cell::number(f64::from(length), 0),
                    Cell::number(1e3 * seconds, 1),
                    Cell::number(f64::from(length) / seconds, 1),
                    ratio,
                ]
            };
            rows.push(row("decoder, f32".to_owned(), dense, Cell::Empty));
            for (format, times) in self.format.iter().zip(sparse) {
                let ratio = Cell::number(ratio(&dense[n], &times[n]), 2);
                rows.push(row(format.to_string(), times, ratio));
            }
        }
        Ok(out::print(Grid { columns, rows, notes: Vec::new() }.render(Rendered::Terminal))?)
    }

    fn print_json(&self, subject: &Subject, dense: &Times, sparse: &[Times]) -> anyhow::Result<()> {
        let each = |times: &Times| -> Vec<_> {
            let all = self.lengths.iter().zip(times).zip(dense);
            all.map(|((length, times), dense)| {
                json!({"tokens": length, "seconds": times, "times_decoder": ratio(dense, times)})
            })
            .collect()
        };
        let formats = self.format.iter().zip(sparse);
        let formats: Vec<_> = formats
            .map(|(format, times)| json!({"format": format, "prompts": each(times)}))
            .collect();
        Ok(out::line(json!({
            "subject": subject.name(), "stage": subject.stage(), "device": "cpu",
            "threads": rayon::current_num_threads(), "decoder": each(dense), "formats": formats,
        }))?)
    }
}

/// How many times as fast as the decoder.
fn ratio(dense: &[f64], times: &[f64]) -> f64 {
    let ratios: Vec<f64> = dense.iter().zip(times).map(|(dense, time)| dense / time).collect();
    median(&ratios)
}
