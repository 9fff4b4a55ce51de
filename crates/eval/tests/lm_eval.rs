//! Our numbers beside lm-evaluation-harness 0.4.13's, on a real checkpoint: every request's
//! tokens and log-likelihood, every document's and every task's metrics.
#![cfg_attr(not(relufy_shared), allow(unused))]
// Helpers of tests, where a panic is a failure; a closure that returns our error.
#![allow(clippy::unwrap_used, clippy::panic, clippy::result_large_err)]

use std::io::Read;
use std::path::{Path, PathBuf};

use candle_core::Device;
use relufy_data::{Hub, HubSettings, Silent, TaskData};
use relufy_eval::tasks::{self, Chosen, Document, Limit, Task};
use relufy_eval::{
    Answer, Cache, Compat, Encoded, Inputs, Metric, ModelInfo, Request, Session, SessionOptions,
    Suite, bootstrap, encode, evaluate,
};
use relufy_model::{Checkpoint, Decoder};
use serde_json::Value;

const MODEL: &str = "data/checkpoints/TinyStories-656K";

fn shared(path: &str) -> PathBuf {
    Path::new(option_env!("RELUFY_SHARED_DIR").unwrap_or_default()).join(path)
}

fn json(path: &str) -> Value {
    serde_json::from_slice(&std::fs::read(shared(path)).unwrap()).unwrap()
}

/// One line a document.
fn golden(task: &str) -> Vec<Value> {
    let file = shared(&format!("golden/lm_eval/{task}.jsonl.gz"));
    let mut text = String::new();
    let file = std::fs::File::open(file).unwrap();
    flate2::read::GzDecoder::new(file).read_to_string(&mut text).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn load() -> (Checkpoint, Decoder) {
    let checkpoint = Checkpoint::open(&shared(MODEL)).unwrap();
    let decoder = checkpoint.load(&Device::Cpu).unwrap();
    (checkpoint, decoder)
}

fn task(name: &str) -> Box<dyn Task> {
    tasks::find(&[name]).unwrap().tasks.remove(0)
}

/// Each request of task `name`: texts, token counts, log-likelihood, greediness; each
/// document's target and metrics.
fn check_requests(name: &str) {
    let (task, golden) = (task(name), golden(name));
    let (checkpoint, decoder) = load();
    let tokenizer = checkpoint.tokenizer().unwrap();
    let session = Session::new(&decoder, &tokenizer, SessionOptions::default()).unwrap();

    let documents: Vec<Document> = golden
        .iter()
        .map(|line| {
            let record = task.process(line["doc"].as_object().unwrap().clone()).unwrap();
            task.document(&record).unwrap()
        })
        .collect();
    let requests: Vec<&[Request]> = documents.iter().map(Document::requests).collect();
    let answered = session.answer(&requests, &Silent, &mut |_, _| Ok(())).unwrap();

    for ((document, answered), line) in documents.iter().zip(answered).zip(&golden) {
        let at = format!("{name} document {}", line["i"]);
        assert_eq!(*document.right(), line["target"], "{at}");
        let answers: Vec<Answer> = answered.answers.into_iter().map(Result::unwrap).collect();
        let expected = line["req"].as_array().unwrap();
        assert_eq!((document.requests().len(), answers.len()), (expected.len(), expected.len()));
        for ((request, answer), expected) in document.requests().iter().zip(&answers).zip(expected)
        {
            let at = format!("{at}: {request:?}");
            let context = expected.get("ctx").unwrap_or(&line["ctx"]).as_str().unwrap();
            let continuation = expected["cont"].as_str().unwrap();
            assert_eq!(*request, Request::likelihood(context, continuation), "{at}");
            let Answer::Likelihood(found) = answer else { panic!("{at}: {answer:?}") };
            assert_eq!(found.context_tokens as u64, expected["n_ctx"].as_u64().unwrap(), "{at}");
            let ids: Vec<u32> = serde_json::from_value(expected["cont_ids"].clone()).unwrap();
            assert_eq!(found.continuation_tokens, ids.len(), "{at}");
            let encoded = encode(&[request], &tokenizer, session.rules()).unwrap().remove(0);
            let Ok(Encoded::Likelihood(encoded)) = encoded else { panic!("{at}: {encoded:?}") };
            assert_eq!(encoded.targets(), ids, "{at}");
            assert_eq!(found.truncated as u64, expected["truncated"].as_u64().unwrap(), "{at}");
            assert_eq!(found.is_greedy, expected["greedy"].as_bool().unwrap(), "{at}");
            let (found, expected) = (found.logprob, expected["ll"].as_f64().unwrap());
            let tolerance = 2e-4 + 1e-6 * expected.abs();
            assert!((found - expected).abs() <= tolerance, "{at}: {found}, expected {expected}");
        }
        for metric in [Metric::Acc, Metric::AccNorm] {
            if let Some(expected) = line["m"].get(metric.name()) {
                let found = document.value(metric, &answers, Compat::Current).value;
                assert_eq!(found, expected.as_f64().unwrap(), "{at} {metric:?}");
            }
        }
    }
}

#[test]
#[cfg_attr(not(relufy_shared), ignore = "needs the shared goldens: set RELUFY_SHARED")]
fn arc_easy_requests() {
    check_requests("arc_easy");
}

#[test]
#[cfg_attr(not(relufy_shared), ignore = "needs the shared goldens: set RELUFY_SHARED")]
fn piqa_requests() {
    check_requests("piqa");
}

#[test]
#[cfg_attr(not(relufy_shared), ignore = "needs the shared goldens: set RELUFY_SHARED")]
fn lambada_openai_requests() {
    check_requests("lambada_openai");
}

#[test]
#[cfg_attr(not(relufy_shared), ignore = "needs the shared goldens: set RELUFY_SHARED")]
fn hellaswag_requests() {
    check_requests("hellaswag");
}

#[test]
#[cfg_attr(not(relufy_shared), ignore = "needs the shared goldens: set RELUFY_SHARED")]
fn sciq_requests() {
    check_requests("sciq");
}

#[test]
#[cfg_attr(not(relufy_shared), ignore = "needs the shared goldens: set RELUFY_SHARED")]
fn winogrande_requests() {
    check_requests("winogrande");
}

/// The golden run drew 1000 replicates: the first chunk of the default's hundred.
#[test]
#[cfg_attr(not(relufy_shared), ignore = "needs the shared goldens: set RELUFY_SHARED")]
fn perplexity_bootstrap_draws_what_python_draws() {
    let logprobs: Vec<f64> = golden("lambada_openai")
        .iter()
        .map(|line| line["m"]["perplexity"].as_f64().unwrap())
        .collect();
    let metrics = &json("golden/lm_eval/results.json")["tasks"]["lambada_openai"]["metrics"];
    let expected = metrics["perplexity_stderr"].as_f64().unwrap();
    let found = bootstrap::perplexity_stderr(&logprobs, 1000).unwrap();
    assert!((found - expected).abs() <= 1e-9 * expected, "{found}, expected {expected}");
}

/// The whole way from dataset files to results, with exclusions and standard errors.
#[test]
#[cfg_attr(not(relufy_shared), ignore = "needs the shared goldens: set RELUFY_SHARED")]
fn metrics_and_exclusions_from_dataset_files() {
    let golden = json("golden/lm_eval/results.json");
    let (checkpoint, decoder) = load();
    let tokenizer = checkpoint.tokenizer().unwrap();
    let session = Session::new(&decoder, &tokenizer, SessionOptions::default()).unwrap();
    let offline = HubSettings { offline: true, ..HubSettings::from_env().unwrap() };
    let inputs = Inputs { tasks: &TaskData::local(shared("data/eval")), hub: &Hub::new(offline) };
    for (name, expected) in golden["tasks"].as_object().unwrap() {
        let limit = Limit::Count(expected["limit"].as_u64().unwrap() as usize);
        let suite = Suite {
            tasks: vec![task(name)],
            chosen: Chosen { limit: Some(limit), ..Chosen::default() },
            ..Suite::default()
        };
        let model = ModelInfo::of(&checkpoint);
        let found =
            evaluate(&session, model, &suite, &inputs, &mut Cache::none(), &Silent).unwrap();
        let task = &found.result.tasks[0];
        assert_eq!(task.documents as u64, expected["docs"].as_u64().unwrap(), "{name}");
        assert_eq!(task.version, expected["version"].as_f64(), "{name}");
        let excluded: Vec<u64> = task.excluded.iter().map(|it| it.document as u64).collect();
        let expected_excluded: Vec<u64> =
            serde_json::from_value(expected["excluded_docs"].clone()).unwrap();
        assert_eq!(excluded, expected_excluded, "{name}");
        for (metric, found) in &task.metrics {
            let expect = |suffix: &str| {
                expected["metrics"][format!("{}{suffix}", metric.name())].as_f64().unwrap()
            };
            // Accuracies are counts; perplexities amplify f32 noise in the log-likelihoods.
            let tolerance = if metric.is_accuracy() { 1e-12 } else { 1e-4 };
            let close = |a: f64, b: f64| (a - b).abs() <= tolerance * b.abs();
            assert!(close(found.value, expect("")), "{name} {metric:?}: {found:?}");
            if metric.is_accuracy() {
                let stderr = found.stderr.unwrap();
                assert!(close(stderr, expect("_stderr")), "{name} {metric:?}: {found:?}");
            }
        }
        let measured = expected["metrics"].as_object().unwrap().keys();
        let measured = measured.filter(|key| !key.ends_with("_stderr") && *key != "sample_len");
        assert_eq!(task.metrics.len(), measured.count(), "{name}");
    }
}
