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
