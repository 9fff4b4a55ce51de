//! Surgery as a pure function: a plan turns one spec into another and touches no weight.

use serde::{Deserialize, Serialize};

use crate::{Activation, DecoderSpec, Error, Result, Site, SiteOp};

/// How far a model is relufied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "u8", try_from = "u8")]
pub enum Stage {
    /// As it came.
    #[default]
    Dense,
    /// ReLU in place of the MLP's activation.
    One,
    /// Stage 1, and ReLU after the norms that feed QKV and up projections.
    Two,
}

impl From<Stage> for u8 {
    fn from(stage: Stage) -> u8 {
        match stage {
            Stage::Dense => 0,
            Stage::One => 1,
            Stage::Two => 2,
        }
    }
}

impl TryFrom<u8> for Stage {
    type Error = String;

    fn try_from(number: u8) -> std::result::Result<Stage, String> {
        match number {
            0 => Ok(Stage::Dense),
            1 => Ok(Stage::One),
            2 => Ok(Stage::Two),
            other => Err(format!("stage {other} does not exist; stages are 0 (dense), 1 and 2")),
        }
    }
}

/// One value for all layers, or one for each.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum PerLayer<T> {
    /// The same everywhere.
    All(T),
    /// One a layer, from the first.
    Each(Vec<T>),
}

impl<T: Copy> PerLayer<T> {
    /// The value of layer `n`; `None` past the end of `Each`.
    pub fn get(&self, n: usize) -> Option<T> {
        match self {
            PerLayer::All(value) => Some(*value),
            PerLayer::Each(values) => values.get(n).copied(),
        }
    }
}

/// What to change. Fields that are `None` stay as they are.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ReluPlan {
    /// The MLP's activation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub activation: Option<PerLayer<Activation>>,
    /// At the input of the query, key and value projections.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub qkv_in: Option<PerLayer<SiteOp>>,
    /// At the input of the attention output projection.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub o_in: Option<PerLayer<SiteOp>>,
    /// At the input of the up and gate projections.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub up_in: Option<PerLayer<SiteOp>>,
    /// At the input of the down projection, after the MLP's own activation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub down_in: Option<PerLayer<SiteOp>>,
}

/// The `relufication` block of a config.json that this toolkit wrote.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Relufication {
    /// Version of this block's layout: [`Relufication::FORMAT`].
    pub format: u32,
    /// How far the model is relufied.
    pub stage: Stage,
    /// The `model_type` before an export gave the model its own.
    pub base_model_type: String,
    /// What was changed; applied to the spec that the other keys describe.
    pub plan: ReluPlan,
    /// What was converted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<Source>,
    /// Tokens of fine-tuning since the conversion.
    #[serde(default)]
    pub tokens_trained: u64,
}

/// The model that was converted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// Hub id, or the folder's name.
    pub model: String,
    /// Commit of the hub's repository.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// BLAKE3 of the weight files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weights_blake3: Option<String>,
}

impl Relufication {
    /// The version of the block's layout that this code writes and reads.
    pub const FORMAT: u32 = 1;
}

impl ReluPlan {
    /// The paper's stages: ReLU as activation (1), and after the norms (2).
    pub fn stage(stage: Stage) -> ReluPlan {
        let mut plan = ReluPlan::default();
        if stage >= Stage::One {
            plan.activation = Some(PerLayer::All(Activation::Relu));
        }
        if stage >= Stage::Two {
            plan.qkv_in = Some(PerLayer::All(SiteOp::Relu));
            plan.up_in = Some(PerLayer::All(SiteOp::Relu));
        }
        plan
    }

    /// The operation planned for a site.
    pub fn site(&self, site: Site) -> Option<&PerLayer<SiteOp>> {
        match site {
            Site::QkvIn => self.qkv_in.as_ref(),
            Site::OIn => self.o_in.as_ref(),
            Site::UpIn => self.up_in.as_ref(),
            Site::DownIn => self.down_in.as_ref(),
        }
    }

    /// Plans `op` for a site.
    pub fn set_site(&mut self, site: Site, op: Option<PerLayer<SiteOp>>) {
        match site {
            Site::QkvIn => self.qkv_in = op,
            Site::OIn => self.o_in = op,
            Site::UpIn => self.up_in = op,
            Site::DownIn => self.down_in = op,
        }
    }

    /// The spec after the plan.
    ///
    /// # Errors
    /// A per-layer list whose length is not the number of layers; different operations on
    /// the two readers of one shared norm.
    pub fn apply(&self, spec: &DecoderSpec) -> Result<DecoderSpec> {
        let mut spec = spec.clone();
        let layers = spec.layers.len();
        check_length("activation", self.activation.as_ref(), layers)?;
        for site in Site::ALL {
            check_length(site.short(), self.site(site), layers)?;
        }
        for (n, layer) in spec.layers.iter_mut().enumerate() {
            if let Some(activation) = self.activation.as_ref().and_then(|each| each.get(n)) {
                layer.mlp.activation = activation;
            }
            for site in Site::ALL {
                if let Some(op) = self.site(site).and_then(|each| each.get(n)) {
                    layer.sites.set(site, op);
                }
            }
        }
        crate::validate::shared_norms(&spec).map_err(|why| Error::Plan { why })?;
        Ok(spec)
    }
}

fn check_length<T>(what: &str, values: Option<&PerLayer<T>>, layers: usize) -> Result<()> {
    match values {
        Some(PerLayer::Each(values)) if values.len() != layers => Err(Error::Plan {
            why: format!("`{what}` lists {} layers, the model has {layers}", values.len()),
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn spec(config: serde_json::Value) -> DecoderSpec {
        crate::family::parse(&config).unwrap().spec
    }

    #[test]
    fn no_plan_changes_nothing() {
        for model_type in ["llama", "opt", "falcon", "gpt_neox", "gpt2"] {
            let spec = spec(json!({"model_type": model_type}));
            assert_eq!(ReluPlan::default().apply(&spec).unwrap(), spec);
            assert_eq!(ReluPlan::stage(Stage::Dense).apply(&spec).unwrap(), spec);
        }
    }

    #[test]
    fn a_plan_changes_what_it_names_and_nothing_else() {
        let spec = spec(json!({"model_type": "llama", "num_hidden_layers": 3}));
        let mut expected = spec.clone();
        for layer in &mut expected.layers {
            layer.mlp.activation = Activation::Relu;
        }
        assert_eq!(ReluPlan::stage(Stage::One).apply(&spec).unwrap(), expected);
        for layer in &mut expected.layers {
            (layer.sites.qkv_in, layer.sites.up_in) = (SiteOp::Relu, SiteOp::Relu);
        }
        assert_eq!(ReluPlan::stage(Stage::Two).apply(&spec).unwrap(), expected);
    }

    #[test]
    fn each_layer_can_have_its_own() {
        let spec = spec(json!({"model_type": "llama", "num_hidden_layers": 3}));
        let shifts = [0.1, 0.2, 0.3];
        let mut plan = ReluPlan {
            activation: Some(PerLayer::Each(
                shifts.iter().map(|shift| Activation::ShiftedRelu { shift: *shift }).collect(),
            )),
            ..ReluPlan::default()
        };
        let ops = vec![SiteOp::Relu, SiteOp::Identity, SiteOp::FatRelu { threshold: 0.5 }];
        plan.set_site(Site::DownIn, Some(PerLayer::Each(ops.clone())));
        let text = serde_json::to_string(&plan).unwrap();
        let read: ReluPlan = serde_json::from_str(&text).unwrap();
        assert_eq!(read, plan);
        let applied = read.apply(&spec).unwrap();
        for (n, layer) in applied.layers.iter().enumerate() {
            assert_eq!(layer.mlp.activation, Activation::ShiftedRelu { shift: shifts[n] });
            assert_eq!(layer.sites.down_in, ops[n]);
            assert_eq!(layer.sites.qkv_in, SiteOp::Identity);
        }
    }

    #[test]
    fn lists_must_have_the_models_length() {
        let spec = spec(json!({"model_type": "llama", "num_hidden_layers": 3}));
        let short = ReluPlan {
            activation: Some(PerLayer::Each(vec![Activation::Relu; 2])),
            ..ReluPlan::default()
        };
        let why = short.apply(&spec).unwrap_err().to_string();
        assert_eq!(why, "plan: `activation` lists 2 layers, the model has 3");
        let mut long = ReluPlan::default();
        long.set_site(Site::OIn, Some(PerLayer::Each(vec![SiteOp::Relu; 4])));
        assert!(long.apply(&spec).unwrap_err().to_string().contains("`o` lists 4 layers"));
    }

    #[test]
    fn a_shared_norm_feeds_both_or_none() {
        let spec = spec(json!({"model_type": "falcon"}));
        let mut plan = ReluPlan::stage(Stage::Two);
        assert!(plan.apply(&spec).is_ok());
        plan.set_site(Site::UpIn, None);
        assert!(matches!(plan.apply(&spec), Err(Error::Plan { .. })));
    }

    #[test]
    fn stages_are_numbers() {
        for (number, stage) in [(0, Stage::Dense), (1, Stage::One), (2, Stage::Two)] {
            assert_eq!(serde_json::to_value(stage).unwrap(), json!(number));
            assert_eq!(serde_json::from_value::<Stage>(json!(number)).unwrap(), stage);
        }
        assert!(serde_json::from_value::<Stage>(json!(3)).is_err());
    }
}
