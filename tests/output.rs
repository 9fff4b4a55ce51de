//! When output cannot be written: a full disk, a limit on file sizes, a reader who leaves.
//! The message says so, nothing half-written is left, and a run can go on afterwards.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod support;

use std::fs::{self, OpenOptions};
use std::process::{Command, Stdio};

use support::{Lab, RELUFY, text};

/// The program with a limit on the size of its files, in KiB.
fn limited(lab: &Lab, kib: u32, args: &[&str]) -> Command {
    let mut limited = Command::new("bash");
    let plain = lab.command(args);
    limited
        .arg("-c")
        .arg(format!("ulimit -f {kib}; exec \"$0\" \"$@\""))
        .arg(RELUFY)
        .args(args)
        .current_dir(plain.get_current_dir().unwrap());
    for (key, value) in plain.get_envs() {
        match value {
            Some(value) => limited.env(key, value),
            None => limited.env_remove(key),
        };
    }
    limited
}

#[test]
fn a_disk_that_is_full_before_a_model_is_written() {
    let lab = Lab::new();
    let before = lab.files();
    for kib in [4, 40] {
        let init = ["init", "llama.json", "--tokenizer", "tokenizer", "-o", "new"];
        let output = limited(&lab, kib, &init).output().unwrap();
        let message = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{message}");
        assert!(
            message.starts_with("error: ") && message.contains("model.safetensors"),
            "{message}"
        );
        assert!(message.contains("File too large") && message.contains("hint: "), "{message}");
        lab.assert_files(&before, "init");
    }
}

#[test]
fn a_disk_that_is_full_when_a_checkpoint_is_saved() {
    let lab = Lab::new();
    let output = limited(&lab, 60, &["train", "run.toml"]).output().unwrap();
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.contains("error: ") && message.contains("File too large"), "{message}");
    let names: Vec<_> = fs::read_dir(lab.path("run"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    let half = |name: &String| name.contains("partial") || name.contains("checkpoint");
    assert!(!names.iter().any(half), "{names:?}");
    lab.succeed(&["train", "run.toml", "--resume"]);
    lab.succeed(&["inspect", "run/final"]);
}

#[test]
fn a_disk_that_is_full_when_results_are_written() {
    let lab = Lab::new();
    let record = r#"{"question": "the", "answerKey": "A", "choices": {"text": ["a", "cat"], "label": ["A", "B"]}}"#;
    lab.write("q.jsonl", format!("{record}\n").repeat(9));
    let eval = ["eval", "model", "-t", "facts=q.jsonl"];
    for (more, name) in [
        (["-o", "out", "-s"].as_slice(), "out/model/samples_facts_"),
        (&["-o", "out"], "out/model/results_"),
        (&["-c", "cache.jsonl"], "cache.jsonl"),
    ] {
        let args = [&eval[..], more].concat();
        let output = limited(&lab, 1, &args).output().unwrap();
        let message = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{message}");
        assert!(message.starts_with("error: ") && message.contains(name), "{message}");
        assert!(message.contains("File too large") && message.contains("hint: "), "{message}");
        let half = lab.files().into_keys().find(|path| {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            name.contains("partial") || name.starts_with("results_") || name.starts_with("samples_")
        });
        assert_eq!(half, None);
        lab.succeed(&args);
        drop(fs::remove_dir_all(lab.path("out")));
    }
}

#[test]
fn a_full_device_fails_and_stays_a_device() {
    let lab = Lab::new();
    let full = || OpenOptions::new().write(true).open("/dev/full").unwrap();
    let before = lab.files();
    for args in [
        ["inspect", "model"].as_slice(),
        &["generate", "model", "--prompt", "the cat"],
        &["table", "--paper"],
        &["completions", "bash"],
    ] {
        let output = lab.command(args).stdout(full()).output().unwrap();
        let message = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {message}");
        assert!(message.starts_with("error: No space left on device"), "{args:?}: {message}");
        lab.assert_files(&before, &format!("{args:?}"));
    }
    let output = lab.run(&["probe", "model", "--input-ids", "ids.json", "-o", "/dev/full"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).starts_with("error: /dev/full: No space left on device"));
    assert!(!fs::metadata("/dev/full").unwrap().is_file());
    lab.assert_files(&before, "probe");
}

#[test]
fn a_link_is_written_through() {
    let lab = Lab::new();
    lab.write("elsewhere/old.safetensors", "old");
    std::os::unix::fs::symlink("elsewhere/old.safetensors", lab.path("link.safetensors")).unwrap();
    lab.succeed(&["probe", "model", "--input-ids", "ids.json", "-o", "link.safetensors"]);
    assert!(lab.path("link.safetensors").is_symlink());
    lab.succeed(&["probe", "model", "--input-ids", "ids.json", "-o", "new/folder/out.safetensors"]);
    assert_eq!(lab.read("elsewhere/old.safetensors"), lab.read("new/folder/out.safetensors"));
}

#[test]
fn a_reader_who_leaves_ends_it_quietly() {
    let lab = Lab::new();
    for args in [
        ["inspect", "model"].as_slice(),
        &["inspect", "model", "--json"],
        &["generate", "model", "--prompt", "the cat", "-n", "50"],
        &["table", "--paper"],
        &["completions", "zsh"],
        &["--help"],
    ] {
        let mut command = lab.command(args);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
        assert_eq!(text(&output.stderr), "", "{args:?}");
    }
    // A run goes on: its work is the model, not what it says meanwhile.
    let mut command = lab.command(&["train", "run.toml"]);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    assert!(child.wait().unwrap().success());
    lab.succeed(&["inspect", "run/final"]);
}
