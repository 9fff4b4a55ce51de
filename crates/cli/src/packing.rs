//! What the sparse engine on the CPU may be told besides: a folder for packed weights, and what was
//! measured of the model.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use relufy_model::Checkpoint;
use relufy_model::layer::LayerPlan;
use relufy_ops::pointwise::{Pointwise, apply_to_slice};
use relufy_sparse::{Calibrated, Engine, Options, PackedCache, SiteThresholds, Thresholds};
use relufy_spec::flops::{Densities, SiteDensities};
use relufy_spec::{DecoderSpec, ReluPlan, Site};
use relufy_surgery::{Calibration, LayerCalibration, SiteCalibration};

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
enum Place {
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

/// The densities to reach by thresholds; 1 where there is none.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Target(SiteDensities);

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Target, String> {
        const EXPECTED: &str = "expected a density above 0 and at most 1, or some of qkv=D, o=D, \
            up=D and down=D with commas";
        let density = |text: &str| match text.trim().parse::<f64>() {
            Ok(density) if density > 0.0 && density <= 1.0 => Ok(density),
            _ => Err(EXPECTED.to_owned()),
        };
        if !text.contains('=') {
            let all = density(text)?;
            return Ok(Target(SiteDensities { qkv: all, o: all, up: all, down: all }));
        }
        let mut target = SiteDensities::DENSE;
        for part in text.split(',') {
            let (site, value) = part.split_once('=').ok_or(EXPECTED)?;
            *match Site::from_short(site.trim()).ok_or(EXPECTED)? {
                Site::QkvIn => &mut target.qkv,
                Site::OIn => &mut target.o,
                Site::UpIn => &mut target.up,
                Site::DownIn => &mut target.down,
            } = density(value)?;
        }
        Ok(Target(target))
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
        let Target(SiteDensities { qkv, o, up, down }) = self.density_target?;
        let none = SiteDensities { qkv, o, up, down } == SiteDensities::DENSE;
        (!none).then(|| {
            format!(
                "inexact: activations below thresholds count as zero (density target \
                 qkv={qkv},o={o},up={up},down={down})"
            )
        })
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
            Some(path) => self.calibrated(path, spec)?,
            None => Calibrated::default(),
        };
        if let Some(inexact) = self.inexact() {
            out::warn(inexact);
        }
        let folder = match &self.packed_cache {
            Place::Off => {
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
            Place::Auto => relufy_data::cache_dir().context("--packed-cache auto")?.join("packed"),
            Place::Folder(folder) => folder.clone(),
        };
        let cache = PackedCache::new(folder);
        let opened = cache.open(checkpoint, plan, options, &calibrated, &Bars::default())?;
        for note in &opened.notes {
            out::warn(format_args!("packed cache: {note}"));
        }
        Ok(opened.engine)
    }

    fn calibrated(&self, path: &Path, spec: &DecoderSpec) -> anyhow::Result<Calibrated> {
        let read = || -> anyhow::Result<Calibration> {
            Ok(serde_json::from_slice(&std::fs::read(path)?)?)
        };
        let found = read().with_context(|| format!("--calibration {}", path.display()))?;
        let (layers, expected) = (found.layers.len(), spec.layers.len());
        if layers != expected {
            bail!(
                "--calibration {}: {layers} layers were measured, and the model has {expected}",
                path.display()
            );
        }
        let target = self.density_target.map_or(SiteDensities::DENSE, |Target(target)| target);
        let both = found.layers.iter().zip(&spec.layers);
        let densities = found.layers.iter().map(|layer| SiteDensities {
            qkv: layer.qkv.density.min(target.qkv),
            o: layer.o.density.min(target.o),
            up: layer.up.density.min(target.up),
            down: layer.down.density.min(target.down),
        });
        let thresholds = both.map(|(found, layer)| {
            thresholds(found, &LayerPlan::new(layer, &spec.position), &target)
        });
        Ok(Calibrated {
            densities: Some(Densities { layers: densities.collect() }),
            thresholds: (self.density_target.is_some())
                .then(|| Thresholds { layers: thresholds.collect() }),
        })
    }
}

/// The magnitudes below which all but a share of each site's activations lie.
fn thresholds(
    found: &LayerCalibration,
    plan: &LayerPlan,
    target: &SiteDensities,
) -> SiteThresholds {
    let at = |site: &SiteCalibration, op: Pointwise, density: f64| {
        let after = |x: f32| {
            let mut x = [x];
            apply_to_slice(&mut x, op);
            x[0]
        };
        match density < 1.0 {
            true => site.histogram.magnitude_quantile(1.0 - density, after).unwrap_or(0.0),
            false => 0.0,
        }
    };
    SiteThresholds {
        qkv: at(&found.qkv, plan.qkv_in, target.qkv),
        o: at(&found.o, plan.o_in, target.o),
        up: at(&found.up, plan.up_in, target.up),
        gate: at(&found.down, plan.activation, target.down),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_for_all_sites_or_for_some() {
        let all = SiteDensities { qkv: 0.5, o: 0.5, up: 0.5, down: 0.5 };
        assert_eq!("0.5".parse::<Target>().unwrap(), Target(all));
        let some = SiteDensities { qkv: 0.25, o: 1.0, up: 1.0, down: 0.1 };
        assert_eq!("qkv=0.25, down=0.1".parse::<Target>().unwrap(), Target(some));
        for bad in ["", "0", "1.5", "nan", "-1", "q=0.5", "qkv=", "qkv=0", "0.5,0.5", "qkv=0.5,"] {
            assert!(bad.parse::<Target>().is_err(), "{bad}");
        }
    }
}
