//! `relufy bench`: how fast it is here.

mod decode;
mod prefill;
mod prompt;
mod subject;
mod train;

use std::process::ExitCode;

/// Measure speed on this machine.
#[derive(Debug, clap::Args)]
pub struct Bench {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    Train(train::Train),
    Prefill(prefill::Prefill),
    Prompt(prompt::Prompt),
    Decode(decode::Decode),
}

impl Bench {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        match self.what {
            What::Train(args) => args.run()?,
            What::Prefill(args) => args.run()?,
            What::Prompt(args) => args.run()?,
            What::Decode(args) => args.run()?,
        }
        Ok(ExitCode::SUCCESS)
    }
}
