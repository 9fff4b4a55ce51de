//! The steps of `torch.optim.AdamW` on a Hugging Face Llama, loss by loss; and what
//! accumulation must give.

use candle_core::{DType, Device};
use relufy_data::Batch;
use relufy_model::{Checkpoint, Decoder, Gradients, Masters, NoTap, Trainable};

use crate::config::Optim;
use crate::optimizer::{Decay, Optimizer};
use crate::step::{self, StepLosses, Terms};

const SHARED: &str = match option_env!("RELUFY_SHARED_DIR") {
    Some(shared) => shared,
    None => "",
};

/// Next-token prediction over rows of equal length.
fn batch(ids: Vec<u32>, seq_len: usize) -> Batch {
    let rows = ids.len() / seq_len;
    let target = |at: usize| match (at + 1) % seq_len {
        0 => relufy_model::IGNORE,
        _ => i64::from(ids[at + 1]),
    };
    Batch {
        targets: (0..ids.len()).map(target).collect(),
        positions: (0..ids.len()).map(|at| (at % seq_len) as u32).collect(),
        segments: (0..rows).map(|row| (row * seq_len, seq_len)).collect(),
        ids,
        rows,
        seq_len,
    }
}

fn golden_batch() -> Batch {
    let path = format!("{SHARED}/golden/llama/golden.safetensors");
    let tensors = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    let ids: Vec<i64> = tensors["input_ids"].flatten_all().unwrap().to_vec1().unwrap();
    batch(ids.into_iter().map(|id| id as u32).collect(), 40)
}

fn llama(stage: u8) -> (Checkpoint, Decoder) {
    let checkpoint = Checkpoint::open(format!("{SHARED}/golden/llama").as_ref()).unwrap();
    let plan = relufy_spec::ReluPlan::stage(stage.try_into().unwrap());
    let decoder = checkpoint.load_with(&Device::Cpu, &plan).unwrap();
    (checkpoint, decoder)
}

fn gradients_of(
    decoder: &Decoder,
    batches: &[Batch],
    terms: &Terms,
    gradients: &mut Gradients,
) -> StepLosses {
    let (tap, stop, later) = (&mut NoTap, &|| false, &mut step::later);
    step::gradients(decoder, batches, terms, 0, gradients, tap, stop, later).unwrap().unwrap()
}

#[test]
#[cfg_attr(not(relufy_shared), ignore = "needs the shared goldens: set RELUFY_SHARED")]
fn twelve_steps_as_in_pytorch() {
    let text = std::fs::read(format!("{SHARED}/golden/llama/train_trajectory.json")).unwrap();
    let runs: Vec<serde_json::Value> = serde_json::from_slice(&text).unwrap();
    assert_eq!(runs.len(), 6);
    let batches = [golden_batch()];
    for run in runs {
        let number = |key: &str| run[key].as_f64().unwrap();
        let list = |key: &str| -> Vec<f64> {
            run[key].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
        };
        let stage = match run["variant"].as_str().unwrap() {
            "dense" => 0,
            "s1" => 1,
            "s2" => 2,
            other => panic!("variant {other}"),
        };
        let betas = list("betas");
        let settings = Optim {
            adam_beta1: betas[0],
            adam_beta2: betas[1],
            adam_epsilon: number("eps"),
            weight_decay: number("weight_decay"),
            max_grad_norm: run["clip_grad_norm"].as_f64().unwrap_or(0.0),
            ..Optim::default()
        };
        let (_, decoder) = llama(stage);
        let trainable = Trainable::all(decoder.params());
        let mut gradients = Gradients::new(decoder.params(), &trainable).unwrap();
        let mut optimizer = Optimizer::new(
            decoder.params(),
            &trainable,
            &Masters::default(),
            &settings,
            Decay::All,
            DType::F32,
        )
        .unwrap();
        let norms = list("grad_norms_before_clip");
        for (n, loss) in list("losses").into_iter().enumerate() {
            let terms = Terms::default();
            let found = gradients_of(&decoder, &batches, &terms, &mut gradients).loss;
            assert!((found - loss).abs() < 1e-4, "stage {stage}, step {n}: {found} for {loss}");
            let norm = gradients.global_norm().unwrap();
            let error = (norm - norms[n]).abs() / norms[n];
            // One ReLU that rounds to the other side of its kink moves the norm by 3e-4.
            assert!(error < 1e-3, "stage {stage}, step {n}: norm {norm} for {}", norms[n]);
            let clip = optimizer.clip_factor(norm);
            optimizer.step(decoder.params(), &gradients, number("lr"), clip).unwrap();
        }
    }
}

#[test]
#[cfg_attr(not(relufy_shared), ignore = "needs the shared goldens: set RELUFY_SHARED")]
fn accumulation_equals_one_large_batch() {
    let whole = golden_batch();
    let mut halves: Vec<Batch> = whole.ids.chunks(40).map(|ids| batch(ids.to_vec(), 40)).collect();
    let mut whole = whole;
    // Halves of unequal weight: most of the second row counts for nothing.
    for at in 5..35 {
        whole.targets[40 + at] = relufy_model::IGNORE;
        halves[1].targets[at] = relufy_model::IGNORE;
    }
    let (_, decoder) = llama(2);
    let terms = Terms {
        regularise: Some(crate::config::Regularise { l1: Some(0.5), prosparse: None }),
        ..Terms::default()
    };
    let run = |batches: &[Batch]| {
        let trainable = Trainable::all(decoder.params());
        let mut gradients = Gradients::new(decoder.params(), &trainable).unwrap();
        (gradients_of(&decoder, batches, &terms, &mut gradients), gradients)
    };
    let (loss, one) = run(&[whole]);
    let (loss_of_two, two) = run(&halves);
    assert_eq!(loss.targets, loss_of_two.targets);
    assert!((loss.loss - loss_of_two.loss).abs() < 1e-6 * loss.loss);
    assert!((loss.l1 - loss_of_two.l1).abs() < 1e-6 * loss.l1);
    for (id, a, _) in one.iter() {
        let b = two.get(id).unwrap();
        let size = relufy_ops::reduce::max_abs(a).unwrap();
        let difference = relufy_ops::reduce::max_abs(&(a - b).unwrap()).unwrap();
        assert!(difference <= 1e-6 * size.max(1e-3), "{id:?}: {difference} of {size}");
    }
}

#[test]
#[cfg_attr(not(relufy_shared), ignore = "needs the shared goldens: set RELUFY_SHARED")]
fn frozen_parameters_have_no_gradient() {
    let (checkpoint, decoder) = llama(0);
    let freeze = crate::config::Freeze {
        train: vec!["*.gate_proj.*".into(), "*.down_proj.*".into()],
        ..Default::default()
    };
    let map = &checkpoint.config().weights;
    let chosen = crate::freeze::select(decoder.params(), map, 2, &freeze).unwrap();
    assert_eq!(chosen.names.len(), 4);
    let gradients = Gradients::new(decoder.params(), &chosen.trainable).unwrap();
    let shapes: Vec<_> = gradients.iter().map(|(id, _, rows)| (id, rows.to_vec())).collect();
    assert_eq!(shapes.len(), 4, "{shapes:?}");
    assert!(gradients.get(relufy_model::ParamId::Embed).is_none());
}
