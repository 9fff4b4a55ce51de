//! What names stand for: tasks, groups, sets of them, and files of one's own.

use super::{
    Arc, BoolQ, Group, HellaSwag, Lambada, Mmlu, OpenBookQa, Piqa, SciQ, Task, TriviaQa, WikiText,
    WinoGrande,
};
use crate::{Error, Result};

/// Tasks, and groups of them whose mean is wanted.
#[derive(Default)]
pub struct Found {
    /// Tasks, each once, in the order asked for.
    pub tasks: Vec<Box<dyn Task>>,
    /// Groups, parts before the whole.
    pub groups: Vec<Group>,
}

/// Every task that has a name of its own.
pub fn all() -> Vec<Box<dyn Task>> {
    let mut tasks: Vec<Box<dyn Task>> = vec![
        Box::new(Arc::easy()),
        Box::new(Arc::challenge()),
        Box::new(HellaSwag),
        Box::new(BoolQ),
        Box::new(Piqa),
        Box::new(Lambada::openai()),
        Box::new(TriviaQa),
        Box::new(WinoGrande),
        Box::new(SciQ),
        Box::new(OpenBookQa),
        Box::new(WikiText),
    ];
    tasks.extend(mmlu(0));
    tasks
}

/// Every group that has a mean.
pub fn groups() -> Vec<Group> {
    Mmlu::groups()
}

/// Names for several tasks at once, without a mean of their own, and what they stand for.
pub const SETS: [(&str, &str); 2] = [
    (
        "paper",
        "arc_easy arc_challenge hellaswag boolq piqa lambada_openai triviaqa winogrande sciq",
    ),
    ("paper-mmlu", "mmlu with 5 examples"),
];

/// Examples in front of each question of `paper-mmlu`.
const PAPER_MMLU_SHOTS: usize = 5;

fn mmlu(shots: usize) -> impl Iterator<Item = Box<dyn Task>> {
    Mmlu::all(shots).into_iter().map(|subject| Box::new(subject) as Box<dyn Task>)
}

/// What `references` stand for, each one of
/// - the name of a task, a group or a [set](SETS);
/// - a pattern with `*`, `?` or `[...]`, for all tasks and groups whose names match;
/// - `NAME=PATH`: a file of multiple-choice questions in the schema of ai2_arc, as task
///   `NAME`; `NAME=lambada:PATH`: a file of passages whose last word is to be found.
///
/// A task that is meant twice is taken once.
///
/// # Errors
/// A name that is none, with those it resembles; two different tasks of one name, or one
/// with different numbers of examples.
pub fn find<S: AsRef<str>>(references: &[S]) -> Result<Found> {
    let mut found = Found::default();
    for reference in references {
        let more = one(reference.as_ref().trim())?;
        for task in more.tasks {
            found.add(task)?;
        }
        for group in more.groups {
            if !found.groups.iter().any(|known| known.name == group.name) {
                found.groups.push(group);
            }
        }
    }
    Ok(found)
}

impl Found {
    fn add(&mut self, task: Box<dyn Task>) -> Result<()> {
        let Some(known) = self.tasks.iter().find(|known| known.name() == task.name()) else {
            self.tasks.push(task);
            return Ok(());
        };
        if known.source() == task.source() && known.shots_by_default() == task.shots_by_default() {
            return Ok(());
        }
        Err(Error::DuplicateName { name: task.name().into() })
    }
}

/// What one reference stands for.
fn one(reference: &str) -> Result<Found> {
    if let Some((name, path)) = reference.split_once('=') {
        let task: Box<dyn Task> = match path.strip_prefix("lambada:") {
            Some(path) => Box::new(Lambada::file(name, path)),
            None => Box::new(Arc::file(name, path)),
        };
        return Ok(Found { tasks: vec![task], groups: Vec::new() });
    }
    match reference {
        "paper" => {
            let names = SETS[0].1.split(' ').collect::<Vec<_>>();
            return find(&names);
        }
        "paper-mmlu" => {
            return Ok(Found { tasks: mmlu(PAPER_MMLU_SHOTS).collect(), groups: groups() });
        }
        _ => {}
    }
    let is_meant: Box<dyn Fn(&str) -> bool> = if reference.contains(['*', '?', '[']) {
        let pattern = glob::Pattern::new(reference).map_err(|error| Error::Setting {
            what: "task",
            expected: "a pattern such as `mmlu_*`".into(),
            found: format!("`{reference}`: {}", error.msg),
        })?;
        Box::new(move |name| pattern.matches(name))
    } else {
        Box::new(move |name| name == reference)
    };
    // A group brings its tasks and its parts.
    let groups: Vec<Group> = groups();
    let whole: Vec<Group> = groups.iter().filter(|group| is_meant(&group.name)).cloned().collect();
    let in_whole = |name: &str| {
        whole
            .iter()
            .any(|group| group.tasks.iter().chain(&group.members).any(|member| member == name))
    };
    let tasks: Vec<Box<dyn Task>> =
        all().into_iter().filter(|task| is_meant(task.name()) || in_whole(task.name())).collect();
    if tasks.is_empty() {
        return Err(Error::UnknownTask { name: reference.into(), known: resembling(reference) });
    }
    let groups = groups.into_iter().filter(|group| is_meant(&group.name) || in_whole(&group.name));
    Ok(Found { groups: groups.collect(), tasks })
}

/// The names that resemble `reference`, the nearest first; else those that are no part of
/// a group.
fn resembling(reference: &str) -> String {
    let mut names: Vec<String> = SETS.iter().map(|(name, _)| (*name).to_owned()).collect();
    names.extend(groups().into_iter().map(|group| group.name));
    let tasks: Vec<String> = all().iter().map(|task| task.name().to_owned()).collect();
    let in_groups: Vec<String> = groups().into_iter().flat_map(|group| group.tasks).collect();
    let (parts, alone): (Vec<_>, Vec<_>) =
        tasks.into_iter().partition(|name| in_groups.contains(name));
    names.extend(alone);
    let typed = reference.to_lowercase();
    let near = |name: &String| {
        let distance = distance(&typed, name);
        let part = typed.len() > 2 && name.contains(&typed);
        (part || distance <= 1 + typed.len() / 4).then(|| (distance, name.clone()))
    };
    let mut nearest: Vec<(usize, String)> = names.iter().chain(&parts).filter_map(near).collect();
    nearest.sort();
    nearest.truncate(5);
    if nearest.is_empty() {
        return format!("known: {}", names.join(", "));
    }
    let nearest: Vec<String> = nearest.into_iter().map(|(_, name)| name).collect();
    format!("near it: {}", nearest.join(", "))
}

/// Levenshtein's distance: characters to insert, drop or replace.
fn distance(from: &str, to: &str) -> usize {
    let to: Vec<char> = to.chars().collect();
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (at, typed) in from.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], at + 1);
        for (column, meant) in to.iter().enumerate() {
            let replaced = diagonal + usize::from(typed != *meant);
            diagonal = row[column + 1];
            row[column + 1] = replaced.min(diagonal + 1).min(row[column] + 1);
        }
    }
    row.last().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tasks::Source;

    fn names(references: &[&str]) -> (Vec<String>, Vec<String>) {
        let found = find(references).unwrap();
        let tasks = found.tasks.iter().map(|task| task.name().to_owned()).collect();
        (tasks, found.groups.into_iter().map(|group| group.name).collect())
    }

    fn why(references: &[&str]) -> String {
        find(references).err().unwrap().to_string()
    }

    #[test]
    fn every_task_is_found_by_its_name() {
        for task in all() {
            assert_eq!(names(&[task.name()]), (vec![task.name().to_owned()], Vec::new()));
        }
        assert_eq!(all().len(), 11 + 57);
    }

    #[test]
    fn groups_bring_their_tasks_and_parts() {
        let (tasks, groups) = names(&["mmlu_other"]);
        assert_eq!((tasks.len(), groups), (13, vec!["mmlu_other".to_owned()]));
        let (tasks, groups) = names(&["mmlu"]);
        assert_eq!((tasks.len(), groups.len()), (57, 5));
        assert_eq!(groups.last().unwrap(), "mmlu");
        let paper = find(&["paper-mmlu"]).unwrap();
        assert!(paper.tasks.iter().all(|task| task.shots_by_default() == 5));
        assert_eq!(paper.groups.len(), 5);
        assert_eq!(names(&["paper"]).0.len(), 9);
    }

    #[test]
    fn patterns_match_tasks_and_groups() {
        let (tasks, groups) = names(&["arc_*", " b??lq", "boolq"]);
        assert_eq!(
            (tasks, groups),
            (vec!["arc_easy".into(), "arc_challenge".into(), "boolq".into()], vec![])
        );
        let (tasks, groups) = names(&["mmlu_*"]);
        assert_eq!((tasks.len(), groups.len()), (57, 4));
        assert!(why(&["mmlu_[a"]).contains("`mmlu_[a`"));
    }

    #[test]
    fn what_is_meant_twice_is_taken_once() {
        assert_eq!(names(&["mmlu_anatomy", "mmlu_stem", "paper", "sciq"]).0.len(), 19 + 9);
        assert!(why(&["mmlu", "paper-mmlu"]).contains("mmlu_abstract_algebra"));
        assert!(why(&["piqa", "piqa=mine.jsonl"]).contains("`piqa` is asked for twice"));
    }

    #[test]
    fn unknown_names_are_told_what_they_resemble() {
        assert!(why(&["arc_eazy"]).contains("near it: arc_easy"), "{}", why(&["arc_eazy"]));
        assert!(why(&["anatomy"]).contains("mmlu_anatomy"));
        assert!(why(&["gsm8k"]).contains("known: paper, paper-mmlu, mmlu_stem"));
        assert!(!why(&["gsm8k"]).contains("anatomy"));
        for nothing in ["", "x*y"] {
            assert!(why(&[nothing]).contains("unknown task"), "{nothing}");
        }
    }

    #[test]
    fn files_of_one_s_own() {
        let found =
            find(&["facts=world/facts.jsonl", "cloze=lambada:world/passages.jsonl"]).unwrap();
        let [facts, cloze] = &found.tasks[..] else { panic!("two tasks") };
        assert_eq!(
            (facts.name(), facts.source()),
            ("facts", Source::File("world/facts.jsonl".into()))
        );
        assert_eq!(cloze.source(), Source::File("world/passages.jsonl".into()));
        assert_eq!(cloze.metrics(), Lambada::openai().metrics());
    }
}
