//! The engine against the dense decoder: every family, every stage, to rounding; and the work it
//! does against the count of FLOPs, to the digit.

#![allow(clippy::unwrap_used)] // a failed unwrap is the failed test

mod common;

use relufy_model::generate;
use relufy_sparse::{Engine, Error, Format, Options, Session};
use relufy_spec::Stage;
use relufy_spec::flops::{active_macs, head_macs};
use serde_json::json;

use common::{
    Active, VOCAB, all, argmax, configs, decoder, dense_logits, distance, largest_of, long_prompt,
    prompt, really_done, spec,
};

fn options(format: Format, threads: usize) -> Options {
    Options { format, threads, context: 0 }
}

fn worst(session: &mut Session, ids: &[u32], expected: &[Vec<f32>]) -> f32 {
    let pairs = ids.iter().zip(expected);
    largest_of(pairs.map(|(id, expected)| distance(session.step(*id).unwrap(), expected)))
}

#[test]
fn f32_logits_are_the_dense_decoders() {
    let ids = prompt();
    for (name, spec) in all() {
        let decoder = decoder(spec);
        let expected = dense_logits(&decoder, &ids);
        for threads in [1, 2, 3] {
            let engine = Engine::new(&decoder, &options(Format::F32, threads)).unwrap();
            let mut session = Session::new(&engine).unwrap();
            let apart = worst(&mut session, &ids, &expected);
            assert!(apart < 1e-5, "{name}, {threads} threads: {apart:e}");
        }
    }
}

#[test]
fn prompts_go_in_some_or_many_tokens_at_a_time() {
    let ids = long_prompt();
    for (name, spec) in all() {
        let decoder = decoder(spec);
        let expected = dense_logits(&decoder, &ids);
        for threads in [1, 2, 3] {
            let engine = Engine::new(&decoder, &options(Format::F32, threads)).unwrap();
            let mut session = Session::new(&engine).unwrap();
            for pieces in [&[2, 9][..], &[60], &[3, 56], &[1, 38, 60]] {
                session.truncate(0);
                let mut from = 0;
                for &to in pieces {
                    let apart =
                        distance(session.prefill(&ids[from..to]).unwrap(), &expected[to - 1]);
                    assert!(apart < 1e-5, "{name}, {threads} threads, {from} to {to}: {apart:e}");
                    from = to;
                }
            }
        }
    }
}

/// Also with key heads that several workers need.
#[test]
fn a_short_prompt_gives_the_bits_of_single_steps() {
    let ids = &long_prompt()[..40];
    for (name, spec) in all() {
        let decoder = decoder(spec);
        for (format, threads) in [(Format::F32, 2), (Format::F16, 3), (Format::Bf16, 5)] {
            let engine = Engine::new(&decoder, &options(format, threads)).unwrap();
            let mut session = Session::new(&engine).unwrap();
            let found = session.prefill(ids).unwrap().to_vec();
            let (counts, densities) = (session.total_counts(), session.densities());
            let mut single = Session::new(&engine).unwrap();
            let expected = ids.iter().map(|id| single.step(*id).unwrap().to_vec()).last().unwrap();
            assert!(found == expected, "{name}, {format}, {threads} threads");
            assert_eq!(densities, single.densities(), "{name}");
            let (blocks, expected) = (counts.blocks(), single.total_counts().blocks());
            assert_eq!((blocks.needed, blocks.done), (expected.needed, expected.done), "{name}");
            assert!(blocks.bytes < expected.bytes, "{name}: no weight was read for several");
            // What follows sees the same keys and values.
            assert!(session.step(7).unwrap() == single.step(7).unwrap(), "{name}, {format}");
        }
    }
}

#[test]
fn long_prompts_go_in_several_passes() {
    let mut config = configs()[0].1.clone();
    config["max_position_embeddings"] = json!(200);
    let ids: Vec<u32> = (0..170).map(|i| ((i * i * 7 + i) % VOCAB) as u32).collect();
    let decoder = decoder(spec(&config, Stage::Two));
    let expected = dense_logits(&decoder, &ids);
    for (format, bound) in [(Format::F32, 1e-5), (Format::F16, 6e-3)] {
        let engine = Engine::new(&decoder, &options(format, 2)).unwrap();
        let mut session = Session::new(&engine).unwrap();
        let apart = distance(session.prefill(&ids).unwrap(), expected.last().unwrap());
        assert!(apart < bound, "{format}: {apart:e}");
        assert_eq!((session.len(), session.left()), (170, 30));
    }
}

#[test]
fn greedy_text_is_the_dense_decoders() {
    let ids = prompt();
    for (name, spec) in all() {
        let decoder = decoder(spec);
        let pick = |logits: &[f32]| Ok::<_, relufy_model::Error>(argmax(logits));
        let expected = generate(&decoder, &ids, 40, &[], pick, |_| true).unwrap();
        let engine = Engine::new(&decoder, &options(Format::F32, 2)).unwrap();
        let mut session = Session::new(&engine).unwrap();
        let mut next = argmax(session.prefill(&ids).unwrap());
        let mut found = vec![next];
        while found.len() < expected.len() {
            next = argmax(session.step(next).unwrap());
            found.push(next);
        }
        assert_eq!(found, expected, "{name}");
    }
}

#[test]
fn smaller_formats_stay_within_their_rounding() {
    let ids = prompt();
    for (format, bound) in [(Format::F16, 6e-3), (Format::Bf16, 4e-2), (Format::Int8, 1.2e-1)] {
        let mut largest = (0f32, String::new());
        for (name, config) in configs() {
            for stage in [Stage::Dense, Stage::One, Stage::Two] {
                let decoder = decoder(spec(&config, stage));
                let expected = dense_logits(&decoder, &ids);
                let engine = Engine::new(&decoder, &options(format, 2)).unwrap();
                let mut session = Session::new(&engine).unwrap();
                let apart = worst(&mut session, &ids, &expected);
                if apart > largest.0 || apart.is_nan() {
                    largest = (apart, format!("{name} {stage:?}"));
                }
            }
        }
        println!("{format}: at most {:e} ({})", largest.0, largest.1);
        assert!(largest.0 < bound, "{format}, {}: {:e}", largest.1, largest.0);
    }
}

#[test]
fn work_is_what_the_active_sets_say() {
    let ids = prompt();
    for (name, spec) in all() {
        let decoder = decoder(spec.clone());
        let active = Active::of(&decoder, &ids);
        for threads in [1, 3] {
            let engine = Engine::new(&decoder, &options(Format::F32, threads)).unwrap();
            let mut session = Session::new(&engine).unwrap();
            let mut sum = 0;
            for (t, id) in ids.iter().enumerate() {
                session.step(*id).unwrap();
                let counts = session.counts();
                let (mut needed, mut done) = (0, [0; 4]);
                for (layer, active) in spec.layers.iter().zip(&active.counts) {
                    let active = active[t];
                    needed += active_macs(spec.hidden, layer, &active);
                    let each = really_done(spec.hidden, layer, &active);
                    done.iter_mut().zip(each).for_each(|(sum, each)| *sum += each);
                }
                assert_eq!(counts.blocks().needed, needed, "{name}, token {t}");
                let found = [counts.qkv, counts.o, counts.up, counts.down].map(|work| work.done);
                assert_eq!(found, done, "{name}, token {t}");
                assert_eq!(counts.head.done, head_macs(&spec));
                sum += counts.total().done;
            }
            assert_eq!(session.total_counts().total().done, sum);
            // The needed work of a prompt is the same, however it goes in.
            let needed = session.total_counts().blocks().needed;
            session.truncate(0);
            session.prefill(&ids).unwrap();
            assert_eq!(session.counts().blocks().needed, needed, "{name}");
        }
    }
}

#[test]
fn work_of_a_long_prompt_is_that_of_its_tokens() {
    let ids = long_prompt();
    for (name, spec) in all() {
        if name.contains("shifted") {
            // A FATReLU jumps: a number that rounding carries over its threshold is another one.
            continue;
        }
        let engine = Engine::new(&decoder(spec), &options(Format::F32, 2)).unwrap();
        let mut session = Session::new(&engine).unwrap();
        ids.iter().for_each(|id| session.step(*id).map(drop).unwrap());
        let needed = session.total_counts().blocks().needed;
        session.truncate(0);
        session.prefill(&ids).unwrap();
        let close = needed.abs_diff(session.counts().blocks().needed);
        // A number next to zero may be zero by rounding.
        assert!(close * 10_000 <= needed, "{name}: {close} of {needed}");
    }
}

#[test]
fn stage_2_reads_less() {
    let config = configs()[0].1.clone();
    let bytes = |stage| {
        let engine = Engine::new(&decoder(spec(&config, stage)), &options(Format::F16, 2)).unwrap();
        let mut session = Session::new(&engine).unwrap();
        session.prefill(&prompt()).unwrap();
        session.counts().blocks().bytes
    };
    let (dense, one, two) = (bytes(Stage::Dense), bytes(Stage::One), bytes(Stage::Two));
    assert!(two < one && one < dense, "{two} {one} {dense}");
}

#[test]
fn sequences_are_taken_back_and_do_not_disturb_each_other() {
    let ids = prompt();
    let decoder = decoder(spec(&configs()[0].1, Stage::Two));
    let engine = Engine::new(&decoder, &options(Format::F32, 2)).unwrap();
    let mut session = Session::new(&engine).unwrap();
    let all = session.prefill(&ids).unwrap().to_vec();
    session.truncate(9);
    assert_eq!((session.len(), session.left()), (9, 64 - 9));
    let mut other = Session::new(&engine.clone()).unwrap();
    other.prefill(&ids[3..8]).unwrap();
    assert!(distance(session.prefill(&ids[9..]).unwrap(), &all) < 1e-5);
    // Sessions may change threads; engines are shared between them.
    let other = std::thread::spawn(move || {
        session.truncate(1);
        let mut fresh = Session::new(&engine).unwrap();
        fresh.prefill(&ids).unwrap().to_vec()
    });
    assert_eq!(other.join().unwrap(), all);
}

#[test]
fn what_cannot_be_decoded_is_refused_and_changes_nothing() {
    let decoder = decoder(spec(&configs()[9].1, Stage::Two));
    let short = Options { context: 4, ..options(Format::F16, 1) };
    let engine = Engine::new(&decoder, &short).unwrap();
    assert_eq!((engine.context(), engine.threads(), engine.format()), (4, 1, Format::F16));
    let mut session = Session::new(&engine).unwrap();
    assert!(session.is_empty());
    assert!(matches!(session.prefill(&[]), Err(Error::EmptyPrompt)));
    assert!(matches!(session.step(70), Err(Error::TokenOutOfRange { id: 70, vocab: VOCAB })));
    assert!(matches!(session.prefill(&[1; 5]), Err(Error::ContextFull { len: 5, context: 4 })));
    session.prefill(&[1; 4]).unwrap();
    assert!(matches!(session.step(1), Err(Error::ContextFull { len: 5, context: 4 })));
    assert_eq!(session.len(), 4);
}
