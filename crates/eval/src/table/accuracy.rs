//! The accuracy-vs-FLOPs table: what a model's sparsity saves, beside what it can still do.
//!
//! The layout is that of the paper's table 1: model, sparsity of the inputs of QKV, down
//! and up projections, FLOPs of a token, average accuracy, each task's accuracy. Behind
//! them stand perplexities, which the average leaves out.

use relufy_spec::flops::{Convention, SiteDensities};

use super::grid::{Cell, Column, Grid};
use crate::metrics::Estimate;
use crate::results::RunResult;

/// The table of some runs, in their order. `convention` says which FLOPs a person reads;
/// JSON and CSV have all. Where a group has a mean, it stands for its tasks.
pub fn accuracy_vs_flops(runs: &[RunResult], convention: Convention) -> Grid {
    let Headlines { shown, within, everywhere } = Headlines::of(runs);
    let perplexities = names(runs, |run, name| run.perplexity(name).is_some());
    let trained = runs.iter().any(|run| run.model.tokens_trained > 0);
    let unit = Unit::of(runs.iter().map(|run| run.flops.get(convention)));

    let mut columns = vec![
        Column::text("model", "Model"),
        Column::number("stage", "Stage").machine_only(),
        Column::number("parameters", "Parameters").machine_only(),
        hidden_unless(trained, Column::number("tokens_trained", "Tokens")),
        Column::number("qkv_sparsity", "QKV %"),
        Column::number("down_sparsity", "Down %"),
        Column::number("up_sparsity", "Up %"),
        Column::number("qkv_sparsity_error_95", "QKV ±").machine_only(),
        Column::number("down_sparsity_error_95", "Down ±").machine_only(),
        Column::number("up_sparsity_error_95", "Up ±").machine_only(),
        Column::number("flops_shown", format!("FLOPs ({})", unit.name)),
    ];
    for each in Convention::ALL {
        columns.push(Column::number(key(each), key(each)).machine_only());
    }
    columns.push(hidden_unless(!everywhere.is_empty(), Column::number("average", "Avg")));
    columns.extend(shown.iter().map(|task| Column::number(*task, *task)));
    columns.extend(within.iter().map(|task| Column::number(*task, *task).machine_only()));
    columns.extend(
        perplexities
            .iter()
            .map(|task| Column::number(format!("{task}_perplexity"), format!("{task} ppl"))),
    );

    let rows = runs
        .iter()
        .map(|run| {
            let density = run.densities.mean;
            let error = run.densities.error_95.as_ref().map(|error| error.mean);
            let error = |site: fn(&SiteDensities) -> f64| {
                error.as_ref().map_or(Cell::Empty, |error| percent(site(error)))
            };
            let mut row = vec![
                Cell::Text(label(run)),
                Cell::Count(u8::from(run.model.stage).into()),
                Cell::Count(run.model.parameters as u64),
                Cell::Count(run.model.tokens_trained),
                percent(1.0 - density.qkv),
                percent(1.0 - density.down),
                percent(1.0 - density.up),
                error(|error| error.qkv),
                error(|error| error.down),
                error(|error| error.up),
                Cell::number(run.flops.get(convention) / unit.size, 2),
            ];
            row.extend(Convention::ALL.map(|each| Cell::number(run.flops.get(each), 0)));
            row.push(average(run, &everywhere));
            let accuracy = |task: &&str| run.accuracy(task).map_or(Cell::Empty, share);
            row.extend(shown.iter().chain(&within).map(accuracy));
            row.extend(perplexities.iter().map(|task| {
                run.perplexity(task).map_or(Cell::Empty, |estimate| {
                    let Estimate { value, stderr } = estimate;
                    Cell::Number { value, stderr, decimals: 2 }
                })
            }));
            row
        })
        .collect();
    Grid { columns, rows, notes: notes(runs, convention, &shown, &everywhere) }
}

/// Tasks and groups with an accuracy, by name and in order of their first appearance.
pub(super) struct Headlines<'a> {
    /// Those that are part of no other.
    pub(super) shown: Vec<&'a str>,
    /// Tasks and groups within these.
    within: Vec<&'a str>,
    /// Those shown that every run has.
    pub(super) everywhere: Vec<&'a str>,
}

impl<'a> Headlines<'a> {
    pub(super) fn of(runs: &'a [RunResult]) -> Headlines<'a> {
        let all = names(runs, |run, name| run.accuracy(name).is_some());
        let is_within = |name: &str| {
            let groups = runs.iter().flat_map(|run| &run.groups);
            let mut measured = groups.filter(|group| !group.metrics.is_empty());
            measured.any(|group| group.members.iter().any(|member| member == name))
        };
        let (within, shown): (Vec<&str>, Vec<&str>) =
            all.into_iter().partition(|name| is_within(name));
        let has = |name: &&str| runs.iter().all(|run| run.accuracy(name).is_some());
        Headlines { everywhere: shown.iter().copied().filter(has).collect(), shown, within }
    }
}

/// Names of tasks and groups for which `wanted` holds in some run.
fn names(runs: &[RunResult], wanted: impl Fn(&RunResult, &str) -> bool) -> Vec<&str> {
    let mut names: Vec<&str> = Vec::new();
    for run in runs {
        let tasks = run.tasks.iter().map(|task| task.name.as_str());
        for name in tasks.chain(run.groups.iter().map(|group| group.name.as_str())) {
            if wanted(run, name) && !names.contains(&name) {
                names.push(name);
            }
        }
    }
    names
}

fn notes(
    runs: &[RunResult],
    convention: Convention,
    accuracies: &[&str],
    everywhere: &[&str],
) -> Vec<String> {
    let mut notes = vec![format!(
        "QKV, Down, Up: zeros at the input of these projections. FLOPs: multiply-accumulates of a token that skips them, {}.",
        convention.name()
    )];
    let errors = runs.iter().filter_map(|run| run.densities.error_95.as_ref());
    let widest = errors
        .flat_map(|error| [error.mean.qkv, error.mean.down, error.mean.up])
        .fold(f64::NAN, f64::max);
    if widest > 0.0 {
        notes.push(format!(
            "Zeros have 95 % intervals over documents of at most ± {:.2} points (JSON and CSV have each).",
            100.0 * widest
        ));
    }
    if !everywhere.is_empty() {
        notes.push(format!("Avg: mean accuracy on {}.", everywhere.join(", ")));
    }
    let partial: Vec<&str> =
        accuracies.iter().copied().filter(|task| !everywhere.contains(task)).collect();
    if !partial.is_empty() {
        notes.push(format!("Not in Avg, since not every run has them: {}.", partial.join(", ")));
    }
    let mut names: Vec<&str> = Vec::new();
    for task in runs.iter().flat_map(|run| &run.tasks) {
        if !names.contains(&task.name.as_str()) {
            names.push(&task.name);
        }
    }
    for name in names {
        let mut same = runs.iter().flat_map(|run| &run.tasks).filter(|task| task.name == name);
        let Some(first) = same.next() else { continue };
        if !first.excluded.is_empty() {
            notes.push(format!(
                "{name}: {} documents excluded ({}).",
                first.excluded.len(),
                first.excluded.first().map_or(String::new(), |one| one.reason.to_string()),
            ));
        }
        if same.any(|task| {
            (task.documents, task.requests, &task.source, task.version)
                != (first.documents, first.requests, &first.source, first.version)
        }) {
            notes.push(format!("{name}: the runs were not asked the same documents."));
        }
    }
    notes
}

/// The model and its stage, as the paper writes them: `name (s1)`, unless the name tells.
pub(super) fn label(run: &RunResult) -> String {
    let name = &run.model.name;
    match u8::from(run.model.stage) {
        0 => name.clone(),
        stage if name.contains(&format!("(s{stage}")) => name.clone(),
        stage => format!("{name} (s{stage})"),
    }
}

/// Mean accuracy over `tasks`; its standard error takes them for independent.
fn average(run: &RunResult, tasks: &[&str]) -> Cell {
    let all: Vec<Estimate> = tasks.iter().filter_map(|task| run.accuracy(task)).collect();
    if all.is_empty() {
        return Cell::Empty;
    }
    let n = all.len() as f64;
    let squares: Option<f64> =
        all.iter().map(|estimate| estimate.stderr.map(|error| error * error)).sum();
    share(Estimate {
        value: all.iter().map(|estimate| estimate.value).sum::<f64>() / n,
        stderr: squares.map(|squares| squares.sqrt() / n),
    })
}

fn share(estimate: Estimate) -> Cell {
    Cell::Number {
        value: 100.0 * estimate.value,
        stderr: estimate.stderr.map(|error| 100.0 * error),
        decimals: 1,
    }
}

fn percent(share: f64) -> Cell {
    Cell::number(100.0 * share, 1)
}

fn hidden_unless(shown: bool, column: Column) -> Column {
    if shown { column } else { column.machine_only() }
}

/// A convention's column in JSON and CSV.
pub(super) fn key(convention: Convention) -> &'static str {
    match convention {
        Convention::Blocks => "flops_blocks",
        Convention::WithHead => "flops_with_head",
        Convention::PaperCompat => "flops_paper_compat",
    }
}

/// One unit for all rows, so that they compare.
struct Unit {
    name: &'static str,
    size: f64,
}

impl Unit {
    fn of(values: impl Iterator<Item = f64>) -> Unit {
        match values.fold(0.0, f64::max) {
            largest if largest >= 1e9 => Unit { name: "G", size: 1e9 },
            largest if largest >= 1e6 => Unit { name: "M", size: 1e6 },
            _ => Unit { name: "K", size: 1e3 },
        }
    }
}

#[cfg(test)]
mod tests {
    use relufy_spec::Stage;

    use super::*;
    use crate::metrics::Metric;
    use crate::results::example;
    use crate::table::Format;

    fn run(name: &str, stage: Stage, tokens_trained: u64, tasks: &[(&str, f64)]) -> RunResult {
        let accuracy =
            |(name, value): &(&str, f64)| example::task(name, &[(Metric::Acc, *value, Some(0.04))]);
        let held_out = example::task("held_out", &[(Metric::Perplexity, 12.345, None)]);
        let tasks = tasks.iter().map(accuracy).chain([held_out]).collect();
        example::run(name, stage, tokens_trained, tasks)
    }

    #[test]
    fn the_table_as_a_person_sees_it() {
        let runs = [
            run("donor", Stage::Dense, 0, &[("arc_easy", 0.5), ("piqa", 0.6)]),
            run("donor", Stage::Two, 1_500_000, &[("arc_easy", 0.48), ("sciq", 0.7)]),
        ];
        insta::assert_snapshot!(
            accuracy_vs_flops(&runs, Convention::PaperCompat).render(Format::Terminal)
        );
    }

    #[test]
    fn machines_read_every_convention() {
        let runs = [run("donor", Stage::One, 0, &[("piqa", 0.6)])];
        let json = accuracy_vs_flops(&runs, Convention::Blocks).render(Format::Json);
        let read: serde_json::Value = serde_json::from_str(&json).unwrap();
        let row = &read["rows"][0];
        assert_eq!(row["flops_blocks"], 5e5);
        assert_eq!(row["flops_paper_compat"], 7e5);
        assert_eq!((&row["stage"], &row["parameters"]), (&1.into(), &2_000_000.into()));
        assert_eq!((&row["average"], &row["piqa"]), (&60.0.into(), &60.0.into()));
    }

    #[test]
    fn a_stage_is_named_once() {
        assert_eq!(label(&run("a", Stage::Dense, 0, &[])), "a");
        assert_eq!(label(&run("a", Stage::Two, 0, &[])), "a (s2)");
        assert_eq!(label(&run("a (s2, bare)", Stage::Two, 0, &[])), "a (s2, bare)");
    }

    #[test]
    fn runs_asked_different_documents_are_marked() {
        let mut runs = vec![run("a", Stage::Dense, 0, &[("piqa", 0.6)]); 2];
        let marked = |runs: &[RunResult]| {
            let notes = accuracy_vs_flops(runs, Convention::Blocks).notes;
            notes.iter().any(|note| note.starts_with("piqa: the runs were not asked"))
        };
        assert!(!marked(&runs));
        runs[1].tasks[0].documents = 99;
        assert!(marked(&runs));
    }
}
