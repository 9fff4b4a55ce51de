//! A training run that is killed again and again, also in the middle of writing a
//! checkpoint, ends with the very bits of a run that nobody disturbed.
#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "../crates/trainer/tests/common/mod.rs"]
mod common;

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use common::{World, metrics, names};
use relufy_model::{Checkpoint, StoredDtype};

const KILLS: usize = 20;

fn start(config: &Path) -> Child {
    Command::new(env!("CARGO_BIN_EXE_relufy"))
        .args(["train", config.to_str().unwrap(), "--resume"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// Writes the configuration of a run of 40 steps that saves after each.
fn write_config(world: &World, output: &str) -> std::path::PathBuf {
    let set = ["train.save_steps=1", "train.save_total_limit=3", "model.stage=1"];
    let config = world.config("model", output, "", &set);
    let path = world.path(&format!("{output}.toml"));
    fs::write(&path, config.to_toml().unwrap()).unwrap();
    path
}

/// What a reader may rely on at any moment: every checkpoint that can be seen is whole.
fn assert_whole(output: &Path) {
    for name in if output.exists() { names(output) } else { Vec::new() } {
        if name.starts_with("checkpoint-") || name == "final" {
            let folder = output.join(name);
            let opened = Checkpoint::open(&folder);
            assert!(opened.is_ok(), "{}: {}", folder.display(), opened.err().unwrap());
            assert!(folder.join("trainer_state.json").is_file());
        }
    }
}

/// Whether a folder is being written (or was, by a process that is no more).
fn half_written(output: &Path) -> bool {
    let partial =
        |name: &String| name.starts_with(".relufy-partial-") && output.join(name).is_dir();
    output.exists() && names(output).iter().any(partial)
}

fn assert_same(a: &Path, b: &Path) {
    for file in [
        "final/model.safetensors",
        "final/config.json",
        "checkpoint-40/model.safetensors",
        "checkpoint-40/optimizer.safetensors",
    ] {
        assert!(fs::read(a.join(file)).unwrap() == fs::read(b.join(file)).unwrap(), "{file}");
    }
    let losses = |output: &Path| -> Vec<_> {
        let mut lines = metrics(output);
        lines.iter_mut().for_each(|line| drop(line.remove("tokens_per_second")));
        lines
    };
    assert_eq!(losses(a).len(), 44);
    losses(a).iter().zip(losses(b)).for_each(|(a, b)| assert_eq!(*a, b));
}

#[test]
fn twenty_kills_change_no_bit() {
    let world = World::new(StoredDtype::Bf16);
    let whole = write_config(&world, "whole");
    let began = Instant::now();
    assert!(start(&whole).wait().unwrap().success());
    let whole_run = began.elapsed();

    let (mut kills, mut halves, mut runs) = (0, 0, 0);
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    while kills < KILLS {
        runs += 1;
        let output = format!("victim{runs}");
        let config = write_config(&world, &output);
        let output = world.path(&output);
        loop {
            let mut child = start(&config);
            if kills < KILLS {
                random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                // Up to a third of a run, so that one victim dies several times on its way.
                sleep(whole_run.mul_f64((random >> 40) as f64 / (1u64 << 24) as f64 / 3.0));
                // Every other time not before a checkpoint is being written.
                while kills % 2 == 1 && !half_written(&output) {
                    if child.try_wait().unwrap().is_some() {
                        break;
                    }
                    sleep(Duration::from_micros(100));
                }
            }
            if kills < KILLS && child.try_wait().unwrap().is_none() {
                child.kill().unwrap();
                child.wait().unwrap();
                kills += 1;
                halves += usize::from(half_written(&output));
                assert_whole(&output);
                continue;
            }
            assert!(child.wait().unwrap().success());
            break;
        }
        assert_same(&world.path("whole"), &output);
        let left = ["checkpoint-38", "checkpoint-39", "checkpoint-40", "final", "metrics.jsonl"];
        assert_eq!(names(&output)[..5], left);
    }
    assert!(halves >= 3, "only {halves} of {KILLS} kills fell into the writing of a checkpoint");
}

#[test]
fn ctrl_c_saves_and_ends() {
    let world = World::new(StoredDtype::F32);
    let whole = write_config(&world, "whole");
    assert!(start(&whole).wait().unwrap().success());

    let config = write_config(&world, "asked");
    let output = world.path("asked");
    let mut child = start(&config);
    // Whichever it is: under load the first ones may have made room for others.
    while !output.exists() || !names(&output).iter().any(|name| name.starts_with("checkpoint-")) {
        assert!(child.try_wait().unwrap().is_none(), "it ended by itself");
        sleep(Duration::from_micros(100));
    }
    let asked = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(asked.success());
    let status = child.wait().unwrap();
    // The conventional code of a program that SIGINT ended; 0 if it was done meanwhile.
    if !output.join("final").exists() {
        assert_eq!(status.code(), Some(130));
    }
    assert!(!half_written(&output));
    assert!(start(&config).wait().unwrap().success());
    assert_same(&world.path("whole"), &output);
}
