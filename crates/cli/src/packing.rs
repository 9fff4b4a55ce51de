//! What the sparse engine on the CPU may be told besides: a folder for packed weights, and what was
//! measured of the model.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::Context;
use relufy_model::Checkpoint;
use relufy_sparse::{Calibrated, Engine, Options, PackedCache};
use relufy_spec::{DecoderSpec, ReluPlan};

use crate::calibration::{self, Target};
use crate::progress::Bars;
use crate::{human, out};

/// Whoever waits so long for packing should hear of the cache.
const LONG: Duration = Duration::from_secs(10);

/// Flags of the sparse engine on the CPU.
#[derive(Clone, Debug, clap::Args)]
pub struct Packing {
    /// Keep packed weights in a folder and start from there: off, auto (relufy/packed in the user's
    /// cache folder) or the folder.
    #[arg(long, value_name = "DIR", default_value = "off")]
    packed_cache: Place,
    /// What `relufy calibrate -o FILE` measured of this model at this stage: each gated MLP is then
    /// laid out for its densities.
    #[arg(long, value_name = "FILE")]
    calibration: Option<PathBuf>,
    /// Inexact: count activations as zero whose magnitude is below a threshold, chosen by site and
    /// layer for this density: D for all, or qkv=D,o=D,up=D,down=D.
    #[arg(long, value_name = "D", requires = "calibration")]
    density_target: Option<Target>,
}

/// Where packed weights are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    Off,
    Auto,
    Folder(PathBuf),
}

impl FromStr for Place {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Place, Self::Err> {
        Ok(match text {
            "off" => Place::Off,
            "auto" => Place::Auto,
            folder => Place::Folder(folder.into()),
        })
    }
}

impl Place {
    /// The folder; `None` for `off`. `argument` is what an error names.
    ///
    /// # Errors
    /// No cache folder of the user's for `auto`.
    pub fn resolve(&self, argument: &'static str) -> anyhow::Result<Option<PathBuf>> {
        Ok(match self {
            Place::Off => None,
            Place::Auto => {
                let folder = relufy_data::cache_dir();
                Some(folder.with_context(|| format!("{argument} auto"))?.join("packed"))
            }
            Place::Folder(folder) => Some(folder.clone()),
        })
    }
}

impl Packing {
    /// The flag that was given, for engines that take none.
    pub fn given(&self) -> Option<&'static str> {
        match self {
            Packing { density_target: Some(_), .. } => Some("--density-target"),
            Packing { calibration: Some(_), .. } => Some("--calibration"),
            Packing { packed_cache: Place::Off, .. } => None,
            Packing { .. } => Some("--packed-cache"),
        }
    }

    /// What to say of results where they are not exact.
    pub fn inexact(&self) -> Option<String> {
        let target = self.density_target.filter(|target| !target.is_dense())?;
        Some(format!(
            "inexact: activations below thresholds count as zero (density target {target})"
        ))
    }

    /// An engine of a checkpoint, on whose config `plan` gives `spec`. Says on standard error what
    /// people should know.
    ///
    /// # Errors
    /// As [`PackedCache::open`]; a calibration that cannot be read or is another model's; no folder
    /// for `auto`.
    pub fn engine(
        &self,
        checkpoint: &Checkpoint,
        plan: &ReluPlan,
        spec: &DecoderSpec,
        options: &Options,
    ) -> anyhow::Result<Engine> {
        let calibrated = match &self.calibration {
            Some(path) => {
                let found = calibration::read(path, spec)?;
                calibration::calibrated(&found, spec, self.density_target.as_ref())
            }
            None => Calibrated::default(),
        };
        if let Some(inexact) = self.inexact() {
            out::warn(inexact);
        }
        let folder = match self.packed_cache.resolve("--packed-cache")? {
            Some(folder) => folder,
            None => {
                let started = Instant::now();
                let decoder = checkpoint.load_with(&candle_core::Device::Cpu, plan)?;
                let engine = Engine::calibrated(&decoder, options, &calibrated)?;
                let (took, bytes) = (started.elapsed(), engine.bytes() as u64);
                if took > LONG {
                    out::warn(format_args!(
                        "packing weights took {:.0} s; --packed-cache auto keeps them ({}) for the next start",
                        took.as_secs_f64(),
                        human::bytes(bytes),
                    ));
                }
                return Ok(engine);
            }
        };
        let cache = PackedCache::new(folder);
        let opened = cache.open(checkpoint, plan, options, &calibrated, &Bars::default())?;
        for note in &opened.notes {
            out::warn(format_args!("packed cache: {note}"));
        }
        if !opened.superseded.is_empty() {
            out::warn(format_args!(
                "packed cache: {} of earlier weights of this model in {}; `relufy cache clean{}` removes them",
                human::bytes(opened.superseded.iter().map(|entry| entry.bytes).sum()),
                cache.dir().display(),
                match &self.packed_cache {
                    Place::Folder(folder) => format!(" {}", folder.display()),
                    _ => String::new(),
                },
            ));
        }
        Ok(opened.engine)
    }
}
