//! Time against density, for each kind of matrix alone.

use std::time::Instant;

use serde::Serialize;

use super::{RawRead, median};
use crate::engine::{Packed, PackedLayer};
use crate::force::choose;
use crate::kernels::{add_rows, bundles, fold_scales};
use crate::linear::{Input, compact, share};
use crate::matrix::padded;
use crate::shared::PerWorker;
use crate::{Engine, Result};

/// Matrices that skip in the same way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// Queries, keys and values, by input.
    Qkv,
    /// The gate, or `up` of a plain MLP, by input.
    Gate,
    /// `up` and `down` by neuron; of a plain MLP `down` alone.
    Neurons,
}

impl Part {
    /// All of them.
    pub const ALL: [Part; 3] = [Part::Qkv, Part::Gate, Part::Neurons];

    /// Whether an engine skips rows of it.
    fn is_skipped(self, packed: &Packed) -> bool {
        packed.layers.iter().all(|layer| match self {
            Part::Qkv => layer.qkv.by_input(),
            Part::Gate => layer.first.by_input(),
            Part::Neurons => true,
        })
    }

    /// How many rows a layer has that can be skipped.
    fn width(self, packed: &Packed, layer: &PackedLayer) -> usize {
        if self == Part::Neurons { layer.plan.ffn } else { packed.spec.hidden }
    }
}

/// One kind of matrix, all layers of it.
#[derive(Clone, Debug, Serialize)]
pub struct Curve {
    /// Which.
    pub part: Part,
    /// Milliseconds where nothing is skipped, in the layout that is best for that.
    pub dense_ms: f64,
    /// Bytes of that.
    pub dense_bytes: u64,
    /// By density, ascending.
    pub points: Vec<Point>,
}

/// One density.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Point {
    /// The share of rows that are read.
    pub density: f64,
    /// Median milliseconds.
    pub ms: f64,
    /// Bytes that were read.
    pub bytes: u64,
    /// Of a plain read's bytes a second; median.
    pub share_of_read: f64,
    /// Of the dense time; the median within rounds.
    pub share_of_dense: f64,
    /// Bytes over the dense bytes: what that share would be if bytes were all.
    pub ideal: f64,
}

/// Measures curves, on an engine that skips and one of the same shape that does not.
pub struct Curves<'a> {
    sparse: &'a Engine,
    dense: &'a Engine,
    raw: &'a RawRead,
    densities: Vec<f64>,
    draws: u64,
}

/// What a pass over all layers took.
#[derive(Clone, Copy)]
struct Pass {
    seconds: f64,
    bytes: u64,
    /// Of the plain read before.
    read: f64,
}

/// A worker's own.
struct Room {
    input: Input,
    out: Vec<f32>,
    sum: Vec<f32>,
    neurons: Vec<u32>,
    active: Vec<f32>,
    products: Vec<f32>,
    bytes: u64,
}

impl Curves<'_> {
    /// At some densities, 0 to 1. `raw` is read before each pass, so that no cache holds what the pass
    /// before has read.
    pub fn new<'a>(
        sparse: &'a Engine,
        dense: &'a Engine,
        raw: &'a RawRead,
        densities: &[f64],
    ) -> Curves<'a> {
        Curves { sparse, dense, raw, densities: densities.to_vec(), draws: 0 }
    }

    /// Measures every density in turn, `rounds` times; parts that the engine does not skip are left
    /// out.
    ///
    /// # Errors
    /// None so far; the signature leaves room for devices.
    pub fn measure(&mut self, rounds: usize) -> Result<Vec<Curve>> {
        let parts = Part::ALL.into_iter().filter(|part| part.is_skipped(&self.sparse.packed));
        let parts: Vec<Part> = parts.collect();
        let densities = self.densities.clone();
        let mut dense = vec![Vec::new(); parts.len()];
        let mut sparse = vec![vec![Vec::new(); densities.len()]; parts.len()];
        // The first round warms up.
        for round in 0..=rounds {
            for (p, part) in parts.iter().enumerate() {
                let pass = self.pass(self.dense, *part, 1.0);
                if round > 0 {
                    dense[p].push(pass);
                }
                for (d, density) in densities.iter().enumerate() {
                    let pass = self.pass(self.sparse, *part, *density);
                    if round > 0 {
                        sparse[p][d].push(pass);
                    }
                }
            }
        }
        let curves = parts.iter().zip(&dense).zip(&sparse).map(|((part, dense), sparse)| {
            let points = densities.iter().zip(sparse);
            Curve {
                part: *part,
                dense_ms: 1e3 * median_of(dense, |pass| pass.seconds),
                dense_bytes: dense.first().map_or(0, |pass| pass.bytes),
                points: points.map(|(density, passes)| point(*density, passes, dense)).collect(),
            }
        });
        Ok(curves.collect())
    }

    /// One pass over all layers, with new masks.
    fn pass(&mut self, engine: &Engine, part: Part, density: f64) -> Pass {
        let packed = &*engine.packed;
        let masks: Vec<Vec<f32>> = (packed.layers.iter())
            .map(|layer| {
                let mut mask = vec![0.0; part.width(packed, layer)];
                choose(&mut mask, density, &mut self.draws);
                mask
            })
            .collect();
        let widest = packed.layers.iter().map(|layer| layer.qkv.outputs.max(layer.plan.ffn)).max();
        let (hidden, widest) = (packed.spec.hidden, padded(widest.unwrap_or(0)));
        let mut rooms = PerWorker::new(packed.pool.workers(), || Room {
            input: Input::new(hidden),
            out: vec![0.0; widest],
            sum: vec![0.0; padded(hidden)],
            neurons: Vec::with_capacity(widest),
            active: Vec::with_capacity(widest),
            products: vec![0.0; widest],
            bytes: 0,
        });
        let read = self.raw.bandwidth(engine);
        let start = Instant::now();
        packed.pool.run(|worker| {
            // SAFETY: each worker has its own index.
            let room = unsafe { rooms.get(worker) };
            for (layer, mask) in packed.layers.iter().zip(&masks) {
                room.layer(packed, layer, part, mask, worker);
                packed.pool.meet();
            }
        });
        let seconds = start.elapsed().as_secs_f64();
        let bytes = rooms.iter_mut().map(|room| room.bytes).sum();
        Pass { seconds, bytes, read }
    }
}

impl Room {
    /// A worker's share of one layer's part.
    fn layer(
        &mut self,
        packed: &Packed,
        layer: &PackedLayer,
        part: Part,
        mask: &[f32],
        worker: usize,
    ) {
        let workers = packed.pool.workers();
        let (isa, identity, hidden) = (packed.isa, &packed.identity, packed.spec.hidden);
        if part != Part::Neurons {
            let linear = if part == Part::Qkv { &layer.qkv } else { &layer.first };
            self.input.x[..hidden].copy_from_slice(mask);
            self.input.list_nonzeros(hidden);
            let columns = share(linear.outputs, worker, workers);
            let work = linear.forward(isa, &mut self.input, identity, columns, &mut self.out);
            self.bytes += work.bytes;
            return;
        }
        let mine = share(layer.plan.ffn, worker, workers);
        compact(&mask[mine.clone()], mine.start, &mut self.neurons, &mut self.active);
        let (list, active, sum) = (&self.neurons[..], &self.active[..], &mut self.sum[..]);
        let bundled = layer.plan.gated && layer.up.is_none();
        let down = layer.neurons.part(usize::from(bundled));
        let mut row = down.row_bytes(hidden);
        if bundled {
            let up = layer.neurons.part(0);
            let (x, products) = (&self.input.x[..], &mut self.products[..]);
            bundles(isa, (&up, &down), list, active, &[], x, products, sum);
            row += up.row_bytes(hidden);
        } else {
            let factors = fold_scales(&down, list, active, &mut self.products);
            add_rows(isa, &down, list, factors, 0..hidden, sum);
        }
        self.bytes += row * list.len() as u64;
    }
}

fn median_of(passes: &[Pass], of: impl Fn(&Pass) -> f64) -> f64 {
    median(&passes.iter().map(of).collect::<Vec<_>>())
}

fn point(density: f64, passes: &[Pass], dense: &[Pass]) -> Point {
    let bytes = passes.first().map_or(0, |pass| pass.bytes);
    let shares: Vec<f64> =
        passes.iter().zip(dense).map(|(pass, dense)| pass.seconds / dense.seconds).collect();
    Point {
        density,
        ms: 1e3 * median_of(passes, |pass| pass.seconds),
        bytes,
        share_of_read: median_of(passes, |pass| pass.bytes as f64 / pass.seconds / pass.read),
        share_of_dense: median(&shares),
        ideal: bytes as f64 / dense.first().map_or(0, |pass| pass.bytes) as f64,
    }
}

#[cfg(test)]
mod tests {
    use relufy_spec::Stage;

    use super::*;
    use crate::Format;
    use crate::bench::cpu::tests::{engine, small};
    use crate::bench::nothing_skipped;

    fn curves(stage: Stage) -> Vec<Curve> {
        let spec = small(stage);
        let sparse = engine(&spec, Format::F16);
        let dense = engine(&nothing_skipped(&spec), Format::F16);
        let raw = RawRead::new(1 << 16).unwrap();
        Curves::new(&sparse, &dense, &raw, &[0.25, 1.0]).measure(1).unwrap()
    }

    #[test]
    fn bytes_follow_the_density() {
        let curves = curves(Stage::Two);
        let parts: Vec<Part> = curves.iter().map(|curve| curve.part).collect();
        assert_eq!(parts, Part::ALL);
        let bytes = [2 * 2 * 256 * 768, 2 * 2 * 256 * 512, 2 * 2 * 512 * 512];
        for (curve, bytes) in curves.iter().zip(bytes) {
            assert_eq!(curve.dense_bytes, bytes, "{curve:?}");
            assert_eq!(
                curve.points.iter().map(|point| point.ideal).collect::<Vec<_>>(),
                [0.25, 1.0]
            );
            assert!(curve.points.iter().all(|point| point.ms > 0.0 && point.share_of_dense > 0.0));
        }
    }

    #[test]
    fn what_is_not_skipped_has_no_curve() {
        let found = curves(Stage::One);
        assert_eq!(found.iter().map(|curve| curve.part).collect::<Vec<_>>(), [Part::Neurons]);
    }
}
