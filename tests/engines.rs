//! The engines of `generate` and `serve`: the one that skips zeros says what the dense one says.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod support;

use support::{Lab, text, tokenizer};

const PROMPT: [&str; 4] = ["generate", "model", "--prompt", "the small cat sees"];

/// A model whose every token has a text.
fn lab() -> Lab {
    let lab = Lab::new();
    lab.write("model/tokenizer.json", tokenizer(2).to_string());
    lab
}

/// What `generate` prints with these flags.
fn generated(lab: &Lab, flags: &[&str]) -> String {
    let output = lab.run(&[&PROMPT[..], &["-n", "30"], flags].concat());
    assert!(output.status.success(), "{flags:?}: {}", text(&output.stderr));
    text(&output.stdout).to_owned()
}

#[test]
fn skipping_zeros_changes_no_text() {
    let lab = lab();
    for stage in ["0", "1", "2"] {
        let dense = generated(&lab, &["--stage", stage, "--engine", "dense"]);
        let sparse = generated(&lab, &["--stage", stage, "--engine", "sparse", "--format", "f32"]);
        assert_eq!(sparse, dense, "stage {stage}");
        assert!(dense.split_whitespace().count() > 5, "{dense}");
    }
}

#[test]
fn a_model_with_zeros_is_decoded_sparsely_without_asking() {
    let lab = lab();
    // int8 rounds what the sparse engine reads, and only that engine takes it.
    let text = |engine| generated(&lab, &["--stage", "2", "--engine", engine, "--format", "int8"]);
    assert_eq!(text("auto"), text("sparse"));
    for flags in [["--stage", "0"], ["--engine", "dense"]] {
        let flags = [&PROMPT[..], &flags, &["--format", "int8"]].concat();
        lab.refuse(&flags, &["--format int8 is for the sparse engine"]);
    }
}

#[test]
fn what_does_not_go_together_is_refused() {
    let lab = Lab::new();
    lab.refuse(&[&PROMPT[..], &["--format", "q4"]].concat(), &["unknown format `q4`"]);
    lab.refuse(&[&PROMPT[..], &["--engine", "fast"]].concat(), &["auto, dense, sparse"]);
    let half = ["--engine", "sparse", "--device", "cuda", "--format", "f16"];
    lab.refuse(&[&PROMPT[..], &half].concat(), &["--format f16 is for the CPU"]);
    let both = ["--device", "cuda", "--format", "f32", "--dtype", "bf16"];
    lab.refuse(&[&PROMPT[..], &both].concat(), &["contradict"]);
    let long = vec!["the"; 65].join(" ");
    lab.refuse(&["generate", "model", "--prompt", &long, "--engine", "sparse"], &["--prompt"]);
}
