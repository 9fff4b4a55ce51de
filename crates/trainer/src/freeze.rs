//! Which tensors are trained: patterns over the names of the checkpoint.

use std::collections::BTreeSet;

use glob::Pattern;
use relufy_model::{Params, Trainable};
use relufy_spec::{Slot, WeightMap};

use crate::config::Freeze;
use crate::{Error, Result};

/// The tensors that `[freeze]` leaves to be trained.
#[derive(Debug)]
pub struct Selection {
    /// Their rows, as the backward pass wants them.
    pub trainable: Trainable,
    /// Their checkpoint names.
    pub names: BTreeSet<String>,
}

/// Applies `[freeze]` to the tensors of a model of `layers` layers.
///
/// # Errors
/// A pattern that matches no tensor, more layers than there are, or nothing left to train.
pub fn select(
    params: &Params,
    map: &WeightMap,
    layers: usize,
    freeze: &Freeze,
) -> Result<Selection> {
    let all: Vec<String> = map.rows.iter().filter_map(|row| row.names.first().cloned()).collect();
    let only = compile("train", &freeze.train, &all)?;
    let never = compile("freeze", &freeze.freeze, &all)?;
    let first_layer = match freeze.last_layers {
        None => None,
        Some(last) => Some(layers.checked_sub(last).ok_or_else(|| Error::Freeze {
            key: "last_layers",
            why: format!("{last} layers of a model that has {layers}"),
        })?),
    };
    let behind = |name: &str| match first_layer {
        None => true,
        Some(first) => slots_of(map, name).all(|slot| match slot {
            Slot::Embed | Slot::Positions => false,
            Slot::Layer(layer, _) => layer >= first,
            Slot::FinalNorm | Slot::FinalNormBias | Slot::Head | Slot::HeadBias => true,
        }),
    };
    let matches = |patterns: &[Pattern], name: &str| patterns.iter().any(|p| p.matches(name));
    let names: BTreeSet<String> = all
        .into_iter()
        .filter(|name| only.is_empty() || matches(&only, name))
        .filter(|name| !matches(&never, name) && behind(name))
        .collect();
    if names.is_empty() {
        return Err(Error::Freeze { key: "freeze", why: "no tensor is left to be trained".into() });
    }
    let trainable = Trainable::by_name(params, map, |name| names.contains(name));
    Ok(Selection { trainable, names })
}

fn slots_of<'a>(map: &'a WeightMap, name: &'a str) -> impl Iterator<Item = Slot> + 'a {
    map.rows
        .iter()
        .filter(move |row| row.names.first().is_some_and(|first| first == name))
        .flat_map(|row| row.slots.iter().copied())
}

/// Parses patterns; each must match at least one name, or it is a typo.
fn compile(key: &'static str, patterns: &[String], names: &[String]) -> Result<Vec<Pattern>> {
    let parse = |text: &String| {
        let refuse = |why: String| Error::Freeze { key, why };
        let pattern = Pattern::new(text).map_err(|error| refuse(format!("`{text}`: {error}")))?;
        if names.iter().any(|name| pattern.matches(name)) {
            return Ok(pattern);
        }
        let some: Vec<&str> = names.iter().take(4).map(String::as_str).collect();
        Err(refuse(format!("`{text}` matches no tensor; there are {}, ...", some.join(", "))))
    };
    patterns.iter().map(parse).collect()
}
