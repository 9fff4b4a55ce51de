//! The command line as a whole; each command's own arguments stand beside its code.

use anyhow::Context;
use clap::{Parser, Subcommand};

use crate::commands;

/// Make pretrained language models sparse with ReLU, fine-tune them back, and prove what it
/// cost and saved.
#[derive(Debug, Parser)]
#[command(
    version,
    propagate_version = true,
    after_help = "Examples:
  relufy quickstart                                  # the whole job, offline, in minutes
  relufy inspect org/model                           # what a model is and costs
  relufy surgery org/model --stage 1 -o model-s1     # ReLU in place of SiLU or GELU
  relufy train configs/tinystories/s1.toml           # fine-tune until it has recovered
  relufy eval model-s1 --tasks arc_easy,piqa -o runs/s1
  relufy table runs/dense runs/s1                    # accuracy against FLOPs
  relufy serve model-s1                              # OpenAI's HTTP interface

Exit codes: 0 success, 1 failure, 2 bad input, 130 interrupted.
Models are Hugging Face folders or hub ids (org/name[@revision]); HF_ENDPOINT, HF_HOME,
HF_TOKEN and HF_HUB_OFFLINE are honoured. RELUFY_LOG sets the log level (warn, info, debug)."
)]
pub struct Args {
    /// Threads for the arithmetic; all cores by default.
    #[arg(long, global = true, value_name = "N", env = "RELUFY_THREADS",
        value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    #[command(subcommand)]
    pub command: Command,
}

impl Args {
    /// Starts the thread pool before anybody uses it.
    pub fn start_threads(&self) -> anyhow::Result<()> {
        rayon::ThreadPoolBuilder::new()
            // 0: as many as there are cores, or as RAYON_NUM_THREADS says.
            .num_threads(self.threads.map_or(0, usize::from))
            // The program itself runs in one of them.
            .stack_size(MAIN_STACK)
            .build_global()
            .context("cannot start the threads")
    }
}

/// What the system gives a program's main thread.
const MAIN_STACK: usize = 8 << 20;

#[derive(Debug, Subcommand)]
pub enum Command {
    Quickstart(commands::quickstart::Quickstart),
    Inspect(commands::inspect::Inspect),
    Surgery(commands::surgery::Surgery),
    Calibrate(commands::calibrate::Calibrate),
    Init(commands::init::Init),
    Train(commands::train::Train),
    Eval(Box<commands::eval::Eval>),
    Table(commands::table::Table),
    Generate(commands::generate::Generate),
    Serve(commands::serve::Serve),
    Probe(commands::probe::Probe),
    Bench(commands::bench::Bench),
    Cache(commands::cache::Cache),
    Completions(commands::completions::Completions),
}
