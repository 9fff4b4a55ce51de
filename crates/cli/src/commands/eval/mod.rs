//! `relufy eval`: tasks, perplexity, densities and FLOPs of one model.

mod flags;
mod report;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::bail;
use flags::{BatchSize, Missing, ModelArgs};
use relufy_data::{Hub, Progress, SourceConfig, TaskData};
use relufy_eval::tasks::{self, Chosen, Limit};
use relufy_eval::{
    Cache, Compat, Corpus, Inputs, ModelInfo, Session, SessionOptions, Settings, Suite, evaluate,
    identity,
};
use relufy_model::{Checkpoint, Precision};
use relufy_spec::{ReluPlan, Stage};

use crate::compute::Compute;
use crate::progress::Bars;
use crate::{out, stop};

/// Evaluate a model: the tasks of lm-evaluation-harness with its numbers, perplexity, densities
/// and FLOPs per token.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  relufy eval MODEL --tasks paper -o runs/dense                  # the paper's nine tasks
  relufy eval MODEL --tasks mmlu --num_fewshot 5 --use_cache runs/answers.jsonl
  relufy eval MODEL --tasks arc_easy --data DIR --limit 200      # DIR/allenai/ai2_arc/ARC-Easy/test.jsonl
  relufy eval MODEL --corpus wikitext=wikitext-2-raw-test.txt.zst
  relufy eval MODEL --tasks facts=my-questions.jsonl             # questions in the schema of ai2_arc
  relufy eval MODEL --tasks paper --device cuda                  # in bf16; --dtype f32 for f32
  relufy eval ls                                                 # tasks and groups by name
Flags have the harness's names; a `-` may stand for each `_`. Prompts and scores are those of
lm-evaluation-harness 0.4.13. Results are written as DIR/MODEL/results_TIME.json, never over
earlier ones; `relufy table runs/dense runs/s1` lays them side by side.")]
pub struct Eval {
    /// Folder or hub id (`org/name@revision`); `ls` lists the tasks.
    #[arg(value_name = "MODEL")]
    reference: Option<String>,
    /// `hf`, for whoever is used to it: the model is then in --model_args.
    #[arg(short = 'M', long, value_name = "hf", value_parser = ["hf", "huggingface"])]
    model: Option<String>,
    /// KEY=VALUE,...: pretrained, revision, dtype (auto, float32, bfloat16), max_length.
    #[arg(short = 'a', long = "model_args", alias = "model-args", value_name = "ARGS")]
    model_args: Vec<String>,
    /// Tasks, groups or patterns by name; NAME=FILE for questions in the schema of ai2_arc,
    /// NAME=lambada:FILE for passages whose last word is to be found.
    #[arg(short, long, value_delimiter = ',', value_name = "NAMES")]
    tasks: Vec<String>,
    /// Examples in front of each question; by default the task's own number.
    #[arg(short = 'f', long = "num_fewshot", alias = "num-fewshot", value_name = "N")]
    num_fewshot: Option<usize>,
    /// Only the first N documents of each task, or this share of them (0.1).
    #[arg(short = 'L', long, value_name = "N", value_parser = flags::limit)]
    limit: Option<Limit>,
    /// {"TASK": [0, 3]}: only these documents, from 0; or a file that holds this.
    #[arg(short = 'E', long, value_name = "JSON", conflicts_with = "limit")]
    samples: Option<String>,
    /// NAME=PATH: perplexity over a text corpus (txt, jsonl, parquet, plain or zst/gz).
    #[arg(long, value_name = "NAME=PATH")]
    corpus: Vec<String>,
    /// Predicted tokens of a window of a corpus; by default the longest input.
    #[arg(long = "seq_len", alias = "seq-len", value_name = "TOKENS")]
    seq_len: Option<usize>,
    /// End a corpus after so many predicted tokens.
    #[arg(long = "max_tokens", alias = "max-tokens", value_name = "TOKENS")]
    max_tokens: Option<u64>,
    /// Where the datasets lie, as REPOSITORY/CONFIG/SPLIT.jsonl or .parquet; by default the hub.
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Write results below this folder (or, with .json at its end, beside this file).
    #[arg(short, long = "output_path", aliases = ["output-path", "output"], value_name = "DIR")]
    output_path: Option<PathBuf>,
    /// Write each document with its answers too.
    #[arg(short = 's', long = "log_samples", alias = "log-samples", requires = "output_path")]
    log_samples: bool,
    /// Keep each answer in this file, and ask only what is not there yet.
    #[arg(short = 'c', long = "use_cache", alias = "use-cache", value_name = "FILE")]
    use_cache: Option<PathBuf>,
    /// Longest input in tokens; by default the model's positions.
    #[arg(long = "max_length", alias = "max-length", value_name = "TOKENS")]
    max_length: Option<usize>,
    /// Tokens of one forward pass; by default 2048 on the CPU and 16384 on a GPU.
    #[arg(long = "tokens_per_batch", alias = "tokens-per-batch", value_name = "TOKENS")]
    tokens_per_batch: Option<usize>,
    /// `auto`: passes of --tokens_per_batch; N: passes of as many tokens as N of the longest
    /// inputs have. Nothing is padded: it is a matter of time and memory.
    #[arg(short, long = "batch_size", alias = "batch-size", value_name = "N", default_value = "auto",
        value_parser = flags::batch_size, conflicts_with = "tokens_per_batch")]
    batch_size: BatchSize,
    #[command(flatten)]
    compute: Compute,
    /// Surgery in memory before the run: 0 (none), 1 or 2.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=2))]
    stage: u8,
    /// Follow this release of lm-evaluation-harness: 0.4.13, or 0.4.9.1, which adds no BOS.
    #[arg(long, default_value = "0.4.13", value_parser = flags::compat)]
    compat: Compat,
    /// Seeds of Python, NumPy, PyTorch and examples; only the last one draws anything here.
    #[arg(long, value_name = "SEEDS", default_value = "0,1234,1234,1234",
        value_parser = flags::seeds)]
    seed: Seeds,
    /// Replicates of the bootstrap behind a perplexity's standard error; 0: no standard errors.
    #[arg(long = "bootstrap_iters", alias = "bootstrap-iters", value_name = "N",
        default_value_t = Suite::default().bootstrap_iters)]
    bootstrap_iters: u32,
    /// Name in tables; by default the hub id or folder.
    #[arg(long)]
    name: Option<String>,
    /// Show the first prompt of each task before anything is asked.
    #[arg(short, long = "write_out", alias = "write-out")]
    write_out: bool,
    /// Print the whole result in front of the table.
    #[arg(long = "show_config", alias = "show-config")]
    show_config: bool,
    /// Print the result as JSON, as it is written to results_TIME.json.
    #[arg(long)]
    json: bool,
    /// Accepted for the harness's sake, without effect: no code comes with a model or a task.
    #[arg(long = "trust_remote_code", alias = "trust-remote-code")]
    trust_remote_code: bool,
    #[command(flatten)]
    missing: Missing,
}

type Seeds = [Option<u64>; 4];

/// A GPU wants more rows at a time than a CPU's caches do.
const GPU_TOKENS_PER_BATCH: usize = 16_384;

impl Eval {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let asks_for_list = self.tasks.len() == 1 && self.tasks[0] == "list";
        if self.reference.as_deref() == Some("ls") || asks_for_list {
            out::print(report::catalog())?;
            return Ok(ExitCode::SUCCESS);
        }
        self.missing.refuse()?;
        let args = ModelArgs::parse(&self.model_args)?;
        let reference = self.model_reference(&args)?;
        let suite = self.suite()?;
        stop::at_once(match &self.use_cache {
            Some(path) => {
                format!("\ninterrupted; the same command goes on from {}", path.display())
            }
            None => {
                "\ninterrupted; with --use_cache FILE the next one goes on where it ended".into()
            }
        })?;

        let bars = Bars::default();
        let checkpoint = Checkpoint::resolve(&reference, &bars)?;
        let tokenizer = checkpoint.tokenizer()?;
        let stage = Stage::try_from(self.stage).map_err(anyhow::Error::msg)?;
        let compute = self.compute(&args)?;
        let decoder = compute.load(&checkpoint, &ReluPlan::stage(stage))?;
        let (on_cpu, dtype) = (decoder.device().is_cpu(), decoder.params().dtype());
        let tokens_per_batch = self.tokens_per_batch.unwrap_or(match on_cpu {
            true => SessionOptions::default().tokens_per_batch,
            false => GPU_TOKENS_PER_BATCH,
        });
        let max_length = self.max_length.or(args.max_length);
        let options = SessionOptions {
            max_length,
            tokens_per_batch: match self.batch_size {
                BatchSize::Auto => tokens_per_batch,
                BatchSize::Requests(n) => {
                    n.saturating_mul(max_length.unwrap_or(decoder.spec().max_positions))
                }
            },
            compat: self.compat,
        };
        let session = Session::new(&decoder, &tokenizer, options)?;

        let hub = Hub::from_env()?;
        let data = match &self.data {
            Some(root) => TaskData::local(root),
            None => TaskData::hub(hub.clone()),
        };
        if self.write_out {
            write_out(&suite, &data, &bars)?;
        }
        let mut cache = match &self.use_cache {
            None => Cache::none(),
            Some(path) => {
                // A GPU rounds in other places, and bf16 to other values.
                let arithmetic = match on_cpu {
                    true => String::new(),
                    false => format!("gpu {dtype:?}"),
                };
                let identity = identity(&checkpoint, &tokenizer, stage, &arithmetic)?;
                Cache::open(path, &identity, session.rules())?
            }
        };
        let model = self.model_info(&checkpoint, stage);
        let inputs = Inputs { tasks: &data, hub: &hub };
        let mut found = evaluate(&session, model, &suite, &inputs, &mut cache, &bars)?;
        drop(cache);
        found.result.settings = Settings {
            model_args: flags::recorded(&self.model_args, &reference, dtype)?,
            pretrained: Some(reference),
            batch_size: match self.batch_size {
                BatchSize::Auto => "auto".into(),
                BatchSize::Requests(n) => n.into(),
            },
            device: self.compute.device.clone(),
            use_cache: self.use_cache.as_ref().map(|path| path.display().to_string()),
            seeds: self.seed,
            ..found.result.settings
        };
        let saved = match &self.output_path {
            Some(output) => Some(found.save(output, self.log_samples)?),
            None => None,
        };
        if self.json || self.show_config {
            out::line(found.result.to_json(serde_json::Map::new())?)?;
        }
        if !self.json {
            out::print(report::text(&found.result, saved.as_ref()))?;
        }
        Ok(ExitCode::SUCCESS)
    }

    /// The model, which is named once: as it stands, or in `--model_args`.
    fn model_reference(&self, args: &ModelArgs) -> anyhow::Result<String> {
        let named = match (&self.reference, &args.pretrained) {
            (Some(_), Some(_)) => bail!("the model is named twice: as MODEL and in --model_args"),
            (Some(name), None) | (None, Some(name)) => name,
            (None, None) => bail!("no model: give a folder or hub id"),
        };
        Ok(match &args.revision {
            Some(_) if named.contains('@') => {
                bail!("the revision is named twice: in {named} and in --model_args")
            }
            Some(revision) => format!("{named}@{revision}"),
            None => named.clone(),
        })
    }

    /// Device and type, which may stand in `--model_args` too.
    fn compute(&self, args: &ModelArgs) -> anyhow::Result<Compute> {
        let dtype = match (self.compute.dtype, args.dtype) {
            (Precision::Auto, Some(dtype)) => dtype,
            (dtype, Some(other)) if other != dtype => {
                bail!("the dtype is named twice: --dtype {dtype} and {other} in --model_args")
            }
            (dtype, _) => dtype,
        };
        Ok(Compute { dtype, ..self.compute.clone() })
    }

    fn model_info(&self, checkpoint: &Checkpoint, stage: Stage) -> ModelInfo {
        let mut model = ModelInfo::of(checkpoint);
        model.stage = model.stage.max(stage);
        if stage > Stage::Dense {
            model.name = format!("{} (s{}, not fine-tuned)", model.name, self.stage);
        }
        if let Some(name) = &self.name {
            model.name.clone_from(name);
        }
        model
    }

    fn suite(&self) -> anyhow::Result<Suite> {
        if self.tasks.is_empty() && self.corpus.is_empty() {
            bail!(
                "nothing to evaluate: give --tasks or --corpus (`relufy eval ls` lists the tasks)"
            );
        }
        let found = tasks::find(&self.tasks)?;
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
        let samples = self.samples.as_deref().map(tasks::read_samples).transpose()?;
        let chosen = Chosen {
            limit: self.limit,
            samples,
            shots: self.num_fewshot,
            fewshot_seed: self.seed[3].unwrap_or(Chosen::default().fewshot_seed),
        };
        let bootstrap_iters = self.bootstrap_iters;
        Ok(Suite { tasks: found.tasks, groups: found.groups, corpora, chosen, bootstrap_iters })
    }
}

/// The first prompt of each task, on standard error.
fn write_out(suite: &Suite, data: &TaskData, progress: &dyn Progress) -> anyhow::Result<()> {
    let chosen = Chosen { limit: Some(Limit::Count(1)), samples: None, ..suite.chosen.clone() };
    for task in &suite.tasks {
        let prepared = tasks::prepare(task.as_ref(), data, &chosen, progress)?;
        if let Some(asked) = prepared.documents.first() {
            out::warn(report::prompt(task.name(), asked));
        }
    }
    Ok(())
}
