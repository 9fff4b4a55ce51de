//! `cargo xtask layers`: dependencies between the workspace's crates only point down.
//!
//! ```text
//! relufy (cli)  >  recipe  >  surgery, trainer, sparse, eval  >  model  >  spec, ops, data
//! ```
//!
//! Crates of one layer never use each other: what two of them need belongs below both. xtask
//! stands outside: it uses none of them and none uses it. The rule holds for every kind of
//! dependency, so that a crate's tests are no back door.

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::workspace;

/// The layers from the top down.
const LAYERS: [&[&str]; 5] = [
    &["relufy"],
    &["relufy-recipe"],
    &["relufy-surgery", "relufy-trainer", "relufy-sparse", "relufy-eval"],
    &["relufy-model"],
    &["relufy-spec", "relufy-ops", "relufy-data"],
];

/// The crates without a layer: nobody uses them and they use nobody.
const OUTSIDE: [&str; 1] = ["relufy-xtask"];

/// One crate of the workspace using another.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Edge {
    from: String,
    to: String,
    /// As cargo names it: `normal`, `build` or `dev`.
    kind: String,
}

/// The workspace's crates and who uses whom.
#[derive(Debug, Default)]
struct Graph {
    crates: Vec<String>,
    edges: Vec<Edge>,
}

/// Prints who uses whom; an error if an edge is against the rule.
pub fn run() -> Result<()> {
    let graph = Graph::read(&workspace::metadata()?)?;
    print!("{}", graph.table());
    let violations = graph.violations();
    if violations.is_empty() {
        println!(
            "layers: {} crates, {} edges, all point down",
            graph.crates.len(),
            graph.edges.len()
        );
        return Ok(());
    }
    bail!("the layering is broken:\n  {}\nrule: {}", violations.join("\n  "), rule());
}

impl Graph {
    /// Takes the crates and the edges between them out of `cargo metadata --no-deps`.
    fn read(metadata: &Value) -> Result<Self> {
        let packages = metadata["packages"].as_array().context("the metadata has no packages")?;
        let mut graph = Self::default();
        for package in packages {
            graph.crates.push(name(package)?);
        }
        for (package, from) in packages.iter().zip(graph.crates.clone()) {
            let used = package["dependencies"].as_array();
            for dependency in used.with_context(|| format!("{from} has no dependencies field"))? {
                let to = name(dependency)?;
                if graph.crates.contains(&to) {
                    let kind = dependency["kind"].as_str().unwrap_or("normal").to_owned();
                    graph.edges.push(Edge { from: from.clone(), to, kind });
                }
            }
        }
        Ok(graph)
    }

    /// One sentence for each crate without a layer and for each edge that does not point down.
    fn violations(&self) -> Vec<String> {
        let unknown =
            self.crates.iter().filter(|name| place(name) == Place::Unknown).map(|name| {
                format!("{name}: has no layer; give it one in crates/xtask/src/layers.rs")
            });
        let edges = self.edges.iter().filter_map(|edge| {
            let reason = objection(place(&edge.from), place(&edge.to))?;
            Some(format!("{} -> {} ({} dependency): {reason}", edge.from, edge.to, edge.kind))
        });
        unknown.chain(edges).collect()
    }

    /// The crates from the top layer down, each with those that it uses; what only its tests
    /// or its build script use is marked.
    fn table(&self) -> String {
        let mut crates: Vec<&String> = self.crates.iter().collect();
        crates.sort_by_key(|name| (place(name), short(name)));
        let width = crates.iter().map(|name| short(name).len()).max().unwrap_or(0);
        let mut table = String::new();
        for name in crates {
            let layer = match place(name) {
                Place::Layer(depth) => (LAYERS.len() - depth).to_string(),
                Place::Outside | Place::Unknown => "-".to_owned(),
            };
            let mut used: Vec<&Edge> =
                self.edges.iter().filter(|edge| edge.from == *name).collect();
            used.sort_by_key(|edge| (place(&edge.to), short(&edge.to)));
            let used: Vec<String> = used
                .iter()
                .map(|edge| match edge.kind.as_str() {
                    "normal" => short(&edge.to).to_owned(),
                    kind => format!("{} ({kind})", short(&edge.to)),
                })
                .collect();
            let line = format!("{layer}  {:width$}  {}", short(name), used.join(", "));
            table.push_str(line.trim_end());
            table.push('\n');
        }
        table
    }
}

/// Where a crate stands; a layer by its depth, 0 at the top.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    Layer(usize),
    Outside,
    Unknown,
}

fn place(name: &str) -> Place {
    if OUTSIDE.contains(&name) {
        return Place::Outside;
    }
    LAYERS.iter().position(|layer| layer.contains(&name)).map_or(Place::Unknown, Place::Layer)
}

/// Why an edge is not allowed, if it isn't. An edge at an unknown crate is not judged: that
/// crate is already a violation, and a second sentence about it would only be noise.
fn objection(from: Place, to: Place) -> Option<&'static str> {
    match (from, to) {
        (_, Place::Outside) => Some("nobody may use it, it stands outside"),
        (Place::Outside, _) => Some("it stands outside and may use no crate of the workspace"),
        (Place::Layer(from), Place::Layer(to)) if from > to => Some("points up"),
        (Place::Layer(from), Place::Layer(to)) if from == to => {
            Some("crates of one layer never use each other; share what both need below them")
        }
        _ => None,
    }
}

/// The rule in one line, top layer first.
fn rule() -> String {
    let layers: Vec<String> = LAYERS
        .iter()
        .map(|layer| layer.iter().map(|name| short(name)).collect::<Vec<_>>().join(", "))
        .collect();
    format!("{}; each uses only what is to its right of a `>`", layers.join(" > "))
}

/// A crate's name as its folder has it.
fn short(name: &str) -> &str {
    name.strip_prefix("relufy-").unwrap_or(name)
}

fn name(entry: &Value) -> Result<String> {
    let name = entry["name"].as_str();
    Ok(name.with_context(|| format!("an entry of the metadata has no name: {entry}"))?.to_owned())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A graph with the named crates and edges (from, to, kind), as cargo would write it.
    fn graph(crates: &[&str], edges: &[(&str, &str, Option<&str>)]) -> Graph {
        let packages: Vec<Value> = crates
            .iter()
            .map(|name| {
                let mut used: Vec<Value> = edges
                    .iter()
                    .filter(|(from, ..)| from == name)
                    .map(|(_, to, kind)| json!({"name": to, "kind": kind, "rename": null}))
                    .collect();
                used.push(json!({"name": "serde", "kind": null, "rename": null}));
                json!({"name": name, "dependencies": used})
            })
            .collect();
        Graph::read(&json!({"packages": packages})).unwrap()
    }

    /// What is said about a single edge.
    fn verdict(from: &str, to: &str, kind: Option<&str>) -> Vec<String> {
        graph(&[from, to], &[(from, to, kind)]).violations()
    }

    #[test]
    fn every_edge_downwards_is_allowed() {
        for (depth, layer) in LAYERS.iter().enumerate() {
            for from in *layer {
                for to in LAYERS[depth + 1..].iter().copied().flatten() {
                    for kind in [None, Some("build"), Some("dev")] {
                        assert_eq!(verdict(from, to, kind), [""; 0], "{from} -> {to}");
                    }
                }
            }
        }
    }

    #[test]
    fn every_edge_upwards_is_named() {
        for (depth, layer) in LAYERS.iter().enumerate() {
            for from in *layer {
                for to in LAYERS[..depth].iter().copied().flatten() {
                    for (kind, named) in
                        [(None, "normal"), (Some("build"), "build"), (Some("dev"), "dev")]
                    {
                        let expected = format!("{from} -> {to} ({named} dependency): points up");
                        assert_eq!(verdict(from, to, kind), [expected]);
                    }
                }
            }
        }
    }

    #[test]
    fn siblings_never_use_each_other() {
        for kind in [None, Some("build"), Some("dev")] {
            let said = verdict("relufy-trainer", "relufy-eval", kind);
            assert_eq!(said.len(), 1);
            assert!(said[0].contains("relufy-trainer -> relufy-eval"), "{}", said[0]);
            assert!(said[0].contains("one layer"), "{}", said[0]);
        }
    }

    #[test]
    fn xtask_uses_nobody_and_nobody_uses_it() {
        assert!(verdict("relufy", "relufy-xtask", None)[0].contains("nobody may use it"));
        assert!(verdict("relufy-xtask", "relufy-spec", None)[0].contains("stands outside"));
    }

    #[test]
    fn a_crate_without_a_layer_is_an_error() {
        let said = graph(&["relufy-spec", "relufy-new"], &[]).violations();
        assert_eq!(said.len(), 1);
        assert!(said[0].starts_with("relufy-new: has no layer"), "{}", said[0]);
    }

    #[test]
    fn crates_from_elsewhere_are_no_edges() {
        assert_eq!(graph(&["relufy-spec"], &[]).edges, []);
    }

    #[test]
    fn the_table_goes_from_the_top_down_and_marks_what_only_tests_use() {
        let graph = graph(
            &["relufy-ops", "relufy-xtask", "relufy-model", "relufy"],
            &[("relufy", "relufy-model", None), ("relufy-model", "relufy-ops", Some("dev"))],
        );
        let expected = "5  relufy  model\n2  model   ops (dev)\n1  ops\n-  xtask\n";
        assert_eq!(graph.table(), expected);
    }

    #[test]
    fn metadata_of_another_shape_is_refused() {
        for bad in [json!({}), json!({"packages": [{}]}), json!({"packages": [{"name": "a"}]})] {
            assert!(Graph::read(&bad).is_err(), "{bad}");
        }
    }
}
