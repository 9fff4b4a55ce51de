//! Sequences side by side: each gives what it gives alone, and what they share is counted once.

#![allow(clippy::unwrap_used)] // a failed unwrap is the failed test

mod common;

use common::{all, argmax, configs, decoder, distance, largest_of, prompt, spec};
use relufy_sparse::{
    Calibrated, Counts, Engine, Error, Format, Options, Session, Sessions, SiteThresholds,
    Thresholds,
};
use relufy_spec::flops::{Densities, SiteDensities};
use relufy_spec::{DecoderSpec, Stage};

const STEPS: usize = 12;

fn options(format: Format, threads: usize) -> Options {
    Options { format, threads, ..Options::default() }
}

/// Prompts of other lengths and other tokens.
fn prompts(batch: usize) -> Vec<Vec<u32>> {
    let ids = prompt();
    let of = |n: usize| ids.iter().cycle().skip(2 * n).take(1 + (5 * n) % 13).copied().collect();
    (0..batch).map(of).collect()
}

/// A sequence alone: its greedy tokens, the bits of all logits, and what each step did.
fn alone(engine: &Engine, prompt: &[u32]) -> (Vec<u32>, Vec<Vec<f32>>, Vec<Counts>) {
    let mut session = Session::new(engine).unwrap();
    let mut next = argmax(session.prefill(prompt).unwrap());
    let (mut tokens, mut logits, mut counts) = (vec![next], Vec::new(), Vec::new());
    for _ in 0..STEPS {
        logits.push(session.step(next).unwrap().to_vec());
        counts.push(session.counts());
        next = argmax(logits.last().unwrap());
        tokens.push(next);
    }
    (tokens, logits, counts)
}

/// Demands that sequences side by side give what they give alone; `bound` is 0 for the same bits.
fn side_by_side(engine: &Engine, batch: usize, bound: f32, what: &str) {
    let prompts = prompts(batch);
    let expected: Vec<_> = prompts.iter().map(|prompt| alone(engine, prompt)).collect();
    let mut sessions = Sessions::new(engine, batch).unwrap();
    sessions.prefill(&prompts.iter().map(Vec::as_slice).collect::<Vec<_>>()).unwrap();
    for step in 0..STEPS {
        let tokens: Vec<u32> = expected.iter().map(|(tokens, ..)| tokens[step]).collect();
        sessions.step(&tokens).unwrap();
        let (mut single, counts) = (Counts::default(), sessions.counts());
        assert_eq!(sessions.logits().len(), expected.len());
        for (n, ((tokens, logits, each), found)) in
            expected.iter().zip(sessions.logits()).enumerate()
        {
            if bound == 0.0 {
                assert!(found == logits[step], "{what}: sequence {n}, step {step}");
                assert_eq!(argmax(found), tokens[step + 1]);
            } else {
                let apart = distance(found, &logits[step]);
                assert!(apart < bound, "{what}: sequence {n}, step {step}: {apart:e}");
            }
            single += each[step];
        }
        if bound == 0.0 {
            let each =
                |counts: &Counts| [counts.qkv, counts.o, counts.up, counts.down, counts.head];
            for (found, sum) in each(&counts).into_iter().zip(each(&single)) {
                assert_eq!((found.needed, found.done), (sum.needed, sum.done), "{what}");
                assert!(found.bytes <= sum.bytes && batch as u64 * found.bytes >= sum.bytes);
            }
            assert_eq!(batch as u64 * counts.head.bytes, single.head.bytes, "{what}");
        }
    }
}

#[test]
fn each_gives_what_it_gives_alone() {
    for (name, spec) in all() {
        let decoder = decoder(spec);
        for (format, batch, threads) in
            [(Format::F32, 8, 2), (Format::F32, 3, 3), (Format::F16, 2, 1), (Format::Bf16, 1, 2)]
        {
            let engine = Engine::new(&decoder, &options(format, threads)).unwrap();
            side_by_side(&engine, batch, 0.0, &format!("{name}, {format}, {batch}"));
        }
    }
}

/// Integer products round eight coefficients together, and which eight depends on the others.
#[test]
fn integers_are_the_same_to_rounding() {
    for (name, spec) in all() {
        if name.contains("shifted") {
            // A FATReLU jumps: a number that rounding carries over its threshold is another one.
            continue;
        }
        let engine = Engine::new(&decoder(spec), &options(Format::Int8, 2)).unwrap();
        side_by_side(&engine, 4, 2e-3, &name);
    }
}

#[test]
fn layouts_and_thresholds_make_no_difference() {
    let each = SiteDensities { qkv: 0.5, o: 1.0, up: 0.1, down: 0.6 };
    let dropped = SiteThresholds { qkv: 0.3, o: 0.1, up: 0.3, gate: 0.1 };
    for (name, config) in configs() {
        let spec = spec(&config, Stage::Two);
        let layers = spec.layers.len();
        let calibrated = Calibrated {
            densities: Some(Densities::uniform(layers, each)),
            thresholds: Some(Thresholds { layers: vec![dropped; layers] }),
        };
        let engine =
            Engine::calibrated(&decoder(spec), &options(Format::F32, 2), &calibrated).unwrap();
        side_by_side(&engine, 3, 0.0, name);
    }
}

/// A Llama whose matrices are many blocks.
fn wide() -> DecoderSpec {
    let mut config = configs()[0].1.clone();
    for (key, value) in [("hidden_size", 480), ("intermediate_size", 2500), ("vocab_size", 1000)] {
        config[key] = value.into();
    }
    spec(&config, Stage::Two)
}

#[test]
fn many_blocks_give_the_same_bits() {
    let decoder = decoder(wide());
    for format in [Format::F32, Format::F16] {
        let engine = Engine::new(&decoder, &options(format, 2)).unwrap();
        side_by_side(&engine, 4, 0.0, &format.to_string());
    }
}

/// A text as it was alone, and where it is side by side with others.
struct Text<'a> {
    prompt: &'a [u32],
    /// How much of the prompt it has.
    taken: usize,
    /// Behind the prompt.
    tokens: &'a [u32],
    logits: &'a [Vec<f32>],
    /// How many of them it has.
    made: usize,
}

/// Texts come when a place is free, and each goes on while others read their prompts or have ended.
#[test]
fn texts_come_and_go() {
    let mut config = configs()[0].1.clone();
    config["max_position_embeddings"] = 400.into();
    let decoder = decoder(spec(&config, Stage::Two));
    let engine = Engine::new(&decoder, &options(Format::F16, 2)).unwrap();
    let ids = prompt();
    // Pieces and their borders, and prompts that are one.
    let prompts: Vec<Vec<u32>> = [3, 128, 129, 300, 1, 177, 380, 64]
        .map(|len| ids.iter().cycle().skip(len % 7).take(len).copied().collect())
        .into();
    let expected: Vec<_> = prompts.iter().map(|prompt| alone(&engine, prompt)).collect();
    let mut waiting = prompts.iter().zip(&expected).map(|(prompt, (tokens, logits, _))| Text {
        prompt,
        taken: 0,
        tokens,
        logits,
        made: 0,
    });
    let mut sessions = Sessions::new(&engine, 3).unwrap();
    let mut places: Vec<Option<Text<'_>>> = (0..3).map(|_| None).collect();
    let mut ended = 0;
    while ended < prompts.len() {
        let mut tokens = Vec::new();
        for (place, text) in places.iter_mut().enumerate() {
            if text.is_none() {
                sessions.clear(place).unwrap();
                *text = waiting.next();
            }
            let Some(text) = text else { continue };
            if text.taken < text.prompt.len() {
                let rest = &text.prompt[text.taken..];
                let taken = sessions.prefill_piece(place, rest).unwrap();
                assert_eq!(taken, rest.len().min(128));
                text.taken += taken;
            } else {
                tokens.push((place, text.tokens[text.made]));
            }
            if text.taken == text.prompt.len() && text.made == 0 {
                assert_eq!(argmax(sessions.get(place).unwrap().logits()), text.tokens[0]);
            }
        }
        sessions.step_some(&tokens).unwrap();
        for (place, _) in tokens {
            let text = places[place].as_mut().unwrap();
            let session = sessions.get(place).unwrap();
            assert!(session.logits() == text.logits[text.made], "place {place}");
            text.made += 1;
            assert_eq!(session.len(), text.prompt.len() + text.made);
            if text.made == text.logits.len() {
                places[place] = None;
                ended += 1;
            }
        }
    }
    // Who does not step keeps what it has, and counts nothing.
    sessions.step_some(&[(1, 2)]).unwrap();
    assert_eq!(sessions.counts(), sessions.get(1).unwrap().counts());
    sessions.step_some(&[]).unwrap();
    assert_eq!(sessions.prefill_piece(2, &[1; 401]).unwrap_err().to_string(), {
        let len = sessions.get(2).unwrap().len() + 401;
        format!("{len} tokens do not fit a context of 400")
    });
}

#[test]
fn equal_sequences_read_what_one_reads() {
    let engine = Engine::new(&decoder(wide()), &options(Format::F32, 2)).unwrap();
    let (prompt, mut session) = (prompt(), Session::new(&engine).unwrap());
    let next = argmax(session.prefill(&prompt).unwrap());
    session.step(next).unwrap();
    let mut sessions = Sessions::new(&engine, 4).unwrap();
    sessions.prefill(&[&prompt[..]; 4]).unwrap();
    sessions.step(&[next; 4]).unwrap();
    let (one, four) = (session.counts(), sessions.counts());
    assert_eq!((four.total().bytes, four.total().done), (one.total().bytes, 4 * one.total().done));
    let found = sessions.densities();
    let expected = session.densities();
    let apart = [(found.qkv, expected.qkv), (found.up, expected.up), (found.down, expected.down)];
    assert!(largest_of(apart.iter().map(|(a, b)| (a - b).abs() as f32)) < 1e-6);
}

#[test]
fn what_does_not_fit_changes_nothing() {
    let options = Options { context: 20, ..options(Format::F32, 2) };
    let engine = Engine::new(&decoder(wide()), &options).unwrap();
    let mut sessions = Sessions::new(&engine, 2).unwrap();
    assert_eq!((sessions.batch(), sessions.left()), (2, 20));
    sessions.prefill(&[&[1, 2, 3], &[4]]).unwrap();
    assert_eq!(sessions.left(), 17);
    let refused = |found: relufy_sparse::Result<()>| found.unwrap_err();
    let error = refused(sessions.step(&[1]));
    assert!(matches!(error, Error::Sequences { found: 1, expected: 2 }), "{error}");
    let error = refused(sessions.prefill(&[&[1][..]; 3]));
    assert!(matches!(error, Error::Sequences { found: 3, expected: 2 }), "{error}");
    let error = refused(sessions.step(&[1, 1000]));
    assert!(matches!(error, Error::TokenOutOfRange { id: 1000, .. }), "{error}");
    for places in [&[(0, 1), (0, 1)][..], &[(1, 1), (0, 1)], &[(0, 1), (2, 1)]] {
        let error = refused(sessions.step_some(places));
        assert!(matches!(error, Error::Place { sequences: 2, .. }), "{error}");
    }
    let error = refused(sessions.step_some(&[(0, 1), (1, 1000)]));
    assert!(matches!(error, Error::TokenOutOfRange { .. }), "{error}");
    assert!(matches!(refused(sessions.clear(2)), Error::Place { place: 2, .. }));
    let error = refused(sessions.prefill_piece(2, &[1]).map(drop));
    assert!(matches!(error, Error::Place { place: 2, .. }), "{error}");
    assert!(matches!(sessions.prefill_piece(0, &[]), Err(Error::EmptyPrompt)));
    assert_eq!(sessions.left(), 17);
    for _ in 0..17 {
        sessions.step(&[1, 1]).unwrap();
    }
    assert!(matches!(refused(sessions.step(&[1, 1])), Error::ContextFull { len: 21, .. }));
    sessions.truncate(0);
    assert_eq!(sessions.left(), 20);
}
