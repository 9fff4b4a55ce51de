//! What a person asks for, and the plan that it means for a model.

use relufy_spec::{Activation, DecoderSpec, PerLayer, ReluPlan, Site, SiteOp, Stage};

use crate::{Error, Result};

/// Which shift the ReLU of the MLP gets (paper section 5.3).
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Shift {
    /// A plain ReLU; an activation that is sparse already stays.
    #[default]
    None,
    /// The same shift in every layer.
    Fixed(f64),
    /// One a layer, as [`crate::fit_shifts`] finds them.
    PerLayer(Vec<f64>),
}

/// A surgery that is asked for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SurgeryRequest {
    /// How far to go.
    pub stage: Stage,
    /// The shift of the MLP's ReLU.
    pub shift: Shift,
    /// Only at these sites; `None`: all of the stage. [`Site::DownIn`] stands for the MLP's
    /// activation, whose zeros the down projection reads. [`Site::OIn`] belongs to stage 2,
    /// but is changed only where it is named: the paper leaves it alone.
    pub sites: Option<Vec<Site>>,
}

impl SurgeryRequest {
    /// The plan that the request means for a model.
    ///
    /// # Errors
    /// Sites that the stage does not reach; a shift without the MLP's activation, not
    /// finite, or not one a layer; a plan that does not fit the model.
    pub fn plan(&self, spec: &DecoderSpec) -> Result<ReluPlan> {
        let sites = self.sites()?;
        let mut plan = ReluPlan::default();
        if sites.contains(&Site::DownIn) {
            plan.activation = Some(self.activation(spec)?);
        } else if self.shift != Shift::None {
            let why = "a shift belongs to the MLP's activation, so it needs stage 1 or 2 and, \
                       with a choice of sites, `down` among them";
            return Err(Error::Request { why: why.to_owned() });
        }
        for site in [Site::QkvIn, Site::OIn, Site::UpIn] {
            if sites.contains(&site) {
                plan.set_site(site, Some(PerLayer::All(SiteOp::Relu)));
            }
        }
        plan.apply(spec)?;
        Ok(plan)
    }

    /// The sites to change.
    fn sites(&self) -> Result<Vec<Site>> {
        let (stage, reach) = match self.stage {
            Stage::Dense => (0, vec![]),
            Stage::One => (1, vec![Site::DownIn]),
            Stage::Two => (2, Site::ALL.to_vec()),
        };
        let Some(named) = &self.sites else {
            return Ok(reach.into_iter().filter(|site| *site != Site::OIn).collect());
        };
        match named.iter().find(|site| !reach.contains(site)) {
            Some(site) => Err(Error::Request {
                why: format!("stage {stage} does not change the site `{}`", site.short()),
            }),
            None => Ok(named.clone()),
        }
    }

    /// The activation of every layer.
    fn activation(&self, spec: &DecoderSpec) -> Result<PerLayer<Activation>> {
        let shifted = |shift: f64| match shift {
            shift if shift.is_finite() => Ok(Activation::ShiftedRelu { shift }),
            shift => Err(Error::Request { why: format!("a shift of {shift}") }),
        };
        match &self.shift {
            Shift::Fixed(shift) => Ok(PerLayer::All(shifted(*shift)?)),
            Shift::PerLayer(shifts) => {
                let each: Vec<Activation> =
                    shifts.iter().map(|shift| shifted(*shift)).collect::<Result<_>>()?;
                Ok(PerLayer::Each(each))
            }
            Shift::None => {
                let each: Vec<Activation> = spec
                    .layers
                    .iter()
                    .map(|layer| match layer.mlp.activation {
                        sparse if sparse.is_sparse() => sparse,
                        _ => Activation::Relu,
                    })
                    .collect();
                Ok(match each.split_first() {
                    Some((first, rest)) if rest.iter().all(|other| other == first) => {
                        PerLayer::All(*first)
                    }
                    _ => PerLayer::Each(each),
                })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use relufy_spec::family::parse;
    use serde_json::json;

    fn spec(model_type: &str) -> DecoderSpec {
        parse(&json!({"model_type": model_type, "num_hidden_layers": 2})).unwrap().spec
    }

    fn request(stage: Stage, shift: Shift, sites: Option<&[Site]>) -> SurgeryRequest {
        SurgeryRequest { stage, shift, sites: sites.map(<[Site]>::to_vec) }
    }

    #[test]
    fn without_options_the_plan_is_the_papers() {
        for stage in [Stage::Dense, Stage::One, Stage::Two] {
            let plan = request(stage, Shift::None, None).plan(&spec("llama")).unwrap();
            assert_eq!(plan, ReluPlan::stage(stage));
        }
    }

    #[test]
    fn sparse_activations_stay_unless_a_shift_is_asked_for() {
        let fat = Activation::FatRelu { threshold: 0.01 };
        let mut spec = spec("llama");
        spec.layers[1].mlp.activation = fat;
        let stay = request(Stage::Two, Shift::None, None).plan(&spec).unwrap();
        assert_eq!(stay.activation, Some(PerLayer::Each(vec![Activation::Relu, fat])));
        let go = request(Stage::Two, Shift::Fixed(1.0), None).plan(&spec).unwrap();
        let shifted = Activation::ShiftedRelu { shift: 1.0 };
        assert_eq!(go.activation, Some(PerLayer::All(shifted)));
        assert_eq!(go.qkv_in, Some(PerLayer::All(SiteOp::Relu)));
    }

    #[test]
    fn chosen_sites_are_changed_and_no_others() {
        let some = Some(&[Site::UpIn, Site::OIn][..]);
        let plan = request(Stage::Two, Shift::None, some).plan(&spec("llama")).unwrap();
        assert_eq!(plan.activation, None);
        assert_eq!((plan.qkv_in, plan.down_in), (None, None));
        assert_eq!(plan.o_in, Some(PerLayer::All(SiteOp::Relu)));
        assert_eq!(plan.up_in, Some(PerLayer::All(SiteOp::Relu)));
    }

    #[test]
    fn contradictions_are_refused() {
        let llama = spec("llama");
        for (request, says) in [
            (request(Stage::One, Shift::None, Some(&[Site::QkvIn])), "stage 1 does not"),
            (request(Stage::Dense, Shift::Fixed(1.0), None), "belongs to the MLP's activation"),
            (request(Stage::Two, Shift::Fixed(1.0), Some(&[Site::UpIn])), "`down` among them"),
            (request(Stage::One, Shift::Fixed(f64::NAN), None), "shift of NaN"),
            (request(Stage::One, Shift::PerLayer(vec![0.1]), None), "lists 1 layers"),
        ] {
            let why = request.plan(&llama).unwrap_err().to_string();
            assert!(why.contains(says), "{why}");
        }
        let one = request(Stage::Two, Shift::None, Some(&[Site::QkvIn]));
        assert!(one.plan(&spec("falcon")).unwrap_err().to_string().contains("shared norm"));
        assert!(one.plan(&llama).is_ok());
    }
}
