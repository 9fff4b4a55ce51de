//! Everything that is read and checked before the first step: model, text, the run's
//! folder and, for a resumed run, its newest checkpoint.

use std::collections::HashSet;
use std::path::PathBuf;

use relufy_data::{Dataset, Hub, Packed, PackingConfig, Progress};
use relufy_model::{Checkpoint, Decoder, Gradients, ParamId, Params, Recompute};
use relufy_spec::memory::{TrainMemory, TrainShape, train_memory, weight_bytes};
use relufy_spec::{Activation, DecoderSpec, PerLayer, ReluPlan, Stage};

use crate::config::TrainConfig;
use crate::folder::{OPTIMIZER, RunFolder, SavedCheckpoint};
use crate::machine::{Machine, Wish, type_name};
use crate::optimizer::{Decay, Optimizer};
use crate::plan::Plan;
use crate::schedule::Schedule;
use crate::state::{self, Identity, ResumeState, TrainerState};
use crate::step::{Teacher, Terms};
use crate::trainer::Trainer;
use crate::{Error, Result, freeze};

/// What a run needs from its surroundings.
pub struct Surroundings<'a> {
    /// Continue from the newest checkpoint of the run's folder.
    pub resume: bool,
    /// Watches downloads and tokenisation.
    pub progress: &'a dyn Progress,
}

impl Trainer {
    /// Reads and checks everything; writes nothing into the run's folder.
    ///
    /// # Errors
    /// A configuration, model or corpus that will not do; a folder that exists (or, with
    /// `resume`, is not this run's).
    pub fn prepare(config: &TrainConfig, around: Surroundings<'_>) -> Result<Trainer> {
        config.validate()?;
        let folder = match around.resume {
            true => RunFolder::existing(&config.output_dir)?,
            false => RunFolder::fresh(&config.output_dir)?,
        };
        let saved = folder.checkpoints()?.pop();
        let source = Checkpoint::resolve(&config.model.path, around.progress)?;
        let plan = relu_plan(config, &source.config().spec);
        let spec = plan.apply(&source.config().spec)?;
        check_length(config, &spec)?;
        let dataset = open_dataset(config, &source, around.progress)?;

        let machine = Machine::open(&Wish::of(&config.train, config.optim.max_grad_norm))?;
        let (params, states) = match &saved {
            None => (source.load_params(&machine.device)?, None),
            Some(saved) => (load_saved(saved, &spec, &machine)?, Some(state::read(&saved.path)?)),
        };
        let map = &source.config().weights;
        let selection = freeze::select(&params, map, spec.layers.len(), &config.freeze)?;
        let source_hash = hash_files(&source.weight_files())?;
        let identity = Identity {
            corpus: dataset.fingerprint().to_string(),
            model: hash([source_hash.as_bytes(), format!("{plan:?}").as_bytes()].into_iter()),
            batch: [
                config.train.per_device_train_batch_size,
                config.train.gradient_accumulation_steps,
                config.train.seq_len,
            ],
            trained: hash(selection.names.iter().map(String::as_bytes)),
        };
        let resolved = resolved_json(config)?;
        if let (Some(saved), Some((_, resume))) = (&saved, &states) {
            resume.check(&saved.path, &identity)?;
        }
        let changed_settings =
            states.as_ref().map_or_else(Vec::new, |(_, resume)| resume.changed_keys(&resolved));

        let trainable = &selection.trainable;
        let shape = train_shape(config, &machine, &spec, &params, &selection)?;
        let trained: HashSet<ParamId> =
            trainable.iter(&params).map(|(param, _)| param.id).collect();
        let (params, masters) = params.into_use(machine.dtype, |id| trained.contains(&id))?;
        let decoder = Decoder::new(spec, params)?;
        let params = decoder.params();
        let gradients = Gradients::held(params, trainable, machine.gradients, machine.buffers)?;
        let (settings, decay) = (&config.optim, Decay::Matrices);
        let mut optimizer =
            Optimizer::new(params, trainable, &masters, settings, decay, machine.moments)?;
        if let Some(saved) = &saved {
            let path = saved.path.join(OPTIMIZER);
            optimizer.load(&path, params)?;
            if optimizer.steps() != saved.step {
                let why = format!("holds step {} of checkpoint {}", optimizer.steps(), saved.step);
                return Err(Error::damaged(path, why));
            }
        }
        let teacher = load_teacher(config, &source, &machine, around.progress)?;
        let teacher_memory = teacher.as_ref().map_or(0, |teacher| {
            weight_bytes(teacher.decoder.spec(), machine.dtype.size_in_bytes())
        });
        let choice = config.train.recompute;
        let recompute = machine.recompute(choice, decoder.spec(), &shape, teacher_memory);
        let memory = train_memory(decoder.spec(), &TrainShape { recompute, ..shape });
        let terms = Terms { teacher, regularise: config.regularise.clone(), recompute };
        let steps = total_steps(config, &dataset.train);
        let (trainer_state, resume_state) = states.unwrap_or_else(|| fresh_state(&identity));
        let plan_of_run = plan_run(
            config,
            &source,
            &decoder,
            &selection,
            &dataset,
            Needs { machine: &machine, recompute, memory, teacher_memory },
            Progressed { start: resume_state.step, steps, changed_settings },
        );
        Ok(Trainer {
            config: config.clone(),
            folder,
            source,
            plan,
            source_hash,
            schedule: Schedule::new(&config.optim, steps),
            decoder,
            gradients,
            optimizer,
            buffers: machine.buffers,
            terms,
            dataset,
            state: trainer_state,
            resume: ResumeState { identity, config: resolved, ..resume_state },
            run: plan_of_run,
        })
    }
}

/// The surgery that the configuration asks for. By its stage, an activation that is sparse
/// already stays what it is.
fn relu_plan(config: &TrainConfig, spec: &DecoderSpec) -> ReluPlan {
    let stage = match (&config.model.plan, config.model.stage) {
        (Some(plan), _) => return plan.clone(),
        (None, stage) => stage.unwrap_or_default(),
    };
    let mut plan = ReluPlan::stage(stage);
    let activations = spec.layers.iter().map(|layer| layer.mlp.activation);
    if stage >= Stage::One && activations.clone().any(Activation::is_sparse) {
        let sparse = |activation: Activation| match activation.is_sparse() {
            true => activation,
            false => Activation::Relu,
        };
        plan.activation = Some(PerLayer::Each(activations.map(sparse).collect()));
    }
    plan
}

fn check_length(config: &TrainConfig, spec: &DecoderSpec) -> Result<()> {
    let (found, most) = (config.train.seq_len, spec.max_positions);
    if found <= most {
        return Ok(());
    }
    Err(Error::Value {
        place: "configuration".to_string(),
        key: "train.seq_len".to_string(),
        expected: format!("at most the model's {most} positions"),
        found: found.to_string(),
    })
}

fn open_dataset(
    config: &TrainConfig,
    source: &Checkpoint,
    progress: &dyn Progress,
) -> Result<Dataset> {
    let packing = PackingConfig {
        sequence_length: config.train.seq_len,
        document_boundaries: config.train.document_boundaries,
    };
    let (tokenizer, hub) = (source.tokenizer()?, Hub::from_env()?);
    Ok(Dataset::open(&config.data, &packing, &tokenizer, &hub, config.seed, progress)?)
}

fn load_saved(
    saved: &SavedCheckpoint,
    expected: &DecoderSpec,
    machine: &Machine,
) -> Result<Params> {
    let checkpoint = Checkpoint::open(&saved.path)?;
    if checkpoint.config().spec != *expected {
        return Err(Error::Changed {
            path: saved.path.clone(),
            what: "the architecture or the plan",
            expected: "that of its config.json".to_string(),
            found: "another".to_string(),
        });
    }
    Ok(checkpoint.load_params(&machine.device)?)
}

/// What a step is asked to do, as far as its memory goes.
fn train_shape(
    config: &TrainConfig,
    machine: &Machine,
    spec: &DecoderSpec,
    params: &Params,
    selection: &freeze::Selection,
) -> Result<TrainShape> {
    let size = (config.train.per_device_train_batch_size, config.train.seq_len);
    machine.shape(spec, params, &selection.trainable, size, config.distill.is_some())
}

fn load_teacher(
    config: &TrainConfig,
    source: &Checkpoint,
    machine: &Machine,
    progress: &dyn Progress,
) -> Result<Option<Teacher>> {
    let Some(distill) = &config.distill else { return Ok(None) };
    let other = match &distill.teacher {
        Some(reference) => Some(Checkpoint::resolve(reference, progress)?),
        None => None,
    };
    let teacher = other.as_ref().unwrap_or(source);
    let (expected, found) = (source.config().spec.vocab, teacher.config().spec.vocab);
    if expected != found {
        return Err(Error::Value {
            place: "configuration".to_string(),
            key: "distill.teacher".to_string(),
            expected: format!("a model with the student's vocabulary of {expected}"),
            found: format!("{} with {found}", teacher.name()),
        });
    }
    Ok(Some(Teacher {
        decoder: teacher.load_as(&machine.device, &ReluPlan::default(), machine.dtype)?,
        weight: distill.weight,
        temperature: distill.temperature,
    }))
}

/// The optimiser steps of the run; the last one may go past `max_tokens` or the epoch.
fn total_steps(config: &TrainConfig, train: &Packed) -> u64 {
    let per_step = config.sequences_per_step();
    let epochs = config
        .train
        .num_train_epochs
        .map(|epochs| (epochs * train.sequences() as f64 / per_step as f64).ceil() as u64);
    let tokens = config.train.max_tokens.map(|tokens| tokens.div_ceil(config.tokens_per_step()));
    config.train.max_steps.or(tokens).or(epochs).unwrap_or(0)
}

/// What the run has behind and before it.
struct Progressed {
    start: u64,
    steps: u64,
    changed_settings: Vec<String>,
}

/// What the run takes, and on what.
struct Needs<'a> {
    machine: &'a Machine,
    recompute: Recompute,
    memory: TrainMemory,
    teacher_memory: u64,
}

fn plan_run(
    config: &TrainConfig,
    source: &Checkpoint,
    decoder: &Decoder,
    selection: &freeze::Selection,
    dataset: &Dataset,
    needs: Needs<'_>,
    progressed: Progressed,
) -> Plan {
    let sequences = progressed.steps * config.sequences_per_step();
    let validation = dataset.validation.as_ref().map_or(0, Packed::sequences);
    Plan {
        model: source.name().to_string(),
        parameters: decoder.spec().parameter_count(),
        trained_parameters: selection.trainable.count(decoder.params()),
        tensors: (selection.names.len(), source.config().weights.rows.len()),
        start_step: progressed.start,
        max_steps: progressed.steps,
        tokens_per_step: config.tokens_per_step(),
        tokens: progressed.steps * config.tokens_per_step(),
        tokens_per_epoch: dataset.train.tokens(),
        epochs: sequences as f64 / dataset.train.sequences().max(1) as f64,
        validation_sequences: validation.min(config.train.eval_sequences.unwrap_or(u64::MAX)),
        device: config.train.device.clone(),
        dtype: type_name(needs.machine.dtype),
        recompute: needs.recompute,
        memory: needs.memory,
        teacher_memory: needs.teacher_memory,
        free_memory: needs.machine.free,
        seconds_per_step: None,
        changed_settings: progressed.changed_settings,
        output_dir: config.output_dir.clone(),
    }
}

fn fresh_state(identity: &Identity) -> (TrainerState, ResumeState) {
    let resume = ResumeState {
        format: 1,
        step: 0,
        sequences: 0,
        tokens: 0,
        identity: identity.clone(),
        config: serde_json::Value::Null,
    };
    (TrainerState::default(), resume)
}

/// The configuration with its defaults, as JSON.
fn resolved_json(config: &TrainConfig) -> Result<serde_json::Value> {
    serde_json::to_value(config).map_err(|error| Error::Config {
        origin: "configuration".to_string(),
        message: error.to_string(),
    })
}

/// Hash of files, one after the other.
fn hash_files(paths: &[PathBuf]) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    for path in paths {
        let file = std::fs::File::open(path).map_err(|source| Error::io(path, source))?;
        hasher.update_reader(file).map_err(|source| Error::io(path, source))?;
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// Hash of a list, each item with its length in front.
fn hash<'a>(items: impl Iterator<Item = &'a [u8]>) -> String {
    let mut hasher = blake3::Hasher::new();
    for item in items {
        hasher.update(&(item.len() as u64).to_le_bytes());
        hasher.update(item);
    }
    hasher.finalize().to_hex().to_string()
}
