//! `relufy eval`: tasks, perplexity, densities and FLOPs of one model.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::bail;
use candle_core::Device;
use relufy_data::{Hub, SourceConfig, TaskData};
use relufy_eval::{
    Corpus, Inputs, ModelInfo, RunResult, Session, SessionOptions, Suite, evaluate, table, tasks,
};
use relufy_model::Checkpoint;
use relufy_spec::flops::Convention;
use relufy_spec::{ReluPlan, Stage};

use crate::out;
use crate::progress::Bars;

/// Evaluate a model: zero-shot tasks, perplexity, densities and FLOPs per token.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  relufy eval MODEL --tasks arc_easy,piqa,lambada_openai -o runs/dense
  relufy eval MODEL --tasks arc_easy --data DIR --limit 200      # DIR/allenai/ai2_arc/ARC-Easy/test.jsonl
  relufy eval MODEL --corpus wikitext=wikitext-2-raw-test.txt.zst
  relufy eval MODEL --tasks facts=my-questions.jsonl             # questions in the schema of ai2_arc
  relufy eval ls                                                 # the tasks by name
`relufy table runs/dense runs/s1` lays results side by side. Prompts and scores are those of
lm-evaluation-harness 0.4.13.")]
pub struct Eval {
    /// Folder or hub id; `ls` lists the tasks.
    model: String,
    /// Tasks by name; NAME=FILE for questions in the schema of ai2_arc, NAME=lambada:FILE for
    /// passages whose last word is to be found.
    #[arg(short, long, value_delimiter = ',')]
    tasks: Vec<String>,
    /// NAME=PATH: perplexity over a text corpus (txt, jsonl, parquet, plain or zst/gz).
    #[arg(long, value_name = "NAME=PATH")]
    corpus: Vec<String>,
    /// Predicted tokens of a window of a corpus; by default the longest input.
    #[arg(long, value_name = "TOKENS")]
    seq_len: Option<usize>,
    /// End a corpus after so many predicted tokens.
    #[arg(long, value_name = "TOKENS")]
    max_tokens: Option<u64>,
    /// Where the datasets lie, as REPOSITORY/CONFIG/SPLIT.jsonl; by default the hub.
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Only the first N documents of each task.
    #[arg(short = 'L', long, value_name = "N")]
    limit: Option<usize>,
    /// Longest input in tokens; by default the model's positions.
    #[arg(long, value_name = "TOKENS")]
    max_length: Option<usize>,
    /// Tokens of one forward pass.
    #[arg(long, value_name = "TOKENS", default_value_t = SessionOptions::default().tokens_per_batch)]
    tokens_per_batch: usize,
    /// Surgery in memory before the run: 0 (none), 1 or 2.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=2))]
    stage: u8,
    /// Name in results and tables; by default the hub id or folder.
    #[arg(long)]
    name: Option<String>,
    /// Write results.json into this folder.
    #[arg(short, long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

impl Eval {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        if self.model == "ls" {
            for task in tasks::all() {
                out::line(format_args!("{:<16} {}", task.name(), task.source()))?;
            }
            return Ok(ExitCode::SUCCESS);
        }
        let suite = self.suite()?;
        let bars = Bars::default();
        let checkpoint = Checkpoint::resolve(&self.model, &bars)?;
        let tokenizer = checkpoint.tokenizer()?;
        let stage = Stage::try_from(self.stage).map_err(anyhow::Error::msg)?;
        let decoder = checkpoint.load_with(&Device::Cpu, &ReluPlan::stage(stage))?;
        let options =
            SessionOptions { max_length: self.max_length, tokens_per_batch: self.tokens_per_batch };
        let session = Session::new(&decoder, &tokenizer, options)?;

        let mut model = ModelInfo::of(&checkpoint);
        model.stage = model.stage.max(stage);
        if stage > Stage::Dense {
            model.name = format!("{} (s{}, not fine-tuned)", model.name, self.stage);
        }
        if let Some(name) = self.name {
            model.name = name;
        }
        let hub = Hub::from_env()?;
        let data = match self.data {
            Some(root) => TaskData::local(root),
            None => TaskData::hub(hub.clone()),
        };
        let result = evaluate(&session, model, &suite, &Inputs { tasks: &data, hub: &hub }, &bars)?;
        if let Some(folder) = &self.output {
            result.write(folder)?;
        }
        if self.json {
            out::line(serde_json::to_string_pretty(&result)?)?;
        } else {
            out::print(text(result))?;
        }
        Ok(ExitCode::SUCCESS)
    }

    fn suite(&self) -> anyhow::Result<Suite> {
        if self.tasks.is_empty() && self.corpus.is_empty() {
            bail!(
                "nothing to evaluate: give --tasks or --corpus (`relufy eval ls` lists the tasks)"
            );
        }
        let named = self.tasks.iter().map(|name| Ok(tasks::find(name)?));
        let tasks = named.collect::<anyhow::Result<_>>()?;
        let corpora = self
            .corpus
            .iter()
            .map(|argument| {
                let Some((name, path)) = argument.split_once('=') else {
                    bail!("--corpus {argument}: expected NAME=PATH");
                };
                Ok(Corpus {
                    sequence_length: self.seq_len,
                    max_tokens: self.max_tokens,
                    ..Corpus::new(name, SourceConfig::new(path))
                })
            })
            .collect::<anyhow::Result<_>>()?;
        Ok(Suite { tasks, corpora, limit: self.limit })
    }
}

/// The result as a table of its own, and what was left out.
fn text(result: RunResult) -> String {
    let left_out: Vec<String> = result
        .tasks
        .iter()
        .filter(|task| !task.excluded.is_empty())
        .map(|task| {
            format!(
                "{}: {} documents left out (no token to score)\n",
                task.name,
                task.excluded.len()
            )
        })
        .collect();
    let seconds: f64 = result.tasks.iter().map(|task| task.seconds).sum();
    let grid = table::accuracy_vs_flops(&[result], Convention::PaperCompat);
    format!(
        "{}{}scored in {seconds:.1} s\n",
        grid.render(table::Format::Terminal),
        left_out.concat()
    )
}
