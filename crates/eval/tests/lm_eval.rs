//! Our numbers beside lm-evaluation-harness 0.4.13's, on a real checkpoint: every request's
//! tokens and log-likelihood, every task's metrics.
#![cfg_attr(not(relufy_shared), allow(unused))]
#![allow(clippy::unwrap_used)] // helpers of tests, where a panic is a failure

use std::io::Read;
use std::path::{Path, PathBuf};

use candle_core::Device;
use relufy_data::{Hub, HubSettings, Silent, SourceConfig, TaskData};
use relufy_eval::table::{Format, accuracy_vs_flops};
use relufy_eval::{
    Corpus, Inputs, Metric, ModelInfo, Request, RunResult, Session, SessionOptions, Suite,
    bootstrap, encode, evaluate, judge, tasks,
};
use relufy_model::{Checkpoint, Decoder, NoTap};
use relufy_spec::flops::Convention;
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

/// Each request of `task`: texts, token counts, log-likelihood, greediness; each
/// document's metrics.
fn check_requests(task: &str) {
    let task = tasks::find(task).unwrap();
    let golden = golden(task.name());
    let (checkpoint, decoder) = load();
    let tokenizer = checkpoint.tokenizer().unwrap();
    let session = Session::new(&decoder, &tokenizer, SessionOptions::default()).unwrap();

    let records: Vec<_> =
        golden.iter().map(|line| line["doc"].as_object().unwrap().clone()).collect();
    let documents = relufy_eval::documents(task.as_ref(), &records).unwrap();
    let requests: Vec<Request> =
        documents.iter().flat_map(|document| document.requests().to_vec()).collect();
    let scored = session.loglikelihood(&requests, &mut NoTap, &Silent).unwrap();

    let expected: Vec<(&Value, &Value)> = golden
        .iter()
        .flat_map(|line| line["req"].as_array().unwrap().iter().map(move |req| (line, req)))
        .collect();
    assert_eq!(requests.len(), expected.len());
    let encoded = encode(&requests, &tokenizer, session.max_length()).unwrap();
    let ours = requests.iter().zip(&encoded).zip(&scored);
    for (((request, encoded), found), (line, expected)) in ours.zip(expected) {
        let at = format!("{} document {}: {:?}", task.name(), line["i"], request.continuation);
        let context = expected.get("ctx").unwrap_or(&line["ctx"]);
        assert_eq!(request.context, context.as_str().unwrap(), "{at}");
        assert_eq!(request.continuation, expected["cont"].as_str().unwrap(), "{at}");
        let found = found.as_ref().unwrap();
        assert_eq!(found.context_tokens as u64, expected["n_ctx"].as_u64().unwrap(), "{at}");
        let ids: Vec<u32> = serde_json::from_value(expected["cont_ids"].clone()).unwrap();
        assert_eq!(found.continuation_tokens, ids.len(), "{at}");
        assert!(encoded.as_ref().unwrap().ids.ends_with(&ids), "{at}");
        assert_eq!(found.truncated as u64, expected["truncated"].as_u64().unwrap(), "{at}");
        assert_eq!(found.is_greedy, expected["greedy"].as_bool().unwrap(), "{at}");
        let (found, expected) = (found.logprob, expected["ll"].as_f64().unwrap());
        let tolerance = 2e-4 + 1e-6 * expected.abs();
        assert!((found - expected).abs() <= tolerance, "{at}: {found}, expected {expected}");
    }
    let judged = judge(&documents, scored);
    assert_eq!((judged.kept.len(), judged.excluded), (golden.len(), Vec::new()));
    for ((document, scores), line) in judged.kept.iter().zip(&golden) {
        for metric in [Metric::Acc, Metric::AccNorm] {
            if let Some(expected) = line["m"].get(metric.name()) {
                let found = document.value(metric, scores);
                assert_eq!(found, expected.as_f64().unwrap(), "{} {metric:?}", line["i"]);
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

/// Not a check but a measurement: documents a second over whole splits.
/// `cargo test --release -p relufy-eval --test lm_eval -- --ignored --nocapture speed`
#[test]
#[ignore = "takes a minute or two: a measurement, run by name"]
fn speed() {
    let (checkpoint, decoder) = load();
    let tokenizer = checkpoint.tokenizer().unwrap();
    let session = Session::new(&decoder, &tokenizer, SessionOptions::default()).unwrap();
    let corpus = shared("data/corpora/tinystories-train-head.txt.zst");
    let suite = Suite {
        tasks: tasks::all(),
        corpora: vec![Corpus::new("tinystories", SourceConfig::new(corpus.to_str().unwrap()))],
        limit: None,
    };
    let offline = HubSettings { offline: true, ..HubSettings::from_env().unwrap() };
    let inputs = Inputs { tasks: &TaskData::local(shared("data/eval")), hub: &Hub::new(offline) };
    let started = std::time::Instant::now();
    let model = ModelInfo::of(&checkpoint);
    let result = evaluate(&session, model, &suite, &inputs, &Silent).unwrap();
    println!("all {:.1} s", started.elapsed().as_secs_f64());
    for task in &result.tasks {
        let rate = |count: usize| count as f64 / task.seconds;
        println!(
            "{} {} documents, {} excluded, {:.1} s: {:.0} documents/s, {:.0} tokens/s",
            task.name,
            task.documents,
            task.excluded.len(),
            task.seconds,
            rate(task.documents),
            rate(task.tokens as usize)
        );
    }
    let table = accuracy_vs_flops(&[result], Convention::PaperCompat);
    println!("{}", table.render(Format::Terminal));
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

/// The whole way from dataset files to `results.json`, with exclusions and standard errors.
#[test]
#[cfg_attr(not(relufy_shared), ignore = "needs the shared goldens: set RELUFY_SHARED")]
fn metrics_and_exclusions_from_dataset_files() {
    let golden = json("golden/lm_eval/results.json");
    let (checkpoint, decoder) = load();
    let tokenizer = checkpoint.tokenizer().unwrap();
    let session = Session::new(&decoder, &tokenizer, SessionOptions::default()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    for (name, metrics) in [
        ("arc_easy", [Metric::Acc, Metric::AccNorm]),
        ("piqa", [Metric::Acc, Metric::AccNorm]),
        ("lambada_openai", [Metric::Acc, Metric::Perplexity]),
    ] {
        let expected = &golden["tasks"][name];
        let suite = Suite {
            tasks: vec![tasks::find(name).unwrap()],
            corpora: Vec::new(),
            limit: expected["limit"].as_u64().map(|limit| limit as usize),
        };
        let offline = HubSettings { offline: true, ..HubSettings::from_env().unwrap() };
        let inputs =
            Inputs { tasks: &TaskData::local(shared("data/eval")), hub: &Hub::new(offline) };
        let model = ModelInfo::of(&checkpoint);
        let result = evaluate(&session, model, &suite, &inputs, &Silent).unwrap();
        result.write(folder.path()).unwrap();
        // serde_json's reader may miss a float by its last digit.
        let read = RunResult::read(folder.path()).unwrap();
        assert_eq!((&read.model, &read.tasks[0].name), (&result.model, &result.tasks[0].name));
        let read = read.metric(name, metrics[1]).unwrap().value;
        let kept = result.metric(name, metrics[1]).unwrap().value;
        assert!((read - kept).abs() <= 1e-14 * kept);

        let task = &result.tasks[0];
        assert_eq!(task.documents as u64, expected["docs"].as_u64().unwrap());
        let excluded: Vec<u64> =
            task.excluded.iter().map(|excluded| excluded.document as u64).collect();
        let expected_excluded: Vec<u64> = expected["excluded_docs"]
            .as_array()
            .unwrap()
            .iter()
            .map(|index| index.as_u64().unwrap())
            .collect();
        assert_eq!(excluded, expected_excluded);
        for metric in metrics {
            let found = result.metric(name, metric).unwrap();
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
    }
}
