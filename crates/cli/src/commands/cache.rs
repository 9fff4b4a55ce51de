//! `relufy cache`: what `--packed-cache` keeps, and what of it is of no use any more.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use relufy_eval::table::{Cell, Column, Format, Grid};
use relufy_sparse::{PackedCache, PackedEntry, PackedState};
use serde_json::json;

use crate::packing::Place;
use crate::{human, out};

/// List and remove the packed weights that --packed-cache keeps.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  relufy cache list                # sizes, and what is of no use any more
  relufy cache clean --dry-run
  relufy cache clean")]
pub struct Cache {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    List(List),
    Clean(Clean),
}

/// List packed weights with their sizes, and whether they are of use.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  relufy cache list
  relufy cache list packed --json")]
struct List {
    /// The folder that was given to --packed-cache; auto is relufy/packed in the user's cache folder.
    #[arg(value_name = "DIR", default_value = "auto")]
    folder: Place,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Remove packed weights that are of no use any more, and what interrupted writes left behind.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  relufy cache clean --dry-run
  relufy cache clean
  relufy cache clean packed --all
Of no use are files whose model changed or is gone, those of another version of relufy, damaged ones,
and those whose writer was interrupted. Nothing else in the folder is touched, nor what a process is
writing; processes that use a removed file go on, and weights that are needed again are packed again.")]
struct Clean {
    /// The folder that was given to --packed-cache; auto is relufy/packed in the user's cache folder.
    #[arg(value_name = "DIR", default_value = "auto")]
    folder: Place,
    /// Remove what is of use as well.
    #[arg(long)]
    all: bool,
    /// Say what would be removed.
    #[arg(long)]
    dry_run: bool,
}

impl Cache {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        match self.action {
            Action::List(args) => args.run()?,
            Action::Clean(args) => args.run()?,
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl List {
    fn run(&self) -> anyhow::Result<()> {
        let (cache, entries) = open(&self.folder)?;
        if self.json {
            return Ok(out::line(json!({"folder": cache.dir(), "files": entries}))?);
        }
        if entries.is_empty() {
            return Ok(out::line(format_args!("no packed weights in {}", cache.dir().display()))?);
        }
        let clean = match &self.folder {
            Place::Folder(folder) => format!("relufy cache clean {}", folder.display()),
            _ => "relufy cache clean".to_owned(),
        };
        Ok(out::print(grid(cache.dir(), &entries, &clean).render(Format::Terminal))?)
    }
}

impl Clean {
    fn run(&self) -> anyhow::Result<()> {
        let (cache, entries) = open(&self.folder)?;
        let wanted = |entry: &&PackedEntry| {
            entry.state.is_useless() || (self.all && entry.state != PackedState::Writing)
        };
        let (mut freed, mut failed) = (0, 0);
        for entry in entries.iter().filter(wanted) {
            let what = format!(
                "{} ({}): {}",
                entry.path.display(),
                human::bytes(entry.bytes),
                said(entry.state)
            );
            let removed = if self.dry_run { Ok(true) } else { cache.remove(entry) };
            match removed {
                Ok(true) => {
                    freed += entry.bytes;
                    let verb = if self.dry_run { "would remove" } else { "removed" };
                    out::line(format_args!("{verb} {what}"))?;
                }
                // Somebody else was faster.
                Ok(false) => {}
                Err(error) => {
                    failed += 1;
                    out::warn(format_args!("cannot remove {what}: {error}"));
                }
            }
        }
        let kept: Vec<&PackedEntry> = entries.iter().filter(|entry| !wanted(entry)).collect();
        let bytes = kept.iter().map(|entry| entry.bytes).sum();
        out::line(format_args!(
            "{} {}; kept {} {} ({})",
            if self.dry_run { "would free" } else { "freed" },
            human::bytes(freed),
            kept.len(),
            if kept.len() == 1 { "file" } else { "files" },
            human::bytes(bytes),
        ))?;
        if failed > 0 {
            bail!("{failed} of the files could not be removed");
        }
        Ok(())
    }
}

/// The cache in a folder, and what it holds.
fn open(folder: &Place) -> anyhow::Result<(PackedCache, Vec<PackedEntry>)> {
    let Some(folder) = folder.resolve("DIR")? else { bail!("off is no folder") };
    let cache = PackedCache::new(folder);
    let entries = cache.entries().with_context(|| cache.dir().display().to_string())?;
    Ok((cache, entries))
}

/// What is said of a file.
fn said(state: PackedState) -> &'static str {
    match state {
        PackedState::Current => "of use",
        PackedState::Writing => "being written",
        PackedState::Interrupted => "its writer was interrupted",
        PackedState::Changed => "the model's weights are others now",
        PackedState::Gone => "the model's weights are not there any more",
        PackedState::OtherVersion => "made by another version of relufy",
        PackedState::Damaged => "damaged",
        _ => "of unknown state",
    }
}

fn grid(folder: &Path, entries: &[PackedEntry], clean: &str) -> Grid {
    let columns = vec![
        Column::text("file", ""),
        Column::text("model", "model"),
        Column::text("format", "format"),
        Column::number("size", "size"),
        Column::text("state", "state"),
    ];
    let name = |path: &PathBuf| {
        path.file_name().map_or(String::new(), |name| name.to_string_lossy().into_owned())
    };
    let rows = entries.iter().map(|entry| {
        vec![
            Cell::Text(name(&entry.path)),
            entry.model.clone().map_or(Cell::Empty, Cell::Text),
            entry.format.map_or(Cell::Empty, |format| Cell::Text(format.to_string())),
            Cell::Text(human::bytes(entry.bytes)),
            Cell::Text(said(entry.state).to_owned()),
        ]
    });
    let sum = |of: &dyn Fn(&PackedEntry) -> bool| {
        human::bytes(entries.iter().filter(|entry| of(entry)).map(|entry| entry.bytes).sum())
    };
    let mut notes = vec![format!("{}: {}", folder.display(), sum(&|_| true))];
    if entries.iter().any(|entry| entry.state.is_useless()) {
        notes.push(format!(
            "of no use: {}; `{clean}` removes that",
            sum(&|entry| entry.state.is_useless())
        ));
    }
    Grid { columns, rows: rows.collect(), notes }
}
