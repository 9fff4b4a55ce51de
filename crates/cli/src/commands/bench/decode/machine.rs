//! An engine on the CPU or a GPU, as the benchmark sees it.

use relufy_model::Decoder;
use relufy_sparse::bench::{RawRead, Text, Timed, Timer, nothing_skipped};
use relufy_sparse::{Calibrated, Engine, Options, Result, Sequence, Session};
#[cfg(feature = "cuda")]
use relufy_sparse::{
    GpuEngine, GpuSession,
    bench::{GpuTimer, gpu_bandwidth},
};
use relufy_spec::flops::{Densities, SiteDensities};

use super::super::subject::{Real, Subject};
use crate::engine::has_zeros;

/// Bytes of a plain read on the CPU: more than caches hold.
pub const READ: usize = 1 << 30;

/// Bytes of a plain read on a GPU.
#[cfg(feature = "cuda")]
const GPU_READ: usize = 8 << 30;

/// Weights packed for decoding, and where they lie.
pub enum Machine {
    Cpu(Engine),
    #[cfg(feature = "cuda")]
    Gpu(GpuEngine),
}

impl Machine {
    /// Packs the engine that skips, or the one of the same weights that reads everything.
    pub fn new(subject: &Subject, skip: bool, options: &Options) -> Result<Machine> {
        let spec = match skip || !has_zeros(subject.spec()) {
            true => subject.spec().clone(),
            false => nothing_skipped(subject.spec()),
        };
        match subject {
            Subject::Shape { device, .. } => {
                #[cfg(feature = "cuda")]
                if device.is_cuda() {
                    return Ok(Machine::Gpu(GpuEngine::random(&spec, options, device, 1)?));
                }
                debug_assert!(device.is_cpu(), "only what was built can be opened");
                Ok(Machine::Cpu(Engine::random(&spec, options, 1)?))
            }
            Subject::Model { real, .. } => {
                let decoder = Decoder::new(spec, real.decoder.params().clone())?;
                #[cfg(feature = "cuda")]
                if decoder.device().is_cuda() {
                    return Ok(Machine::Gpu(GpuEngine::new(decoder, options)?));
                }
                Ok(Machine::Cpu(Engine::new(&decoder, options)?))
            }
        }
    }

    /// Packs the engine that skips, laid out for these densities.
    pub fn forced(subject: &Subject, densities: &Densities, options: &Options) -> Result<Machine> {
        let calibrated = Calibrated { densities: Some(densities.clone()), thresholds: None };
        match subject {
            Subject::Shape { spec, device, .. } => {
                #[cfg(feature = "cuda")]
                if device.is_cuda() {
                    let densities = Some(densities);
                    let engine = GpuEngine::random_calibrated(spec, options, densities, device, 1)?;
                    return Ok(Machine::Gpu(engine));
                }
                debug_assert!(device.is_cpu(), "only what was built can be opened");
                Ok(Machine::Cpu(Engine::random_calibrated(spec, options, &calibrated, 1)?))
            }
            Subject::Model { real, .. } => Machine::calibrated(real, &calibrated, options),
        }
    }

    /// Whether packing for these densities would give the same.
    pub fn suits(&self, densities: &Densities) -> bool {
        match self {
            Machine::Cpu(engine) => engine.suits(densities),
            #[cfg(feature = "cuda")]
            Machine::Gpu(engine) => engine.suits(densities),
        }
    }

    /// Packs the engine of a model that knows what was measured of it; thresholds are for the CPU.
    pub fn calibrated(real: &Real, calibrated: &Calibrated, options: &Options) -> Result<Machine> {
        #[cfg(feature = "cuda")]
        if let (true, Some(densities)) = (real.decoder.device().is_cuda(), &calibrated.densities) {
            debug_assert!(calibrated.thresholds.is_none(), "refused before");
            let decoder = Decoder::new(real.decoder.spec().clone(), real.decoder.params().clone())?;
            return Ok(Machine::Gpu(GpuEngine::calibrated(decoder, options, densities)?));
        }
        Ok(Machine::Cpu(Engine::calibrated(&real.decoder, options, calibrated)?))
    }

    /// Whether it computes what the model does, but for rounding.
    pub fn is_exact(&self) -> bool {
        match self {
            Machine::Cpu(engine) => engine.is_exact(),
            #[cfg(feature = "cuda")]
            Machine::Gpu(_) => true,
        }
    }

    /// One token again and again, after so many positions, with forced densities.
    pub fn timer(
        &self,
        densities: Option<SiteDensities>,
        context: usize,
        batch: usize,
    ) -> Result<Box<dyn Timed>> {
        Ok(match self {
            Machine::Cpu(engine) => Box::new(Timer::batched(engine, densities, context, batch)?),
            #[cfg(feature = "cuda")]
            Machine::Gpu(engine) => Box::new(GpuTimer::new(engine, densities, context, batch)?),
        })
    }

    /// A text with the zeros that the model has, in sequences side by side.
    pub fn reader(&self, text: &Text, batch: usize) -> Result<Box<dyn Timed>> {
        Ok(match self {
            Machine::Cpu(engine) => Box::new(Timer::reading(engine, text, batch)?),
            #[cfg(feature = "cuda")]
            Machine::Gpu(engine) => Box::new(GpuTimer::reading(engine, text, batch)?),
        })
    }

    /// An empty sequence.
    pub fn sequence(&self) -> Result<Box<dyn Sequence>> {
        Ok(match self {
            Machine::Cpu(engine) => Box::new(Session::new(engine)?),
            #[cfg(feature = "cuda")]
            Machine::Gpu(engine) => Box::new(GpuSession::new(engine, 1)?),
        })
    }

    /// A plain read of the memory that the weights lie in: bytes a second.
    pub fn plain_read(&self) -> Result<Box<dyn FnMut() -> Result<f64>>> {
        Ok(match self {
            Machine::Cpu(engine) => {
                let (raw, engine) = (RawRead::new(READ)?, engine.clone());
                Box::new(move || Ok(raw.bandwidth(&engine)))
            }
            #[cfg(feature = "cuda")]
            Machine::Gpu(engine) => {
                let device = engine.device().clone();
                Box::new(move || gpu_bandwidth(&device, GPU_READ))
            }
        })
    }

    /// The engine on the CPU.
    pub fn cpu(self) -> Option<Engine> {
        match self {
            Machine::Cpu(engine) => Some(engine),
            #[cfg(feature = "cuda")]
            Machine::Gpu(_) => None,
        }
    }

    /// Threads that decode; `None` on a GPU.
    pub fn threads(&self) -> Option<usize> {
        match self {
            Machine::Cpu(engine) => Some(engine.threads()),
            #[cfg(feature = "cuda")]
            Machine::Gpu(_) => None,
        }
    }
}
