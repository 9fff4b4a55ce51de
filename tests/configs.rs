//! Every shipped configuration is one that the program understands.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::{Path, PathBuf};

use relufy_spec::family;
use relufy_trainer::TrainConfig;

/// The files below `configs` that end so.
fn shipped(extension: &str) -> Vec<PathBuf> {
    let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("configs")];
    let mut found = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|found| found == extension) {
                found.push(path);
            }
        }
    }
    found.sort();
    assert!(!found.is_empty(), "configs holds no .{extension} file");
    found
}

#[test]
fn every_run_parses() {
    for path in shipped("toml") {
        let config = TrainConfig::read(&path, &[]).unwrap();
        let written = config.to_toml().unwrap();
        let again = TrainConfig::parse(&written, "written", &[]).unwrap();
        assert_eq!(again.to_toml().unwrap(), written, "{}", path.display());
    }
}

#[test]
fn every_architecture_parses() {
    for path in shipped("json") {
        let text = std::fs::read_to_string(&path).unwrap();
        let config = family::parse(&serde_json::from_str(&text).unwrap()).unwrap();
        assert!(config.spec.parameter_count() > 0, "{}", path.display());
    }
}
