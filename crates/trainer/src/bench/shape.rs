//! The models that are timed, and what one step of them costs in arithmetic.

use relufy_spec::{DecoderSpec, Slot, family};
use serde::Serialize;
use serde_json::{Value, json};

use crate::Result;

/// A model's kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Family {
    /// RMSNorm, rotary positions, gated MLP, head untied.
    Llama,
    /// LayerNorm, learned positions, biases, plain MLP, head tied.
    Opt,
    /// LayerNorm, rotary positions, one head of keys, plain MLP beside attention, head tied.
    Falcon,
}

/// A model and the batch it is trained on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Shape {
    /// What people call it.
    pub name: &'static str,
    /// Its kind.
    pub family: Family,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Layers.
    pub layers: usize,
    /// Heads of queries; of keys and values as many, or one in Falcon.
    pub heads: usize,
    /// Neurons of a layer.
    pub ffn: usize,
    /// Rows of the embedding.
    pub vocab: usize,
    /// Sequences of a step.
    pub batch: usize,
    /// Tokens of a sequence.
    pub seq_len: usize,
}

const fn llama(
    name: &'static str,
    [hidden, layers, heads, ffn, vocab]: [usize; 5],
    [batch, seq_len]: [usize; 2],
) -> Shape {
    let family = Family::Llama;
    Shape { name, family, hidden, layers, heads, ffn, vocab, batch, seq_len }
}

impl Shape {
    /// About 5 M parameters, for a CPU.
    pub const SMALL: Shape = llama("small", [256, 4, 4, 704, 4096], [4, 128]);

    /// About 30 M parameters, for a CPU.
    pub const MEDIUM: Shape = llama("medium", [512, 8, 8, 1408, 4096], [8, 256]);

    /// All of them, by size.
    pub const ALL: [Shape; 9] = [
        Shape::SMALL,
        Shape::MEDIUM,
        llama("130m", [768, 12, 12, 2048, 32_000], [32, 1024]),
        llama("1b", [2048, 16, 16, 5632, 32_000], [8, 2048]),
        llama("7b", [4096, 32, 32, 11_008, 32_000], [4, 2048]),
        llama("13b", [5120, 40, 40, 13_824, 32_000], [2, 2048]),
        Shape { family: Family::Opt, ..llama("opt125m", [768, 12, 12, 3072, 50_272], [32, 1024]) },
        Shape { family: Family::Opt, ..llama("opt1b", [2048, 24, 32, 8192, 50_272], [8, 2048]) },
        Shape {
            family: Family::Falcon,
            ..llama("falcon1b", [2048, 24, 32, 8192, 50_304], [8, 2048])
        },
    ];

    /// The shape of this name.
    pub fn named(name: &str) -> Option<Shape> {
        Shape::ALL.into_iter().find(|shape| shape.name == name)
    }

    /// Tokens of a step.
    pub fn tokens(&self) -> usize {
        self.batch * self.seq_len
    }

    /// The activation where none is asked for: ReLU, but Falcon's own GELU.
    pub fn activation(&self) -> &'static str {
        match self.family {
            Family::Llama | Family::Opt => "relu",
            Family::Falcon => "gelu",
        }
    }

    /// The model, with an activation by its Hugging Face name.
    ///
    /// # Errors
    /// A shape that no model can have; an activation that nobody knows.
    pub fn spec(&self, activation: &str) -> Result<DecoderSpec> {
        Ok(family::parse(&self.config(activation))?.spec)
    }

    /// As Hugging Face writes it.
    fn config(&self, activation: &str) -> Value {
        let Shape { hidden, layers, heads, ffn, vocab, .. } = *self;
        match self.family {
            Family::Llama => json!({
                "model_type": "llama", "architectures": ["LlamaForCausalLM"],
                "hidden_act": activation, "hidden_size": hidden, "intermediate_size": ffn,
                "num_hidden_layers": layers, "num_attention_heads": heads,
                "num_key_value_heads": heads, "vocab_size": vocab,
                "max_position_embeddings": self.seq_len, "rms_norm_eps": 1e-6,
                "tie_word_embeddings": false,
            }),
            Family::Opt => json!({
                "model_type": "opt", "architectures": ["OPTForCausalLM"],
                "activation_function": activation, "hidden_size": hidden, "ffn_dim": ffn,
                "num_hidden_layers": layers, "num_attention_heads": heads, "vocab_size": vocab,
                "word_embed_proj_dim": hidden, "max_position_embeddings": self.seq_len.max(2048),
                "tie_word_embeddings": true,
            }),
            Family::Falcon => json!({
                "model_type": "falcon", "architectures": ["FalconForCausalLM"],
                "activation": activation, "hidden_size": hidden, "ffn_hidden_size": ffn,
                "num_hidden_layers": layers, "num_attention_heads": heads, "vocab_size": vocab,
                "max_position_embeddings": self.seq_len, "multi_query": true,
                "parallel_attn": true, "new_decoder_architecture": false, "bias": false,
                "alibi": false, "tie_word_embeddings": true,
            }),
        }
    }
}

/// Floating point operations of a training step, whatever is computed again: 6 for each token and
/// element of a matrix that it is multiplied with (the head is one, the embedding's look-up is
/// not), and for each pair of a query and a key that it sees 12 for each column of the heads.
pub fn step_flops(spec: &DecoderSpec, tokens: usize, seq_len: usize) -> f64 {
    let is_matrix = |slot: &Slot| match slot {
        Slot::Embed => spec.head.tied,
        Slot::Positions => false,
        _ => true,
    };
    let elements = |slot: Slot| match spec.shape(slot)[..] {
        [rows, columns] => rows as f64 * columns as f64,
        _ => 0.0,
    };
    let matrices: f64 = spec.slots().into_iter().filter(is_matrix).map(elements).sum();
    let columns: f64 = spec.layers.iter().map(|layer| layer.attention.q_width() as f64).sum();
    let keys = seq_len as f64 / 2.0;
    (6.0 * matrices + 12.0 * columns * keys) * tokens as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shape_is_a_model_of_its_size() {
        let sizes = [
            ("small", 5_310_720.0),
            ("1b", 0.95e9),
            ("130m", 0.134e9),
            ("7b", 6_738_415_616.0),
            ("13b", 13_015_864_320.0),
            ("opt125m", 125_239_296.0),
            ("opt1b", 1_315_758_080.0),
            ("falcon1b", 1.12e9),
        ];
        for (name, size) in sizes {
            let shape = Shape::named(name).unwrap();
            let found = shape.spec(shape.activation()).unwrap().parameter_count() as f64;
            assert!((found - size).abs() < 0.01 * size, "{name}: {found}");
        }
        assert_eq!(Shape::named("2b"), None);
        assert!(Shape::SMALL.spec("sine").is_err());
    }

    #[test]
    fn arithmetic_by_hand() {
        let flops = |name: &str| {
            let shape = Shape::named(name).unwrap();
            step_flops(&shape.spec("relu").unwrap(), shape.tokens(), shape.seq_len)
        };
        let blocks = 16.0 * (4.0 * 2048.0 * 2048.0 + 3.0 * 2048.0 * 5632.0);
        let matrices = blocks + 32_000.0 * 2048.0;
        let expected = 16_384.0 * (6.0 * matrices + 6.0 * 16.0 * 2048.0 * 2048.0);
        assert_eq!(flops("1b"), expected);
        // A tied head counts, its look-up and the table of positions do not.
        let blocks = 12.0 * (4.0 * 768.0 * 768.0 + 2.0 * 768.0 * 3072.0);
        let matrices = blocks + 50_272.0 * 768.0;
        let expected = 32_768.0 * (6.0 * matrices + 6.0 * 12.0 * 768.0 * 1024.0);
        assert_eq!(flops("opt125m"), expected);
    }
}
