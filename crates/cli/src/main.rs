//! `relufy`: arguments in, tables and progress out. The only place that prints.

#![allow(clippy::print_stdout, clippy::print_stderr)] // printing is what this crate is for

mod allocator;
mod args;
mod calibration;
mod commands;
mod compute;
mod engine;
mod failure;
mod human;
mod out;
mod packing;
mod progress;
mod sampling;
mod stop;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    allocator::keep_freed_memory();
    let args = args::Args::parse();
    report_file_size_limit();
    let default = match args.command {
        // Who runs a server wants to see its requests.
        args::Command::Serve(_) => "warn,relufy::serve=info",
        _ => "warn",
    };
    let filter = EnvFilter::try_from_env("RELUFY_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .without_time()
        .init();
    if let Err(error) = args.start_threads() {
        return failure::report(&error);
    }
    // Inside the pool: an operation that starts there need not wake a worker first.
    rayon::scope(|_| match commands::run(args.command) {
        Ok(code) => code,
        Err(error) => failure::report(&error),
    })
}

/// Makes a write beyond `ulimit -f` an error that is reported and cleaned up after; by
/// default the signal that comes with it ends the program where it stands.
#[cfg(unix)]
fn report_file_size_limit() {
    // SAFETY: ignoring a signal runs no code of ours, and no other thread exists yet.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}

#[cfg(not(unix))]
fn report_file_size_limit() {}
