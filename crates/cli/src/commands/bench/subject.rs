//! What is decoded: random weights of a shape, or a model.

use anyhow::anyhow;
use candle_core::{DType, Device};
use clap::builder::PossibleValuesParser;
use relufy_model::{Checkpoint, Decoder};
use relufy_spec::{DecoderSpec, ReluPlan, Stage};
use relufy_trainer::bench::Shape;

use crate::progress::Bars;

/// What is decoded.
pub enum Subject {
    /// A shape without weights.
    Shape { name: String, stage: u8, spec: Box<DecoderSpec>, device: Device },
    /// A model.
    Model { name: String, stage: u8, real: Box<Real> },
}

/// A checkpoint, and its weights in f32.
pub struct Real {
    pub checkpoint: Checkpoint,
    pub decoder: Decoder,
}

impl Subject {
    /// A model, or else a shape, by default `m`; without a stage as it is, or at stage 2.
    pub fn open(
        model: Option<&str>,
        shape: Option<&str>,
        stage: Option<u8>,
        device: &str,
    ) -> anyhow::Result<Subject> {
        match model {
            Some(model) => Subject::model(model, stage.unwrap_or(0), device),
            None => Subject::shape(shape.unwrap_or("m"), stage.unwrap_or(2), device),
        }
    }

    /// The names of shapes.
    pub fn shapes() -> PossibleValuesParser {
        PossibleValuesParser::new(["m"].into_iter().chain(Shape::ALL.map(|shape| shape.name)))
    }

    /// A shape by its name, `m` among them.
    fn shape(name: &str, stage: u8, device: &str) -> anyhow::Result<Subject> {
        // A device that is not there is said first.
        let device = relufy_ops::device::open(device)?;
        let known = if name == "m" { "1b" } else { name };
        let shape = Shape::named(known).ok_or_else(|| anyhow!("no shape is named {name}"))?;
        // As the paper's models come: Llama has SiLU, OPT ReLU and Falcon GELU.
        let activation = match shape.activation() {
            "relu" if shape.family == relufy_trainer::bench::Family::Llama => "silu",
            own => own,
        };
        let plan = ReluPlan::stage(Stage::try_from(stage).map_err(anyhow::Error::msg)?);
        let spec = Box::new(plan.apply(&shape.spec(activation)?)?);
        Ok(Subject::Shape { name: name.to_owned(), stage, spec, device })
    }

    /// A checkpoint by its folder or hub id; in f32, whatever the device.
    fn model(name: &str, stage: u8, device: &str) -> anyhow::Result<Subject> {
        let device = relufy_ops::device::open(device)?;
        let checkpoint = Checkpoint::resolve(name, &Bars::default())?;
        let plan = ReluPlan::stage(Stage::try_from(stage).map_err(anyhow::Error::msg)?);
        let decoder = checkpoint.load_as(&device, &plan, DType::F32)?;
        let real = Box::new(Real { checkpoint, decoder });
        Ok(Subject::Model { name: name.to_owned(), stage, real })
    }

    pub fn name(&self) -> &str {
        match self {
            Subject::Shape { name, .. } | Subject::Model { name, .. } => name,
        }
    }

    /// The surgery in memory.
    pub fn stage(&self) -> u8 {
        match self {
            Subject::Shape { stage, .. } | Subject::Model { stage, .. } => *stage,
        }
    }

    pub fn spec(&self) -> &DecoderSpec {
        match self {
            Subject::Shape { spec, .. } => spec,
            Subject::Model { real, .. } => real.decoder.spec(),
        }
    }

    /// The checkpoint and decoder of a model.
    pub fn real(&self) -> anyhow::Result<&Real> {
        match self {
            Subject::Shape { name, .. } => Err(anyhow!("{name} is a shape, and reads no text")),
            Subject::Model { real, .. } => Ok(real),
        }
    }
}
