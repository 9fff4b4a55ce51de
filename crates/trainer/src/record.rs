//! One record a logged step, to all who keep them: `metrics.jsonl`, TensorBoard and the
//! history in `trainer_state.json`.

use relufy_model::DensityTap;
use relufy_spec::Site;
use serde_json::{Value, json};

use crate::Result;
use crate::folder::RunFolder;
use crate::metrics::{Metrics, Record};
use crate::observer::{StepReport, Validation};
use crate::state::TrainerState;
use crate::tensorboard::EventWriter;

/// The open files of a run.
#[derive(Debug)]
pub(crate) struct Recorder {
    metrics: Metrics,
    events: Option<EventWriter>,
}

impl Recorder {
    /// Opens the files for the steps after `step`.
    pub fn open(folder: &RunFolder, step: u64, tensorboard: bool) -> Result<Recorder> {
        let metrics = Metrics::resume(&folder.metrics(), step)?;
        let path = folder.tensorboard();
        // A run that begins again in a folder it has used must hide its earlier events too.
        let resumed = (step > 0 || path.exists()).then_some(step);
        let events = tensorboard.then(|| EventWriter::create(&path, resumed)).transpose()?;
        Ok(Recorder { metrics, events })
    }

    /// Records a training step.
    pub fn step(&mut self, state: &mut TrainerState, report: &StepReport<'_>) -> Result<()> {
        let mut scalars = vec![
            ("train/loss".to_string(), report.loss),
            ("train/learning_rate".to_string(), report.learning_rate),
            ("train/grad_norm".to_string(), report.grad_norm),
            ("train/tokens".to_string(), report.tokens_seen as f64),
            ("train/tokens_per_second".to_string(), report.tokens_per_second),
        ];
        let mut record = Record::new();
        record.insert("step".into(), report.step.into());
        record.insert("loss".into(), report.loss.into());
        record.insert("learning_rate".into(), report.learning_rate.into());
        record.insert("grad_norm".into(), report.grad_norm.into());
        record.insert("num_input_tokens_seen".into(), report.tokens_seen.into());
        record.insert("tokens_per_second".into(), rounded(report.tokens_per_second));
        for (name, value) in [("kl", report.kl), ("l1", report.l1)] {
            if let Some(value) = value {
                record.insert(name.into(), value.into());
                scalars.push((format!("train/{name}"), value));
            }
        }
        if let Some(densities) = report.densities {
            record.insert("density".into(), density_record(densities));
            for site in Site::ALL {
                scalars.push((format!("density/{}", site.short()), densities.mean(site)));
            }
        }
        self.write(state, report.step, record, &scalars)
    }

    /// Records a validation.
    pub fn validation(
        &mut self,
        state: &mut TrainerState,
        step: u64,
        found: &Validation,
    ) -> Result<()> {
        let mut record = Record::new();
        record.insert("step".into(), step.into());
        record.insert("eval_loss".into(), found.loss.into());
        record.insert("eval_perplexity".into(), found.perplexity.into());
        let mut scalars = vec![
            ("eval/loss".to_string(), found.loss),
            ("eval/perplexity".to_string(), found.perplexity),
        ];
        if let Some(dead) = &found.dead_neurons {
            record.insert("dead_neurons".into(), json!(dead));
            scalars.push(("eval/dead_neurons".into(), dead.iter().sum::<usize>() as f64));
        }
        if state.best_metric.is_none_or(|best| found.loss < best) {
            state.best_metric = Some(found.loss);
            state.best_global_step = Some(step);
        }
        self.write(state, step, record, &scalars)
    }

    fn write(
        &mut self,
        state: &mut TrainerState,
        step: u64,
        record: Record,
        scalars: &[(String, f64)],
    ) -> Result<()> {
        self.metrics.write(&record)?;
        state.log_history.push(record);
        match &mut self.events {
            Some(events) => events.scalars(step, scalars),
            None => Ok(()),
        }
    }
}

/// For each site its mean density and that of every layer.
fn density_record(densities: &DensityTap) -> Value {
    let layers = densities.densities().layers;
    let of = |site: Site| {
        let each: Vec<f64> = layers.iter().map(|layer| layer.get(site)).collect();
        (site.short().to_string(), json!({ "mean": densities.mean(site), "layers": each }))
    };
    Value::Object(Site::ALL.into_iter().map(of).collect())
}

/// Three digits behind the point: the clock is not better than that.
fn rounded(value: f64) -> Value {
    ((value * 1e3).round() / 1e3).into()
}
