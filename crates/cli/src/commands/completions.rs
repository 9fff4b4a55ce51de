//! `relufy completions`: tab completion for a shell.

use std::process::ExitCode;

use clap::CommandFactory;

use crate::out;

/// Print the tab completion script of a shell.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  relufy completions bash > ~/.local/share/bash-completion/completions/relufy"
)]
pub struct Completions {
    /// The shell.
    shell: clap_complete::Shell,
}

impl Completions {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let mut command = crate::args::Args::command();
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut command, "relufy", &mut script);
        out::print(String::from_utf8(script)?)?;
        Ok(ExitCode::SUCCESS)
    }
}
