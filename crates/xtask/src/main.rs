//! The repository's own chores, run as `cargo xtask CHORE`.
//!
//! - `layers`: which crate may use which ([`layers`]).
//! - `docs`: the API documentation builds without a warning ([`docs`]).
//! - `links`: what the Markdown pages point at exists ([`links`]).
//!
//! A chore exits with 0 when all is well, 1 when it found something wrong and 2 when it was
//! called wrongly. It depends on no other crate of the workspace, so that it is built in seconds.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a chore reports to the terminal")]

mod docs;
mod layers;
mod links;
mod workspace;

use std::process::ExitCode;

use anyhow::Result;

const USAGE: &str = "\
Usage: cargo xtask CHORE

Chores:
  layers   check that dependencies between the crates only point down
  docs     build the API documentation; a warning is an error
  links    check that links and paths in the Markdown pages exist";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let outcome = match arguments[..] {
        ["layers"] => layers::run(),
        ["docs"] => docs::run(),
        ["links"] => links::run(),
        ["-h" | "--help" | "help"] => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    report(outcome)
}

fn report(outcome: Result<()>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
