//! The run: step after step, with metrics, validation and checkpoints between.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use relufy_data::{Batch, Dataset};
use relufy_model::{Buffers, Checkpoint, Decoder, DensityTap, Gradients, NoTap, Tap};
use relufy_ops::{device, reduce};
use relufy_spec::ReluPlan;

use crate::config::TrainConfig;
use crate::folder::RunFolder;
use crate::metrics::Record;
use crate::observer::{Observer, StepReport, Validation};
use crate::optimizer::Optimizer;
use crate::pieces::{InPieces, Watch};
use crate::plan::Plan;
use crate::record::Recorder;
use crate::schedule::Schedule;
use crate::state::{ResumeState, TrainerState};
use crate::step::{self, StepLosses, Terms};
use crate::{Error, Result, validation};

/// A run that is ready to go.
pub struct Trainer {
    pub(crate) config: TrainConfig,
    pub(crate) folder: RunFolder,
    pub(crate) source: Checkpoint,
    pub(crate) plan: ReluPlan,
    /// Hash of the source's weight files.
    pub(crate) source_hash: String,
    pub(crate) schedule: Schedule,
    pub(crate) decoder: Decoder,
    pub(crate) gradients: Gradients,
    pub(crate) optimizer: Optimizer,
    /// Shared ones are used as soon as a gradient is final.
    pub(crate) buffers: Buffers,
    pub(crate) terms: Terms,
    pub(crate) dataset: Dataset,
    pub(crate) state: TrainerState,
    pub(crate) resume: ResumeState,
    pub(crate) run: Plan,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// Optimiser steps done, those before a resume included.
    pub steps: u64,
    /// Tokens trained on, padding included.
    pub tokens: u64,
    /// Loss of the last step; `None` where this call made none.
    pub loss: Option<f64>,
    /// The last validation of this call.
    pub validation: Option<Validation>,
    /// Whether it was told to stop before its end.
    pub interrupted: bool,
    /// The newest checkpoint.
    pub checkpoint: Option<PathBuf>,
    /// The trained model, once the run is complete.
    pub model: Option<PathBuf>,
    /// How long this call took.
    pub elapsed: Duration,
}

/// One step that was taken.
struct Taken {
    losses: StepLosses,
    learning_rate: f64,
    grad_norm: f64,
}

impl Trainer {
    /// What the run will do and take.
    pub fn plan(&self) -> &Plan {
        &self.run
    }

    /// The decoder as it is now.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// Measures how long a step takes, on real data and without changing a weight, and adds
    /// it to the plan.
    ///
    /// # Errors
    /// From data or model.
    pub fn measure(&mut self) -> Result<f64> {
        const PASSES: usize = 2;
        let batch = self.dataset.train.batch(0, self.config.train.per_device_train_batch_size)?;
        let batches = std::slice::from_ref(&batch);
        let mut fastest = f64::INFINITY;
        for _ in 0..PASSES {
            let started = Instant::now();
            let gradients = &mut self.gradients;
            step::gradients(
                &self.decoder,
                batches,
                &self.terms,
                0,
                gradients,
                &mut NoTap,
                &|| false,
                &mut step::later,
            )?;
            device::synchronize(self.decoder.device())?;
            fastest = fastest.min(started.elapsed().as_secs_f64());
        }
        let seconds = fastest * self.config.train.gradient_accumulation_steps as f64;
        self.run.seconds_per_step = Some(seconds);
        Ok(seconds)
    }

    /// Trains until the end, or until `stop` becomes true. Either way what is needed to
    /// resume is on disk when this returns.
    ///
    /// # Errors
    /// A loss that is no number, gradients that fail the first step's check, a full disk.
    pub fn run(&mut self, observer: &mut dyn Observer, stop: &AtomicBool) -> Result<Summary> {
        let started = Instant::now();
        let stopped = || stop.load(Ordering::Relaxed);
        let mut recorder = self.open_folder(observer)?;
        observer.started(&self.run);
        let mut last_loss = None;
        let mut last_validation = None;
        if self.owes_validation() {
            last_validation = self.validate(&mut recorder, observer, &stopped)?;
        }
        let first = self.resume.step;
        while self.resume.step < self.run.max_steps {
            if stopped() {
                return self.interrupted(observer, last_loss, last_validation, started);
            }
            let step = self.resume.step + 1;
            let logged =
                step.is_multiple_of(self.config.train.logging_steps) || step == self.run.max_steps;
            let mut tap = DensityTap::new(self.decoder.spec().layers.len());
            let began = Instant::now();
            let taken = self.step(step == first + 1, logged.then_some(&mut tap), &stopped)?;
            let Some(taken) = taken else { continue };
            let seconds = began.elapsed().as_secs_f64();
            last_loss = Some(taken.losses.loss);
            let report = StepReport {
                step,
                max_steps: self.run.max_steps,
                loss: taken.losses.loss,
                kl: self.terms.teacher.as_ref().map(|_| taken.losses.kl),
                l1: self.terms.regularise.as_ref().map(|_| taken.losses.l1),
                learning_rate: taken.learning_rate,
                grad_norm: taken.grad_norm,
                tokens_seen: self.resume.tokens,
                tokens_per_second: self.run.tokens_per_step as f64 / seconds.max(1e-9),
                densities: logged.then_some(&tap),
            };
            observer.step(&report);
            if logged {
                recorder.step(&mut self.state, &report)?;
            }
            if self.owes_validation() {
                let validation = self.validate(&mut recorder, observer, &stopped)?;
                if validation.is_none() && stopped() {
                    return self.interrupted(observer, last_loss, last_validation, started);
                }
                last_validation = validation.or(last_validation);
            }
            let every = self.config.train.save_steps;
            if every > 0 && (step.is_multiple_of(every) || step == self.run.max_steps) {
                self.save(observer)?;
            }
        }
        let model = self.save_final(self.resume.step > first)?;
        let summary =
            Summary { model: Some(model), ..self.summary(last_loss, last_validation, started)? };
        observer.finished(&summary);
        Ok(summary)
    }

    /// Makes the run's folder ready for the next step.
    fn open_folder(&self, observer: &mut dyn Observer) -> Result<Recorder> {
        let root = self.folder.root();
        std::fs::create_dir_all(root).map_err(|source| Error::io(root, source))?;
        match self.folder.clean()? {
            0 => {}
            count => observer.note(&format!("removed what was left half-written: {count} entries")),
        }
        let text = self.config.to_toml()?;
        relufy_model::checkpoint::write_atomic(&self.folder.config(), text.as_bytes())?;
        Recorder::open(&self.folder, self.resume.step, self.config.train.tensorboard)
    }

    /// One optimiser step; `None` if it was stopped within, with nothing changed.
    fn step(
        &mut self,
        check: bool,
        tap: Option<&mut DensityTap>,
        stopped: &dyn Fn() -> bool,
    ) -> Result<Option<Taken>> {
        let batches = self.batches()?;
        if check {
            self.gradients.poison()?;
        }
        let mut none = NoTap;
        let tap: &mut dyn Tap = match tap {
            Some(tap) => tap,
            None => &mut none,
        };
        let taken = match self.buffers {
            Buffers::Own => self.step_at_once(check, &batches, tap, stopped)?,
            Buffers::Shared => self.step_in_pieces(check, &batches, tap, stopped)?,
        };
        if taken.is_some() {
            self.resume.step += 1;
            self.resume.sequences += self.config.sequences_per_step();
            self.resume.tokens += self.run.tokens_per_step;
        }
        Ok(taken)
    }

    /// All gradients, their norm, then all parameters.
    fn step_at_once(
        &mut self,
        check: bool,
        batches: &[Batch],
        tap: &mut dyn Tap,
        stopped: &dyn Fn() -> bool,
    ) -> Result<Option<Taken>> {
        let (step, gradients) = (self.resume.step, &mut self.gradients);
        let (terms, later) = (&self.terms, &mut step::later);
        let losses =
            step::gradients(&self.decoder, batches, terms, step, gradients, tap, stopped, later)?;
        let Some(losses) = losses else { return Ok(None) };
        if !losses.loss.is_finite() {
            return Err(self.not_finite(format!("the loss is {}", losses.loss), true));
        }
        if check {
            let watch = Watch::new(&self.decoder, &self.source.config().weights);
            let problems = watch.problems(&self.gradients, |_| true)?;
            if !problems.is_empty() {
                return Err(Error::Gradients { problems });
            }
        }
        let learning_rate = self.schedule.rate(step);
        let params = self.decoder.params();
        let grad_norm = self.optimizer.step_clipped(params, &self.gradients, learning_rate)?;
        if !grad_norm.is_finite() {
            return Err(self.not_finite(format!("the gradient's norm is {grad_norm}"), true));
        }
        Ok(Some(Taken { losses, learning_rate, grad_norm }))
    }

    /// Each parameter as soon as its gradient is final; the norm is summed up on the way.
    fn step_in_pieces(
        &mut self,
        check: bool,
        batches: &[Batch],
        tap: &mut dyn Tap,
        stopped: &dyn Fn() -> bool,
    ) -> Result<Option<Taken>> {
        let (step, gradients) = (self.resume.step, &mut self.gradients);
        let learning_rate = self.schedule.rate(step);
        let watch = Watch::new(&self.decoder, &self.source.config().weights);
        let (params, watch) = (self.decoder.params(), check.then_some(watch));
        let mut pieces = InPieces::new(params, self.optimizer.begin(), learning_rate, watch);
        let (terms, advance) =
            (&self.terms, &mut |gradients: &Gradients, ids: &[_]| pieces.advance(gradients, ids));
        let losses =
            step::gradients(&self.decoder, batches, terms, step, gradients, tap, stopped, advance)?;
        // Whoever asks for an end is heard in front of the batch, when nothing has moved.
        let Some(losses) = losses else { return Ok(None) };
        if !pieces.problems.is_empty() {
            return Err(Error::Gradients { problems: pieces.problems });
        }
        let grad_norm = pieces.squares.sqrt();
        let untouched = pieces.step.is_untouched();
        if !grad_norm.is_finite() {
            let what = format!("the gradient's norm is {grad_norm}, the loss {}", losses.loss);
            return Err(self.not_finite(what, untouched));
        }
        pieces.step.finish()?;
        if !losses.loss.is_finite() {
            return Err(self.not_finite(format!("the loss is {}", losses.loss), false));
        }
        Ok(Some(Taken { losses, learning_rate, grad_norm }))
    }

    /// The micro-batches of the next step.
    fn batches(&self) -> Result<Vec<Batch>> {
        let rows = self.config.train.per_device_train_batch_size;
        (0..self.config.train.gradient_accumulation_steps)
            .map(|micro| {
                let first = self.resume.sequences + (micro * rows) as u64;
                Ok(self.dataset.train.batch(first, rows)?)
            })
            .collect()
    }

    /// Saves the state before the failed step, if it is still there and any good, and says where.
    fn not_finite(&mut self, what: String, untouched: bool) -> Error {
        let newest = |trainer: &Self| match trainer.folder.checkpoints() {
            Ok(saved) => saved.last().map_or_else(
                || "no checkpoint was saved before".to_string(),
                |last| format!("the newest checkpoint is {}", last.path.display()),
            ),
            Err(error) => error.to_string(),
        };
        let finite = self
            .decoder
            .params()
            .iter()
            .all(|param| reduce::all_finite(&param.tensor).unwrap_or(false));
        let saved = match finite {
            _ if !untouched => format!("some layers had moved already; {}", newest(self)),
            false => format!("the weights are no longer finite either; {}", newest(self)),
            true => match self.save_checkpoint() {
                Ok(path) => format!("the state before it is saved in {}", path.display()),
                Err(error) => {
                    format!("saving the state before it failed ({error}); {}", newest(self))
                }
            },
        };
        let first = self.resume.sequences;
        let end = first + self.config.sequences_per_step();
        Error::NonFinite { what, step: self.resume.step + 1, first, end, saved }
    }

    /// Whether the split is to be evaluated at the present step and was not yet: a run that
    /// was stopped meanwhile does so when it is resumed.
    fn owes_validation(&self) -> bool {
        let (step, every) = (self.resume.step, self.config.train.eval_steps);
        let due = match step {
            0 => self.config.train.eval_on_start,
            step => step == self.run.max_steps || (every > 0 && step.is_multiple_of(every)),
        };
        let here = |record: &Record| {
            record.contains_key("eval_loss") && record.get("step") == Some(&step.into())
        };
        due && !self.state.log_history.iter().rev().take(2).any(here)
    }

    fn validate(
        &mut self,
        recorder: &mut Recorder,
        observer: &mut dyn Observer,
        stopped: &dyn Fn() -> bool,
    ) -> Result<Option<Validation>> {
        let Some(split) = &self.dataset.validation else { return Ok(None) };
        let settings = validation::Settings {
            rows: self.config.train.per_device_train_batch_size,
            sequences: self.config.train.eval_sequences,
            dead_neurons: self.config.train.dead_neurons,
        };
        let found = validation::validate(&self.decoder, split, settings, stopped)?;
        if let Some(found) = &found {
            observer.validated(self.resume.step, found);
            recorder.validation(&mut self.state, self.resume.step, found)?;
        }
        Ok(found)
    }

    /// Saves and announces a checkpoint, then lets go of the oldest.
    fn save(&mut self, observer: &mut dyn Observer) -> Result<()> {
        let path = self.save_checkpoint()?;
        observer.saved(self.resume.step, &path);
        self.folder.prune(self.config.train.save_total_limit)
    }

    fn interrupted(
        &mut self,
        observer: &mut dyn Observer,
        loss: Option<f64>,
        validation: Option<Validation>,
        started: Instant,
    ) -> Result<Summary> {
        self.save(observer)?;
        let summary = Summary { interrupted: true, ..self.summary(loss, validation, started)? };
        observer.interrupted(&summary);
        Ok(summary)
    }

    fn summary(
        &self,
        loss: Option<f64>,
        validation: Option<Validation>,
        started: Instant,
    ) -> Result<Summary> {
        Ok(Summary {
            steps: self.resume.step,
            tokens: self.resume.tokens,
            loss,
            validation,
            interrupted: false,
            checkpoint: self.folder.checkpoints()?.pop().map(|saved| saved.path),
            model: None,
            elapsed: started.elapsed(),
        })
    }
}
