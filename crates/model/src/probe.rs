//! One batch through a model, with everything that a comparison wants to see.

use relufy_ops::buffer;
use relufy_spec::{Site, WeightMap};

use crate::checkpoint::checkpoint_tensor;
use crate::{
    Decoder, DensityTap, Error, Gradients, IGNORE, Objective, ParamId, Result, Tokens, Trainable,
};

/// What a probe saw.
#[derive(Clone, Debug)]
pub struct Probe {
    /// `[batch * time * vocab]`.
    pub logits: Vec<f32>,
    /// `[batch, time, vocab]`.
    pub logits_shape: [usize; 3],
    /// Mean cross-entropy of the next token; NaN for sequences of one token.
    pub loss: f64,
    /// For QKV, up and down: the share of non-zeros that the matrices read, per layer.
    pub density: [Vec<f64>; 3],
    /// For each name asked: shape and values of the loss's gradient, in the checkpoint's layout.
    pub gradients: Vec<(String, Vec<usize>, Vec<f32>)>,
}

/// Runs `ids` (equally long rows) through a decoder; `gradients` are names of checkpoint tensors.
///
/// # Errors
/// Rows that are empty or not equally long; a name that the checkpoint does not have.
pub fn probe(
    decoder: &Decoder,
    map: &WeightMap,
    ids: &[Vec<u32>],
    gradients: &[String],
) -> Result<Probe> {
    let time = ids.first().map_or(0, Vec::len);
    if time == 0 || ids.iter().any(|row| row.len() != time) {
        return Err(Error::Invalid("a probe takes equally long, non-empty rows of ids".to_owned()));
    }
    let rows = gradients
        .iter()
        .map(|name| {
            map.rows
                .iter()
                .find(|row| {
                    let bare = |full: &String| full.strip_prefix(map.prefix.as_str()) == Some(name);
                    row.names.iter().any(|full| full == name || bare(full))
                })
                .ok_or_else(|| Error::NoSuchTensor(name.clone()))
        })
        .collect::<Result<Vec<_>>>()?;
    let tokens = Tokens::rows(ids.concat(), time);
    let targets: Vec<i64> = ids
        .iter()
        .flat_map(|row| row[1..].iter().map(|id| i64::from(*id)).chain([IGNORE]))
        .collect();
    let count = targets.iter().filter(|target| **target != IGNORE).count();

    let mut tap = DensityTap::new(decoder.spec().layers.len());
    let hidden = decoder.hidden(&tokens, &mut tap)?;
    let logits = buffer::to_host(&decoder.logits(&hidden)?)?;

    let params = decoder.params();
    let names: Vec<ParamId> =
        rows.iter().filter_map(|row| row.slots.first().map(|slot| ParamId::of(*slot))).collect();
    let trainable = Trainable::by_name(params, map, |name| {
        map.rows.iter().any(|row| {
            row.names.iter().any(|candidate| candidate == name)
                && row.slots.first().is_some_and(|slot| names.contains(&ParamId::of(*slot)))
        })
    });
    let mut buffers = Gradients::new(params, &trainable)?;
    let objective = Objective { scale: 1.0 / count.max(1) as f32, ..Objective::default() };
    let loss =
        decoder.forward_backward(&tokens, &targets, &objective, &mut buffers, &mut crate::NoTap)?;
    let gradients = gradients
        .iter()
        .zip(&rows)
        .map(|(name, row)| {
            let (shape, values) =
                checkpoint_tensor(decoder.spec(), params, row, |id| buffers.get(id).cloned())?;
            Ok((name.clone(), shape, values))
        })
        .collect::<Result<_>>()?;

    let layers = decoder.spec().layers.len();
    let density = [Site::QkvIn, Site::UpIn, Site::DownIn]
        .map(|site| (0..layers).map(|n| tap.layer(n, site)).collect());
    let logits_shape = [ids.len(), time, decoder.spec().vocab];
    Ok(Probe { logits, logits_shape, loss: loss.mean(), density, gradients })
}
