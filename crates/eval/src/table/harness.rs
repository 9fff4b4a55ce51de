//! The table that lm-evaluation-harness prints, character for character.
//!
//! The harness writes it with pytablewriter, which guesses each column's type: numbers stand
//! right and share as many decimals as the longest of them needs, and a single `N/A` makes
//! the column text. What is guessed there is guessed here.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::metrics::{Estimate, Metric};
use crate::results::{GroupResult, RunResult, TaskResult, python_float};

const HEADERS: [&str; 8] = ["Version", "Filter", "n-shot", "Metric", "", "Value", "", "Stderr"];

/// pytablewriter's least width of a column.
const LEAST_WIDTH: usize = 3;

/// The results of all tasks and groups, and below it those of the groups alone.
pub fn harness_table(run: &RunResult) -> String {
    let groups = run.groups.iter().any(|group| !group.metrics.is_empty());
    let mut text = table(run, "Tasks", false);
    if groups {
        text += "\n";
        text += &table(run, "Groups", true);
    }
    text
}

/// A task or a group.
#[derive(Clone, Copy)]
enum Entry<'a> {
    Task(&'a TaskResult),
    Group(&'a GroupResult),
}

impl Entry<'_> {
    fn name(&self) -> &str {
        match self {
            Entry::Task(task) => &task.name,
            Entry::Group(group) => &group.name,
        }
    }

    fn alias(&self) -> &str {
        match self {
            Entry::Task(task) => task.alias.as_ref().unwrap_or(&task.name),
            Entry::Group(group) => group.alias.as_ref().unwrap_or(&group.name),
        }
    }

    fn filter(&self) -> &str {
        match self {
            Entry::Task(task) => &task.filter,
            Entry::Group(_) => "none",
        }
    }

    fn metrics(&self) -> Vec<(Metric, Estimate)> {
        let metrics = match self {
            Entry::Task(task) => &task.metrics,
            Entry::Group(group) => &group.metrics,
        };
        let mut sorted: Vec<_> = metrics.iter().map(|(metric, value)| (*metric, *value)).collect();
        sorted.sort_by_key(|(metric, _)| format!("{},", metric.name()));
        sorted
    }
}

fn table(run: &RunResult, title: &str, groups_only: bool) -> String {
    let (versions, shots) = (run.versions(), run.n_shot());
    let directions = run.higher_is_better();
    let mut rows: Vec<Vec<Cell>> = Vec::new();
    for (depth, entry) in ordered(run, groups_only) {
        let alias = match depth {
            0 => entry.alias().to_owned(),
            depth => format!("{}- {}", " ".repeat(depth), entry.alias()),
        };
        let version = match versions.get(entry.name()) {
            Some(Value::String(version)) => Cell::text(version),
            Some(version) => Cell::Number(version.as_f64().unwrap_or(f64::NAN)),
            None => Cell::text("    N/A"),
        };
        let shots = shots.get(entry.name()).map_or(" ".to_owned(), usize::to_string);
        for (n, (metric, Estimate { value, stderr })) in entry.metrics().into_iter().enumerate() {
            let higher = directions.get(entry.name()).and_then(|known| known.get(metric.name()));
            rows.push(vec![
                Cell::text(if n == 0 { &alias } else { "" }),
                if n == 0 { version.clone() } else { Cell::text("") },
                Cell::text(entry.filter()),
                Cell::text(&shots),
                Cell::text(metric.name()),
                Cell::text(match higher.and_then(Value::as_bool) {
                    Some(true) => "↑",
                    Some(false) => "↓",
                    None => "",
                }),
                Cell::text(&four_decimals(value)),
                Cell::text("±"),
                Cell::text(&stderr.map_or("   N/A".to_owned(), four_decimals)),
            ]);
        }
    }
    let columns: Vec<Written> = std::iter::once(title)
        .chain(HEADERS)
        .enumerate()
        .map(|(at, header)| write_column(header, rows.iter().map(|row| &row[at]).collect()))
        .collect();
    let mut text = String::new();
    for line in 0..rows.len() + 2 {
        for column in &columns {
            text.push('|');
            text += &column.lines[line];
        }
        text += "|\n";
    }
    text
}

/// Python's `f"{value:.4f}"`.
fn four_decimals(value: f64) -> String {
    if value.is_nan() { "nan".into() } else { format!("{value:.4}") }
}

/// Groups with what is in them, by name and with their depth; then what is in no group.
fn ordered(run: &RunResult, groups_only: bool) -> Vec<(usize, Entry<'_>)> {
    fn visit<'a>(
        run: &'a RunResult,
        name: &'a str,
        depth: usize,
        out: &mut Vec<(usize, Entry<'a>)>,
        seen: &mut BTreeSet<&'a str>,
    ) {
        if !seen.insert(name) {
            return;
        }
        if let Some(task) = run.tasks.iter().find(|task| task.name == name) {
            out.push((depth, Entry::Task(task)));
        }
        if let Some(group) = run.groups.iter().find(|group| group.name == name) {
            out.push((depth, Entry::Group(group)));
            let mut members: Vec<&str> = group.members.iter().map(String::as_str).collect();
            members.sort_unstable();
            members.into_iter().for_each(|member| visit(run, member, depth + 1, out, seen));
        }
    }
    let (mut out, mut seen) = (Vec::new(), BTreeSet::new());
    let is_member =
        |name: &str| run.groups.iter().any(|group| group.members.iter().any(|other| other == name));
    let mut roots: Vec<&str> = run.groups.iter().map(|group| group.name.as_str()).collect();
    roots.retain(|name| !is_member(name));
    roots.sort_unstable();
    let mut alone: Vec<&str> = run.tasks.iter().map(|task| task.name.as_str()).collect();
    alone.sort_unstable();
    for name in roots.into_iter().chain(alone) {
        visit(run, name, 0, &mut out, &mut seen);
    }
    out.retain(|(_, entry)| !groups_only || matches!(entry, Entry::Group(_)));
    out
}

/// What the harness hands to pytablewriter.
#[derive(Clone)]
enum Cell {
    Text(String),
    Number(f64),
}

impl Cell {
    fn text(text: &str) -> Cell {
        Cell::Text(text.to_owned())
    }
}

/// What pytablewriter takes a cell for.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Empty,
    Text,
    Integer,
    Real,
    Infinity,
    Nan,
}

impl Kind {
    fn is_number(self) -> bool {
        matches!(self, Kind::Integer | Kind::Real)
    }
}

fn kind(text: &str) -> Kind {
    if text.trim().is_empty() {
        return Kind::Empty;
    }
    // Rust reads names of infinity that Python's tables take for text.
    let numeric = text.starts_with(|c: char| c.is_ascii_digit() || c == '-' || c == '.');
    match text.parse::<f64>() {
        _ if text == "inf" => Kind::Infinity,
        _ if text == "nan" => Kind::Nan,
        Ok(value) if numeric && value.is_finite() => {
            if value.fract() == 0.0 {
                Kind::Integer
            } else {
                Kind::Real
            }
        }
        _ => Kind::Text,
    }
}

/// A column's lines: header, rule, cells.
struct Written {
    lines: Vec<String>,
}

fn write_column(header: &str, cells: Vec<&Cell>) -> Written {
    // A text in the first row makes texts of all that are texts in Python.
    let all_texts = matches!(cells.first(), Some(Cell::Text(text)) if kind(text) == Kind::Text);
    let typed: Vec<(String, Kind)> = cells
        .into_iter()
        .map(|cell| match cell {
            Cell::Text(text) if all_texts => (text.clone(), Kind::Text),
            Cell::Text(text) => (text.clone(), kind(text)),
            Cell::Number(value) => (value.to_string(), kind(&value.to_string())),
        })
        .collect();
    let decimals = typed
        .iter()
        .filter(|(_, kind)| *kind == Kind::Real)
        .map(|(text, _)| decimals(text))
        .max()
        .unwrap_or(0);
    let has = |wanted: Kind| typed.iter().any(|(_, kind)| *kind == wanted);
    let is_text = has(Kind::Text);
    let kinds = [Kind::Integer, Kind::Real, Kind::Infinity, Kind::Nan].map(has);
    let mixed = kinds.into_iter().filter(|has| *has).count() > 1;
    let is_real = !is_text && (has(Kind::Real) || mixed);
    let is_right = is_real || (!is_text && has(Kind::Integer));
    let written: Vec<(String, bool)> = typed
        .iter()
        .map(|(text, kind)| {
            let number = |decimals: usize| {
                let value: f64 = text.parse().unwrap_or(f64::NAN);
                // What rounds to zero has no sign.
                format!("{:.decimals$}", if value == 0.0 { 0.0 } else { value })
            };
            let shown = match kind {
                Kind::Integer if is_real => number(decimals),
                Kind::Integer => number(0),
                Kind::Real => number(decimals),
                Kind::Infinity => "Infinity".to_owned(),
                Kind::Nan => "NaN".to_owned(),
                Kind::Empty if is_right => String::new(),
                Kind::Empty | Kind::Text => text.clone(),
            };
            (shown, if is_text { kind.is_number() } else { is_right })
        })
        .collect();
    let longest = written.iter().map(|(text, _)| text.chars().count()).max().unwrap_or(0);
    let width = longest.max(header.chars().count()).max(LEAST_WIDTH);
    let rule = if is_right { "-".repeat(width - 1) + ":" } else { "-".repeat(width) };
    let mut lines = vec![format!("{header:^width$}"), rule];
    lines.extend(written.into_iter().map(|(text, right)| {
        let padded = if right { format!("{text:>width$}") } else { format!("{text:<width$}") };
        padded.replace('|', "\\|")
    }));
    Written { lines }
}

/// Digits behind the point that a number needs.
fn decimals(text: &str) -> usize {
    let value: f64 = text.parse().unwrap_or(0.0);
    let text = python_float(value);
    text.split_once('.').map_or(0, |(_, digits)| digits.len())
}

#[cfg(test)]
mod tests {
    use relufy_spec::Stage;

    use super::*;
    use crate::results::example;

    fn shown(tasks: Vec<TaskResult>, groups: Vec<GroupResult>) -> String {
        let mut run = example::run("m", Stage::Dense, 0, tasks);
        run.groups = groups;
        harness_table(&run)
    }

    // The expected tables were printed by `lm_eval.utils.make_table` of lm_eval 0.4.13, of the
    // same numbers.

    #[test]
    fn numbers_share_their_decimals() {
        let metrics = [(Metric::Acc, 0.23, Some(0.0423)), (Metric::AccNorm, 0.18, Some(0.0386))];
        assert_eq!(
            shown(vec![example::task("arc_easy", &metrics)], Vec::new()),
            "\
| Tasks  |Version|Filter|n-shot| Metric |   |Value|   |Stderr|
|--------|------:|------|-----:|--------|---|----:|---|-----:|
|arc_easy|      1|none  |     0|acc     |↑  | 0.23|±  |0.0423|
|        |       |none  |     0|acc_norm|↑  | 0.18|±  |0.0386|
"
        );
        let metrics = [
            (Metric::Perplexity, 2616004127.4428864, Some(5004117871.73247)),
            (Metric::Acc, 0.0, Some(0.0)),
        ];
        assert_eq!(
            shown(vec![example::task("lam", &metrics)], Vec::new()),
            "\
|Tasks|Version|Filter|n-shot|  Metric  |   |     Value     |   |    Stderr     |
|-----|------:|------|-----:|----------|---|--------------:|---|--------------:|
|lam  |      1|none  |     0|acc       |↑  |         0.0000|±  |         0.0000|
|     |       |none  |     0|perplexity|↓  |2616004127.4429|±  |5004117871.7325|
"
        );
        let one = example::task("a", &[(Metric::Acc, 1.0, Some(0.0))]);
        assert!(shown(vec![one], Vec::new()).contains("|acc   |↑  |    1|±  |     0|"));
    }

    #[test]
    fn a_missing_error_makes_the_column_text() {
        let first =
            [(Metric::WordPerplexity, 642276.2881428653, None), (Metric::BitsPerByte, 3.607, None)];
        let mut wikitext = example::task("w", &first);
        wikitext.version = Some(2.0);
        let x = example::task("x", &[(Metric::Acc, 0.5, Some(0.1))]);
        assert_eq!(
            shown(vec![wikitext.clone(), x.clone()], Vec::new()),
            "\
|Tasks|Version|Filter|n-shot|    Metric     |   |   Value   |   |Stderr|
|-----|------:|------|-----:|---------------|---|----------:|---|------|
|w    |      2|none  |     0|bits_per_byte  |↓  |     3.6070|±  |   N/A|
|     |       |none  |     0|word_perplexity|↓  |642276.2881|±  |   N/A|
|x    |      1|none  |     0|acc            |↑  |     0.5000|±  |0.1000|
"
        );
        // Where a number comes first, the others stay numbers.
        let mut corpus = wikitext;
        corpus.name = "z".into();
        corpus.version = None;
        corpus.metrics.remove(&Metric::WordPerplexity);
        corpus.metrics.insert(Metric::Perplexity, Estimate { value: f64::INFINITY, stderr: None });
        let y = example::task("y", &[(Metric::Acc, 0.25, Some(0.123))]);
        assert_eq!(
            shown(vec![x, y, corpus], Vec::new()),
            "\
|Tasks|Version|Filter|n-shot|   Metric    |   | Value  |   |Stderr|
|-----|-------|------|-----:|-------------|---|-------:|---|------|
|x    |      1|none  |     0|acc          |↑  |   0.500|±  | 0.100|
|y    |      1|none  |     0|acc          |↑  |   0.250|±  | 0.123|
|z    |    N/A|none  |     0|bits_per_byte|↓  |   3.607|±  |   N/A|
|     |       |none  |     0|perplexity   |↓  |Infinity|±  |   N/A|
"
        );
    }

    #[test]
    fn groups_stand_before_their_tasks() {
        let subject = |name: &str, alias: &str, value| {
            let task = example::task(name, &[(Metric::Acc, value, Some(0.3333))]);
            TaskResult { alias: Some(alias.into()), shots: 5, ..task }
        };
        let group = |name: &str, alias: &str, members: &[&str], value| GroupResult {
            name: name.into(),
            alias: Some(alias.into()),
            version: 2.0,
            members: members.iter().map(|member| (*member).to_owned()).collect(),
            documents: 9,
            metrics: [(Metric::Acc, Estimate { value, stderr: Some(0.0526) })].into(),
        };
        let tasks = vec![
            subject("mmlu_virology", "virology", 0.0),
            subject("mmlu_anatomy", "anatomy", 0.6667),
        ];
        let groups = vec![
            group("mmlu_stem", "stem", &["mmlu_virology", "mmlu_anatomy"], 0.193),
            group("mmlu", "mmlu", &["mmlu_stem"], 0.2222),
        ];
        assert_eq!(
            shown(tasks, groups),
            "\
|   Tasks    |Version|Filter|n-shot|Metric|   |Value |   |Stderr|
|------------|------:|------|-----:|------|---|-----:|---|-----:|
|mmlu        |      2|none  |      |acc   |   |0.2222|±  |0.0526|
| - stem     |      2|none  |     5|acc   |↑  |0.1930|±  |0.0526|
|  - anatomy |      1|none  |     5|acc   |↑  |0.6667|±  |0.3333|
|  - virology|      1|none  |     5|acc   |↑  |0.0000|±  |0.3333|

|Groups |Version|Filter|n-shot|Metric|   |Value |   |Stderr|
|-------|------:|------|-----:|------|---|-----:|---|-----:|
|mmlu   |      2|none  |      |acc   |   |0.2222|±  |0.0526|
| - stem|      2|none  |     5|acc   |↑  |0.1930|±  |0.0526|
"
        );
    }
}
