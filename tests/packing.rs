//! What the sparse engine may be told: where packed weights are kept, and what was measured.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod support;

use std::fs;
use std::path::PathBuf;

use support::{Lab, text, tokenizer};

/// A model whose every token has a text, and what was measured of it at stage 2.
fn lab() -> Lab {
    let lab = Lab::new();
    lab.write("model/tokenizer.json", tokenizer(2).to_string());
    for (stage, file) in [("0", "s0.json"), ("2", "s2.json")] {
        lab.succeed(&[
            "calibrate",
            "model",
            "--corpus",
            "corpus.jsonl",
            "--tokens",
            "500",
            "--stage",
            stage,
            "-o",
            file,
        ]);
    }
    lab
}

fn args<'a>(stage: &'a str, flags: &[&'a str]) -> Vec<&'a str> {
    let all = ["generate", "model", "--prompt", "the small cat sees", "-n", "30", "--stage", stage];
    [&all, flags].concat()
}

/// What is written, and what is said besides.
fn generated(lab: &Lab, stage: &str, flags: &[&str]) -> (String, String) {
    let output = lab.run(&args(stage, flags));
    assert!(output.status.success(), "{flags:?}: {}", text(&output.stderr));
    (text(&output.stdout), text(&output.stderr))
}

fn packed(lab: &Lab, folder: &str) -> Vec<PathBuf> {
    let files = fs::read_dir(lab.path(folder)).unwrap().map(|entry| entry.unwrap().path());
    files.collect()
}

#[test]
fn packed_weights_say_the_same() {
    let lab = lab();
    let (expected, silence) = generated(&lab, "2", &["--format", "int8"]);
    assert_eq!(silence, "");
    let flags = ["--format", "int8", "--packed-cache", "packed"];
    for _ in 0..2 {
        assert_eq!(generated(&lab, "2", &flags), (expected.clone(), String::new()));
    }
    let [file] = &packed(&lab, "packed")[..] else { panic!("not one file") };
    let mut bytes = fs::read(file).unwrap();
    bytes[100] ^= 1;
    fs::write(file, bytes).unwrap();
    let (found, said) = generated(&lab, "2", &flags);
    assert_eq!(found, expected);
    assert!(said.starts_with("packed cache: ") && said.ends_with("; packing again\n"), "{said}");
    assert_eq!(generated(&lab, "2", &flags), (expected.clone(), String::new()));
    // Where nothing can be kept, nothing is lost.
    lab.write("file", "not a folder");
    let (found, said) = generated(&lab, "2", &["--format", "int8", "--packed-cache", "file"]);
    assert_eq!(found, expected);
    assert!(said.ends_with("the packed weights are not kept\n"), "{said}");
}

#[test]
fn the_users_cache_is_taken_for_auto() {
    let lab = lab();
    let mut command = lab.command(&args("2", &["--packed-cache", "auto"]));
    let output = command.env("XDG_CACHE_HOME", lab.path("home")).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(packed(&lab, "home/relufy/packed").len(), 1);
}

#[test]
fn a_layout_for_measured_densities_says_the_same() {
    let lab = lab();
    let plain = generated(&lab, "2", &["--format", "f32"]);
    assert_eq!(generated(&lab, "2", &["--format", "f32", "--calibration", "s2.json"]), plain);
    // Inputs made much sparser than the gate: another layout.
    let mut found: serde_json::Value = serde_json::from_slice(&lab.read("s2.json")).unwrap();
    for layer in found["layers"].as_array_mut().unwrap() {
        (layer["up"]["density"], layer["down"]["density"]) = (0.05.into(), 0.9.into());
    }
    lab.write("other.json", found.to_string());
    let flags = ["--format", "f32", "--calibration", "other.json", "--packed-cache", "packed"];
    assert_eq!(generated(&lab, "2", &flags), plain);
    assert_eq!(generated(&lab, "2", &["--format", "f32", "--packed-cache", "packed"]), plain);
    assert_eq!(packed(&lab, "packed").len(), 2);
}

#[test]
fn thresholds_are_called_inexact() {
    let lab = lab();
    let target =
        |target| ["--format", "f32", "--calibration", "s0.json", "--density-target", target];
    let dense = generated(&lab, "0", &["--engine", "dense"]);
    let (found, said) = generated(&lab, "0", &target("0.3"));
    assert_ne!(found, dense.0);
    assert_eq!(said, "inexact: activations below thresholds count as zero (density target 0.3)\n");
    // So few are dropped that nothing is: exact, and not called otherwise.
    let flags = [&target("1")[..], &["--engine", "sparse"]].concat();
    assert_eq!(generated(&lab, "0", &flags), dense);
}

#[test]
fn what_does_not_fit_is_refused() {
    let lab = lab();
    let refuse = |stage, flags: &[&str], why: &str| lab.refuse(&args(stage, flags), &[why]);
    refuse("2", &["--density-target", "0.5"], "--calibration");
    for bad in ["0", "2", "up=x", "gate=0.5"] {
        let flags = ["--calibration", "s2.json", "--density-target", bad];
        refuse("2", &flags, "expected a density above 0");
    }
    refuse("2", &["--calibration", "none.json"], "--calibration none.json");
    refuse("2", &["--calibration", "model/config.json"], "--calibration model/config.json");
    refuse("0", &["--calibration", "s0.json"], "--calibration is for the sparse engine");
    refuse("0", &["--packed-cache", "packed"], "--packed-cache is for the sparse engine");
    let mut found: serde_json::Value = serde_json::from_slice(&lab.read("s2.json")).unwrap();
    found["layers"].as_array_mut().unwrap().pop();
    lab.write("short.json", found.to_string());
    let why = "1 layers were measured, and the model has 2";
    refuse("2", &["--calibration", "short.json"], why);
}
