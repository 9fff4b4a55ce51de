//! `relufy bench decode` and `prompt`: what they measure, and what they refuse.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod support;

use serde_json::Value;
use support::{Lab, tokenizer};

const BENCH: [&str; 2] = ["bench", "decode"];

/// A model whose every token has a text.
fn lab() -> Lab {
    let lab = Lab::new();
    lab.write("model/tokenizer.json", tokenizer(2).to_string());
    lab
}

/// What a benchmark with these flags says.
fn measured(lab: &Lab, flags: &[&str]) -> Value {
    let flags = [&BENCH[..], flags, &["--tokens", "5", "--threads", "2", "--json"]].concat();
    serde_json::from_str(&lab.succeed(&flags)).unwrap()
}

/// The names of the rows.
fn names(found: &Value) -> Vec<&str> {
    found["rows"].as_array().unwrap().iter().map(|row| row["name"].as_str().unwrap()).collect()
}

#[test]
fn a_shape_is_measured_at_forced_densities() {
    let lab = Lab::new();
    let flags = ["--shape", "small", "--format", "f16,int8,f16", "--densities", "50,25,10"];
    let found = measured(&lab, &flags);
    assert_eq!(
        names(&found),
        ["f16 dense", "f16 50/25/10 %", "int8 dense", "int8 50/25/10 %"],
        "{found}"
    );
    assert_eq!(
        (&found["stage"], &found["threads"], &found["context"]),
        (&2.into(), &2.into(), &16.into())
    );
    assert_eq!((&found["tokens"], &found["subject"]), (&5.into(), &"small".into()));
    for key in ["read", "run", "parameters"] {
        assert!(found[key].as_f64().unwrap() > 0.0, "{key}");
    }
    let rows = found["rows"].as_array().unwrap();
    for row in rows {
        for key in ["tokens_per_second", "median_ms", "p10_ms", "p90_ms", "share_of_read"] {
            assert!(row[key].as_f64().unwrap() > 0.0, "{key}: {row}");
        }
    }
    // Hidden 256, 4 layers of 704 neurons, 4096 tokens; two bytes a weight.
    let dense = 4 * (4 * 256 * 256 + 3 * 256 * 704) + 4096 * 256;
    assert_eq!(rows[0]["bytes"].as_f64(), Some(2.0 * f64::from(dense)));
    assert!(rows[0]["faster"].is_null() && rows[0]["forced"].is_null());
    let sparse = 4 * (128 * 768 + 256 * 256 + 64 * 704 + 70 * 512) + 4096 * 256;
    assert_eq!(rows[1]["bytes"].as_f64(), Some(2.0 * f64::from(sparse)));
    assert_eq!(rows[1]["forced"]["up"], 0.25);
    let faster = &rows[1]["faster"];
    assert_eq!(faster["allowed"].as_f64(), Some(f64::from(dense) / f64::from(sparse)));
    let share = faster["times"].as_f64().unwrap() / faster["allowed"].as_f64().unwrap();
    assert_eq!(faster["share"].as_f64(), Some(share));
}

#[test]
fn sequences_side_by_side_share_what_they_read() {
    let lab = Lab::new();
    let flags = ["--shape", "small", "--densities", "50,25,10", "--batch"];
    let of = |batch: &'static str| measured(&lab, &[&flags[..], &[batch]].concat());
    let (one, four) = (of("1"), of("4"));
    assert_eq!((&four["batch"], &four["rows"][1]["densities"]["qkv"]), (&4.into(), &0.5.into()));
    let number = |found: &Value, row: usize, key: &str| found["rows"][row][key].as_f64().unwrap();
    for row in [0, 1] {
        assert_eq!(number(&four, row, "macs_done"), 4.0 * number(&one, row, "macs_done"));
    }
    assert_eq!(number(&four, 0, "bytes"), number(&one, 0, "bytes"));
    let bytes = number(&four, 1, "bytes");
    assert!(bytes > number(&one, 1, "bytes") && bytes < number(&four, 0, "bytes"));
    let (second, step) = (number(&four, 1, "tokens_per_second"), number(&four, 1, "median_ms"));
    assert!((second * step / 4e3 - 1.0).abs() < 1e-9);
}

#[test]
fn a_model_decodes_a_text_with_its_own_zeros() {
    let lab = lab();
    let all = ["model", "--stage", "2", "--corpus", "corpus.jsonl", "--format", "f32", "--decoder"];
    let found = measured(&lab, &all);
    assert_eq!(names(&found), ["f32 decoder", "f32 dense", "f32 sparse"]);
    let rows = found["rows"].as_array().unwrap();
    let perplexity = |row: &Value| row["perplexity"].as_f64();
    let (dense, sparse) = (perplexity(&rows[0]).unwrap(), perplexity(&rows[2]).unwrap());
    assert!((dense / sparse).ln().abs() < 1e-4 && dense > 1.0, "{dense} {sparse}");
    assert_eq!(perplexity(&rows[1]), None);
    assert!(rows[2]["bytes"].as_f64() < rows[1]["bytes"].as_f64());
    assert_eq!(rows[1]["bytes"], rows[0]["bytes"]);
    for site in ["qkv", "up", "down"] {
        let density = found["densities"][site].as_f64().unwrap();
        assert!(density > 0.0 && density < 1.0, "{site}: {density}");
    }
    assert_eq!(found["densities"]["o"], 1.0);
    // Two sequences, each in a part of the text of its own, read what either needs.
    let two = measured(&lab, &[&all[..7], &["--batch", "2"]].concat());
    assert_eq!((names(&two), &two["batch"]), (vec!["f32 dense", "f32 sparse"], &2.into()));
    let bytes = |row: &Value| row["bytes"].as_f64().unwrap();
    assert!(bytes(&two["rows"][1]) > bytes(&rows[2]));
    assert!(bytes(&two["rows"][1]) < bytes(&two["rows"][0]));
    assert!(perplexity(&two["rows"][1]).unwrap() > 1.0);
    // Its own text, and forced densities.
    let own =
        measured(&lab, &["model", "--stage", "2", "--prompt", "the cat", "--engine", "sparse"]);
    assert_eq!((names(&own), &own["context"]), (vec!["f16 sparse"], &2.into()));
    assert!(own["rows"][0]["perplexity"].is_null() && own["rows"][0]["faster"].is_null());
    let forced = measured(&lab, &["model", "--stage", "1", "--densities", "llama"]);
    assert_eq!(names(&forced), ["f16 dense", "f16 Llama's 49/33/35 %"]);
    assert!(forced["densities"].is_null());
    // A model without zeros has nothing to skip.
    let plain = measured(&lab, &["model", "--corpus", "corpus.jsonl"]);
    assert_eq!(names(&plain), ["f16 dense"]);
    assert!(perplexity(&plain["rows"][0]).is_some() && plain["densities"].is_null());
}

/// What was measured of `model` at a stage.
fn calibrated(lab: &Lab, stage: &str, file: &str) {
    let flags = ["--corpus", "corpus.jsonl", "--tokens", "500", "--stage", stage, "-o", file];
    lab.succeed(&[&["calibrate", "model"][..], &flags].concat());
}

#[test]
fn thresholds_are_measured_beside_the_exact_model() {
    let lab = lab();
    calibrated(&lab, "0", "s0.json");
    let corpus = ["model", "--corpus", "corpus.jsonl", "--format", "f32"];
    let targets = ["--calibration", "s0.json", "--density-target", "1", "--density-target"];
    let found = measured(&lab, &[&corpus[..], &["--decoder"], &targets, &["down=0.3"]].concat());
    let inexact = "f32 target down=0.3, inexact";
    assert_eq!(names(&found), ["f32 decoder", "f32 dense", "f32 target 1", inexact]);
    let rows = found["rows"].as_array().unwrap();
    let number = |row: usize, key: &str| rows[row][key].as_f64().unwrap();
    // Nothing is dropped at 1: the same bits.
    assert_eq!(number(2, "perplexity"), number(1, "perplexity"));
    assert!((number(0, "perplexity") / number(1, "perplexity")).ln().abs() < 1e-4);
    assert_eq!([1, 2, 3].map(|row| rows[row]["exact"] == true), [true, true, false]);
    assert_eq!((&rows[1]["target"], &rows[3]["target"]["down"]), (&Value::Null, &0.3.into()));
    let times = number(3, "perplexity") / number(1, "perplexity");
    assert!(times != 1.0 && (times - number(3, "times_exact_perplexity")).abs() < 1e-9);
    assert!(rows[2]["times_exact_perplexity"].is_null());
    assert_eq!(rows[1]["densities"]["down"], 1.0);
    let [qkv, down] = ["qkv", "down"].map(|site| rows[3]["densities"][site].as_f64().unwrap());
    assert!(qkv == 1.0 && down > 0.1 && down < 0.5, "{qkv} {down}");
    assert!(number(3, "bytes") < number(1, "bytes"));
    // Beside zeros that are there anyway, and as a person reads it.
    calibrated(&lab, "2", "s2.json");
    let flags = ["--stage", "2", "--calibration", "s2.json", "--density-target", "0.2"];
    let plain = [&BENCH[..], &corpus, &flags, &["--tokens", "5", "--threads", "2"]].concat();
    let found = lab.succeed(&plain);
    for part in ["f32 dense", "f32 sparse", "f32 target 0.2, inexact", "times exact"] {
        assert!(found.contains(part), "no {part} in {found}");
    }
    assert!(found.contains("\ninexact: activations below thresholds count as zero"), "{found}");
    // The layout alone is exact.
    let found = measured(&lab, &[&corpus[..], &flags[..4], &["--engine", "sparse"]].concat());
    assert_eq!((names(&found), &found["rows"][0]["exact"]), (vec!["f32 sparse"], &true.into()));
}

#[test]
fn curves_say_what_each_matrix_takes_by_density() {
    let lab = Lab::new();
    let flags = ["--shape", "small", "--curves", "--tokens", "1", "--threads", "2"];
    let found = lab.succeed(&[&BENCH[..], &flags, &["--json"]].concat());
    let found: Value = serde_json::from_str(&found).unwrap();
    let curves = found["formats"][0]["curves"].as_array().unwrap();
    let parts: Vec<_> = curves.iter().map(|curve| curve["part"].as_str().unwrap()).collect();
    assert_eq!(parts, ["qkv", "gate", "neurons"]);
    for curve in curves {
        let points = curve["points"].as_array().unwrap();
        assert_eq!((points.len(), &points[9]["density"]), (20, &0.5.into()));
        assert_eq!((&points[9]["ideal"], &points[19]["ideal"]), (&0.5.into(), &1.0.into()));
    }
}

#[test]
fn what_cannot_be_measured_is_refused() {
    let lab = lab();
    calibrated(&lab, "0", "s0.json");
    lab.write("one.jsonl", "{\"text\": \"the cat sat on the mat\"}\n");
    let cases: [(&[&str], &str); 28] = [
        (&[], "<MODEL|--shape <SHAPE>>"),
        (&["model", "--shape", "m"], "cannot be used with"),
        (&["--shape", "2b"], "possible values: m, small"),
        (&["--shape", "small", "--stage", "3"], "3 is not in 0..=2"),
        (&["--shape", "small", "--stage", "0", "--densities", "llama"], "has no zeros to skip"),
        (&["--shape", "small", "--stage", "0", "--curves"], "has no zeros to skip"),
        (&["model", "--engine", "sparse"], "has no zeros to skip: --stage 1 or 2"),
        (&["--shape", "small", "--densities", "1,2"], "three densities in per cent"),
        (&["--shape", "small", "--densities", "0.5,0.5,0.5"], "in per cent: 49,33,35"),
        (&["--shape", "small", "--format", "q4"], "unknown format `q4`"),
        (&["--shape", "small", "--batch", "0"], "0 is not in 1..=64"),
        (&["model", "--batch", "2"], "--batch needs --corpus or --densities"),
        (&["model", "--corpus", "one.jsonl", "--batch", "2"], "each of 2 sequences"),
        (&["--shape", "small", "--context", "128"], "has 128 positions"),
        (&["--shape", "small", "--prompt", "the"], "cannot be used with"),
        (&["--shape", "small", "--device", "cuda", "--format", "f16"], "f16 is for the CPU"),
        (&["model", "--corpus", "none.jsonl"], "none.jsonl"),
        (&["model", "--corpus", "corpus.jsonl", "--context", "30"], "no document of more than 31"),
        (&["model", "--prompt", "the", "--context", "62"], "leaves nothing to time"),
        (&["model", "--corpus", "corpus.jsonl", "--prompt", "the"], "cannot be used with"),
        (&["nowhere"], "nowhere"),
        (&["model", "--density-target", "0.5"], "--calibration"),
        (&["model", "--calibration", "s0.json"], "has no zeros to lay out for"),
        (&["model", "--calibration", "none.json", "--density-target", "1"], "none.json"),
        (&["model", "--calibration", "s0.json", "--density-target", "x"], "expected a density"),
        (
            &["model", "--calibration", "s0.json", "--density-target", "1", "--densities", "llama"],
            "cannot be used with",
        ),
        (&["--shape", "m", "--calibration", "s0.json"], "cannot be used with"),
        (&["model", "--calibration", "s0.json", "--engine", "dense"], "leave --engine dense out"),
    ];
    for (flags, message) in cases {
        lab.refuse(&[&BENCH[..], flags].concat(), &[message]);
    }
}

#[test]
fn prompts_are_measured_by_length() {
    let lab = lab();
    let flags = ["bench", "prompt", "model", "--stage", "2", "--lengths", "5,60", "--rounds", "2"];
    let found = lab.succeed(&[&flags[..], &["--format", "f16,f32", "--json"]].concat());
    let found: Value = serde_json::from_str(&found).unwrap();
    assert_eq!((&found["subject"], &found["stage"]), (&"model".into(), &2.into()));
    let formats = found["formats"].as_array().unwrap();
    assert_eq!((&formats[0]["format"], &formats[1]["format"]), (&"f16".into(), &"f32".into()));
    for format in formats {
        for (prompt, tokens) in format["prompts"].as_array().unwrap().iter().zip([5, 60]) {
            assert_eq!(prompt["tokens"], tokens);
            let seconds = prompt["seconds"].as_array().unwrap();
            assert!(seconds.len() == 2 && seconds.iter().all(|time| time.as_f64().unwrap() > 0.0));
            assert!(prompt["times_decoder"].as_f64().unwrap() > 0.0);
        }
    }
    let table = lab.succeed(&[&flags[..], &["--format", "int8"]].concat());
    assert_eq!(table.matches("decoder, f32").count(), 2, "{table}");
    lab.refuse(&["bench", "prompt", "model", "--lengths", "65"], &["65", "64"]);
    lab.refuse(&["bench", "prompt", "--shape", "m", "--lengths", "0"], &["--lengths"]);
}
