//! One file a command: its arguments, what it runs, what it prints.

pub mod bench;
pub mod cache;
pub mod calibrate;
pub mod completions;
pub mod eval;
pub mod generate;
pub mod init;
pub mod inspect;
pub mod probe;
pub mod quickstart;
pub mod serve;
pub mod surgery;
pub mod table;
pub mod train;

use std::process::ExitCode;

use crate::args::Command;

/// Runs a command.
pub fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Quickstart(args) => args.run(),
        Command::Inspect(args) => args.run(),
        Command::Surgery(args) => args.run(),
        Command::Calibrate(args) => args.run(),
        Command::Init(args) => args.run(),
        Command::Train(args) => args.run(),
        Command::Eval(args) => args.run(),
        Command::Table(args) => args.run(),
        Command::Generate(args) => args.run(),
        Command::Serve(args) => args.run(),
        Command::Probe(args) => args.run(),
        Command::Bench(args) => args.run(),
        Command::Cache(args) => args.run(),
        Command::Completions(args) => args.run(),
    }
}
