//! A run that was stopped and resumed is the run that was never stopped, bit for bit.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::fs;
use std::path::Path;

use common::{World, metrics, names, train, train_until};
use relufy_model::StoredDtype;
use relufy_trainer::{Error, completed};

/// Every loss there is, so that each has to resume.
const LOSSES: &str =
    "[distill]\nweight = 0.3\n[regularise.prosparse]\nlambda = [0.0, 0.1]\nuntil_step = [5, 30]\n";

fn same_file(a: &Path, b: &Path, name: &str) {
    assert!(fs::read(a.join(name)).unwrap() == fs::read(b.join(name)).unwrap(), "{name} differs");
}

fn same_run(a: &Path, b: &Path) {
    same_file(&a.join("checkpoint-40"), &b.join("checkpoint-40"), "optimizer.safetensors");
    same_file(&a.join("checkpoint-40"), &b.join("checkpoint-40"), "model.safetensors");
    same_file(&a.join("final"), &b.join("final"), "model.safetensors");
    same_file(&a.join("final"), &b.join("final"), "config.json");
    let without_clock = |path| {
        let mut lines = metrics(path);
        lines.iter_mut().for_each(|line| drop(line.remove("tokens_per_second")));
        lines
    };
    let (left, right) = (without_clock(a), without_clock(b));
    left.iter().zip(&right).for_each(|(left, right)| assert_eq!(left, right));
    assert_eq!(left.len(), right.len());
}

#[test]
fn stopping_and_resuming_changes_no_bit() {
    // bf16 weights: only the masters in the optimizer's file make this exact.
    let world = World::new(StoredDtype::Bf16);
    let whole = world.config("model", "whole", LOSSES, &["model.stage=1"]);
    train(&whole, false).unwrap();

    let cut = world.config("model", "cut", LOSSES, &["model.stage=1"]);
    let (summary, _) = train_until(&cut, false, 20).unwrap();
    assert!(summary.interrupted && summary.steps == 20 && summary.model.is_none());
    let (summary, _) = train_until(&cut, true, 33).unwrap();
    assert!(summary.interrupted && summary.checkpoint.unwrap().ends_with("checkpoint-33"));
    fs::remove_dir_all(world.path("cut/checkpoint-33")).unwrap();
    assert!(completed(&cut).unwrap().is_none());
    let (summary, steps) = train_until(&cut, true, u64::MAX).unwrap();
    assert_eq!((steps[0].step, steps.len(), summary.steps), (31, 10, 40));
    same_run(&world.path("whole"), &world.path("cut"));
    let (model, state) = completed(&cut).unwrap().unwrap();
    assert_eq!((model, state.global_step), (world.path("cut/final"), 40));
    // Once more changes nothing.
    let (_, steps) = train_until(&cut, true, u64::MAX).unwrap();
    assert!(steps.is_empty());
    same_run(&world.path("whole"), &world.path("cut"));
    // Other settings are allowed, and give another model.
    fs::remove_dir_all(world.path("cut/checkpoint-40")).unwrap();
    let slower = world.config("model", "cut", LOSSES, &["model.stage=1", "optim.min_lr_ratio=0.5"]);
    assert!(completed(&slower).unwrap().is_none());
    assert_eq!(train_until(&slower, true, u64::MAX).unwrap().1.len(), 10);
    let model = |run: &str| fs::read(world.path(run).join("final/model.safetensors")).unwrap();
    assert!(model("whole") != model("cut"));
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let world = World::new(StoredDtype::F32);
    for threads in [1, 3] {
        let config = world.config("model", &format!("threads{threads}"), LOSSES, &[]);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| train(&config, false)).unwrap();
    }
    same_run(&world.path("threads1"), &world.path("threads3"));
}

#[test]
fn a_run_killed_before_its_first_checkpoint_begins_again() {
    let world = World::new(StoredDtype::F32);
    let config = world.config("model", "run", "", &["train.max_steps=12"]);
    let output = world.path("run");
    fs::create_dir_all(output.join(".relufy-partial-x")).unwrap();
    train_until(&config, true, 6).unwrap();
    // As after a kill: the checkpoint of step 6 was never finished.
    fs::rename(output.join("checkpoint-6"), output.join(".relufy-partial-y")).unwrap();
    let (_, steps) = train_until(&config, true, u64::MAX).unwrap();
    assert_eq!(steps.len(), 12);
    let logged: Vec<u64> = metrics(&output)
        .iter()
        .filter(|line| line.contains_key("loss"))
        .map(|line| line["step"].as_u64().unwrap())
        .collect();
    assert_eq!(logged, (1..=12).collect::<Vec<_>>());
    let expected =
        ["checkpoint-10", "checkpoint-12", "final", "metrics.jsonl", "tensorboard", "train.toml"];
    assert_eq!(names(&output), expected);
}

#[test]
fn what_would_make_another_run_is_refused() {
    let world = World::new(StoredDtype::F32);
    let config = world.config("model", "run", "", &["train.max_steps=3"]);
    train(&config, false).unwrap();
    assert!(matches!(train(&config, false), Err(Error::OutputExists { .. })));
    let other = world.model("other", 8, StoredDtype::F32, |_| {});
    let other = format!("model.path='{}'", other.display());
    for (set, what) in [
        ("train.per_device_train_batch_size=4", "batch shape"),
        ("train.seq_len=16", "batch shape"),
        ("seed=1", "corpus"),
        ("freeze.freeze=['*embed*']", "trained tensors"),
        (other.as_str(), "the model"),
        ("model.stage=1", "plan"),
    ] {
        let config = world.config("model", "run", "", &["train.max_steps=5", set]);
        let error = train(&config, true).unwrap_err();
        assert!(matches!(error, Error::Changed { .. }), "{set}: {error}");
        assert!(error.to_string().contains(what), "{set}: {error}");
    }
    let longer = world.config("model", "run", "", &["train.max_steps=5"]);
    assert_eq!(train(&longer, true).unwrap().steps, 5);
    let state = fs::read_to_string(world.path("run/final/trainer_state.json")).unwrap();
    assert!(state.contains("\"global_step\": 5"), "{state}");
}
