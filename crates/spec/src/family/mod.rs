//! The families: how each one's `config.json` parses into a spec and a weight map.

mod common;
mod falcon;
mod gpt2;
mod gpt_neox;
mod keys;
mod llama;
mod names;
mod opt;
mod rope;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::{DecoderSpec, Error, Relufication, Result, WeightMap};

use keys::Keys;

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
pub fn parse(json: &Value) -> Result<ModelConfig> {
    let map = json.as_object().ok_or_else(|| Error::BadValue {
        key: "config.json".to_owned(),
        expected: "a JSON object".to_owned(),
        found: json.to_string(),
    })?;
    let mut keys = Keys::new(map, "");
    let relufication = relufication(&mut keys)?;
    let model_type = base_model_type(&mut keys, relufication.as_ref())?;
    common::housekeeping(&mut keys)?;
    let parsed = match model_type.as_str() {
        // ProSparse's Llama differs from Llama in its activations only.
        "llama" | "sparsellama" => llama::parse(&mut keys, llama::Dialect::Llama)?,
        "mistral" => llama::parse(&mut keys, llama::Dialect::Mistral)?,
        "qwen2" => llama::parse(&mut keys, llama::Dialect::Qwen2)?,
        "qwen3" => llama::parse(&mut keys, llama::Dialect::Qwen3)?,
        "opt" => opt::parse(&mut keys)?,
        "falcon" => falcon::parse(&mut keys, falcon::Release::Falcon)?,
        "RefinedWeb" | "RefinedWebModel" => falcon::parse(&mut keys, falcon::Release::RefinedWeb)?,
        "gpt_neox" => gpt_neox::parse(&mut keys)?,
        "gpt2" => gpt2::parse(&mut keys)?,
        _ => return Err(Error::UnknownArchitecture { model_type }),
    };
    keys.finish()?;
    let spec = match &relufication {
        Some(block) => block.plan.apply(&parsed.spec)?,
        None => parsed.spec,
    };
    spec.validate()?;
    Ok(ModelConfig {
        family: parsed.family,
        spec,
        weights: parsed.weights,
        activation_key: parsed.activation_key,
        relufication,
        json: map.clone(),
    })
}

/// What a family makes of its keys.
struct Parsed {
    family: &'static str,
    spec: DecoderSpec,
    weights: WeightMap,
    activation_key: &'static str,
}

/// Reads the block that this toolkit writes.
fn relufication(keys: &mut Keys<'_>) -> Result<Option<Relufication>> {
    let Some(value) = keys.take("relufication") else { return Ok(None) };
    // The version first: a later layout would only fail with a less helpful message.
    match value.get("format").and_then(Value::as_u64) {
        Some(format) if format == u64::from(Relufication::FORMAT) => {}
        Some(format) => {
            return Err(common::unsupported(format!(
                "`relufication` block of format {format} (this version reads {})",
                Relufication::FORMAT
            )));
        }
        None => return Err(Error::MissingKey { key: "relufication.format".to_owned() }),
    }
    match Relufication::deserialize(value) {
        Ok(block) => Ok(Some(block)),
        Err(error) => {
            Err(keys.bad("relufication", "a block that this toolkit wrote", error.to_string()))
        }
    }
}

/// The architecture under our exports' own `model_type`s (`relu_llama`).
fn base_model_type(keys: &mut Keys<'_>, block: Option<&Relufication>) -> Result<String> {
    let model_type = keys.required::<String>("model_type")?;
    match block {
        Some(block) if model_type.starts_with("relu_") => Ok(block.base_model_type.clone()),
        Some(block) if block.base_model_type != model_type => Err(keys.bad(
            "relufication.base_model_type",
            &format!("`{model_type}`, as in `model_type`"),
            &block.base_model_type,
        )),
        None if model_type.starts_with("relu_") => {
            Err(Error::MissingKey { key: "relufication".to_owned() })
        }
        _ => Ok(model_type),
    }
}

#[cfg(test)]
mod tests;
