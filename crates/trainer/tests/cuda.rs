//! Whole runs on a GPU: against the CPU's, against themselves, and stopped and resumed. Ignored, with
//! the reason, where there is no GPU.
//!
//! `cargo test --release --features relufy-trainer/cuda --test trainer_cuda` on a machine with one.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a failure is the test's failure")]

mod common;

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::path::Path;

use candle_core::{Device, Tensor};
use common::{Step, World, metrics, train, train_until};
use libtest_mimic::{Arguments, Failed, Trial};
use relufy_model::{Checkpoint, StoredDtype};
use relufy_trainer::bench::{Options, Shape, train_steps};
use relufy_trainer::config::RecomputeChoice;

fn main() {
    let tests: [(&str, fn()); 9] = [
        ("f32_follows_the_cpu", f32_follows_the_cpu),
        ("bf16_follows_the_cpu", bf16_follows_the_cpu),
        ("a_run_repeats_bit_by_bit", a_run_repeats),
        ("stopping_and_resuming_changes_no_bit", resuming_changes_no_bit),
        ("stepping_layers_at_once_changes_no_bit", pieces_change_no_bit),
        ("recomputing_changes_no_bit", recomputing_changes_no_bit),
        ("frozen_tensors_keep_their_bits", frozen_tensors_keep_their_bits),
        ("distillation_and_regularisation_run", all_terms_run),
        ("memory_is_flat_and_as_planned", memory_is_as_planned),
    ];
    let gpu = relufy_ops::device::open("cuda");
    if let Err(why) = &gpu {
        println!("ignored: {why}");
    }
    let trial = |(name, run): (&str, fn())| match &gpu {
        Err(_) => Trial::test(name, || Ok(())).with_ignored_flag(true),
        Ok(_) => Trial::test(name, move || {
            std::panic::catch_unwind(AssertUnwindSafe(run)).map_err(|panic| {
                let text = panic.downcast_ref::<String>().map(String::as_str);
                Failed::from(text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("panicked"))
            })
        }),
    };
    let mut arguments = Arguments::from_args();
    // Memory is measured, which is the whole process's.
    arguments.test_threads.get_or_insert(1);
    libtest_mimic::run(&arguments, tests.into_iter().map(trial).collect()).exit();
}

/// A model whose heads take the fast attention kernels.
fn world() -> World {
    let world = World::new(StoredDtype::F32);
    world.model("wide", 7, StoredDtype::F32, |config| {
        config.insert("hidden_size".into(), 128.into());
        config.insert("intermediate_size".into(), 192.into());
        config.insert("num_attention_heads".into(), 2.into());
        config.insert("num_key_value_heads".into(), 1.into());
        config.insert("initializer_range".into(), 0.05.into());
    });
    world
}

const GPU: &str = "train.device=cuda";

fn run(world: &World, output: &str, set: &[&str]) -> Vec<Step> {
    train_until(&world.config("wide", output, "", set), false, u64::MAX).unwrap().1
}

fn weights(world: &World, output: &str) -> HashMap<String, Tensor> {
    let file = world.path(output).join("final/model.safetensors");
    candle_core::safetensors::load(file, &Device::Cpu).unwrap()
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    let values: Vec<f32> = tensor.flatten_all().unwrap().to_vec1().unwrap();
    values.into_iter().map(f32::to_bits).collect()
}

#[track_caller]
fn assert_same_weights(world: &World, one: &str, other: &str) {
    let (one_run, other_run) = (weights(world, one), weights(world, other));
    assert_eq!(one_run.len(), other_run.len());
    for (name, tensor) in one_run {
        assert!(bits(&tensor) == bits(&other_run[&name]), "{one}, {other}: {name}");
    }
}

/// The largest distance of two loss curves, relative.
fn distance(one: &[Step], other: &[Step]) -> f64 {
    assert_eq!(one.len(), other.len());
    let far = one.iter().zip(other).map(|(a, b)| (a.loss - b.loss).abs() / b.loss);
    far.fold(0.0, f64::max)
}

fn validation(output: &Path) -> f64 {
    let lines = metrics(output);
    lines.iter().rev().find_map(|line| line.get("eval_loss")?.as_f64()).unwrap()
}

fn f32_follows_the_cpu() {
    let world = world();
    for model in ["model", "wide"] {
        let on = |device: &str| {
            let (set, output) = (format!("train.device={device}"), format!("{model}-{device}"));
            let config = world.config(model, &output, "", &[&set, "train.dtype=f32"]);
            train_until(&config, false, u64::MAX).unwrap().1
        };
        let far = distance(&on("cuda"), &on("cpu"));
        assert!(far < 1e-3, "{model}: {far}");
    }
}

fn bf16_follows_the_cpu() {
    let world = world();
    let cpu = run(&world, "cpu", &[]);
    // Four micro-batches gather in f32, one in bf16.
    for (output, set) in [
        ("gathered", [GPU, "train.dtype=bf16", "train.grad_dtype=auto"]),
        ("rounded", [GPU, "train.dtype=bf16", "train.grad_dtype=bf16"]),
        ("moments", [GPU, "train.dtype=bf16", "train.moment_dtype=bf16"]),
    ] {
        let far = distance(&run(&world, output, &set), &cpu);
        assert!(far < 3e-2, "{output}: {far}");
        let (found, expected) = (validation(&world.path(output)), validation(&world.path("cpu")));
        assert!((found - expected).abs() < 1e-2 * expected, "{output}: {found} {expected}");
        let model = Checkpoint::open(&world.path(output).join("final")).unwrap();
        model.load(&Device::Cpu).unwrap();
    }
}

fn a_run_repeats() {
    let world = world();
    for (dtype, clip) in [("bf16", "1.0"), ("bf16", "0.0"), ("f32", "1.0")] {
        let (dtype_set, clip_set) =
            (format!("train.dtype={dtype}"), format!("optim.max_grad_norm={clip}"));
        let names = ["one", "other"].map(|side| format!("{side}-{dtype}-{clip}"));
        let runs = names.each_ref().map(|name| run(&world, name, &[GPU, &dtype_set, &clip_set]));
        assert_eq!(runs[0], runs[1]);
        assert_same_weights(&world, &names[0], &names[1]);
    }
}

fn resuming_changes_no_bit() {
    let world = world();
    for (name, more) in [
        ("masters", "train.moment_dtype=f32"),
        ("moments", "train.moment_dtype=bf16"),
        ("pieces", "optim.max_grad_norm=0.0"),
    ] {
        let accumulation = "train.gradient_accumulation_steps=1";
        let set = [GPU, more, accumulation, "train.eval_steps=0", "train.save_steps=0"];
        let (whole, stopped) = (format!("{name}-whole"), format!("{name}-stopped"));
        let expected = run(&world, &whole, &set);
        let config = world.config("wide", &stopped, "", &set);
        let (summary, mut found) = train_until(&config, false, 17).unwrap();
        assert!(summary.interrupted);
        found.extend(train_until(&config, true, u64::MAX).unwrap().1);
        assert_eq!(found, expected, "{name}");
        assert_same_weights(&world, &whole, &stopped);
    }
}

fn pieces_change_no_bit() {
    let world = world();
    for tied in [false, true] {
        world.model("tied", 3, StoredDtype::F32, |config| {
            config.insert("tie_word_embeddings".into(), tied.into());
        });
        let on = |clip: &str| {
            let (set, output) = (format!("optim.max_grad_norm={clip}"), format!("{clip}-{tied}"));
            let set = [GPU, set.as_str(), "train.gradient_accumulation_steps=1"];
            let config = world.config("tied", &output, "", &set);
            (train_until(&config, false, u64::MAX).unwrap().1, output)
        };
        // No gradient is that long: the first clips by a factor of 1, after all are known.
        let ((whole, one), (pieces, other)) = (on("1e9"), on("0.0"));
        assert_eq!(whole, pieces);
        assert_same_weights(&world, &one, &other);
        std::fs::remove_dir_all(world.path("tied")).unwrap();
    }
}

fn recomputing_changes_no_bit() {
    let world = world();
    let modes = ["none", "inputs", "block", "auto"];
    for mode in modes {
        let set = format!("train.recompute={mode}");
        run(&world, mode, &[GPU, "train.max_steps=5", "model.stage=2", &set]);
    }
    modes[1..].iter().for_each(|mode| assert_same_weights(&world, modes[0], mode));
}

fn frozen_tensors_keep_their_bits() {
    let world = world();
    // In bf16 the frozen tensors of a bf16 model are what they were.
    let model = world.model("half", 5, StoredDtype::Bf16, |_| {});
    let set = [GPU, "freeze.train=[\"*.v_proj.*\", \"*.down_proj.*\"]", "train.max_steps=4"];
    train(&world.config("half", "frozen", "", &set), false).unwrap();
    let file = model.join("model.safetensors");
    let before = candle_core::safetensors::load(file, &Device::Cpu).unwrap();
    let after = weights(&world, "frozen");
    let f32 = |tensor: &Tensor| bits(&tensor.to_dtype(candle_core::DType::F32).unwrap());
    for (name, tensor) in before {
        let trained = name.contains("v_proj") || name.contains("down_proj");
        assert_eq!(f32(&tensor) != f32(&after[&name]), trained, "{name}");
    }
}

fn all_terms_run() {
    let world = world();
    let set =
        ["distill.weight=0.5", "regularise.l1=0.5", "train.dead_neurons=true", "model.stage=1"];
    let cpu = run(&world, "cpu", &set);
    let gpu = run(&world, "gpu", &[&[GPU][..], &set].concat());
    for (cpu, gpu) in cpu.iter().zip(&gpu) {
        let near = |a: f64, b: f64| (a - b).abs() < 0.05 * b.abs() + 2e-3;
        assert!(near(gpu.loss, cpu.loss), "{gpu:?} {cpu:?}");
        assert!(near(gpu.kl.unwrap(), cpu.kl.unwrap()), "{gpu:?} {cpu:?}");
        assert!(near(gpu.l1.unwrap(), cpu.l1.unwrap()), "{gpu:?} {cpu:?}");
    }
}

fn memory_is_as_planned() {
    for (name, clip) in [("130m", 1.0), ("130m", 0.0), ("opt125m", 1.0)] {
        for recompute in [RecomputeChoice::None, RecomputeChoice::Inputs, RecomputeChoice::Block] {
            let shape = Shape { batch: 8, ..Shape::named(name).unwrap() };
            let options = Options {
                device: "cuda".to_owned(),
                recompute,
                clip,
                steps: 3,
                warmup: 2,
                parts: false,
                ..Options::new(shape)
            };
            let found = train_steps(&options).unwrap();
            let used = &found.used_after_step;
            // Lists of indices that are kept for the next step come and go: kilobytes.
            let flat = used[1..].iter().all(|now| now.abs_diff(used[1]) < 4 << 20);
            assert!(flat, "{name} {recompute:?}: {used:?}");
            let (peak, planned) = (found.peak_bytes.unwrap() as f64, found.planned_bytes as f64);
            let error = (planned - peak) / peak;
            println!(
                "{name} clip {clip} {recompute:?}: peak {peak:.3e}, planned {:+.1} %",
                100.0 * error
            );
            assert!(error.abs() < 0.05, "{name} {recompute:?}: {peak} measured, {planned} planned");
        }
    }
}
