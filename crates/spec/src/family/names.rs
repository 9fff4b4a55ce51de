//! Builds a weight map from a family's table of names.

use crate::{DecoderSpec, LayerSlot, Layout, Slot, WeightMap, WeightRow, weights::layer_slots};

/// The weight and bias of one module inside a layer.
pub(super) struct Module {
    /// The module's name inside its layer (`self_attn.q_proj`).
    pub name: &'static str,
    /// What its `.weight` fills.
    pub weight: &'static [LayerSlot],
    /// What its `.bias` fills, where the decoder has that.
    pub bias: &'static [LayerSlot],
    /// How the outputs belong to the slots.
    pub layout: Layout,
    /// Whether the weight is stored `[in, out]`.
    pub transposed: bool,
}

/// A module that holds one slot.
pub(super) const fn module(
    name: &'static str,
    weight: &'static [LayerSlot],
    bias: &'static [LayerSlot],
) -> Module {
    Module { name, weight, bias, layout: Layout::Concat, transposed: false }
}

/// The names of a family's tensors.
pub(super) struct Names<'a> {
    /// The base model's prefix (`model.`).
    pub prefix: &'static str,
    /// The token embedding, without `.weight`.
    pub embed: &'static str,
    /// The table of positions, without `.weight`, where there is one.
    pub positions: Option<&'static str>,
    /// What stands before a layer's number (`model.layers.`).
    pub layers: &'static str,
    /// The modules of a layer; those that the decoder has no slot for are left out.
    pub modules: &'a [Module],
    /// The norm before the head, without `.weight`.
    pub final_norm: &'static str,
    /// The head, without `.weight`; a tied head may be stored instead of the embedding.
    pub head: &'static str,
    /// Ends of the names of buffers that carry no weight.
    pub ignored_suffixes: &'static [&'static str],
}

impl Names<'_> {
    /// The rows for the slots that `spec` has, in the order a token meets them.
    pub fn weight_map(&self, spec: &DecoderSpec) -> WeightMap {
        let mut embed = vec![format!("{}.weight", self.embed)];
        if spec.head.tied {
            embed.push(format!("{}.weight", self.head));
        }
        let mut rows = vec![row(Slot::Embed, embed)];
        rows.extend(
            self.positions.map(|name| row(Slot::Positions, vec![format!("{name}.weight")])),
        );
        for n in 0..spec.layers.len() {
            let there = layer_slots(spec, n);
            rows.extend(self.modules.iter().flat_map(|module| module.rows(self.layers, n, &there)));
        }
        let tail = [
            (Slot::FinalNorm, true, self.final_norm, "weight"),
            (Slot::FinalNormBias, spec.final_norm.bias, self.final_norm, "bias"),
            (Slot::Head, !spec.head.tied, self.head, "weight"),
            (Slot::HeadBias, spec.head.bias, self.head, "bias"),
        ];
        rows.extend(
            tail.into_iter()
                .filter(|(_, there, ..)| *there)
                .map(|(slot, _, name, part)| row(slot, vec![format!("{name}.{part}")])),
        );
        WeightMap {
            rows,
            prefix: self.prefix.to_owned(),
            ignored_suffixes: self.ignored_suffixes.to_vec(),
        }
    }
}

fn row(slot: Slot, names: Vec<String>) -> WeightRow {
    WeightRow { slots: vec![slot], names, layout: Layout::Concat, transposed: false }
}

impl Module {
    /// The module's rows in layer `n`, as far as that layer has their slots.
    fn rows(&self, layers: &str, n: usize, there: &[LayerSlot]) -> Vec<WeightRow> {
        [("weight", self.weight), ("bias", self.bias)]
            .into_iter()
            .filter(|(_, slots)| !slots.is_empty() && slots.iter().all(|slot| there.contains(slot)))
            .map(|(part, slots)| WeightRow {
                slots: slots.iter().map(|slot| Slot::Layer(n, *slot)).collect(),
                names: vec![format!("{layers}{n}.{}.{part}", self.name)],
                layout: self.layout,
                // A bias is a vector: there is nothing to transpose.
                transposed: self.transposed && part == "weight",
            })
            .collect()
    }
}
