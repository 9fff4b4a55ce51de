//! Several tasks under one name, and their mean.

use std::collections::BTreeMap;

use crate::metrics::{Estimate, Metric};
use crate::results::{GroupResult, TaskResult};

/// Several tasks under one name whose mean is wanted.
#[derive(Clone, Debug, PartialEq)]
pub struct Group {
    /// Its name.
    pub name: String,
    /// A shorter name within its own group.
    pub alias: Option<String>,
    /// Version, as the harness counts it.
    pub version: f64,
    /// Names of its tasks and groups, in their order.
    pub members: Vec<String>,
    /// Names of all its tasks, those of its groups too.
    pub tasks: Vec<String>,
    /// What is averaged.
    pub metrics: &'static [Metric],
}

impl Group {
    /// The mean of those of its tasks that were run, each weighing as much as it has
    /// documents; `None` without any.
    ///
    /// The standard error is pooled from the tasks', as if their documents were one sample
    /// of each: `sqrt(sum((n - 1) n se^2) / (N - k) / N)` for `k` tasks of `n` documents, `N`
    /// in all. There is none where a task has none.
    pub fn result(&self, tasks: &[TaskResult]) -> Option<GroupResult> {
        let run: Vec<&TaskResult> = self
            .tasks
            .iter()
            .filter_map(|name| tasks.iter().find(|task| task.name == *name))
            .collect();
        let metrics: BTreeMap<Metric, Estimate> = self
            .metrics
            .iter()
            .filter_map(|metric| Some((*metric, mean(&run, *metric)?)))
            .collect();
        (!metrics.is_empty()).then(|| GroupResult {
            name: self.name.clone(),
            alias: self.alias.clone(),
            version: self.version,
            members: self.members.clone(),
            documents: run.iter().map(|task| task.documents).sum(),
            metrics,
        })
    }
}

fn mean(tasks: &[&TaskResult], metric: Metric) -> Option<Estimate> {
    let measured: Vec<(f64, Estimate)> = tasks
        .iter()
        .filter_map(|task| Some((task.documents as f64, *task.metrics.get(&metric)?)))
        .collect();
    let total: f64 = measured.iter().map(|(size, _)| size).sum();
    if total == 0.0 {
        return None;
    }
    let value = measured.iter().map(|(size, found)| found.value * size).sum::<f64>() / total;
    let spread: Option<f64> = measured
        .iter()
        .map(|(size, found)| Some((size - 1.0) * found.stderr?.powi(2) * size))
        .sum();
    let stderr = spread.map(|sum| (sum / (total - measured.len() as f64) / total).sqrt());
    Some(Estimate { value, stderr })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::example;
    use crate::tasks::Mmlu;

    fn task(name: &str, documents: usize, value: f64, stderr: Option<f64>) -> TaskResult {
        TaskResult { documents, ..example::task(name, &[(Metric::Acc, value, stderr)]) }
    }

    fn stem() -> Group {
        Mmlu::groups().remove(0)
    }

    #[test]
    fn larger_tasks_weigh_more_and_errors_are_pooled() {
        let tasks = [
            task("mmlu_anatomy", 20, 0.25, Some(0.1)),
            task("mmlu_astronomy", 60, 0.5, Some(0.05)),
            task("piqa", 1000, 0.9, Some(0.5)),
        ];
        let found = stem().result(&tasks).unwrap();
        assert_eq!((found.documents, found.alias.as_deref()), (80, Some("stem")));
        let acc = found.metrics[&Metric::Acc];
        assert_eq!(acc.value, 0.4375);
        // lm_eval.api.metrics.pooled_sample_stderr([0.1, 0.05], [20, 60])
        assert!((acc.stderr.unwrap() - 0.04502492187381995).abs() < 1e-16, "{acc:?}");
    }

    #[test]
    fn without_a_task_s_error_there_is_none() {
        let tasks = [task("mmlu_anatomy", 1, 1.0, None), task("mmlu_astronomy", 3, 0.0, Some(0.1))];
        let acc = stem().result(&tasks).unwrap().metrics[&Metric::Acc];
        assert_eq!(acc, Estimate { value: 0.25, stderr: None });
        assert_eq!(stem().result(&[task("piqa", 3, 0.0, None)]), None);
    }
}
