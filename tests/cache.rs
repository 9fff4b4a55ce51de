//! `relufy cache`: packed weights that are of no use any more, and writers that were killed.
#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod support;

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::{Lab, llama, text, tokenizer};

/// A model whose every token has a text.
fn lab() -> Lab {
    let lab = Lab::new();
    lab.write("model/tokenizer.json", tokenizer(2).to_string());
    lab
}

/// One with so many weights that writing them takes a while.
fn large() -> Lab {
    let lab = lab();
    let mut config = llama();
    config.extend(
        json!({"hidden_size": 512, "intermediate_size": 4096}).as_object().unwrap().clone(),
    );
    lab.write("large.json", Value::Object(config).to_string());
    lab.succeed(&["init", "large.json", "--tokenizer", "tokenizer", "-o", "large"]);
    lab.write("large/tokenizer.json", tokenizer(2).to_string());
    lab
}

fn generate<'a>(model: &'a str, format: &'a str) -> Vec<&'a str> {
    let all = ["generate", model, "--prompt", "the small cat", "-n", "4", "--stage", "2"];
    [&all[..], &["--packed-cache", "packed", "--format", format]].concat()
}

/// What it says on standard error.
fn said(lab: &Lab, args: &[&str]) -> String {
    let output = lab.run(args);
    assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
    text(&output.stderr)
}

/// Files of the cache that are being written, or were.
fn partial(lab: &Lab) -> Vec<PathBuf> {
    let found = fs::read_dir(lab.path("packed")).into_iter().flatten();
    let names = found.map(|entry| entry.unwrap().path());
    names.filter(|path| path.file_name().unwrap().as_encoded_bytes()[0] == b'.').collect()
}

/// The states of the files, by name.
fn states(lab: &Lab) -> Vec<String> {
    let found = lab.succeed(&["cache", "list", "packed", "--json"]);
    let found: Value = serde_json::from_str(&found).unwrap();
    let files = found["files"].as_array().unwrap();
    files.iter().map(|file| file["state"].as_str().unwrap().to_owned()).collect()
}

/// Whether something of a file is written: before that its writer may not have locked it yet, and then
/// it is a leftover to whoever looks.
fn is_begun(lab: &Lab) -> bool {
    // One that is gone has its final name.
    partial(lab).iter().any(|path| fs::metadata(path).is_ok_and(|file| file.len() > 0))
}

/// Starts a process that packs the large model, and stops it while it writes.
fn stopped(lab: &Lab) -> Child {
    for _ in 0..50 {
        let mut command = lab.command(&generate("large", "f32"));
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let limit = Instant::now() + Duration::from_secs(60);
        let mut running = true;
        while running && !is_begun(lab) {
            assert!(Instant::now() < limit, "nothing is written");
            std::thread::sleep(Duration::from_millis(1));
            running = child.try_wait().unwrap().is_none();
        }
        if running {
            stop(&child);
            if is_begun(lab) {
                return child;
            }
            child.kill().unwrap();
        }
        child.wait().unwrap();
        // It has written all, and is to write again.
        for file in fs::read_dir(lab.path("packed")).unwrap().map(|file| file.unwrap()) {
            if file.file_name().as_encoded_bytes().starts_with(b"large-") {
                fs::remove_file(file.path()).unwrap();
            }
        }
    }
    panic!("writing is too fast to be interrupted");
}

/// Stops a process; when this returns it does nothing any more, or has ended.
fn stop(child: &Child) {
    signal(child, libc::SIGSTOP);
    // SAFETY: all zeros are a value of a plain struct of numbers.
    let mut seen: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let what = libc::WSTOPPED | libc::WEXITED | libc::WNOWAIT;
    // SAFETY: waits for a process of ours, which stays to be waited for, and writes to `seen` alone.
    assert_eq!(unsafe { libc::waitid(libc::P_PID, child.id(), &raw mut seen, what) }, 0);
}

fn signal(child: &Child, signal: i32) {
    // SAFETY: sends a signal to a process of ours that was not waited for, so the number is its.
    assert_eq!(unsafe { libc::kill(child.id().cast_signed(), signal) }, 0);
}

#[test]
fn what_a_killed_writer_left_is_removed_and_a_live_one_is_left_alone() {
    let lab = large();
    for by_hand in [true, false] {
        let mut dead = stopped(&lab);
        // While it lives, nobody takes its file, not even stopped.
        assert_eq!(states(&lab), ["writing"]);
        let all = lab.succeed(&["cache", "clean", "packed", "--all"]);
        assert!(all.starts_with("freed 0 B; kept 1 file ("), "{all}");
        dead.kill().unwrap();
        dead.wait().unwrap();
        assert_eq!((states(&lab), partial(&lab).len()), (vec!["interrupted".to_owned()], 1));
        if by_hand {
            let found = lab.succeed(&["cache", "clean", "packed"]);
            assert!(found.starts_with("removed packed/.relufy-partial-packed-"), "{found}");
            assert!(found.contains("): its writer was interrupted\nfreed "), "{found}");
        } else {
            // Or by the next who writes.
            assert_eq!(said(&lab, &generate("model", "f16")), "");
            assert_eq!(states(&lab), ["current"]);
        }
        assert!(partial(&lab).is_empty());
    }
    // Two writers: the one that goes on is not disturbed by the other.
    let mut slow = stopped(&lab);
    assert_eq!(said(&lab, &generate("model", "int8")), "");
    assert_eq!(partial(&lab).len(), 1);
    signal(&slow, libc::SIGCONT);
    assert!(slow.wait().unwrap().success());
    assert_eq!(states(&lab), ["current"; 3]);
    let expected = lab.succeed(&generate("large", "f32"));
    fs::remove_dir_all(lab.path("packed")).unwrap();
    assert_eq!(lab.succeed(&generate("large", "f32")), expected);
}

#[test]
fn weights_that_changed_are_said_and_cleaned() {
    let lab = lab();
    for format in ["f16", "int8"] {
        assert_eq!(said(&lab, &generate("model", format)), "");
    }
    lab.write("packed/notes.txt", "mine");
    lab.write("packed/mine.packed", "mine");
    lab.write("packed/.relufy-partial-mine", "mine");
    let list = lab.succeed(&["cache", "list", "packed"]);
    for part in ["model-f16-", "model-int8-", "of use", "packed: "] {
        assert!(list.contains(part), "no {part} in {list}");
    }
    assert!(!list.contains("mine") && !list.contains("of no use"), "{list}");
    // Written anew with the same content, they are what they were.
    let weights = lab.read("model/model.safetensors");
    lab.write("model/model.safetensors", &weights);
    assert_eq!(states(&lab), ["current", "current"]);
    let name = lab_tensor(&lab);
    lab.weights("model", |weights| weights.set(&name, 0, 0.5));
    assert_eq!(states(&lab), ["changed", "changed"]);
    // Said once, by who packs the new ones.
    let note = said(&lab, &generate("model", "f16"));
    assert!(note.starts_with("packed cache: ") && note.contains("of earlier weights"), "{note}");
    assert!(note.ends_with("in packed; `relufy cache clean packed` removes them\n"), "{note}");
    assert_eq!(said(&lab, &generate("model", "f16")), "");
    let list = lab.succeed(&["cache", "list", "packed"]);
    assert!(list.contains("`relufy cache clean packed` removes that"), "{list}");
    let before = lab.files();
    let dry = lab.succeed(&["cache", "clean", "packed", "--dry-run"]);
    assert_eq!(dry.matches("would remove packed/model-").count(), 2, "{dry}");
    assert!(dry.contains("\nwould free ") && dry.contains("; kept 1 file ("), "{dry}");
    lab.assert_files(&before, "--dry-run");
    let clean = lab.succeed(&["cache", "clean", "packed"]);
    assert_eq!(clean.matches("): the model's weights are others now\n").count(), 2, "{clean}");
    assert_eq!(states(&lab), ["current"]);
    assert_eq!(said(&lab, &generate("model", "f16")), "");
    // A model that is gone, and everything.
    fs::rename(lab.path("model"), lab.path("moved")).unwrap();
    assert_eq!(states(&lab), ["gone"]);
    fs::rename(lab.path("moved"), lab.path("model")).unwrap();
    assert_eq!(lab.succeed(&["cache", "clean", "packed"]).matches("removed").count(), 0);
    assert_eq!(lab.succeed(&["cache", "clean", "packed", "--all"]).matches("): of use").count(), 1);
    for kept in ["notes.txt", "mine.packed", ".relufy-partial-mine"] {
        assert_eq!(lab.read(&format!("packed/{kept}")), b"mine");
    }
    assert_eq!(fs::read_dir(lab.path("packed")).unwrap().count(), 3);
}

/// A tensor of the model.
fn lab_tensor(lab: &Lab) -> String {
    let weights = support::Weights::read(&lab.read("model/model.safetensors"));
    weights.names().into_iter().find(|name| name.contains("embed")).unwrap()
}

#[test]
fn the_users_cache_is_taken_by_default() {
    let lab = lab();
    let run = |args: &[&str]| {
        let mut command = lab.command(args);
        let output = command.env("XDG_CACHE_HOME", lab.path("home")).output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        text(&output.stdout)
    };
    let nothing = run(&["cache", "list"]);
    assert!(nothing.starts_with("no packed weights in ") && nothing.contains("relufy/packed"));
    assert_eq!(run(&["cache", "clean"]), "freed 0 B; kept 0 files (0 B)\n");
    assert!(!lab.path("home").exists());
    let mut args = generate("model", "f16");
    *args.iter_mut().find(|arg| **arg == "packed").unwrap() = "auto";
    run(&args);
    assert!(run(&["cache", "list"]).contains("of use"));
    assert!(run(&["cache", "clean", "--all"]).contains("): of use\n"));
}

#[test]
fn what_is_no_folder_is_refused() {
    let lab = lab();
    lab.refuse(&["cache", "list", "corpus.jsonl"], &["corpus.jsonl: Not a directory"]);
    lab.refuse(&["cache", "clean", "off"], &["off is no folder"]);
}
