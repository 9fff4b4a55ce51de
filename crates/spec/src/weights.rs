//! Where a checkpoint keeps each weight, as data that is read in both directions.

use std::fmt;

use crate::{DecoderSpec, MlpKind, Position};

/// A weight of the decoder, whatever a family calls it. Matrices are `[out, in]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Slot {
    /// Token embedding `[vocab, hidden]`; also the head, where that is tied.
    Embed,
    /// Learned positions `[offset + max_positions, hidden]`.
    Positions,
    /// A weight of layer `n`.
    Layer(usize, LayerSlot),
    /// Weight of the norm before the head.
    FinalNorm,
    /// Bias of the norm before the head.
    FinalNormBias,
    /// Untied head `[vocab, hidden]`.
    Head,
    /// Bias of the head.
    HeadBias,
}

/// A weight of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs)] // each names a matrix or vector of the standard block
pub enum LayerSlot {
    AttnNorm,
    AttnNormBias,
    Q,
    K,
    V,
    QBias,
    KBias,
    VBias,
    QNorm,
    KNorm,
    O,
    OBias,
    /// Absent where a parallel block shares one norm.
    MlpNorm,
    MlpNormBias,
    /// Only in a gated MLP.
    Gate,
    Up,
    GateBias,
    UpBias,
    Down,
    DownBias,
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Slot::Layer(layer, slot) => write!(f, "layer {layer} {slot:?}"),
            slot => write!(f, "{slot:?}"),
        }
    }
}

/// How one checkpoint tensor holds the rows (outputs) of its slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// The slots' rows one after the other; with one slot, the slot itself.
    Concat,
    /// For each head its rows of each slot in turn (GPT-NeoX: q0 k0 v0 q1 k1 v1 ...).
    /// `head_dim` rows a piece.
    PerHead {
        /// Rows of one piece.
        head_dim: usize,
    },
    /// For each key/value head: `queries` query heads, then its key, then its value
    /// (Falcon). Slots are q, k, v.
    PerGroup {
        /// Query heads of one group.
        queries: usize,
        /// Rows of one head.
        head_dim: usize,
    },
}

/// One checkpoint tensor and the slots it fills.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightRow {
    /// The slots, in the layout's order.
    pub slots: Vec<Slot>,
    /// The tensor's name; further names are accepted in its place (a tied head stored
    /// instead of the embedding). Names include the base model's prefix.
    pub names: Vec<String>,
    /// How the tensor's rows belong to the slots.
    pub layout: Layout,
    /// Stored `[in, out]` (GPT-2's Conv1D).
    pub transposed: bool,
}

/// The tensors of a checkpoint: read one way to load it, the other way to save it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WeightMap {
    /// One row a tensor; every slot of the spec stands in exactly one.
    pub rows: Vec<WeightRow>,
    /// The base model's prefix (`model.`), which a file may leave out.
    pub prefix: String,
    /// Buffers that carry no weight, by the end of their name (`.rotary_emb.inv_freq`).
    pub ignored_suffixes: Vec<&'static str>,
}

impl WeightMap {
    /// The row that fills `slot`, with the slot's index in it.
    pub fn row_of(&self, slot: Slot) -> Option<(&WeightRow, usize)> {
        self.rows.iter().find_map(|row| {
            row.slots.iter().position(|candidate| *candidate == slot).map(|at| (row, at))
        })
    }
}

impl WeightRow {
    /// Where each row (output) of the stored tensor belongs: `(index into slots, row of
    /// that slot)`, for every stored row in order. `rows[i]` is the row count of `slots[i]`.
    pub fn row_order(&self, rows: &[usize]) -> Vec<(usize, usize)> {
        let run =
            |slot: usize, start: usize, len: usize| (start..start + len).map(move |r| (slot, r));
        match self.layout {
            Layout::Concat => {
                rows.iter().enumerate().flat_map(|(slot, len)| run(slot, 0, *len)).collect()
            }
            Layout::PerHead { head_dim } => {
                let heads = rows.first().and_then(|len| len.checked_div(head_dim)).unwrap_or(0);
                (0..heads)
                    .flat_map(|head| {
                        (0..rows.len()).flat_map(move |slot| run(slot, head * head_dim, head_dim))
                    })
                    .collect()
            }
            Layout::PerGroup { queries, head_dim } => {
                let groups = rows.get(1).and_then(|len| len.checked_div(head_dim)).unwrap_or(0);
                (0..groups)
                    .flat_map(|group| {
                        run(0, group * queries * head_dim, queries * head_dim)
                            .chain(run(1, group * head_dim, head_dim))
                            .chain(run(2, group * head_dim, head_dim))
                    })
                    .collect()
            }
        }
    }
}

/// The slots of `spec`, in the order a token meets them.
pub(crate) fn slots(spec: &DecoderSpec) -> Vec<Slot> {
    let mut slots = vec![Slot::Embed];
    if matches!(spec.position, Position::Learned { .. }) {
        slots.push(Slot::Positions);
    }
    for n in 0..spec.layers.len() {
        slots.extend(layer_slots(spec, n).into_iter().map(|slot| Slot::Layer(n, slot)));
    }
    slots.push(Slot::FinalNorm);
    if spec.final_norm.bias {
        slots.push(Slot::FinalNormBias);
    }
    if !spec.head.tied {
        slots.push(Slot::Head);
    }
    if spec.head.bias {
        slots.push(Slot::HeadBias);
    }
    slots
}

/// The slots of layer `n`; none where there is no such layer.
pub(crate) fn layer_slots(spec: &DecoderSpec, n: usize) -> Vec<LayerSlot> {
    use LayerSlot::*;
    let Some(layer) = spec.layers.get(n) else { return Vec::new() };
    let bias = layer.attention.bias;
    let gated = layer.mlp.kind == MlpKind::Gated;
    let qk_norm = layer.attention.qk_norm.is_some();
    let own_mlp_norm = !layer.shares_norm();
    [
        (AttnNorm, true),
        (AttnNormBias, layer.norm.bias),
        (Q, true),
        (K, true),
        (V, true),
        (QBias, bias.qkv),
        (KBias, bias.qkv),
        (VBias, bias.qkv),
        (QNorm, qk_norm),
        (KNorm, qk_norm),
        (O, true),
        (OBias, bias.o),
        (MlpNorm, own_mlp_norm),
        (MlpNormBias, own_mlp_norm && layer.norm.bias),
        (Gate, gated),
        (Up, true),
        (GateBias, gated && layer.mlp.bias.up),
        (UpBias, layer.mlp.bias.up),
        (Down, true),
        (DownBias, layer.mlp.bias.down),
    ]
    .into_iter()
    .filter(|(_, there)| *there)
    .map(|(slot, _)| slot)
    .collect()
}

/// The shape of `slot` in `spec`.
pub(crate) fn shape(spec: &DecoderSpec, slot: Slot) -> Vec<usize> {
    use LayerSlot::*;
    let hidden = spec.hidden;
    match slot {
        Slot::Embed | Slot::Head => vec![spec.vocab, hidden],
        Slot::Positions => match spec.position {
            Position::Learned { offset } => vec![offset + spec.max_positions, hidden],
            _ => Vec::new(),
        },
        Slot::FinalNorm | Slot::FinalNormBias => vec![hidden],
        Slot::HeadBias => vec![spec.vocab],
        Slot::Layer(n, slot) => {
            let Some(layer) = spec.layers.get(n) else { return Vec::new() };
            let (attention, ffn) = (&layer.attention, layer.mlp.ffn);
            match slot {
                AttnNorm | AttnNormBias | MlpNorm | MlpNormBias | OBias | DownBias => vec![hidden],
                Q => vec![attention.q_width(), hidden],
                K | V => vec![attention.kv_width(), hidden],
                QBias => vec![attention.q_width()],
                KBias | VBias => vec![attention.kv_width()],
                QNorm | KNorm => vec![attention.head_dim],
                O => vec![hidden, attention.q_width()],
                Gate | Up => vec![ffn, hidden],
                GateBias | UpBias => vec![ffn],
                Down => vec![hidden, ffn],
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn row(layout: Layout) -> WeightRow {
        WeightRow { slots: Vec::new(), names: Vec::new(), layout, transposed: false }
    }

    /// Every row of every slot once, and nothing else.
    fn is_permutation(layout: Layout, rows: &[usize]) -> bool {
        let order = row(layout).row_order(rows);
        let all: BTreeSet<_> =
            (0..rows.len()).flat_map(|slot| (0..rows[slot]).map(move |at| (slot, at))).collect();
        order.len() == all.len() && order.into_iter().collect::<BTreeSet<_>>() == all
    }

    proptest! {
        #[test]
        fn concatenated_rows_are_a_permutation(rows in prop::collection::vec(0usize..9, 0..5)) {
            prop_assert!(is_permutation(Layout::Concat, &rows));
        }

        #[test]
        fn rows_by_head_are_a_permutation(heads in 1usize..7, head_dim in 1usize..9, slots in 1usize..4) {
            let rows = vec![heads * head_dim; slots];
            let layout = Layout::PerHead { head_dim };
            prop_assert!(is_permutation(layout, &rows));
        }

        #[test]
        fn rows_by_group_are_a_permutation(groups in 1usize..5, queries in 1usize..5, head_dim in 1usize..9) {
            let kv = groups * head_dim;
            let rows = [kv * queries, kv, kv];
            let layout = Layout::PerGroup { queries, head_dim };
            prop_assert!(is_permutation(layout, &rows));
        }
    }

    #[test]
    fn orders_by_hand() {
        let order = |layout, rows: &[usize]| row(layout).row_order(rows);
        assert_eq!(
            order(Layout::PerHead { head_dim: 1 }, &[2, 2, 2]),
            [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]
        );
        assert_eq!(
            order(Layout::PerGroup { queries: 2, head_dim: 1 }, &[4, 2, 2]),
            [(0, 0), (0, 1), (1, 0), (2, 0), (0, 2), (0, 3), (1, 1), (2, 1)]
        );
    }

    #[test]
    fn a_layout_of_nothing_has_no_rows() {
        assert!(row(Layout::PerHead { head_dim: 0 }).row_order(&[4, 4, 4]).is_empty());
        assert!(row(Layout::PerGroup { queries: 1, head_dim: 0 }).row_order(&[4, 4, 4]).is_empty());
    }
}
