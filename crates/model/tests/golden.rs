//! Parity with Hugging Face transformers: logits, loss, gradients and densities of every
//! golden checkpoint, dense and after both stages of surgery.

#![allow(clippy::unwrap_used)] // a failed unwrap is the failed test

use std::path::{Path, PathBuf};

use candle_core::Device;
use relufy_model::{Checkpoint, Objective, Probe, Tokens, Trainable, probe};
use relufy_spec::{ReluPlan, Stage};
use safetensors::SafeTensors;

/// The folder of a golden file.
fn golden(family: &str) -> PathBuf {
    Path::new(option_env!("RELUFY_SHARED_DIR").unwrap_or("")).join("golden").join(family)
}

struct Golden {
    bytes: Vec<u8>,
    json: serde_json::Value,
}

impl Golden {
    fn open(dir: &Path) -> Golden {
        let json = std::fs::read_to_string(dir.join("golden.json")).unwrap();
        Golden {
            bytes: std::fs::read(dir.join("golden.safetensors")).unwrap(),
            json: serde_json::from_str(&json).unwrap(),
        }
    }

    fn f32s(&self, name: &str) -> Vec<f32> {
        let file = SafeTensors::deserialize(&self.bytes).unwrap();
        let tensor = file.tensor(name).unwrap();
        assert_eq!(tensor.dtype(), safetensors::Dtype::F32, "{name}");
        tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    fn ids(&self) -> Vec<Vec<u32>> {
        let file = SafeTensors::deserialize(&self.bytes).unwrap();
        let tensor = file.tensor("input_ids").unwrap();
        let ids =
            tensor.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as u32);
        ids.collect::<Vec<_>>().chunks(tensor.shape()[1]).map(<[u32]>::to_vec).collect()
    }
}

const STAGES: [(&str, Stage); 3] =
    [("dense", Stage::Dense), ("s1", Stage::One), ("s2", Stage::Two)];

fn max_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// `|a - b| / |b|` by L2 norm.
fn relative(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    norm(&mut a.iter().zip(b).map(|(a, b)| f64::from(a - b)))
        / norm(&mut b.iter().map(|b| f64::from(*b)))
}

fn check(family: &str) {
    let dir = golden(family);
    let golden = Golden::open(&dir);
    let checkpoint = Checkpoint::open(&dir).unwrap();
    for (name, stage) in STAGES {
        let decoder = checkpoint.load_with(&Device::Cpu, &ReluPlan::stage(stage)).unwrap();
        let embed = golden.json["embed_name"].as_str().unwrap().to_owned();
        let down = golden.json["down0_name"].as_str().unwrap().to_owned();
        let map = &checkpoint.config().weights;
        let probe = probe(&decoder, map, &golden.ids(), &[embed, down]).unwrap();

        let logits = max_difference(&probe.logits, &golden.f32s(&format!("{name}.logits")));
        assert!(logits < 1e-4, "{family} {name}: logits differ by {logits}");
        let loss = probe.loss - f64::from(golden.f32s(&format!("{name}.loss"))[0]);
        assert!(loss.abs() < 1e-5, "{family} {name}: loss differs by {loss}");
        for (at, key) in [(0, "embed"), (1, "down0")] {
            let gradient =
                relative(&probe.gradients[at].2, &golden.f32s(&format!("{name}.grad.{key}")));
            assert!(gradient < 1e-4, "{family} {name}: gradient of {key} differs by {gradient}");
        }
        densities(family, name, &probe, &golden, &decoder);
        gradient_norms(family, name, &checkpoint, &golden, &decoder);
    }
}

/// Densities may differ by one element: a pre-activation within rounding of zero.
fn densities(
    family: &str,
    variant: &str,
    probe: &Probe,
    golden: &Golden,
    decoder: &relufy_model::Decoder,
) {
    let expected = golden.f32s(&format!("{variant}.density"));
    let tokens = probe.logits_shape[0] * probe.logits_shape[1];
    for (n, layer) in decoder.spec().layers.iter().enumerate() {
        let widths = [decoder.spec().hidden, decoder.spec().hidden, layer.mlp.ffn];
        for site in 0..3 {
            let one = 1.0 / (tokens * widths[site]) as f64;
            let difference = (probe.density[site][n] - f64::from(expected[n * 3 + site])).abs();
            // The golden value itself is rounded to f32.
            assert!(
                difference <= 1.01 * one,
                "{family} {variant} layer {n} site {site}: {difference}"
            );
        }
    }
}

/// The norm of every parameter's gradient.
fn gradient_norms(
    family: &str,
    variant: &str,
    checkpoint: &Checkpoint,
    golden: &Golden,
    decoder: &relufy_model::Decoder,
) {
    let norms = golden.json["variants"][variant]["grad_norms"].as_object().unwrap();
    let map = &checkpoint.config().weights;
    let names: Vec<String> = norms.keys().cloned().collect();
    let probe = probe(decoder, map, &golden.ids(), &names).unwrap();
    let all = norms.values().map(|norm| norm.as_f64().unwrap().powi(2)).sum::<f64>().sqrt();
    for (name, _, values) in &probe.gradients {
        let norm = values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
        let expected = norms[name].as_f64().unwrap();
        // A key bias has no gradient but rounding: compare with the whole gradient's size.
        let difference = (norm - expected).abs();
        assert!(
            difference < 1e-4 * expected + 1e-7 * all,
            "{family} {variant}: gradient norm of {name}: {norm} against {expected}"
        );
    }
}

macro_rules! families {
    ($($test:ident: $folder:literal),*) => {$(
        #[test]
        #[cfg_attr(not(relufy_shared), ignore = "needs the shared goldens: set RELUFY_SHARED")]
        fn $test() {
            check($folder);
        }
    )*};
}

families!(llama: "llama", opt: "opt", falcon: "falcon7b", gpt_neox: "gpt_neox", gpt2: "gpt2");

/// Recomputing blocks, and training only a part, give the very same gradients.
#[test]
#[cfg_attr(not(relufy_shared), ignore = "needs the shared goldens: set RELUFY_SHARED")]
fn recompute_and_freezing_change_no_gradient() {
    for family in ["llama", "opt", "falcon7b", "gpt_neox", "gpt2"] {
        let checkpoint = Checkpoint::open(&golden(family)).unwrap();
        let decoder = checkpoint.load_with(&Device::Cpu, &ReluPlan::stage(Stage::Two)).unwrap();
        let ids = Golden::open(&golden(family)).ids();
        let tokens = Tokens::rows(ids.concat(), ids[0].len());
        let targets: Vec<i64> = tokens.ids.iter().map(|id| i64::from(*id)).collect();
        let map = &checkpoint.config().weights;
        let run = |trainable: &Trainable, recompute| {
            let mut gradients = relufy_model::Gradients::new(decoder.params(), trainable).unwrap();
            gradients.poison().unwrap();
            gradients.begin_step();
            let objective = Objective { scale: 0.5, recompute, ..Objective::default() };
            decoder
                .forward_backward(
                    &tokens,
                    &targets,
                    &objective,
                    &mut gradients,
                    &mut relufy_model::NoTap,
                )
                .unwrap();
            gradients
        };
        let all = run(&Trainable::all(decoder.params()), relufy_model::Recompute::None);
        let lean = run(&Trainable::all(decoder.params()), relufy_model::Recompute::Block);
        for ((id, a, _), (_, b, _)) in all.iter().zip(lean.iter()) {
            assert_eq!(flat(a), flat(b), "{family} {id:?} with recompute");
        }
        for part in ["mlp", "fc", "attn", "attention", ".1.", "norm", "ln", "embed", "wte"] {
            let trainable = Trainable::by_name(decoder.params(), map, |name| name.contains(part));
            let some = run(&trainable, relufy_model::Recompute::None);
            for (id, gradient, rows) in some.iter() {
                let whole = all.get(id).unwrap();
                for range in rows {
                    let part = |t: &candle_core::Tensor| {
                        flat(&t.narrow(0, range.start, range.len()).unwrap())
                    };
                    assert_eq!(
                        part(gradient),
                        part(whole),
                        "{family} {id:?} of `{part:?}`",
                        part = part(whole).len()
                    );
                }
            }
        }
    }
}

fn flat(tensor: &candle_core::Tensor) -> Vec<f32> {
    tensor.contiguous().unwrap().flatten_all().unwrap().to_vec1().unwrap()
}
