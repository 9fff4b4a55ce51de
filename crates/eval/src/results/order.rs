//! What follows from tasks and groups together: their order, versions, examples, directions.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value};

use super::file::metrics;
use super::{GroupResult, RunResult, TaskResult};
use crate::metrics::Metric;

impl RunResult {
    /// Versions by name: numbers of tasks, texts of groups.
    pub(crate) fn versions(&self) -> BTreeMap<String, Value> {
        let tasks =
            self.tasks.iter().filter_map(|task| Some((task.name.clone(), task.version?.into())));
        let groups =
            self.groups.iter().map(|group| (group.name.clone(), group.version.to_string().into()));
        tasks.chain(groups).collect()
    }

    /// Examples in front of a question; of a group where all its own tasks agree.
    pub(crate) fn n_shot(&self) -> BTreeMap<String, usize> {
        let mut shots: BTreeMap<String, usize> =
            self.tasks.iter().map(|task| (task.name.clone(), task.shots)).collect();
        for group in self.groups_parents_first() {
            let mut known = group.members.iter().filter_map(|member| shots.get(member)).copied();
            if let Some(first) = known.next().filter(|first| known.all(|other| other == *first)) {
                shots.insert(group.name.clone(), first);
            }
        }
        shots
    }

    /// Which metrics are better when they are higher, of tasks and of groups of tasks.
    pub(crate) fn higher_is_better(&self) -> BTreeMap<String, Map<String, Value>> {
        let directions = |task: &TaskResult| -> Map<String, Value> {
            let direction = |metric: Metric| (metric.name().into(), metric.is_accuracy().into());
            metrics(&task.metrics).map(|(metric, _)| direction(metric)).collect()
        };
        let mut all: BTreeMap<String, Map<String, Value>> =
            self.tasks.iter().map(|task| (task.name.clone(), directions(task))).collect();
        for group in self.groups_parents_first() {
            let known = group.members.iter().filter_map(|member| all.get(member)).flatten();
            let of_group: Map<String, Value> =
                known.map(|(metric, higher)| (metric.clone(), higher.clone())).collect();
            if !of_group.is_empty() {
                all.insert(group.name.clone(), of_group);
            }
        }
        all
    }

    /// Groups, each before those within it.
    pub(crate) fn groups_parents_first(&self) -> Vec<&GroupResult> {
        self.walk(true)
    }

    /// Groups, each behind those within it.
    pub(crate) fn groups_children_first(&self) -> Vec<&GroupResult> {
        self.walk(false)
    }

    fn walk(&self, parents_first: bool) -> Vec<&GroupResult> {
        let (mut order, mut seen) = (Vec::new(), BTreeSet::new());
        let is_member =
            |name: &String| self.groups.iter().any(|other| other.members.contains(name));
        for root in self.groups.iter().filter(|group| !is_member(&group.name)) {
            self.visit(root, parents_first, &mut order, &mut seen);
        }
        order
    }

    /// Each group once, also where a file says that it contains itself.
    fn visit<'a>(
        &'a self,
        group: &'a GroupResult,
        parents_first: bool,
        order: &mut Vec<&'a GroupResult>,
        seen: &mut BTreeSet<&'a str>,
    ) {
        if !seen.insert(&group.name) {
            return;
        }
        if parents_first {
            order.push(group);
        }
        for member in &group.members {
            if let Some(inner) = self.groups.iter().find(|inner| inner.name == *member) {
                self.visit(inner, parents_first, order, seen);
            }
        }
        if !parents_first {
            order.push(group);
        }
    }
}
