//! `relufy generate`: text from a prompt, token by token.

use std::io::{IsTerminal, Read, Write};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, bail};
use relufy_model::Checkpoint;
use relufy_spec::{ReluPlan, Stage};

use crate::engine::{EngineArgs, generate};
use crate::out;
use crate::progress::Bars;
use crate::sampling::{Draw, Sampler};

/// Continue a prompt; the text appears as it is made.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  relufy generate MODEL --prompt 'Once upon a time'
  relufy generate MODEL --prompt 'Once upon a time' --temperature 0.8 --top-p 0.95 --seed 7
  cat prompt.txt | relufy generate MODEL --prompt -
  relufy generate MODEL --prompt 'Once upon a time' --device cuda
  relufy generate MODEL-S2 --prompt 'Once upon a time' --engine sparse --format int8
Greedy unless a temperature is given.")]
pub struct Generate {
    /// Folder or hub id.
    model: String,
    /// The text to continue; `-` reads it from standard input.
    #[arg(short, long)]
    prompt: String,
    /// At most so many new tokens.
    #[arg(short = 'n', long, default_value_t = 200)]
    max_new_tokens: usize,
    /// 0 is greedy; 1 samples the model's own distribution.
    #[arg(short, long, default_value_t = 0.0)]
    temperature: f64,
    /// Sample among the K most likely tokens only.
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Sample among the most likely tokens that make up the probability P.
    #[arg(long, value_name = "P")]
    top_p: Option<f64>,
    /// Seed of the sampling.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Surgery in memory before the run: 0 (none), 1 or 2.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=2))]
    stage: u8,
    /// Do not print the prompt itself.
    #[arg(long)]
    no_echo: bool,
    #[command(flatten)]
    engine: EngineArgs,
}

impl Generate {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let draw = self.draw()?;
        let prompt = match self.prompt.as_str() {
            "-" => {
                let mut text = String::new();
                std::io::stdin().read_to_string(&mut text).context("standard input")?;
                text
            }
            text => text.to_owned(),
        };
        let checkpoint = Checkpoint::resolve(&self.model, &Bars::default())?;
        let tokenizer = checkpoint.tokenizer()?;
        let stage = Stage::try_from(self.stage).map_err(anyhow::Error::msg)?;
        let mut engine = self.engine.load(&checkpoint, &ReluPlan::stage(stage), Some(1))?;

        let mut ids = tokenizer.encode(&prompt, true)?;
        if ids.is_empty() {
            // An empty prompt is the beginning of a text.
            ids.extend(tokenizer.prefix_token());
        }
        let max = checkpoint.config().spec.max_positions;
        if ids.len() > max {
            return Err(relufy_model::Error::SequenceTooLong { len: ids.len(), max })
                .context("--prompt");
        }
        let mut sampler = Sampler::new(&draw);
        let mut stream = tokenizer.stream_after(&ids, true)?;
        let mut out = std::io::stdout().lock();
        if !self.no_echo {
            write!(out, "{prompt}")?;
            out.flush()?;
        }
        let started = Instant::now();
        let mut broken = None;
        let made = generate(
            engine.as_mut(),
            &ids,
            self.max_new_tokens,
            tokenizer.eos_ids(),
            &mut |logits| sampler.pick(logits),
            &mut |token| {
                let shown = stream.push(token).map_err(anyhow::Error::from).and_then(|text| {
                    out.write_all(text.unwrap_or_default().as_bytes())?;
                    Ok(out.flush()?)
                });
                broken = shown.err();
                broken.is_none()
            },
        )?;
        if let Some(error) = broken {
            return Err(error);
        }
        if let Some(rest) = stream.finish()? {
            write!(out, "{rest}")?;
        }
        writeln!(out)?;
        if std::io::stderr().is_terminal() {
            let seconds = started.elapsed().as_secs_f64();
            out::warn(format_args!("{made} tokens, {:.1} tokens/s", made as f64 / seconds));
        }
        Ok(ExitCode::SUCCESS)
    }

    fn draw(&self) -> anyhow::Result<Draw> {
        let Generate { temperature, top_k, top_p, seed, .. } = *self;
        if !(temperature >= 0.0 && temperature.is_finite()) {
            bail!("--temperature {temperature}: expected 0 (greedy) or more");
        }
        if top_p.is_some_and(|p| !(p > 0.0 && p <= 1.0)) || top_k == Some(0) {
            bail!("expected --top-p above 0 and at most 1, and --top-k of at least 1");
        }
        if temperature == 0.0 && (top_k.is_some() || top_p.is_some()) {
            bail!("--top-k and --top-p need a --temperature above 0");
        }
        Ok(Draw { temperature, top_k, top_p, seed })
    }
}
