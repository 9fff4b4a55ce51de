//! The families: how each one's `config.json` parses into a spec and a weight map.

use serde_json::{Map, Value};

use crate::{DecoderSpec, Relufication, Result, WeightMap};

/// What a `config.json` says: everything but the weights.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// The family's name, for people and for exports (`llama`, `mistral`, `opt`, ...):
    /// the `model_type` that stock engines know. Forward code never sees it.
    pub family: &'static str,
    /// The decoder, with the `relufication` block's plan applied.
    pub spec: DecoderSpec,
    /// Where the checkpoint keeps each weight.
    pub weights: WeightMap,
    /// The config key that names the MLP's activation (`hidden_act`, `activation`, ...).
    pub activation_key: &'static str,
    /// What this toolkit wrote about an earlier conversion.
    pub relufication: Option<Relufication>,
    /// The file as it was read, key order kept.
    pub json: Map<String, Value>,
}

/// Parses a `config.json`.
///
/// # Errors
/// An unknown architecture; a key that is missing, has a wrong value, or that nobody
/// consumed; a feature that is not supported, by name.
pub fn parse(_json: &Value) -> Result<ModelConfig> {
    unimplemented!()
}
