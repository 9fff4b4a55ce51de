//! A real model, stories3M, as it came and with the plans of both stages: the same greedy text.

#![allow(clippy::unwrap_used)] // a failed unwrap is the failed test

use std::path::Path;

use relufy_model::{Checkpoint, Decoder, generate};
use relufy_sparse::{Engine, Format, Options, Session};
use relufy_spec::{ReluPlan, Stage};

fn argmax(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().rev().max_by(|a, b| a.1.total_cmp(b.1));
    best.unwrap().0 as u32
}

#[test]
#[cfg_attr(not(relufy_shared), ignore = "needs the shared data: set RELUFY_SHARED")]
fn greedy_text_of_a_real_model_is_the_same() {
    let shared = Path::new(option_env!("RELUFY_SHARED_DIR").unwrap_or_default());
    let folder = shared.join("data/checkpoints/stories3M");
    let loaded = Checkpoint::open(&folder).unwrap().load(&candle_core::Device::Cpu).unwrap();
    for stage in [Stage::Dense, Stage::One, Stage::Two] {
        let spec = ReluPlan::stage(stage).apply(loaded.spec()).unwrap();
        let decoder = Decoder::new(spec, loaded.params().clone()).unwrap();
        for first in [1, 403, 1000] {
            let pick = |logits: &[f32]| Ok::<_, relufy_model::Error>(argmax(logits));
            let expected = generate(&decoder, &[1, first], 120, &[], pick, |_| true).unwrap();
            let options = Options { format: Format::F32, threads: 2, context: 0 };
            let engine = Engine::new(&decoder, &options).unwrap();
            let mut session = Session::new(&engine).unwrap();
            let mut next = argmax(session.prefill(&[1, first]).unwrap());
            let mut found = vec![next];
            while found.len() < expected.len() {
                next = argmax(session.step(next).unwrap());
                found.push(next);
            }
            assert_eq!(found, expected, "{stage:?}");
        }
    }
}
