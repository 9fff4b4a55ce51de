//! `--device` and `--dtype`: where a model computes, and in which number type.

use candle_core::{DType, Device};
use relufy_model::{Checkpoint, Decoder, Precision};
use relufy_spec::ReluPlan;

/// Where to compute, and how precisely.
#[derive(Clone, Debug, clap::Args)]
pub struct Compute {
    /// Where to compute: cpu, cuda (the first GPU) or cuda:N.
    #[arg(long, value_name = "DEVICE", default_value = "cpu", value_parser = device)]
    pub device: String,
    /// Number type of weights and activations: auto (f32 on the CPU, bf16 on a GPU), f32 or bf16.
    #[arg(long, value_name = "TYPE", default_value = "auto")]
    pub dtype: Precision,
}

impl Compute {
    /// Opens the device.
    ///
    /// # Errors
    /// A device that is not there; a type that it does not compute in.
    pub fn open(&self) -> anyhow::Result<(Device, DType)> {
        let device = relufy_ops::device::open(&self.device)?;
        let dtype = self.dtype.on(&device)?;
        Ok((device, dtype))
    }

    /// Reads a model onto the device.
    ///
    /// # Errors
    /// As [`Compute::open`] and [`Checkpoint::load`].
    pub fn load(&self, checkpoint: &Checkpoint, plan: &ReluPlan) -> anyhow::Result<Decoder> {
        let (device, dtype) = self.open()?;
        Ok(checkpoint.load_as(&device, plan, dtype)?)
    }
}

/// A device's name, wherever that device is.
pub fn device(text: &str) -> Result<String, String> {
    match relufy_ops::device::is_name(text) {
        true => Ok(text.to_owned()),
        false => Err("expected cpu, cuda or cuda:N".to_owned()),
    }
}
