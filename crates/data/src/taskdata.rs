//! The records of evaluation tasks: a folder laid out like the hub's datasets, or the hub.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::corpus::{Format, Lines, ParquetRows, format_of, open};
use crate::{Error, Hub, Progress, Result};

/// One record of a task.
pub type Record = Map<String, Value>;

/// The records of a split, in order, and the files that they come from.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Split {
    /// The records.
    pub records: Vec<Record>,
    /// The files, each with how many of the records it holds.
    pub files: Vec<(PathBuf, usize)>,
}

impl Split {
    /// The file that record `index` comes from, and the record's number in it, from 1.
    pub fn place(&self, index: usize) -> (&Path, usize) {
        let mut first = 0;
        for (file, records) in &self.files {
            if index < first + records {
                return (file, index - first + 1);
            }
            first += records;
        }
        (Path::new(""), index + 1)
    }

    fn read(files: impl IntoIterator<Item = PathBuf>) -> Result<Split> {
        let mut split = Split::default();
        for file in files {
            let before = split.records.len();
            read(&file, &mut split.records)?;
            split.files.push((file, split.records.len() - before));
        }
        Ok(split)
    }
}

/// Where task files come from.
#[derive(Clone, Debug)]
pub enum TaskData {
    /// `ROOT/<repository>/<config>/<split>.jsonl`, or `.parquet`, each plain, `.zst` or `.gz`.
    Local(PathBuf),
    /// The dataset's own files on the hub, else those that the hub converts to parquet.
    Hub(Hub),
}

/// Endings of local files, in the order in which they are looked for.
const ENDINGS: [&str; 6] =
    ["jsonl", "jsonl.zst", "jsonl.gz", "parquet", "parquet.zst", "parquet.gz"];

/// The branch with the hub's own conversions.
const CONVERTED: &str = "refs/convert/parquet";

impl TaskData {
    /// Files below a folder.
    pub fn local(root: impl Into<PathBuf>) -> Self {
        TaskData::Local(root.into())
    }

    /// Files of the hub.
    pub fn hub(hub: Hub) -> Self {
        TaskData::Hub(hub)
    }

    /// All records of a split, in order. A task without a configuration is `default`.
    ///
    /// # Errors
    /// [`Error::NoSplit`], [`Error::Record`] naming file and record, those of [`Hub`].
    pub fn load_split(
        &self,
        repo: &str,
        config: &str,
        split: &str,
        progress: &dyn Progress,
    ) -> Result<Split> {
        let files = match self {
            TaskData::Local(root) => local_files(root, repo, config, split)?,
            TaskData::Hub(hub) => hub_files(hub, repo, config, split, progress)?,
        };
        Split::read(files)
    }

    /// The splits of a local task, sorted; `None` for the hub, where asking costs requests.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn local_splits(&self, repo: &str, config: &str) -> Result<Option<Vec<String>>> {
        let TaskData::Local(root) = self else { return Ok(None) };
        splits_in(&root.join(repo).join(config)).map(Some)
    }
}

/// All records of one jsonl or parquet file, in order.
///
/// # Errors
/// [`Error::Record`] naming file and record, [`Error::Io`].
pub fn load_file(file: &Path) -> Result<Split> {
    Split::read([file.to_path_buf()])
}

fn local_files(root: &Path, repo: &str, config: &str, split: &str) -> Result<Vec<PathBuf>> {
    let folder = root.join(repo).join(config);
    let found = ENDINGS.iter().map(|e| folder.join(format!("{split}.{e}"))).find(|f| f.is_file());
    if let Some(file) = found {
        return Ok(vec![file]);
    }
    let there = match splits_in(&folder) {
        Ok(splits) if splits.is_empty() => "the folder has no split".to_owned(),
        Ok(splits) => format!("there is {}", splits.join(", ")),
        Err(_) => "there is no such folder".to_owned(),
    };
    let file = folder.join(split);
    let looked_for = format!("{}.{{jsonl,parquet}}[.zst|.gz] ({there})", file.display());
    Err(no_split(repo, config, split, looked_for))
}

/// The splits that have a file in a folder, sorted.
fn splits_in(folder: &Path) -> Result<Vec<String>> {
    let mut splits = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(|e| Error::io(folder, e))? {
        let name = entry.map_err(|e| Error::io(folder, e))?.file_name();
        let name = name.to_string_lossy();
        if let Some((split, ending)) = name.split_once('.')
            && ENDINGS.contains(&ending)
        {
            splits.push(split.to_owned());
        }
    }
    splits.sort();
    splits.dedup();
    Ok(splits)
}

/// The names under which the datasets library and the hub's converter store a split:
/// `config/split-00000-of-00001.parquet`, `config/split/0000.parquet`, and without the
/// configuration, or under `data/`, for `default`.
fn is_split(file: &str, config: &str, split: &str) -> bool {
    let Some(stem) = ["parquet", "jsonl"].iter().find_map(|e| file.strip_suffix(&format!(".{e}")))
    else {
        return false;
    };
    let mut folders = vec![format!("{config}/")];
    if config == "default" {
        folders.extend([String::new(), "data/".to_owned()]);
    }
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    folders.iter().filter_map(|folder| stem.strip_prefix(folder.as_str())).any(|rest| {
        let Some(rest) = rest.strip_prefix(split) else { return false };
        match rest.strip_prefix('-').map(|shard| shard.split_once("-of-")) {
            Some(Some((shard, of))) => is_number(shard) && is_number(of),
            Some(None) => false,
            None => rest.is_empty() || rest.strip_prefix('/').is_some_and(is_number),
        }
    })
}

fn hub_files(
    hub: &Hub,
    repo: &str,
    config: &str,
    split: &str,
    progress: &dyn Progress,
) -> Result<Vec<PathBuf>> {
    let mut failed = None;
    for revision in [None, Some(CONVERTED)] {
        let listing = match hub.dataset_listing(repo, revision) {
            Ok(listing) => listing,
            // Where the dataset itself exists, there may be no conversion of it, or the
            // other way round in a cache.
            Err(error) => {
                failed.get_or_insert(error);
                continue;
            }
        };
        let files: Vec<_> = listing.iter().filter(|file| is_split(file, config, split)).collect();
        if !files.is_empty() {
            let fetch = |file: &String| hub.dataset_file(repo, revision, file, progress);
            return files.into_iter().map(fetch).collect();
        }
        if revision.is_some() {
            failed = None;
        }
    }
    let looked_for = format!("{config}/{split}-*.parquet on `main` and `{CONVERTED}`");
    Err(failed.unwrap_or_else(|| no_split(repo, config, split, looked_for)))
}

fn no_split(repo: &str, config: &str, split: &str, looked_for: String) -> Error {
    Error::NoSplit {
        repo: repo.to_owned(),
        config: config.to_owned(),
        split: split.to_owned(),
        looked_for,
    }
}

fn read(file: &Path, records: &mut Vec<Record>) -> Result<()> {
    let opened = open(file, Arc::default())?;
    match format_of(file, None)? {
        Format::Parquet => {
            for row in ParquetRows::open(opened, None)? {
                records.push(row?.1);
            }
        }
        Format::Jsonl | Format::Text => {
            for line in Lines::new(opened) {
                records.push(line?.1);
            }
        }
    }
    Ok(())
}
