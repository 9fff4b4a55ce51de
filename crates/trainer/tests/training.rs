//! What a run does and leaves behind.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::fs;
use std::path::Path;

use candle_core::{Device, Tensor};
use common::{World, metrics, names, train, train_until};
use relufy_data::Silent;
use relufy_model::{Checkpoint, StoredDtype};
use relufy_trainer::{Error, Surroundings, Trainer};
use serde_json::Value;

fn weights(folder: &Path) -> std::collections::HashMap<String, Tensor> {
    candle_core::safetensors::load(folder.join("model.safetensors"), &Device::Cpu).unwrap()
}

fn same(a: &Tensor, b: &Tensor) -> bool {
    let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    values(a) == values(b)
}

#[test]
fn a_run_learns_and_says_so() {
    let world = World::new(StoredDtype::F32);
    let set = ["train.save_total_limit=2", "train.eval_on_start=true", "train.dead_neurons=true"];
    let config = world.config("model", "run", "", &set);
    let summary = train(&config, false).unwrap();
    let output = world.path("run");
    let expected =
        ["checkpoint-30", "checkpoint-40", "final", "metrics.jsonl", "tensorboard", "train.toml"];
    assert_eq!(names(&output), expected);
    assert_eq!(summary.tokens, 40 * 4 * 24);

    let lines = metrics(&output);
    let of = |key: &str| -> Vec<f64> {
        lines.iter().filter_map(|line| line.get(key)).filter_map(Value::as_f64).collect()
    };
    let (losses, validation) = (of("loss"), of("eval_loss"));
    assert_eq!((losses.len(), validation.len()), (40, 5));
    // The corpus has 1.0 nats a token; a model that knows nothing pays ln 16 = 2.8.
    assert!(validation[0] > 2.5 && validation[4] < 1.3, "{validation:?}");
    assert_eq!(summary.validation.unwrap().loss, validation[4]);
    let density = &lines.last().unwrap();
    assert!(density.contains_key("dead_neurons"));
    let step = lines.iter().rfind(|line| line.contains_key("density")).unwrap();
    assert_eq!(step["density"]["down"]["layers"].as_array().unwrap().len(), 2);
    assert!(step["density"]["qkv"]["mean"].as_f64().unwrap() > 0.99);

    let state = fs::read(output.join("checkpoint-40/trainer_state.json")).unwrap();
    let state: Value = serde_json::from_slice(&state).unwrap();
    assert_eq!(state["global_step"], 40);
    assert_eq!(state["num_input_tokens_seen"], 40 * 4 * 24);
    assert_eq!(state["log_history"].as_array().unwrap().len(), lines.len());
    let model = Checkpoint::open(&output.join("final")).unwrap();
    assert!(model.tokenizer().is_ok());
    let resolved = fs::read_to_string(output.join("train.toml")).unwrap();
    assert!(resolved.contains("adam_beta2 = 0.95"), "{resolved}");
}

#[test]
fn surgery_in_memory_is_exported_with_its_tokens() {
    let world = World::new(StoredDtype::F32);
    let config = world.config("model", "run", "", &["model.stage=1", "train.max_steps=4"]);
    train(&config, false).unwrap();
    let model = Checkpoint::open(&world.path("run/final")).unwrap();
    let block = model.config().relufication.clone().unwrap();
    assert_eq!(block.tokens_trained, 4 * 4 * 24);
    assert!(block.source.unwrap().weights_blake3.is_some());
    let card = fs::read_to_string(world.path("run/final/README.md")).unwrap();
    assert!(card.contains("fine-tuned on 384 tokens"), "{card}");
    let lines = metrics(&world.path("run"));
    let step = lines.iter().find(|line| line.contains_key("density")).unwrap();
    let density = step["density"]["down"]["mean"].as_f64().unwrap();
    assert!((0.2..0.8).contains(&density), "ReLU leaves about half: {density}");
    // Training on from there counts on.
    let config = world.config("run/final", "more", "", &["train.max_steps=2"]);
    train(&config, false).unwrap();
    let model = Checkpoint::open(&world.path("more/final")).unwrap();
    assert_eq!(model.config().relufication.clone().unwrap().tokens_trained, 6 * 4 * 24);
}

#[test]
fn frozen_tensors_keep_their_bits() {
    let world = World::new(StoredDtype::F32);
    let before = weights(&world.path("model"));
    type Trained = fn(&str) -> bool;
    let cases: [(&str, Trained); 3] = [
        ("freeze.train=['*.mlp.*']", |name| name.contains(".mlp.")),
        ("freeze.freeze=['*.up_proj.*', '*.k_proj.*', '*embed*']", |name| {
            !["up_proj", "k_proj", "embed"].iter().any(|part| name.contains(part))
        }),
        ("freeze.last_layers=1", |name| {
            name.contains("layers.1.") || name.contains("lm_head") || name == "model.norm.weight"
        }),
    ];
    for (n, (set, trained)) in cases.into_iter().enumerate() {
        let output = format!("run{n}");
        let config = world.config("model", &output, "", &["train.max_steps=3", set]);
        train(&config, false).unwrap();
        let after = weights(&world.path(&output).join("final"));
        assert_eq!(before.len(), after.len());
        for (name, tensor) in &before {
            assert_eq!(!same(tensor, &after[name]), trained(name), "{set}: {name}");
        }
    }
}

#[test]
fn patterns_that_match_nothing_are_typos() {
    let world = World::new(StoredDtype::F32);
    for (set, why) in [
        ("freeze.train=['*.ffn.*']", "`*.ffn.*` matches no tensor"),
        ("freeze.last_layers=3", "3 layers of a model that has 2"),
        ("freeze.freeze=['*']", "no tensor is left"),
    ] {
        let config = world.config("model", "run", "", &[set]);
        let error = train(&config, false).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
        assert!(!world.path("run").exists());
    }
}

#[test]
fn distillation_comes_closer_to_the_teacher() {
    let world = World::new(StoredDtype::F32);
    world.model("student", 99, StoredDtype::F32, |_| {});
    let teacher = format!("distill.teacher='{}'", world.path("model").display());
    let set = [teacher.as_str(), "distill.weight=1.0", "distill.temperature=2.0"];
    let config = world.config("student", "run", "", &set);
    let (_, steps) = train_until(&config, false, u64::MAX).unwrap();
    let kl = |n: usize| steps[n].kl.unwrap();
    assert!(kl(39) < 0.5 * kl(0), "{} did not fall to half: {}", kl(0), kl(39));
}

#[test]
fn regularisation_shrinks_activations() {
    let world = World::new(StoredDtype::F32);
    let last = |output: &str, l1: f64| {
        let set = format!("regularise.l1={l1:?}");
        let config = world.config("model", output, "", &[&set]);
        train_until(&config, false, u64::MAX).unwrap().1[39].l1.unwrap()
    };
    let (free, pressed) = (last("free", 0.0), last("pressed", 3.0));
    assert!(pressed < 0.7 * free, "{pressed} is not much below {free}");
}

#[test]
fn the_first_step_names_tensors_without_a_gradient() {
    let world = World::new(StoredDtype::F32);
    // No activation gets past this threshold: the MLP of every layer is silent.
    let plan = "model.plan={activation={kind='shifted_relu',shift=1e6}}";
    let config = world.config("model", "run", "", &[plan]);
    let Err(Error::Gradients { problems }) = train(&config, false) else { panic!("no error") };
    let named = |name: &str| problems.iter().any(|problem| problem.starts_with(name));
    assert!(named("model.layers.0.mlp.down_proj.weight is all zero"), "{problems:?}");
    assert!(named("model.layers.1.mlp.gate_proj.weight is all zero"), "{problems:?}");
    assert!(!problems.iter().any(|problem| problem.contains("self_attn")), "{problems:?}");
}

#[test]
fn a_loss_that_is_no_number_stops_with_the_last_good_state() {
    let world = World::new(StoredDtype::F32);
    let set = ["optim.learning_rate=1e30", "optim.warmup_steps=0", "optim.weight_decay=0.0"];
    let config = world.config("model", "run", "", &set);
    let error = train(&config, false).unwrap_err();
    let Error::NonFinite { step, first, end, .. } = &error else { panic!("{error}") };
    assert_eq!((*step, *first, *end), (2, 4, 8));
    let text = error.to_string();
    assert!(text.contains("step 2") && text.contains("checkpoint-1"), "{text}");
    assert!(world.path("run/checkpoint-1/optimizer.safetensors").is_file());
    // The line of the good step is there.
    assert_eq!(metrics(&world.path("run")).len(), 1);
}

#[test]
fn a_plan_is_made_and_measured_without_writing() {
    let world = World::new(StoredDtype::F32);
    let mut config = world.config("model", "run", "", &["freeze.train=['*.mlp.*']"]);
    config.train.max_steps = None;
    config.train.max_tokens = Some(5000);
    let surroundings = Surroundings { resume: false, progress: &Silent };
    let mut trainer = Trainer::prepare(&config, surroundings).unwrap();
    let embedding = |trainer: &Trainer| -> Vec<f32> {
        let param = trainer.decoder().params().iter().next().unwrap();
        param.tensor.flatten_all().unwrap().to_vec1().unwrap()
    };
    let before = embedding(&trainer);
    let seconds = trainer.measure().unwrap();
    let plan = trainer.plan();
    // 96 tokens a step.
    assert_eq!((plan.max_steps, plan.tokens), (53, 53 * 96));
    assert_eq!(plan.trained_parameters, 2 * 3 * 32 * 48);
    assert_eq!(plan.memory.gradients, 4 * plan.trained_parameters as u64);
    assert_eq!(plan.seconds(), Some(53.0 * seconds));
    assert!(before == embedding(&trainer) && !world.path("run").exists());
}

#[test]
fn what_does_not_fit_the_model_is_refused() {
    let world = World::new(StoredDtype::F32);
    let config = world.config("model", "run", "", &["train.seq_len=65"]);
    let error = train(&config, false).unwrap_err().to_string();
    assert!(error.contains("at most the model's 64 positions, found 65"), "{error}");
    world.model("wide", 1, StoredDtype::F32, |config| {
        config.insert("vocab_size".into(), 20.into());
    });
    let teacher = format!("distill.teacher='{}'", world.path("wide").display());
    let config = world.config("model", "run", "", &[&teacher]);
    let error = train(&config, false).unwrap_err().to_string();
    assert!(error.contains("vocabulary of 16, found wide with 20"), "{error}");
}

#[test]
fn recomputing_changes_no_bit() {
    let world = World::new(StoredDtype::F32);
    let modes = ["none", "inputs", "block", "auto"];
    for mode in modes {
        let set = format!("train.recompute={mode}");
        let config = world.config("model", mode, "", &["train.max_steps=5", &set]);
        train(&config, false).unwrap();
    }
    let weights_of = |mode: &str| weights(&world.path(&format!("{mode}/final")));
    let kept = weights_of(modes[0]);
    for mode in &modes[1..] {
        let again = weights_of(mode);
        kept.iter().for_each(|(name, tensor)| assert!(same(tensor, &again[name]), "{name}"));
    }
}
