//! However the work is shared and packed, a request gets the answer that it would get alone.

#![allow(clippy::unwrap_used)] // a failed unwrap is the failed test

use std::path::Path;

use candle_core::Device;
use proptest::prelude::*;
use relufy_data::{Silent, Tokenizer};
use relufy_eval::{Activity, Answer, Answered, Exclusion, Request, Session, SessionOptions};
use relufy_model::{Decoder, DensityTap, Init, Params, Tokens};
use relufy_spec::{ReluPlan, Site, Stage, family};
use serde_json::json;

const POSITIONS: usize = 96;

/// Words `w0` to `w96` are ids 3 to 99; BOS is 1 and EOS 2.
fn tokenizer(folder: &Path) -> Tokenizer {
    let special = ["<unk>", "<s>", "</s>"];
    let words = special.into_iter().map(str::to_owned).chain((0..97).map(|n| format!("w{n}")));
    let vocab: serde_json::Map<_, _> =
        words.enumerate().map(|(id, word)| (word, id.into())).collect();
    let added: Vec<_> = special
        .iter()
        .enumerate()
        .map(|(id, content)| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true})
        })
        .collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": null, "pre_tokenizer": {"type": "WhitespaceSplit"}, "decoder": null,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    });
    let config = json!({"bos_token": "<s>", "eos_token": "</s>"});
    std::fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    std::fs::write(folder.join("tokenizer_config.json"), config.to_string()).unwrap();
    Tokenizer::from_folder(folder).unwrap()
}

/// A small relufied Llama, whose activations have zeros to count.
fn decoder() -> Decoder {
    let config = json!({"model_type": "llama", "hidden_size": 24, "intermediate_size": 40,
        "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1, "vocab_size": 100,
        "max_position_embeddings": POSITIONS, "hidden_act": "silu", "rms_norm_eps": 1e-5});
    let spec = ReluPlan::stage(Stage::Two).apply(&family::parse(&config).unwrap().spec).unwrap();
    let init = Init { std: 0.3, scale_residual: false, seed: 7 };
    let params = Params::random(&spec, &init, &Device::Cpu).unwrap();
    Decoder::new(spec, params).unwrap()
}

/// Some words, a function of the seed.
fn words(seed: usize, count: usize) -> String {
    let words: Vec<String> =
        (0..count).map(|n| format!("w{}", (seed * 31 + n * n * 7 + n) % 97)).collect();
    words.join(" ")
}

/// Questions after examples, each with some choices, of one word or of several.
fn documents(count: usize) -> Vec<Vec<Request>> {
    let examples = words(1, 30);
    (0..count)
        .map(|n| {
            let context = format!("{examples} {}", words(n + 2, 20 + n % 7));
            let choice =
                |c: usize| format!(" {}", words(100 + c, if n % 2 == 0 { 1 } else { 2 + c }));
            (0..4).map(|c| Request::likelihood(context.clone(), choice(c))).collect()
        })
        .collect()
}

fn answer(
    decoder: &Decoder,
    tokenizer: &Tokenizer,
    documents: &[Vec<Request>],
    tokens_per_batch: usize,
) -> Vec<Answered> {
    let options = SessionOptions { tokens_per_batch, ..SessionOptions::default() };
    let session = Session::new(decoder, tokenizer, options).unwrap();
    let documents: Vec<&[Request]> = documents.iter().map(Vec::as_slice).collect();
    let mut heard: Vec<Option<Answered>> = vec![None; documents.len()];
    let all = session
        .answer(&documents, &Silent, &mut |index, answered| {
            assert!(heard[index].replace(answered.clone()).is_none(), "{index} is done twice");
            Ok(())
        })
        .unwrap();
    let heard: Vec<Answered> = heard.into_iter().flatten().collect();
    assert_eq!(heard, all);
    all
}

fn likelihood(answer: &std::result::Result<Answer, Exclusion>) -> (f64, bool) {
    let answer = answer.as_ref().unwrap();
    (answer.logprob(), answer.is_greedy())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// The same numbers, and the same zeros, as each request gives in a pass of its own.
    #[test]
    fn sharing_changes_no_answer(count in 1usize..12, budget in 1usize..400) {
        let folder = tempfile::tempdir().unwrap();
        let (tokenizer, decoder) = (tokenizer(folder.path()), decoder());
        let documents = documents(count);
        let together = answer(&decoder, &tokenizer, &documents, budget);
        let mut total = Activity::new(2);
        let mut tap = DensityTap::new(2);
        for (document, answered) in documents.iter().zip(&together) {
            total.add(&answered.activity);
            for (request, together) in document.iter().zip(&answered.answers) {
                let alone = answer(&decoder, &tokenizer, &[vec![request.clone()]], 4096);
                let (expected, found) = (likelihood(&alone[0].answers[0]), likelihood(together));
                prop_assert!((expected.0 - found.0).abs() < 2e-5, "{expected:?} {found:?}");
                prop_assert_eq!(expected.1, found.1);
                let Request::Likelihood { context, continuation } = request else { continue };
                let ids = tokenizer.encode(&format!("{context}{continuation}"), true).unwrap();
                let input = ids[..ids.len() - 1].to_vec();
                let n = input.len();
                decoder.hidden(&Tokens::rows(input, n), &mut tap).unwrap();
            }
        }
        for site in Site::ALL {
            // Sums in another order may turn a pre-activation around zero.
            for layer in 0..2 {
                let (found, expected) =
                    (total.densities(decoder.spec()).layers[layer].get(site), tap.layer(layer, site));
                prop_assert!((found - expected).abs() < 1e-4, "{site:?} {found} {expected}");
            }
        }
    }
}

/// A text longer than the model is read in windows that predict each token once.
#[test]
fn a_text_is_the_sum_of_its_windows() {
    let folder = tempfile::tempdir().unwrap();
    let (tokenizer, decoder) = (tokenizer(folder.path()), decoder());
    let text = words(3, 200);
    let documents = [vec![Request::Rolling { text: text.clone() }]];
    let answered = answer(&decoder, &tokenizer, &documents, 64);
    let Ok(Answer::Rolling { logprob, tokens }) = &answered[0].answers[0] else { panic!() };
    // BOS stands in front twice: as the harness's prefix, and as the tokenizer adds it.
    let ids = [vec![1], tokenizer.encode(&text, true).unwrap()].concat();
    assert_eq!(*tokens as usize, ids.len() - 1);
    let mut expected = 0.0;
    for start in (0..ids.len() - 1).step_by(POSITIONS) {
        let end = (start + POSITIONS).min(ids.len() - 1);
        let first = end.saturating_sub(POSITIONS);
        let input = Tokens::rows(ids[first..end].to_vec(), end - first);
        let hidden = decoder.hidden(&input, &mut DensityTap::new(2)).unwrap();
        let wanted: Vec<(u32, u32)> =
            (start..end).map(|at| ((at - first) as u32, ids[at + 1])).collect();
        let scores = decoder.score(&hidden, &wanted).unwrap();
        expected += scores.iter().map(|score| f64::from(score.logprob)).sum::<f64>();
    }
    assert!((logprob - expected).abs() < 1e-4, "{logprob} {expected}");
}

/// What is generated does not depend on who is generated beside it.
#[test]
fn answers_side_by_side_are_those_alone() {
    let folder = tempfile::tempdir().unwrap();
    let (tokenizer, decoder) = (tokenizer(folder.path()), decoder());
    let ask = |n: usize| {
        let until = vec![format!("w{}", n % 50)];
        vec![Request::Generate { context: words(n, 3 + n), until, max_tokens: 20 }]
    };
    let documents: Vec<Vec<Request>> = (0..40).map(ask).collect();
    let together = answer(&decoder, &tokenizer, &documents, 64);
    let mut shorter = 0;
    for (document, together) in documents.iter().zip(&together) {
        let alone = answer(&decoder, &tokenizer, std::slice::from_ref(document), 64);
        assert_eq!(alone[0].answers, together.answers);
        let said = together.answers[0].as_ref().unwrap().text().split(' ').count();
        shorter += usize::from(said < 20);
        let Request::Generate { until, .. } = &document[0] else { panic!() };
        assert!(!together.answers[0].as_ref().unwrap().text().contains(&until[0]));
    }
    assert!(shorter > 0, "no stop was met");
}

/// What cannot be asked is named, and does not stop the rest.
#[test]
fn what_cannot_be_answered_is_excluded() {
    let folder = tempfile::tempdir().unwrap();
    let (tokenizer, decoder) = (tokenizer(folder.path()), decoder());
    let prompt = |max_tokens| Request::Generate { context: "w1".into(), until: vec![], max_tokens };
    let documents = [
        vec![Request::likelihood("w1 w2", " "), Request::likelihood("w1 w2", " w3")],
        vec![prompt(POSITIONS)],
        vec![Request::Rolling { text: String::new() }],
        vec![Request::likelihood("", &*words(5, POSITIONS + 1))],
        vec![prompt(1)],
    ];
    let answered = answer(&decoder, &tokenizer, &documents, 64);
    assert_eq!(answered[0].answers[0], Err(Exclusion::NoContinuationToken));
    assert!(answered[0].answers[1].is_ok());
    assert_eq!(answered[1].answers[0], Err(Exclusion::NoRoomToGenerate));
    assert!(answered[2].answers[0].is_ok());
    assert_eq!(answered[3].answers[0], Err(Exclusion::ContinuationTooLong));
    assert!(answered[4].answers[0].is_ok());
}
