//! `relufy eval` and `relufy table` as a person uses them: files in the harness's form, runs
//! that are killed and go on, models compared.
#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::{Lab, WORDS, text};

/// Questions with two to four answers, all different.
fn questions(n: usize) -> String {
    let word = |n: usize| WORDS[n % 11];
    let line = |n: usize| {
        let question =
            (0..6).map(|k| word(n / 11usize.pow(k) + k as usize)).collect::<Vec<_>>().join(" ");
        let choices = 2 + n % 3;
        let texts: Vec<String> =
            (0..choices).map(|k| format!("{} {}", word(n + k), word(n / 7 + 2 * k))).collect();
        let labels = &["A", "B", "C", "D"][..choices];
        let record = json!({
            "question": question, "answerKey": labels[n % choices],
            "choices": { "text": texts, "label": labels },
        });
        format!("{record}\n")
    };
    (0..n).map(line).collect()
}

/// Files in or below a folder whose names begin so, in order.
fn files(lab: &Lab, folder: &str, prefix: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![lab.path(folder)];
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else if path.file_name().unwrap().to_string_lossy().starts_with(prefix) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

fn json_of(path: &PathBuf) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn lines(path: &PathBuf) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn files_have_the_harness_form_and_are_never_overwritten() {
    let lab = Lab::new();
    lab.write("q.jsonl", questions(30));
    let args = ["eval", "model", "-t", "facts=q.jsonl", "-L", "20", "-o", "out", "-s"];
    let told = lab.succeed(&args);
    assert!(told.contains("|Tasks|Version|Filter|n-shot| Metric |"), "{told}");
    assert!(told.contains("|facts|      1|none  |     0|acc     |↑  |"), "{told}");
    assert!(told.contains("Zeros in the input of QKV"), "{told}");
    lab.succeed(&args);
    let results = files(&lab, "out/model", "results_");
    let samples = files(&lab, "out/model", "samples_facts_");
    assert_eq!((results.len(), samples.len()), (2, 2), "{results:?} {samples:?}");

    let file = json_of(&results[0]);
    assert_eq!(file["n-samples"]["facts"], json!({"original": 30, "effective": 20}));
    assert_eq!(file["config"]["limit"], 20);
    assert_eq!(file["config"]["model_args"], json!({"pretrained": "model", "dtype": "float32"}));
    assert_eq!(file["model_name"], "model");
    let details = &file["relufication"]["tasks"]["facts"];
    assert_eq!(details["source"], "q.jsonl");
    assert!(details["seconds"].as_f64().unwrap() > 0.0);
    assert_eq!(file["relufication"]["densities"]["error_95"]["documents"], 20);
    let documents = lines(&samples[0]);
    assert_eq!(documents.len(), 20);
    let keys: Vec<&String> = documents[3].as_object().unwrap().keys().collect();
    let expected = [
        "doc_id",
        "doc",
        "target",
        "arguments",
        "resps",
        "filtered_resps",
        "filter",
        "metrics",
        "doc_hash",
        "prompt_hash",
        "target_hash",
        "acc",
        "acc_norm",
    ];
    assert_eq!(keys, expected);
    assert_eq!(documents[3]["doc_id"], 3);
    let right = documents.iter().map(|document| document["acc"].as_f64().unwrap()).sum::<f64>();
    assert_eq!(file["results"]["facts"]["acc,none"].as_f64(), Some(right / 20.0));
    // The same questions give the same answers and hashes.
    assert_eq!(file["task_hashes"], json_of(&results[1])["task_hashes"]);
    assert_eq!(documents, lines(&samples[1]));

    let table = lab.succeed(&["table", "out", "-f", "json"]);
    let table: Value = serde_json::from_str(&table).unwrap();
    assert_eq!(table["rows"][0]["facts"].as_f64(), Some(100.0 * right / 20.0));
}

#[test]
fn flags_may_be_written_as_in_the_harness() {
    let lab = Lab::new();
    lab.write("q.jsonl", questions(12));
    let run = |args: &[&str]| -> Value {
        let told = lab.succeed(&[&["eval", "--json", "--tasks", "facts=q.jsonl"], args].concat());
        let mut file: Value = serde_json::from_str(&told).unwrap();
        file["results"].take()
    };
    let plain = run(&["model"]);
    assert_eq!(run(&["--model", "hf", "--model_args", "pretrained=model,dtype=float32"]), plain);
    for batch in ["auto", "auto:4", "1", "7"] {
        assert_eq!(run(&["model", "--batch_size", batch]), plain, "{batch}");
    }
    assert_eq!(run(&["model", "--num-fewshot", "0", "--max-length", "64"]), plain);
    assert_eq!(run(&["model", "--device", "cpu", "--trust_remote_code", "--seed", "0"]), plain);
    let half = run(&["model", "--limit", "0.5"]);
    assert_eq!(half["facts"]["sample_len"], 6);
    let chosen = run(&["model", "--samples", "{\"facts\": [1, 4]}"]);
    assert_eq!(chosen["facts"]["sample_len"], 2);
    let shown = lab.run(&["eval", "model", "-t", "facts=q.jsonl", "-L", "1", "--write_out"]);
    let shown = text(&shown.stderr);
    assert!(shown.contains("facts, document 0; the prompt:\nQuestion: "), "{shown}");
    let listed = lab.succeed(&["eval", "ls"]);
    assert_eq!(listed, lab.succeed(&["eval", "--tasks", "list"]));
    for name in ["arc_easy", "mmlu_anatomy", "mmlu_stem", "paper-mmlu"] {
        assert!(listed.lines().any(|line| line.starts_with(name)), "{name}: {listed}");
    }
}

#[test]
fn models_are_compared_on_the_same_documents() {
    let lab = Lab::new();
    lab.write("q.jsonl", questions(40));
    let eval = |stage: &str, out: &str, more: &[&str]| {
        let args = ["eval", "model", "-t", "facts=q.jsonl", "--stage", stage, "-o", out];
        lab.succeed(&[&args[..], more].concat())
    };
    eval("0", "dense", &["-s"]);
    eval("2", "s2", &["-s"]);
    let table = lab.succeed(&["table", "s2", "--baseline", "dense", "-f", "json"]);
    let table: Value = serde_json::from_str(&table).unwrap();
    assert_eq!(table["rows"].as_array().unwrap().len(), 2, "the baseline has a row too");
    let accuracy = |n: usize| table["rows"][n]["facts"].as_f64().unwrap();
    let difference = &table["differences"]["rows"][0];
    let [value, low, high, p] =
        ["difference", "low", "high", "p"].map(|key| difference[key].as_f64().unwrap());
    assert!((value - (accuracy(1) - accuracy(0))).abs() < 1e-9, "{table:#}");
    assert!(low <= value && value <= high && p > 0.0 && p <= 1.0, "{table:#}");
    let shown = lab.succeed(&["table", "s2", "dense", "--baseline", "dense"]);
    assert!(shown.contains("paired bootstrap, 10000 replicates"), "{shown}");

    let refuse = |run: &str, expected: &[&str]| {
        lab.refuse(&["table", run, "--baseline", "dense"], expected);
    };
    eval("2", "silent", &[]);
    refuse("silent", &["`facts`", "has no samples beside it", "hint: ", "--log_samples"]);
    eval("2", "fewer", &["-s", "-L", "39"]);
    refuse("fewer", &["only model was asked document 39"]);
    lab.write("q.jsonl", questions(41).replacen("the", "a", 1));
    eval("2", "other", &["-s", "-L", "40"]);
    refuse("other", &["document 0 is another one"]);
}

/// A long evaluation that keeps its answers.
fn start(lab: &Lab, cache: &str, out: &str) -> Child {
    let args = ["eval", "model", "-t", "facts=q.jsonl", "-c", cache, "-o", out, "-s"];
    lab.command(&args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// Waits until some answers are kept; false if it ended first.
fn has_answers(lab: &Lab, child: &mut Child, cache: &str) -> bool {
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(60) {
        let written = fs::metadata(lab.path(cache)).map_or(0, |found| found.len());
        if written > 20_000 {
            return child.try_wait().unwrap().is_none();
        }
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        sleep(Duration::from_micros(200));
    }
    false
}

#[test]
fn a_killed_evaluation_goes_on_without_asking_twice() {
    let lab = Lab::new();
    lab.write("q.jsonl", questions(4000));
    assert!(start(&lab, "whole.jsonl", "whole").wait().unwrap().success());

    let mut kills = 0;
    for attempt in 0..8 {
        let (cache, out) = (format!("cache{attempt}.jsonl"), format!("out{attempt}"));
        let mut child = start(&lab, &cache, &out);
        let stopped = has_answers(&lab, &mut child, &cache);
        child.kill().unwrap();
        if child.wait().unwrap().success() || !stopped {
            continue;
        }
        kills += 1;
        assert!(!lab.path(&out).exists(), "results of half an evaluation");
        let half = fs::read(lab.path(&cache)).unwrap();
        let whole_lines = half.iter().filter(|byte| **byte == b'\n').count();
        assert!((1..4000).contains(&whole_lines), "{whole_lines}");
        assert!(start(&lab, &cache, &out).wait().unwrap().success());

        let kept = lines(&lab.path(&cache));
        let keys: BTreeSet<&str> = kept.iter().map(|line| line["key"].as_str().unwrap()).collect();
        assert_eq!((kept.len(), keys.len()), (4000, 4000), "a document was asked twice");
        let whole = half.iter().rposition(|byte| *byte == b'\n').unwrap() + 1;
        assert!(fs::read(lab.path(&cache)).unwrap().starts_with(&half[..whole]));
        let result = |out: &str| json_of(&files(&lab, out, "results_")[0]);
        let (once, twice) = (result("whole"), result(&out));
        assert_eq!(once["results"], twice["results"]);
        assert_eq!(once["task_hashes"], twice["task_hashes"]);
        assert_eq!(once["relufication"]["densities"], twice["relufication"]["densities"]);
        if kills == 2 {
            return;
        }
    }
    assert!(kills > 0, "every evaluation ended before it could be killed");
}

#[test]
fn ctrl_c_ends_it_with_the_conventional_code() {
    let lab = Lab::new();
    lab.write("q.jsonl", questions(4000));
    for attempt in 0..8 {
        let cache = format!("cache{attempt}.jsonl");
        let mut child = start(&lab, &cache, "out");
        if has_answers(&lab, &mut child, &cache) {
            let asked = Command::new("kill").args(["-INT", &child.id().to_string()]).status();
            assert!(asked.unwrap().success());
            let status = child.wait().unwrap();
            if !status.success() {
                assert_eq!(status.code(), Some(130));
                return;
            }
        }
        child.wait().unwrap();
    }
    unreachable!("every evaluation ended before it could be interrupted");
}

#[test]
fn a_cache_is_for_one_evaluation_at_a_time() {
    let lab = Lab::new();
    lab.write("q.jsonl", questions(3));
    lab.write("cache.jsonl", "");
    let file = File::open(lab.path("cache.jsonl")).unwrap();
    file.lock().unwrap();
    let args = ["eval", "model", "-t", "facts=q.jsonl", "--use_cache", "cache.jsonl"];
    lab.refuse(&args, &["cache.jsonl: another evaluation is using it", "hint: "]);
    drop(file);
    lab.succeed(&args);
    assert_eq!(lines(&lab.path("cache.jsonl")).len(), 3);
    // Another stage is another model.
    lab.succeed(&[&args[..], &["--stage", "1"]].concat());
    assert_eq!(lines(&lab.path("cache.jsonl")).len(), 6);
}
