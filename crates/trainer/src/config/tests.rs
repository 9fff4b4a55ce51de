//! Configurations: what is accepted, and what the errors say.

use relufy_model::Precision;

use super::*;

const RUN: &str = r#"output_dir = "runs/a"

[model]
path = "models/tiny"
stage = 1

[train]
seq_len = 64
max_steps = 100

[optim]
learning_rate = 1e-3
lr_scheduler_type = "wsd"
warmup_steps = 5

[data]
validation_fraction = 0.1

[[data.sources]]
path = "corpus.jsonl"
"#;

fn parse(text: &str, set: &[&str]) -> Result<TrainConfig> {
    let set: Vec<String> = set.iter().map(ToString::to_string).collect();
    TrainConfig::parse(text, "run.toml", &set)
}

#[test]
fn defaults_are_filled_in_and_written_out() {
    let config = parse(RUN, &[]).unwrap();
    assert_eq!(config.seed, 42);
    assert_eq!(config.optim.lr_scheduler_type, LrScheduler::Wsd);
    let resolved = config.to_toml().unwrap();
    assert!(resolved.contains("max_grad_norm = 1.0"), "{resolved}");
    let again = parse(&resolved, &[]).unwrap();
    assert_eq!(resolved, again.to_toml().unwrap());
}

#[test]
fn a_plan_survives_the_round_trip() {
    let text = RUN.replace(
        "stage = 1",
        "plan = { activation = { kind = \"shifted_relu\", shift = 0.5 }, up_in = [{ op = \"relu\" }, { op = \"identity\" }] }",
    );
    let config = parse(&text, &[]).unwrap();
    let again = parse(&config.to_toml().unwrap(), &[]).unwrap();
    assert_eq!(config.model.plan, again.model.plan);
    assert!(again.model.plan.is_some());
}

#[test]
fn set_changes_values_and_makes_sections() {
    let config = parse(
        RUN,
        &[
            "optim.learning_rate=2e-4",
            "optim.lr_scheduler_type=cosine",
            "distill.weight=0.25",
            "data.sources.0.path=other.txt",
            "output_dir=\"runs/b\"",
            "freeze.train=[\"*.mlp.*\"]",
        ],
    )
    .unwrap();
    assert_eq!(config.optim.learning_rate, 2e-4);
    assert_eq!(config.optim.lr_scheduler_type, LrScheduler::Cosine);
    assert_eq!(config.optim.warmup_steps, Some(5));
    assert_eq!(config.distill.unwrap().weight, 0.25);
    assert_eq!(config.data.sources[0].path, "other.txt");
    assert_eq!(config.output_dir, PathBuf::from("runs/b"));
    assert_eq!(config.freeze.train, ["*.mlp.*"]);
}

#[test]
fn typos_fail_with_their_place() {
    let cases = [
        (RUN.replace("learning_rate", "learning_rat"), vec![], "line 12, column 1", "learning_rat"),
        (RUN.to_string(), vec!["optim.learning_rat=1"], "learning_rat = 1", "unknown field"),
        (RUN.to_string(), vec!["optm.learning_rate=1"], "optm", "unknown field"),
        (RUN.replace("\"wsd\"", "\"cosin\""), vec![], "line 13", "unknown variant `cosin`"),
        (RUN.replace("max_steps = 100", "max_steps = \"x\""), vec![], "line 9", "u64"),
        (RUN.replace("stage = 1", "stage = 3"), vec![], "line 5", "stage 3 does not exist"),
        (RUN.replace("[optim]", "[optim"), vec![], "line 11", "expected `]`"),
        (format!("{RUN}weigth = 1\n"), vec![], "line 21", "weigth"),
    ];
    for (text, set, place, what) in cases {
        let error = parse(&text, &set).unwrap_err().to_string();
        assert!(error.starts_with("run.toml: "), "{error}");
        assert!(error.contains(place), "no `{place}` in: {error}");
        assert!(error.contains(what), "no `{what}` in: {error}");
    }
}

#[test]
fn senseless_values_name_key_expected_and_found() {
    let cases = [
        ("optim.learning_rate=-1", "run.toml:12:1: `optim.learning_rate`", "found -1"),
        ("optim.learning_rate=nan", "`optim.learning_rate`", "found NaN"),
        ("optim.warmup_ratio=0.1", "`optim.warmup_ratio`", "found both"),
        ("optim.adam_beta2=1.0", "`optim.adam_beta2`", "below 1, found 1"),
        ("train.max_tokens=5", "`train.max_steps`", "found 2 of them"),
        ("train.seq_len=1", "run.toml:8:1: `train.seq_len`", "at least 2 tokens, found 1"),
        ("train.gradient_accumulation_steps=0", "accumulation_steps`", "found 0"),
        ("train.save_total_limit=0", "`train.save_total_limit`", "found 0"),
        ("train.device=gpu", "`train.device`", "`cuda:N`, found `gpu`"),
        ("train.dtype=bf16", "`train.dtype`", "on the CPU"),
        ("train.moment_dtype=bf16", "`train.moment_dtype`", "found `bf16`"),
        ("model.plan={}", "`model.plan`", "found both"),
        ("distill.weight=1.5", "`distill.weight`", "found 1.5"),
        ("regularise={}", "`regularise`", "found neither"),
        (
            "regularise.prosparse={lambda=[0.0,0.1],until_step=[9,9]}",
            "prosparse.until_step`",
            "[9, 9]",
        ),
        ("freeze.train=[\"a[\"]", "`freeze.train`", "`a[`"),
        ("data.sources=[]", "`data.sources`", "found none"),
    ];
    for (set, place, found) in cases {
        let error = parse(RUN, &[set]).unwrap_err().to_string();
        assert!(error.contains(place), "{set}: no `{place}` in: {error}");
        assert!(error.contains(found), "{set}: no `{found}` in: {error}");
    }
}

#[test]
fn a_gpu_computes_in_what_it_is_told() {
    let config = parse(RUN, &["train.device=cuda:1", "train.dtype=bf16"]).unwrap();
    assert_eq!((config.train.device.as_str(), config.train.dtype), ("cuda:1", Precision::Bf16));
    let more = ["train.device=cuda", "train.grad_dtype=bf16", "train.moment_dtype=bf16"];
    parse(RUN, &more).unwrap();
    let error = parse(RUN, &[&more[..], &["train.dtype=f32"]].concat()).unwrap_err().to_string();
    assert!(error.contains("`train.grad_dtype`"), "{error}");
}

#[test]
fn broken_set_arguments_are_refused() {
    for (set, why) in [
        ("optim.learning_rate", "expected key=value"),
        ("optim..x=1", "is no key"),
        ("data.sources.7.path=x", "`7` is no index into 1 tables"),
        ("output_dir.x=1", "under a value that is no table"),
    ] {
        let error = parse(RUN, &[set]).unwrap_err().to_string();
        assert!(error.contains(why), "{set}: {error}");
    }
}
