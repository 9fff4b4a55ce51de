//! Models against a baseline, task by task on the same documents: the differences, their
//! 95 % intervals and p-values, by the paired bootstrap.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::accuracy::Headlines;
use super::grid::{Cell, Column, Grid};
use crate::metrics::Metric;
use crate::paired::{Difference, Pair, REPLICATES, Stratum, paired_bootstrap};
use crate::results::{Judged, RunResult, TaskResult, locate, read_samples, samples_beside};
use crate::{Error, Result};

/// Every comparison draws the same documents.
const SEED: u32 = 1234;

/// A result and the documents behind it.
pub struct Run {
    /// What it found.
    pub result: RunResult,
    file: PathBuf,
}

impl Run {
    /// Reads a result: the file, or the newest below a folder.
    ///
    /// # Errors
    /// As [`RunResult::read`].
    pub fn read(path: &Path) -> Result<Run> {
        let file = locate(path)?;
        Ok(Run { result: RunResult::read(&file)?, file })
    }

    /// The file it was read from.
    pub fn file(&self) -> &Path {
        &self.file
    }

    fn name(&self) -> String {
        super::accuracy::label(&self.result)
    }

    fn samples(&self, task: &str, other: &Run) -> Result<BTreeMap<usize, Judged>> {
        match samples_beside(&self.file, task) {
            Some(path) => read_samples(&path),
            None => Err(unpaired(
                task,
                self,
                other,
                format!("{} has no samples beside it", self.file.display()),
            )),
        }
    }
}

fn unpaired(task: &str, run: &Run, baseline: &Run, why: String) -> Error {
    Error::Unpaired { task: task.into(), run: run.name(), baseline: baseline.name(), why }
}

/// Each run against the baseline, on every task that both were asked; then groups of tasks
/// by the means that the results give them, and the average over tasks and groups. A run
/// that is the baseline itself is passed over.
///
/// # Errors
/// Samples that are missing, or documents that are not the same.
pub fn against_baseline(runs: &[Run], baseline: &Run) -> Result<Grid> {
    let mut rows = Vec::new();
    let mut notes = vec![format!(
        "Differences to {}, on the same documents: paired bootstrap, {REPLICATES} replicates, 95 % percentile interval; p: two-sided, twice the smaller share of replicates on one side of 0. Not corrected for the number of comparisons.",
        baseline.name()
    )];
    for run in runs.iter().filter(|run| run.file != baseline.file) {
        let mut paired = BTreeMap::new();
        for task in &run.result.tasks {
            let other = baseline.result.tasks.iter().find(|other| other.name == task.name);
            match other {
                None => notes.push(format!("{}: {} was not asked.", task.name, baseline.name())),
                // A corpus has no documents that stand for themselves.
                Some(_) if task.version.is_none() => notes
                    .push(format!("{}: a corpus is not compared document by document.", task.name)),
                Some(other) => {
                    paired.insert(task.name.as_str(), pair(run, task, baseline, other)?);
                }
            }
        }
        for task in &run.result.tasks {
            let Some(found) = paired.get(task.name.as_str()) else { continue };
            for (metric, comparison) in &found.metrics {
                rows.extend(row(
                    run,
                    &task.name,
                    *metric,
                    std::slice::from_ref(comparison),
                    &[1.0],
                ));
            }
            if found.apart > 0 {
                notes.push(format!(
                    "{}: {} documents left out, since one of {} and {} excludes them.",
                    task.name,
                    found.apart,
                    run.name(),
                    baseline.name()
                ));
            }
        }
        rows.extend(means(run, &paired, &[run.result.clone(), baseline.result.clone()]));
    }
    let columns = vec![
        Column::text("model", "Model"),
        Column::text("task", "Task"),
        Column::text("metric", "Metric"),
        Column::number("documents", "n"),
        Column::number("baseline", "Baseline"),
        Column::number("value", "Value"),
        Column::number("difference", "Difference"),
        Column::number("low", "2.5 %"),
        Column::number("high", "97.5 %"),
        Column::number("p", "p"),
        Column::text("unit", "Unit"),
    ];
    Ok(Grid { columns, rows, notes })
}

/// A task's documents in both runs.
struct Paired {
    metrics: Vec<(Metric, Comparison)>,
    /// Documents that only one of them counts.
    apart: usize,
}

/// A metric's parts, document by document.
#[derive(Clone)]
struct Comparison {
    /// The run's and the baseline's values, with their weight.
    points: Vec<(f64, f64, f64)>,
}

impl Comparison {
    /// The run's and the baseline's metric: sum of values over sum of weights.
    fn means(&self) -> (f64, f64) {
        let (mut a, mut b, mut weight) = (0.0, 0.0, 0.0);
        for point in &self.points {
            a += point.0;
            b += point.1;
            weight += point.2;
        }
        (a / weight, b / weight)
    }

    fn stratum(&self, scale: f64, share: f64) -> Stratum {
        let pair = |(a, b, weight): &(f64, f64, f64)| Pair {
            difference: scale * (a - b),
            weight: *weight,
        };
        Stratum { pairs: self.points.iter().map(pair).collect(), share }
    }
}

fn pair(run: &Run, task: &TaskResult, baseline: &Run, other: &TaskResult) -> Result<Paired> {
    let (mine, theirs) = (run.samples(&task.name, baseline)?, baseline.samples(&task.name, run)?);
    let refuse = |why: String| Err(unpaired(&task.name, run, baseline, why));
    let only = |here: &BTreeMap<usize, Judged>, there: &BTreeMap<usize, Judged>| -> Vec<usize> {
        here.keys().filter(|id| !there.contains_key(id)).copied().collect()
    };
    let is_excluded =
        |task: &TaskResult, id: &usize| task.excluded.iter().any(|one| one.document == *id);
    let (only_mine, only_theirs) = (only(&mine, &theirs), only(&theirs, &mine));
    for (ids, absent, here) in [(&only_mine, other, run), (&only_theirs, task, baseline)] {
        if let Some(id) = ids.iter().find(|id| !is_excluded(absent, id)) {
            return refuse(format!("only {} was asked document {id}", here.name()));
        }
    }
    let mut metrics: Vec<(Metric, Comparison)> = Vec::new();
    for (id, mine) in &mine {
        let Some(theirs) = theirs.get(id) else { continue };
        if mine.doc_hash != theirs.doc_hash {
            return refuse(format!("document {id} is another one"));
        }
        if mine.prompt_hash != theirs.prompt_hash {
            return refuse(format!("document {id} was asked with another prompt"));
        }
        for (metric, a) in &mine.values {
            let Some(b) = theirs.values.get(metric) else { continue };
            if a.weight != b.weight {
                return refuse(format!("document {id} has another length"));
            }
            let point = (a.value, b.value, a.weight);
            match metrics.iter_mut().find(|(known, _)| known == metric) {
                Some((_, comparison)) => comparison.points.push(point),
                None => metrics.push((*metric, Comparison { points: vec![point] })),
            }
        }
    }
    Ok(Paired { metrics, apart: only_mine.len() + only_theirs.len() })
}

/// Groups of tasks, and the average of the headlines.
fn means(run: &Run, paired: &BTreeMap<&str, Paired>, both: &[RunResult]) -> Vec<Vec<Cell>> {
    let accuracy = |task: &str| {
        let found = paired.get(task)?;
        let is_headline = |metric: &Metric| matches!(metric, Metric::Acc | Metric::ExactMatch);
        found.metrics.iter().find(|(metric, _)| is_headline(metric))
    };
    let mut rows = Vec::new();
    for group in &run.result.groups {
        let tasks = run.result.tasks_of(&group.name);
        let parts: Option<Vec<_>> = tasks.iter().map(|task| accuracy(task)).collect();
        let Some(parts) = parts.filter(|parts| !parts.is_empty()) else { continue };
        let comparisons: Vec<Comparison> =
            parts.iter().map(|(_, comparison)| comparison.clone()).collect();
        let shares = by_size(&comparisons, 1.0);
        rows.extend(row(run, &group.name, parts[0].0, &comparisons, &shares));
    }
    let headlines = Headlines::of(both).everywhere;
    let (mut comparisons, mut shares) = (Vec::new(), Vec::new());
    for name in &headlines {
        let tasks = match run.result.tasks_of(name) {
            tasks if tasks.is_empty() => vec![*name],
            tasks => tasks,
        };
        let parts: Option<Vec<Comparison>> = tasks
            .iter()
            .map(|task| accuracy(task).map(|(_, comparison)| comparison.clone()))
            .collect();
        let Some(parts) = parts else { return rows };
        shares.extend(by_size(&parts, 1.0 / headlines.len() as f64));
        comparisons.extend(parts);
    }
    if headlines.len() > 1 {
        rows.extend(row(run, "average", Metric::Acc, &comparisons, &shares));
    }
    rows
}

/// Shares of tasks that weigh as much as they have documents, `whole` in all.
fn by_size(parts: &[Comparison], whole: f64) -> Vec<f64> {
    let total: usize = parts.iter().map(|part| part.points.len()).sum();
    parts.iter().map(|part| whole * part.points.len() as f64 / total as f64).collect()
}

fn row(
    run: &Run,
    task: &str,
    metric: Metric,
    parts: &[Comparison],
    shares: &[f64],
) -> Option<Vec<Cell>> {
    // How a difference is told, and a mean.
    let (scale, unit, decimals) = match metric {
        _ if metric.is_accuracy() => (100.0, "points", 2),
        Metric::BitsPerByte => (-std::f64::consts::LN_2.recip(), "bits", 4),
        _ => (-1.0, "log ratio", 4),
    };
    let shown = |mean: f64| match metric {
        _ if metric.is_accuracy() => Cell::number(100.0 * mean, 2),
        Metric::BitsPerByte => Cell::number(-mean / std::f64::consts::LN_2, 4),
        _ => Cell::number((-mean).exp(), 2),
    };
    let strata: Vec<Stratum> =
        parts.iter().zip(shares).map(|(part, share)| part.stratum(scale, *share)).collect();
    let Difference { value, low, high, p } = paired_bootstrap(&strata, REPLICATES, SEED)?;
    let (mut a, mut b) = (0.0, 0.0);
    for (part, share) in parts.iter().zip(shares) {
        let (mine, theirs) = part.means();
        a += share * mine;
        b += share * theirs;
    }
    let documents: usize = parts.iter().map(|part| part.points.len()).sum();
    Some(vec![
        Cell::Text(run.name()),
        Cell::Text(task.to_owned()),
        Cell::Text(metric.name().to_owned()),
        Cell::number(documents as f64, 0),
        shown(b),
        shown(a),
        Cell::number(value, decimals),
        Cell::number(low, decimals),
        Cell::number(high, decimals),
        Cell::number(p, 4),
        Cell::Text(unit.to_owned()),
    ])
}
