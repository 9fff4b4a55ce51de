//! How many bytes a model takes, to hold, to run and to train: estimates for a person who
//! asks before starting.

use serde::{Deserialize, Serialize};

use crate::{DecoderSpec, Layer, MlpKind};

/// Bytes of an f32.
const F32: u64 = 4;

/// Bytes of the weights at `element_bytes` each (4: f32, 2: bf16, f16).
pub fn weight_bytes(spec: &DecoderSpec, element_bytes: usize) -> u64 {
    (spec.parameter_count() as u64).saturating_mul(element_bytes as u64)
}

/// Bytes of the keys and values of `context` tokens in each of `batch` sequences; a
/// layer's window limits what must be kept.
pub fn kv_cache_bytes(
    spec: &DecoderSpec,
    batch: usize,
    context: usize,
    element_bytes: usize,
) -> u64 {
    let elements = spec
        .layers
        .iter()
        .map(|layer| {
            let kept = layer.attention.window.map_or(context, |window| window.min(context));
            product(&[2, layer.attention.kv_width(), kept])
        })
        .fold(0, u64::saturating_add);
    elements.saturating_mul(product(&[batch, element_bytes]))
}

/// What a training step is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrainShape {
    /// Sequences of one micro-batch.
    pub batch: usize,
    /// Tokens of one sequence.
    pub seq_len: usize,
    /// Bytes of one element of the weights and activations in use (4: f32, 2: bf16).
    pub element_bytes: usize,
    /// Blocks keep their input only, and are computed again on the way back.
    pub recompute: bool,
    /// Rows of logits that exist at once.
    pub logits_rows: usize,
    /// Parameters that are trained; the others have neither gradient nor moments.
    pub trainable: usize,
}

/// Bytes that training holds at its peak, by what for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrainMemory {
    /// The weights in use, where they are not the f32 masters themselves.
    pub weights: u64,
    /// f32 weights.
    pub masters: u64,
    /// Adam's two f32 moments.
    pub moments: u64,
    /// f32 gradients.
    pub gradients: u64,
    /// What forward saves for backward.
    pub activations: u64,
    /// One chunk of logits with its gradient, f32.
    pub logits: u64,
}

impl TrainMemory {
    /// Everything together.
    pub fn total(&self) -> u64 {
        [self.weights, self.masters, self.moments, self.gradients, self.activations, self.logits]
            .into_iter()
            .fold(0, u64::saturating_add)
    }
}

/// Estimates what training `spec` takes: f32 masters, two f32 moments, f32 gradients, and
/// the activations of one micro-batch.
pub fn train_memory(spec: &DecoderSpec, shape: &TrainShape) -> TrainMemory {
    let trainable = shape.trainable as u64;
    let masters = weight_bytes(spec, F32 as usize);
    let tokens = product(&[shape.batch, shape.seq_len]);
    let per_layer = spec.layers.iter().map(|layer| saved_elements(spec.hidden, layer));
    let per_token = if shape.recompute {
        // Each block's input, and one block's all.
        product(&[spec.layers.len(), spec.hidden])
            .saturating_add(per_layer.max().unwrap_or_default())
    } else {
        per_layer.fold(0, u64::saturating_add)
    };
    let logits = product(&[shape.logits_rows, spec.vocab]);
    TrainMemory {
        weights: if shape.element_bytes == F32 as usize {
            0
        } else {
            weight_bytes(spec, shape.element_bytes)
        },
        masters,
        moments: trainable.saturating_mul(2 * F32),
        gradients: trainable.saturating_mul(F32),
        activations: tokens.saturating_mul(per_token).saturating_mul(shape.element_bytes as u64),
        logits: logits.saturating_mul(2 * F32),
    }
}

/// Elements that one token leaves behind in one layer for the way back: the input and the
/// norm's output of either branch, queries, keys and values, attention's result, and the
/// MLP's width before and after its activation, for a gated one also `up`.
fn saved_elements(hidden: usize, layer: &Layer) -> u64 {
    let attention = &layer.attention;
    let widths = match layer.mlp.kind {
        MlpKind::Plain => 2,
        MlpKind::Gated => 3,
    };
    [
        product(&[4, hidden]),
        attention.qkv_width() as u64,
        attention.q_width() as u64,
        product(&[widths, layer.mlp.ffn]),
    ]
    .into_iter()
    .fold(0, u64::saturating_add)
}

fn product(factors: &[usize]) -> u64 {
    factors.iter().fold(1, |product, factor| product.saturating_mul(*factor as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn llama_7b() -> DecoderSpec {
        crate::family::parse(&serde_json::json!({"model_type": "llama"})).unwrap().spec
    }

    #[test]
    fn llama_7b_by_hand() {
        let spec = llama_7b();
        let parameters = 6_738_415_616;
        assert_eq!(weight_bytes(&spec, 2), 2 * parameters);
        assert_eq!(kv_cache_bytes(&spec, 3, 100, 2), 3 * 100 * 32 * 2 * 4096 * 2);
        let shape = TrainShape {
            batch: 2,
            seq_len: 10,
            element_bytes: 2,
            recompute: false,
            logits_rows: 5,
            trainable: parameters as usize,
        };
        let memory = train_memory(&spec, &shape);
        let saved = 4 * 4096 + 3 * 4096 + 4096 + 3 * 11_008;
        assert_eq!(memory.activations, 20 * 32 * saved * 2);
        assert_eq!(memory.total() - memory.activations, parameters * 18 + 5 * 32_000 * 8);
        let again = train_memory(&spec, &TrainShape { recompute: true, ..shape });
        assert_eq!(again.activations, 20 * (32 * 4096 + saved) * 2);
    }

    #[test]
    fn windows_limit_the_cache() {
        let mut spec = llama_7b();
        for layer in &mut spec.layers {
            layer.attention.window = Some(7);
        }
        assert_eq!(kv_cache_bytes(&spec, 1, 100, 4), kv_cache_bytes(&llama_7b(), 1, 7, 4));
    }

    #[test]
    fn frozen_parameters_have_no_gradient() {
        let shape = TrainShape {
            batch: 1,
            seq_len: 1,
            element_bytes: 4,
            recompute: false,
            logits_rows: 1,
            trainable: 10,
        };
        let memory = train_memory(&llama_7b(), &shape);
        assert_eq!((memory.weights, memory.gradients, memory.moments), (0, 40, 80));
    }
}
