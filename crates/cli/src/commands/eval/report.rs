//! What a person sees of an evaluation: what the model costs, what was left out, and the
//! table that users of lm-evaluation-harness know.

use std::fmt::Write;

use relufy_eval::tasks::{self, Asked, Shots};
use relufy_eval::{Request, RunResult, Saved, table};
use relufy_spec::flops::Convention;

use crate::human;

/// A whole result.
pub fn text(run: &RunResult, saved: Option<&Saved>) -> String {
    let mut text = costs(run);
    text += &excluded(run);
    let _ = write!(text, "\n{}\n", table::harness_table(run));
    let requests: usize = run.tasks.iter().map(|task| task.requests).sum();
    let seconds: f64 = run.tasks.iter().map(|task| task.seconds).sum();
    let _ = writeln!(text, "{requests} requests, scored in {seconds:.1} s");
    if let Some(saved) = saved {
        let _ = writeln!(text, "results: {}", saved.results.display());
    }
    text
}

/// FLOPs of a token and zeros, with what they rest on.
fn costs(run: &RunResult) -> String {
    let flops = |convention| {
        let (sparse, dense) = (run.flops.get(convention), run.flops_dense.get(convention));
        let share = human::percent(sparse / dense);
        format!(
            "{} of {} ({share}, {})",
            human::count(sparse),
            human::count(dense),
            convention.name()
        )
    };
    let mean = run.densities.mean;
    let error = run.densities.error_95.as_ref();
    let zeros = |what: &str, density: f64, error: Option<f64>| match error {
        Some(error) => format!("{what} {:.1} ± {:.1} %", 100.0 * (1.0 - density), 100.0 * error),
        None => format!("{what} {:.1} %", 100.0 * (1.0 - density)),
    };
    let sites = [
        zeros("QKV", mean.qkv, error.map(|error| error.mean.qkv)),
        zeros("up", mean.up, error.map(|error| error.mean.up)),
        zeros("down", mean.down, error.map(|error| error.mean.down)),
    ];
    let basis = error.map_or(String::new(), |error| {
        format!(" (95 % interval over {} documents)", error.documents)
    });
    format!(
        "{}: {} parameters, stage {}\nMultiply-accumulates a token: {}, {}\nZeros in the input of {}{basis}\n",
        run.model.name,
        human::count(run.model.parameters as f64),
        u8::from(run.model.stage),
        flops(Convention::PaperCompat),
        flops(Convention::WithHead),
        sites.join(", "),
    )
}

/// Documents that do not count, by task, reason and index.
fn excluded(run: &RunResult) -> String {
    /// Indices that are shown of each reason.
    const SHOWN: usize = 10;
    let mut text = String::new();
    for task in &run.tasks {
        let mut rest = task.excluded.as_slice();
        let mut reasons = Vec::new();
        while let Some(first) = rest.first() {
            if !reasons.contains(&first.reason) {
                reasons.push(first.reason);
            }
            rest = &rest[1..];
        }
        for reason in reasons {
            let all: Vec<usize> = task
                .excluded
                .iter()
                .filter(|one| one.reason == reason)
                .map(|one| one.document)
                .collect();
            let shown: Vec<String> = all.iter().take(SHOWN).map(usize::to_string).collect();
            let more = if all.len() > SHOWN { ", ..." } else { "" };
            let _ = writeln!(
                text,
                "{}: {} excluded, since {reason}: documents {}{more}",
                task.name,
                all.len(),
                shown.join(", ")
            );
        }
    }
    text
}

/// Tasks, groups and sets by name.
pub fn catalog() -> String {
    let mut text = String::new();
    let groups = tasks::groups();
    let all = tasks::all();
    let width = all.iter().map(|task| task.name().len()).max().unwrap_or(0);
    for task in &all {
        let metrics: Vec<&str> = task.metrics().iter().map(|metric| metric.name()).collect();
        let shots = match task.shots() {
            Shots::None => "no examples".to_owned(),
            Shots::First(split) => format!("examples: the first of {split}"),
            Shots::Drawn { split, .. } => format!("examples: drawn from {split}"),
        };
        let _ = writeln!(
            text,
            "{:<width$}  {}, {} ({shots})",
            task.name(),
            task.source(),
            metrics.join(" ")
        );
    }
    for group in &groups {
        let _ = writeln!(text, "{:<width$}  group of {} tasks", group.name, group.tasks.len());
    }
    for (name, meaning) in tasks::SETS {
        let _ = writeln!(text, "{name:<width$}  {meaning}");
    }
    text
}

/// A document as the model sees it.
pub fn prompt(task: &str, asked: &Asked) -> String {
    let shown = match asked.document.requests().first() {
        Some(Request::Likelihood { context, continuation }) => {
            format!("{context}\n(end of the prompt; scored behind it:)\n{continuation}")
        }
        Some(Request::Generate { context, until, .. }) => {
            format!("{context}\n(end of the prompt; generated until one of {until:?})")
        }
        Some(Request::Rolling { text }) => format!("{text}\n(end of the text)"),
        None => "(nothing)".to_owned(),
    };
    format!("{task}, document {}; the prompt:\n{shown}", asked.id)
}
