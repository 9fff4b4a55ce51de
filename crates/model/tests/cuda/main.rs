//! Whole decoders on a GPU against the same weights on the CPU, which is held to the goldens:
//! ignored, with the reason, where there is no GPU.
//!
//! `cargo test --release --features relufy-model/cuda --test model_cuda` on a machine with one.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a failure is the test's failure")]

#[path = "../common/mod.rs"]
mod common;

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
    libtest_mimic::run(&args, trials).exit();
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

struct Outcome {
    loss: f64,
    logits: Vec<f32>,
    gradients: Vec<(ParamId, Vec<f32>)>,
    tap: DensityTap,
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
    Outcome { loss: loss.mean(), logits, gradients, tap }
}

/// `|a - b| / |b|`.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let square = |x: f64| x * x;
    let far: f64 = a.iter().zip(b).map(|(a, b)| square(f64::from(a - b))).sum();
    let size: f64 = b.iter().map(|b| square(f64::from(*b))).sum();
    (far / size.max(1e-20)).sqrt()
}

/// Loss and logits within `value`, gradients within `tolerance`, relative by norm.
#[track_caller]
fn compare(found: &Outcome, expected: &Outcome, value: f64, tolerance: f64) {
    let loss = (found.loss - expected.loss).abs() / expected.loss;
    assert!(loss <= value, "loss {} against {}", found.loss, expected.loss);
    let logits = distance(&found.logits, &expected.logits);
    assert!(logits <= value, "logits are {logits:.2e} away");
    let all = |outcome: &Outcome| -> Vec<f32> {
        outcome.gradients.iter().flat_map(|(_, values)| values.iter().copied()).collect()
    };
    let gradient = distance(&all(found), &all(expected));
    assert!(gradient <= tolerance, "the gradient is {gradient:.2e} away");
    // Parts of it that nearly cancel are only held to the size of the whole.
    let whole = all(expected).iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    for ((id, found), (_, expected)) in found.gradients.iter().zip(&expected.gradients) {
        let size = expected.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        let far = distance(found, expected) * size.max(1e-10);
        assert!(far <= tolerance * (2.0 * size + 0.02 * whole), "{id:?}: {far:.2e} of {size:.2e}");
    }
}

fn load(checkpoint: &Checkpoint, stage: Stage, device: &Device, dtype: DType) -> Decoder {
    checkpoint.load_as(device, &ReluPlan::stage(stage), dtype).unwrap()
}

fn in_f32(kind: usize, stage: Stage, gpu: &Device) {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = checkpoint(kind, folder.path(), 8);
    let expected = outcome(&load(&checkpoint, stage, &Device::Cpu, DType::F32), Recompute::None);
    let found = outcome(&load(&checkpoint, stage, gpu, DType::F32), Recompute::None);
    compare(&found, &expected, 1e-4, 1e-4);
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
    // Rounding sends what lies next to ReLU's kink to its other side, gradient and all.
    compare(&found, &expected, 2e-2, 1e-1);
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
