//! What `relufy calibrate -o FILE` measured of a model, and what the sparse engine makes of it: a
//! layout for its densities, and thresholds below which activations count as zero.

use std::fmt::{self, Display, Formatter};
use std::path::Path;
use std::str::FromStr;

use anyhow::{Context, bail};
use relufy_model::layer::LayerPlan;
use relufy_ops::pointwise::{Pointwise, apply_to_slice};
use relufy_sparse::{Calibrated, SiteThresholds, Thresholds};
use relufy_spec::flops::{Densities, SiteDensities};
use relufy_spec::{DecoderSpec, Site};
use relufy_surgery::{Calibration, LayerCalibration, SiteCalibration};

/// The densities to reach by thresholds: `D` for all sites, or some of `qkv=D,o=D,up=D,down=D`; 1 where
/// there is none.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Target(pub SiteDensities);

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

impl Display for Target {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Target(SiteDensities { qkv, o, up, down }) = self;
        if [o, up, down] == [qkv; 3] {
            return write!(f, "{qkv}");
        }
        let sites = [("qkv", qkv), ("o", o), ("up", up), ("down", down)];
        let dropped = sites.iter().filter(|(_, density)| **density != 1.0);
        let parts: Vec<String> =
            dropped.map(|(site, density)| format!("{site}={density}")).collect();
        f.write_str(&parts.join(","))
    }
}

impl Target {
    /// Whether it drops nothing.
    pub fn is_dense(&self) -> bool {
        self.0 == SiteDensities::DENSE
    }
}

/// Reads what was measured of the model that `spec` describes.
///
/// # Errors
/// A file that cannot be read, is no calibration, or is one of another number of layers.
pub fn read(path: &Path, spec: &DecoderSpec) -> anyhow::Result<Calibration> {
    let read =
        || -> anyhow::Result<Calibration> { Ok(serde_json::from_slice(&std::fs::read(path)?)?) };
    let found = read().with_context(|| format!("--calibration {}", path.display()))?;
    let (layers, expected) = (found.layers.len(), spec.layers.len());
    if layers != expected {
        bail!(
            "--calibration {}: {layers} layers were measured, and the model has {expected}",
            path.display()
        );
    }
    Ok(found)
}

/// What the engine is told: the densities, and with a target the thresholds that reach it.
pub fn calibrated(found: &Calibration, spec: &DecoderSpec, target: Option<&Target>) -> Calibrated {
    let Target(wanted) = target.copied().unwrap_or(Target(SiteDensities::DENSE));
    let densities = found.layers.iter().map(|layer| SiteDensities {
        qkv: layer.qkv.density.min(wanted.qkv),
        o: layer.o.density.min(wanted.o),
        up: layer.up.density.min(wanted.up),
        down: layer.down.density.min(wanted.down),
    });
    let both = found.layers.iter().zip(&spec.layers);
    let thresholds = both
        .map(|(found, layer)| thresholds(found, &LayerPlan::new(layer, &spec.position), &wanted));
    Calibrated {
        densities: Some(Densities { layers: densities.collect() }),
        thresholds: target.map(|_| Thresholds { layers: thresholds.collect() }),
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
        assert_eq!(Target(all).to_string(), "0.5");
        assert_eq!(Target(some).to_string(), "qkv=0.25,down=0.1");
        assert_eq!(Target(some).to_string().parse(), Ok(Target(some)));
    }
}
