//! Whole decoders on a GPU against the same weights on the CPU, which is held to the goldens:
//! ignored, with the reason, where there is no GPU. Ends with the worst distances that were seen.
//!
//! `cargo test --release --features relufy-model/cuda --test model_cuda` on a machine with one.
#![allow(clippy::unwrap_used, reason = "a failure is the test's failure")]
#![allow(clippy::print_stderr, clippy::print_stdout, reason = "why tests are ignored; a summary")]

#[path = "../common/mod.rs"]
mod common;
mod distance;

use std::panic::AssertUnwindSafe;

use candle_core::{DType, Device};
use libtest_mimic::{Arguments, Failed, Trial};
use relufy_model::checkpoint::{save_weights, write_config};
use relufy_model::{
    Buffers, Checkpoint, Decoder, DensityTap, Gradients, NoTap, Objective, ParamId, Recompute,
    StoredDtype, Tokens, Trainable, generate,
};
use relufy_ops::buffer::to_host;
use relufy_spec::{ReluPlan, Stage};

use common::{KINDS, config, random};
use distance::{Outcome, compare};

/// A test of a kind of model and a stage.
type Test = fn(usize, Stage, &Device);

fn main() {
    let args = Arguments::from_args();
    let mut trials = Vec::new();
    let gpu = relufy_ops::device::open("cuda");
    if let Err(why) = &gpu {
        eprintln!("ignored: {why}");
    }
    for kind in 0..KINDS {
        let stages = [Stage::Dense, Stage::One, Stage::Two];
        for (number, stage) in stages.into_iter().enumerate() {
            let tests: [(&str, Test); 4] = [
                ("f32", in_f32),
                ("bf16", in_bf16),
                ("recompute", recompute_changes_nothing),
                ("generate", generates_the_same),
            ];
            for (name, test) in tests {
                let name = format!("kind_{kind}_stage_{number}_{name}");
                trials.push(trial(name, &gpu, move |gpu| test(kind, stage, gpu)));
            }
        }
    }
    trials.push(trial("gradients_shared_by_layers".into(), &gpu, shared_buffers));
    let conclusion = libtest_mimic::run(&args, trials);
    if gpu.is_ok() && !args.list {
        let name = |kind| config(kind, 2, 2, 8, 2).json["model_type"].as_str().unwrap().to_string();
        println!("{}\n", distance::summary(&(0..KINDS).map(name).collect::<Vec<_>>()));
    }
    conclusion.exit();
}

fn trial(
    name: String,
    gpu: &relufy_ops::Result<Device>,
    run: impl Fn(&Device) + Send + 'static,
) -> Trial {
    let Ok(gpu) = gpu.as_ref().cloned() else {
        return Trial::test(name, || Ok(())).with_ignored_flag(true);
    };
    Trial::test(name, move || {
        std::panic::catch_unwind(AssertUnwindSafe(|| run(&gpu))).map_err(|panic| {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            Failed::from(text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("panicked"))
        })
    })
}

/// A model of a kind in a folder. Heads of 64 take the fast attention kernels in bf16.
fn checkpoint(kind: usize, folder: &std::path::Path, head_dim: usize) -> Checkpoint {
    let config = config(kind, 2, 2, head_dim, 2);
    let mut params = random(&config, 7 + kind as u64);
    // Weights of an ordinary size: random ones of 0.3 over wide rows explode.
    for param in params.iter() {
        if param.is_matrix() {
            relufy_ops::reduce::scale_in_place(&param.tensor, 0.25).unwrap();
        }
    }
    params = random_vectors(params);
    write_config(folder, &config.json).unwrap();
    save_weights(folder, &config.spec, &params, &config.weights, StoredDtype::Bf16).unwrap();
    Checkpoint::open(folder).unwrap()
}

/// Biases that do something.
fn random_vectors(params: relufy_model::Params) -> relufy_model::Params {
    for (n, param) in params.iter().enumerate().filter(|(_, param)| !param.is_matrix()) {
        let values: Vec<f32> = to_host(&param.tensor)
            .unwrap()
            .into_iter()
            .enumerate()
            .map(|(i, value)| value + 0.1 * ((i * 7 + n * 13) % 11) as f32 / 11.0)
            .collect();
        relufy_ops::buffer::write_from_host(&param.tensor, &values).unwrap();
    }
    params
}

/// Documents of several lengths in one pass, with targets.
fn batch(vocab: usize) -> (Tokens, Vec<i64>) {
    let lengths = [13, 1, 30, 20];
    let n: usize = lengths.iter().sum();
    let ids: Vec<u32> = (0..n).map(|i| ((i * i * 31 + i * 7 + 3) % vocab) as u32).collect();
    let targets =
        (0..n).map(|i| if i % 9 == 4 { -100 } else { ((i * 17) % vocab) as i64 }).collect();
    (Tokens::packed(ids, lengths), targets)
}

fn outcome(decoder: &Decoder, recompute: Recompute) -> Outcome {
    let (tokens, targets) = batch(decoder.spec().vocab);
    let mut gradients =
        Gradients::new(decoder.params(), &Trainable::all(decoder.params())).unwrap();
    gradients.poison().unwrap();
    gradients.begin_step();
    let objective = Objective { scale: 0.02, recompute, ..Objective::default() };
    let mut tap = DensityTap::new(decoder.spec().layers.len());
    let loss =
        decoder.forward_backward(&tokens, &targets, &objective, &mut gradients, &mut tap).unwrap();
    let hidden = decoder.hidden(&tokens, &mut NoTap).unwrap();
    let logits = to_host(&decoder.logits(&hidden).unwrap()).unwrap();
    let gradients = gradients.iter().map(|(id, t, _)| (id, to_host(t).unwrap())).collect();
    let relu = decoder.spec().layers.iter().any(|layer| layer.mlp.activation.is_sparse());
    Outcome { loss: loss.mean(), logits, gradients, tap, relu }
}

fn load(checkpoint: &Checkpoint, stage: Stage, device: &Device, dtype: DType) -> Decoder {
    checkpoint.load_as(device, &ReluPlan::stage(stage), dtype).unwrap()
}

fn in_f32(kind: usize, stage: Stage, gpu: &Device) {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = checkpoint(kind, folder.path(), 8);
    let expected = outcome(&load(&checkpoint, stage, &Device::Cpu, DType::F32), Recompute::None);
    let found = outcome(&load(&checkpoint, stage, gpu, DType::F32), Recompute::None);
    compare(kind, DType::F32, &found, &expected);
    let densities = |outcome: &Outcome| format!("{:?}", outcome.tap.densities());
    if stage == Stage::Dense {
        assert_eq!(densities(&found), densities(&expected));
    }
}

fn in_bf16(kind: usize, stage: Stage, gpu: &Device) {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = checkpoint(kind, folder.path(), 64);
    let expected = outcome(&load(&checkpoint, stage, &Device::Cpu, DType::F32), Recompute::None);
    let decoder = load(&checkpoint, stage, gpu, DType::BF16);
    let found = outcome(&decoder, Recompute::None);
    compare(kind, DType::BF16, &found, &expected);
    let again = outcome(&decoder, Recompute::None);
    assert_eq!(again.loss.to_bits(), found.loss.to_bits(), "two runs differ");
    for ((id, one), (_, other)) in found.gradients.iter().zip(&again.gradients) {
        assert!(one == other, "two runs differ in {id:?}");
    }
}

fn recompute_changes_nothing(kind: usize, stage: Stage, gpu: &Device) {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = checkpoint(kind, folder.path(), 64);
    let decoder = load(&checkpoint, stage, gpu, DType::BF16);
    let kept = outcome(&decoder, Recompute::None);
    for recompute in [Recompute::Inputs, Recompute::Block] {
        let again = outcome(&decoder, recompute);
        assert_eq!(again.loss.to_bits(), kept.loss.to_bits());
        for ((id, one), (_, other)) in kept.gradients.iter().zip(&again.gradients) {
            assert!(one == other, "{recompute:?} differs in {id:?}");
        }
    }
}

fn generates_the_same(kind: usize, stage: Stage, gpu: &Device) {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = checkpoint(kind, folder.path(), 8);
    let text = |device| {
        let decoder = load(&checkpoint, stage, device, DType::F32);
        let first_largest = |logits: &[f32]| -> relufy_model::Result<u32> {
            let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            Ok(logits.iter().position(|logit| *logit == most).unwrap() as u32)
        };
        generate(&decoder, &[3, 1, 4, 1, 5], 12, &[], first_largest, |_| true).unwrap()
    };
    assert_eq!(text(gpu), text(&Device::Cpu));
}

/// An optimizer that takes each layer's gradients as they come may let all layers share buffers.
fn shared_buffers(gpu: &Device) {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = checkpoint(0, folder.path(), 64);
    let decoder = load(&checkpoint, Stage::One, gpu, DType::BF16);
    let own = outcome(&decoder, Recompute::None);
    let (tokens, targets) = batch(decoder.spec().vocab);
    let all = Trainable::all(decoder.params());
    let mut shared = Gradients::held(decoder.params(), &all, DType::BF16, Buffers::Shared).unwrap();
    shared.begin_step();
    let mut seen: Vec<ParamId> = Vec::new();
    let objective = Objective { scale: 0.02, ..Objective::default() };
    decoder
        .forward_backward_with(
            &tokens,
            &targets,
            &objective,
            &mut shared,
            &mut NoTap,
            &mut |gradients, ids| {
                for (id, gradient, _) in gradients.iter().filter(|(id, ..)| ids.contains(id)) {
                    let found = to_host(gradient).unwrap();
                    let expected = own.gradients.iter().find(|(known, _)| *known == id).unwrap();
                    assert!(found == expected.1, "{id:?} differs");
                    seen.push(id);
                }
                Ok(())
            },
        )
        .unwrap();
    seen.sort();
    let mut expected: Vec<ParamId> = own.gradients.iter().map(|(id, _)| *id).collect();
    expected.sort();
    assert_eq!(seen, expected);
}
