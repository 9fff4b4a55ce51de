//! `relufy`: arguments in, tables and progress out. The only place that prints.

#![allow(clippy::print_stdout, clippy::print_stderr)] // printing is what this crate is for

mod args;
mod commands;
mod failure;
mod human;
mod progress;
mod stop;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;

/// glibc gives freed activations back to the system and takes them again, page fault by
/// page fault, at every step; mimalloc keeps them.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let args = args::Args::parse();
    let filter = EnvFilter::try_from_env("RELUFY_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .without_time()
        .init();
    if let Err(error) = args.use_threads() {
        return failure::report(&error);
    }
    match commands::run(args.command) {
        Ok(code) => code,
        Err(error) => failure::report(&error),
    }
}
