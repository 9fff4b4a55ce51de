//! What a token did, from what the kernels counted.

use relufy_ops::decode::COUNTS;
use relufy_spec::flops::{Densities, SiteDensities};

use super::engine::Packed;
use super::layer::{Linear, Mlp};
use crate::counts::{Counts, Work};

/// Places of a layer where non-zeros are counted, in the order of their records.
#[derive(Clone, Copy)]
pub(super) enum Place {
    Qkv,
    O,
    /// What the gate and `up` read.
    Up,
    /// Open gates.
    Gate,
    Down,
}

/// Records of a layer.
const PLACES: usize = 5;

/// Words for the records of so many layers and of the head.
pub(super) fn words(layers: usize) -> usize {
    (layers * PLACES + 1) * COUNTS
}

/// The first word of a layer's record.
pub(super) fn at(layer: usize, place: Place) -> usize {
    (layer * PLACES + place as usize) * COUNTS
}

/// The first word of the head's record.
pub(super) fn at_head(layers: usize) -> usize {
    layers * PLACES * COUNTS
}

/// A record: how many elements are not zero in any row of the batch, and in each row.
#[derive(Clone, Copy)]
struct Seen<'a> {
    any: u64,
    rows: &'a [u32],
}

impl Seen<'_> {
    fn sum(self) -> u64 {
        self.rows.iter().map(|row| u64::from(*row)).sum()
    }
}

/// The work of one step of `batch` sequences.
pub(super) fn counts(packed: &Packed, batch: usize, words: &[u32]) -> Counts {
    let seen = |at: usize| Seen { any: u64::from(words[at]), rows: &words[at + 1..=at + batch] };
    let mut counts = Counts::default();
    for (n, layer) in packed.layers.iter().enumerate() {
        let [qkv, o, up, gate, down] =
            [Place::Qkv, Place::O, Place::Up, Place::Gate, Place::Down].map(|p| seen(at(n, p)));
        counts.qkv += work(&layer.qkv, qkv);
        counts.o += work(&layer.o, o);
        counts.up += match &layer.mlp {
            Mlp::Plain { up: first, .. } => work(first, up),
            Mlp::Neurons { gate: first, up: matrix, .. } => {
                let macs = matrix.cols() as u64 * gate.any;
                let bytes = matrix.row_bytes(matrix.cols()) * gate.any;
                let done = macs * batch as u64;
                work(first, up) + Work { needed: both(up, gate), done, bytes }
            }
            Mlp::Pairs { pairs, .. } => {
                let ffn = layer.plan.ffn as u64;
                let done = 2 * ffn * up.any * batch as u64;
                let bytes = up.any * pairs.row_bytes(2 * layer.plan.ffn);
                Work { needed: ffn * up.sum() + both(up, gate), done, bytes }
            }
            // Nobody lists the gates here; a product is zero where its gate is.
            Mlp::Whole { gate: first, .. } => {
                let gate = work(first, up);
                gate + Work { needed: both(up, down), ..gate }
            }
        };
        let (Mlp::Plain { down: last, .. }
        | Mlp::Neurons { down: last, .. }
        | Mlp::Pairs { down: last, .. }
        | Mlp::Whole { down: last, .. }) = &layer.mlp;
        counts.down += work(last, down);
    }
    counts.head += work(&packed.head, seen(at_head(packed.layers.len())));
    counts
}

/// The shares of what was not zero in any of the sequences, by site and layer; in a gated MLP those of
/// open gates at `down`.
pub(super) fn densities(packed: &Packed, words: &[u32]) -> Densities {
    let layers = packed.layers.iter().enumerate().map(|(n, layer)| {
        let (plan, hidden) = (&layer.plan, packed.spec.hidden);
        let share = |place, width: usize| f64::from(words[at(n, place)]) / width as f64;
        let gates = match layer.mlp {
            Mlp::Neurons { .. } | Mlp::Pairs { .. } => Place::Gate,
            Mlp::Whole { .. } | Mlp::Plain { .. } => Place::Down,
        };
        SiteDensities {
            qkv: share(Place::Qkv, hidden),
            o: share(Place::O, plan.q_width),
            up: share(Place::Up, hidden),
            down: share(gates, plan.ffn),
        }
    });
    Densities { layers: layers.collect() }
}

/// Multiply-adds of `up` that matter: each row's inputs times its open gates.
fn both(inputs: Seen<'_>, gates: Seen<'_>) -> u64 {
    inputs.rows.iter().zip(gates.rows).map(|(a, b)| u64::from(*a) * u64::from(*b)).sum()
}

/// The work of a projection. A row that one sequence needs is multiplied for all of them.
fn work(linear: &Linear, seen: Seen<'_>) -> Work {
    let matrix = &linear.matrix;
    let read = if linear.by_input { seen.any } else { matrix.rows() as u64 };
    Work {
        needed: seen.sum() * linear.outputs() as u64,
        done: read * (matrix.cols() * seen.rows.len()) as u64,
        bytes: read * matrix.row_bytes(matrix.cols()),
    }
}
