//! Where results lie: `OUTPUT/MODEL/results_TIME.json` and beside it, where they are wanted,
//! `samples_TASK_TIME.jsonl`.
//!
//! A run never writes over another's files, and its results appear last: where they can be
//! seen, their samples are whole.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use relufy_model::checkpoint::write_atomic;

use super::RunResult;
use super::samples::write_samples;
use crate::evaluate::Evaluation;
use crate::{Error, Result};

/// The files of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Saved {
    /// `results_TIME.json`.
    pub results: PathBuf,
    /// `samples_TASK_TIME.jsonl`, one a task.
    pub samples: Vec<PathBuf>,
}

impl Evaluation {
    /// Writes the results below `output`, and where `log_samples` the documents. An output
    /// that ends in `.json` names the file, to which the time is added.
    ///
    /// # Errors
    /// The file system's.
    pub fn save(&self, output: &Path, log_samples: bool) -> Result<Saved> {
        let (folder, stem) = match output.extension() {
            Some(extension) if extension == "json" => {
                let stem = output.file_stem().unwrap_or_default().to_string_lossy().into_owned();
                (output.parent().unwrap_or(Path::new("")).to_owned(), stem)
            }
            _ => (output.join(self.result.sanitized_name()), "results".to_owned()),
        };
        std::fs::create_dir_all(&folder)
            .map_err(|source| Error::Write { path: folder.clone(), source })?;
        let time = free_time(&folder, &stem, SystemTime::now());
        let mut hashes = serde_json::Map::new();
        let mut samples = Vec::new();
        if log_samples {
            for task in &self.samples {
                let written = write_samples(task, self.result.compat)?;
                let path = folder.join(samples_name(&task.task, &time));
                write_atomic(&path, written.lines.as_bytes())?;
                hashes.insert(task.task.clone(), written.task_hash.into());
                samples.push(path);
            }
        }
        let results = folder.join(format!("{stem}_{time}.json"));
        write_atomic(&results, self.result.to_json(hashes)?.as_bytes())?;
        Ok(Saved { results, samples })
    }
}

impl RunResult {
    /// Reads a result: the file, or of a folder the newest `results_*.json` in or below it.
    ///
    /// # Errors
    /// No such file, or one that this program has not written.
    pub fn read(path: &Path) -> Result<RunResult> {
        let path = locate(path)?;
        let text = std::fs::read_to_string(&path)
            .map_err(|source| Error::Read { path: path.clone(), source })?;
        RunResult::from_json(&text).map_err(|error| match error {
            Error::Json(source) => Error::Results { path, source },
            other => other,
        })
    }

    /// Whether a folder holds results, in or below it.
    pub fn is_below(folder: &Path) -> bool {
        folder.is_dir() && locate(folder).is_ok()
    }

    /// The model's name as a folder's: what no file system likes becomes `__`.
    pub(super) fn sanitized_name(&self) -> String {
        let name = self.settings.pretrained.as_ref().unwrap_or(&self.model.name);
        let mut out = String::with_capacity(name.len());
        let mut replaced = false;
        for c in name.chars() {
            let bad = "\"<>:/|\\?*[]".contains(c);
            match (bad, replaced) {
                (true, false) => out += "__",
                (true, true) => {}
                (false, _) => out.push(c),
            }
            replaced = bad;
        }
        // A folder called `.` or `..` would be another one.
        if out.chars().all(|c| c == '.') { format!("__{out}") } else { out }
    }
}

/// The file of results that `path` stands for.
///
/// # Errors
/// A folder without any, or that cannot be read.
pub(crate) fn locate(path: &Path) -> Result<PathBuf> {
    if !path.is_dir() {
        return Ok(path.to_path_buf());
    }
    let mut found = Vec::new();
    collect(path, &mut found)?;
    let newest = found.into_iter().max_by_key(|file| {
        let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        (name, file.clone())
    });
    newest.ok_or_else(|| Error::NoResults { path: path.to_path_buf() })
}

/// The samples of `task` that belong to a file of results; `None` where there are none.
pub(crate) fn samples_beside(results: &Path, task: &str) -> Option<PathBuf> {
    let stem = results.file_stem()?.to_string_lossy();
    let (_, time) = stem.rsplit_once('_')?;
    Some(results.with_file_name(samples_name(task, time))).filter(|path| path.is_file())
}

fn samples_name(task: &str, time: &str) -> String {
    // A task's name may come from a person; it must not name another folder.
    format!("samples_{}_{time}.jsonl", task.replace(['/', '\\'], "_"))
}

fn collect(folder: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    let failed = |source| Error::Read { path: folder.to_path_buf(), source };
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let (path, kind) = (entry.path(), entry.file_type().map_err(failed)?);
        let name = entry.file_name().to_string_lossy().into_owned();
        if kind.is_dir() {
            collect(&path, found)?;
        } else if name.starts_with("results_") && name.ends_with(".json") {
            found.push(path);
        }
    }
    Ok(())
}

/// `now` as the harness writes times in names, or the first microsecond after it whose name
/// is still free.
fn free_time(folder: &Path, stem: &str, mut now: SystemTime) -> String {
    loop {
        let time = time(now);
        let taken = |name: &std::ffi::OsStr| name.to_string_lossy().contains(&time);
        let used = std::fs::read_dir(folder)
            .is_ok_and(|entries| entries.flatten().any(|entry| taken(&entry.file_name())));
        if !used && !folder.join(format!("{stem}_{time}.json")).exists() {
            return time;
        }
        now += Duration::from_micros(1);
    }
}

/// `2026-01-31T12-59-59.000001`, UTC.
fn time(now: SystemTime) -> String {
    let since = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let (days, seconds) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let (year, month, day) = date(days);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}-{:02}-{:02}.{:06}",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60,
        since.subsec_micros()
    )
}

/// Year, month and day of a day since 1970-01-01 (Gregorian), counted in years from March,
/// whose leap day is their last.
fn date(days: u64) -> (u64, u64, u64) {
    // Days since 0000-03-01, in cycles of 400 years.
    let days = days + 719_468;
    let (cycle, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let first = (153 * month + 2) / 5;
    let (calendar, january_is_next) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    (400 * cycle + year + january_is_next, calendar, day - first + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_calendar_times() {
        let at = |seconds: u64, micros: u64| {
            time(
                SystemTime::UNIX_EPOCH
                    + Duration::from_secs(seconds)
                    + Duration::from_micros(micros),
            )
        };
        // datetime.fromtimestamp(..., UTC).isoformat(), CPython 3.11
        assert_eq!(at(0, 0), "1970-01-01T00-00-00.000000");
        assert_eq!(at(951_782_399, 999_999), "2000-02-28T23-59-59.999999");
        assert_eq!(at(951_782_400, 1), "2000-02-29T00-00-00.000001");
        assert_eq!(at(1_795_309_996, 997_131), "2026-11-22T01-13-16.997131");
        assert_eq!(at(4_107_542_400, 0), "2100-03-01T00-00-00.000000");
        assert_eq!(at(1_704_067_199, 0), "2023-12-31T23-59-59.000000");
    }

    #[test]
    fn names_are_used_once() {
        let folder = tempfile::tempdir().unwrap();
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1);
        let first = free_time(folder.path(), "results", now);
        std::fs::write(folder.path().join(format!("samples_piqa_{first}.jsonl")), "").unwrap();
        let second = free_time(folder.path(), "results", now);
        assert_eq!(
            (&*first, &*second),
            ("1970-01-01T00-00-01.000000", "1970-01-01T00-00-01.000001")
        );
    }

    #[test]
    fn the_newest_result_is_found_below_a_folder() {
        let folder = tempfile::tempdir().unwrap();
        let why = locate(folder.path()).unwrap_err().to_string();
        assert!(why.contains("holds no results_*.json"), "{why}");
        for name in ["a/results_2026-01-02.json", "b/results_2026-01-01.json", "b/other_2027.json"]
        {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "{}").unwrap();
        }
        let newest = folder.path().join("a/results_2026-01-02.json");
        assert_eq!(locate(folder.path()).unwrap(), newest);
        assert_eq!(locate(&newest).unwrap(), newest);
        assert_eq!(samples_beside(&newest, "piqa"), None);
        let samples = folder.path().join("a/samples_piqa_2026-01-02.jsonl");
        std::fs::write(&samples, "").unwrap();
        assert_eq!(samples_beside(&newest, "piqa"), Some(samples));
    }
}
