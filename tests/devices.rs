//! Devices as a person asks for them: by name, never replaced by another.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod support;

use serde_json::Value;
use support::{Lab, RUN, text};

/// The commands that compute, each on a device of its own.
fn commands(lab: &Lab) -> Vec<Vec<&'static str>> {
    lab.write("run.toml", RUN);
    lab.write("ids.json", "[[1, 5, 9, 4]]");
    vec![
        vec!["train", "run.toml"],
        vec!["eval", "model", "--corpus", "text=corpus.jsonl", "--seq_len", "16"],
        vec!["generate", "model", "--prompt", "the cat", "-n", "4"],
        vec!["probe", "model", "--input-ids", "ids.json", "-o", "out.safetensors"],
        vec!["calibrate", "model", "--corpus", "corpus.jsonl", "--tokens", "64"],
        vec!["bench", "train", "--steps", "1"],
    ]
}

#[test]
fn a_build_without_cuda_says_so_and_computes_nothing() {
    if relufy_ops::device::has_cuda() {
        return;
    }
    let lab = Lab::new();
    for command in commands(&lab) {
        let before = lab.files();
        let output = lab.run(&[&command[..], &["--device", "cuda"]].concat());
        let message = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{command:?}: {message}");
        assert!(message.contains("built without CUDA"), "{command:?}: {message}");
        assert!(message.contains("scripts/build-cuda.sh"), "{command:?}: {message}");
        assert!(message.contains("hint: "), "{command:?}: {message}");
        lab.assert_files(&before, "a device that is not there");
    }
}

#[test]
fn names_and_types_that_do_not_exist_are_refused() {
    let lab = Lab::new();
    for command in commands(&lab) {
        for (flags, expected) in [
            (["--device", "gpu"], "expected cpu, cuda or cuda:N"),
            (["--device", "cuda:x"], "expected cpu, cuda or cuda:N"),
            (["--dtype", "f64"], "expected auto, f32 or bf16"),
        ] {
            lab.refuse(&[&command[..], &flags].concat(), &[expected]);
        }
        let expected =
            if command[0] == "train" { "`auto` or `f32` on the CPU" } else { "bf16 needs a GPU" };
        lab.refuse(&[&command[..], &["--dtype", "bf16"]].concat(), &[expected]);
    }
}

#[test]
fn the_cpu_by_name_is_the_default() {
    let lab = Lab::new();
    lab.write("ids.json", "[[1, 5, 9, 4]]");
    let probe = ["probe", "model", "--input-ids", "ids.json", "-o"];
    lab.succeed(&[&probe[..], &["one.safetensors"]].concat());
    let named = ["two.safetensors", "--device", "cpu", "--dtype", "f32"];
    lab.succeed(&[&probe[..], &named].concat());
    assert!(lab.read("one.safetensors") == lab.read("two.safetensors"));
}

#[test]
fn a_training_benchmark_reports_everything_as_json() {
    let lab = Lab::new();
    let args = ["bench", "train", "--shape", "opt125m", "--batch", "1", "--seq-len", "2"];
    let more = ["--steps", "2", "--recompute", "inputs", "--peak-tflops", "0.5", "--json"];
    let found: Value =
        serde_json::from_str(&lab.succeed(&[args.as_slice(), &more].concat())).unwrap();
    assert_eq!(found["shape"], "opt125m");
    assert_eq!((&found["batch"], &found["seq_len"]), (&1.into(), &2.into()));
    assert_eq!(found["recompute"], "inputs");
    assert_eq!(found["dtype"], "f32");
    assert_eq!(found["step_ms"].as_array().unwrap().len(), 2);
    for key in ["tokens_per_second", "median_ms", "model_tflops", "mfu", "last_loss"] {
        assert!(found[key].as_f64().is_some_and(|value| value > 0.0), "{key}: {}", found[key]);
    }
    assert!(found["planned_bytes"].as_u64().unwrap() > 125_000_000 * 16);
    for key in ["peak_bytes", "attention"] {
        assert!(found[key].is_null(), "{key}: {}", found[key]);
    }
    for part in ["forward", "backward", "forward_backward", "clip", "adamw"] {
        assert!(found["parts"][part].as_f64().is_some(), "{part}");
    }
}
