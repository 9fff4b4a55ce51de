//! One token's way through the layers, as each worker walks it; several sequences' tokens walk side by
//! side, or a few of one sequence.
//!
//! ```text
//! norm, list of non-zeros      every worker for itself: cheaper than a barrier
//! queries, keys, values        each worker its columns
//! --- barrier
//! rotation, scores, values     each worker its heads
//! --- barrier
//! output projection            each worker its columns
//! --- barrier, sum, norm, list
//! gate, then up and down       each worker its neurons, with a sum of its own
//! --- barrier, sum
//! ```
//!
//! Tokens of one sequence see each other's keys and values, so a barrier stands behind those.
//!
//! A parallel block has its MLP beside the output projection, and a barrier less. Sums of several
//! workers are added in the workers' order, so the same number of threads gives the same bits.

use relufy_model::layer::Joins;
use relufy_ops::attention::weights_of_one;
use relufy_ops::norm::RowNorm;
use relufy_ops::pointwise::{Pointwise, apply_to_slice};

use crate::engine::{Packed, PackedLayer};
use crate::force::{Forced, Masks};
use crate::kernels::{add_rows, dot_rows};
use crate::linear::{Input, Pass, share};
use crate::matrix::padded;
use crate::session::{Own, Room};
use crate::shared::KvRows;
use crate::thresholds::drop_small;

/// A token of each of some sequences on their way, or tokens of one.
pub(crate) struct Walk<'a> {
    pub packed: &'a Packed,
    pub lanes: &'a [Lane<'a>],
    /// The lanes are tokens of one sequence, one after the other.
    pub one: bool,
    /// Whether the head is needed.
    pub logits: bool,
}

/// A token.
pub(crate) struct Lane<'a> {
    pub keys: &'a [KvRows],
    pub values: &'a [KvRows],
    pub room: &'a Room,
    pub forced: Option<&'a Forced>,
    pub token: u32,
    pub position: usize,
}

impl Walk<'_> {
    /// A worker's part.
    ///
    /// # Safety
    /// Every worker of the pool calls it once, with its index, each lane has a room of its own, lanes
    /// share keys and values only where they say so, and nobody else uses any of them.
    pub unsafe fn run(&self, worker: usize) {
        let (packed, lanes) = (self.packed, self.lanes);
        let (workers, identity) = (packed.pool.workers(), &packed.identity);
        let hidden = packed.spec.hidden;
        // SAFETY: each worker has its own index, and each lane its own room.
        let owns = lanes.iter().map(|lane| unsafe { lane.room.own.get(worker) });
        let mut owns: Vec<&mut Own> = owns.collect();
        for (lane, own) in lanes.iter().zip(&mut owns) {
            packed.embed(lane.token, lane.position, &mut own.x, &mut own.input.x[..hidden]);
        }
        for (n, layer) in packed.layers.iter().enumerate() {
            let thresholds = &layer.thresholds;
            let first = usize::from(worker == 0);
            for (lane, own) in lanes.iter().zip(&mut owns) {
                let mask = lane.masks(n).map(|masks| &masks.qkv[..]);
                enter(&layer.attention_norm, thresholds.qkv, own, mask);
                own.nonzeros.qkv += first * own.input.list.len();
            }
            let columns = share(layer.qkv.outputs, worker, workers);
            let passes = lanes.iter().zip(&mut owns).map(|(lane, own)| {
                // SAFETY: these columns are this worker's; the others read them after the barrier, and
                // have read what was there before an earlier one.
                let y = unsafe { lane.room.qkv.write(columns.start..padded_end(&columns)) };
                Pass { input: &mut own.input, y, work: &mut own.counts.qkv }
            });
            let mut passes: Vec<Pass<'_>> = passes.collect();
            layer.qkv.forward_all(packed.isa, &mut passes, identity, columns);
            packed.pool.meet();
            if self.one {
                for (lane, own) in lanes.iter().zip(&mut owns) {
                    self.store(lane, n, worker, own);
                }
                packed.pool.meet();
            }
            for (lane, own) in lanes.iter().zip(&mut owns) {
                // SAFETY: queries, keys and values are complete, and not written before the next layer.
                let qkv = unsafe { lane.room.qkv.read() };
                self.attend(lane, n, worker, qkv, own);
            }
            packed.pool.meet();
            self.project(layer, worker, &mut owns);
            let parallel = layer.plan.joins != Joins::Sequential;
            if !parallel {
                packed.pool.meet();
            }
            for (lane, own) in lanes.iter().zip(&mut owns) {
                if !parallel {
                    // SAFETY: complete, and not written before the next layer's barriers.
                    add(&mut own.x, unsafe { lane.room.mid.read() });
                }
                if let Some(norm) = &layer.mlp_norm {
                    enter(norm, thresholds.up, own, lane.masks(n).map(|masks| &masks.up[..]));
                }
                own.nonzeros.up += first * own.input.list.len();
            }
            self.mlp(n, worker, &mut owns);
            packed.pool.meet();
            for (lane, own) in lanes.iter().zip(&mut owns) {
                if parallel {
                    // SAFETY: as above.
                    add(&mut own.x, unsafe { lane.room.mid.read() });
                }
                // SAFETY: complete, and not written before the next layer's barriers.
                for sum in unsafe { lane.room.partial.read() }.chunks_exact(padded(hidden)) {
                    add(&mut own.x, sum);
                }
            }
        }
        if self.logits {
            self.head(worker, &mut owns);
        }
    }

    /// This worker's logits.
    fn head(&self, worker: usize, owns: &mut [&mut Own]) {
        let packed = self.packed;
        let columns = share(packed.head.outputs, worker, packed.pool.workers());
        let passes = self.lanes.iter().zip(owns).map(|(lane, own)| {
            enter(&packed.final_norm, 0.0, own, None);
            // SAFETY: these columns are this worker's; they are read after all have finished.
            let y = unsafe { lane.room.logits.write(columns.start..padded_end(&columns)) };
            Pass { input: &mut own.input, y, work: &mut own.counts.head }
        });
        let mut passes: Vec<Pass<'_>> = passes.collect();
        packed.head.forward_all(packed.isa, &mut passes, &packed.identity, columns.clone());
        if let Some(cap) = packed.spec.head.softcap {
            let cap = cap as f32;
            for Pass { y, .. } in passes {
                y[..columns.len()].iter_mut().for_each(|x| *x = cap * (*x / cap).tanh());
            }
        }
    }

    /// Puts a token's keys and values, of the heads that are this worker's, into the cache.
    fn store(&self, lane: &Lane<'_>, n: usize, worker: usize, own: &mut Own) {
        let (packed, position) = (self.packed, lane.position);
        let layer = &packed.layers[n];
        let (plan, dim) = (&layer.plan, layer.plan.heads.head_dim);
        let (kv_heads, workers) = (plan.heads.kv_heads, packed.pool.workers());
        // SAFETY: complete, and not written before the next layer.
        let qkv = unsafe { lane.room.qkv.read() };
        let [_, k, ..] = &mut own.heads;
        for head in kv_heads * worker / workers..kv_heads * (worker + 1) / workers {
            let at = plan.q_width + head * dim;
            turned(packed, layer.k_norm.as_ref(), position, &qkv[at..at + dim], k);
            // SAFETY: this head is this worker's, and nobody reads the cache before the barrier.
            unsafe {
                lane.keys[n].store(head, position, &k[..dim]);
                lane.values[n].store(head, position, &qkv[at + plan.kv_width..][..dim]);
            }
        }
    }

    /// Attention of this worker's heads, over the cache and the token itself.
    fn attend(&self, lane: &Lane<'_>, n: usize, worker: usize, qkv: &[f32], own: &mut Own) {
        let (packed, position) = (self.packed, lane.position);
        let layer = &packed.layers[n];
        let plan = &layer.plan;
        let (heads, dim) = (&plan.heads, plan.heads.head_dim);
        let group = heads.heads / heads.kv_heads;
        let workers = packed.pool.workers();
        let mine = heads.heads * worker / workers..heads.heads * (worker + 1) / workers;
        let first = heads.window.map_or(0, |window| (position + 1).saturating_sub(window));
        let before = &packed.identity[first..position];
        let [q, k, v, out] = &mut own.heads;
        let mut loaded = None;
        for head in mine {
            let kv_head = head / group;
            if loaded != Some(kv_head) {
                let at = plan.q_width + kv_head * dim;
                turned(packed, layer.k_norm.as_ref(), position, &qkv[at..at + dim], k);
                v[..dim].copy_from_slice(&qkv[at + plan.kv_width..][..dim]);
                // The group's first head belongs to one worker. Tokens of one sequence have stored theirs.
                if !self.one && head.is_multiple_of(group) {
                    // SAFETY: no other worker writes this row, and none reads it for this token.
                    unsafe {
                        lane.keys[n].store(kv_head, position, &k[..dim]);
                        lane.values[n].store(kv_head, position, &v[..dim]);
                    }
                }
                loaded = Some(kv_head);
            }
            let from = head * dim;
            turned(packed, layer.q_norm.as_ref(), position, &qkv[from..from + dim], q);
            // SAFETY: rows before this position are not written during this step.
            let (keys, values) = unsafe {
                (lane.keys[n].rows(kv_head, position), lane.values[n].rows(kv_head, position))
            };
            let scores = &mut own.scores[..before.len() + 1];
            dot_rows(packed.isa, &keys, before, q, scores);
            scores[before.len()] = q[..dim].iter().zip(&k[..dim]).map(|(q, k)| q * k).sum();
            weights_of_one(scores, heads, head, first);
            out.fill(0.0);
            add_rows(packed.isa, &values, before, scores, 0..dim, out);
            let weight = scores[before.len()];
            // SAFETY: this head's columns are this worker's.
            let to = unsafe { lane.room.attended.write(head * dim..(head + 1) * dim) };
            for ((to, out), v) in to.iter_mut().zip(&*out).zip(&*v) {
                *to = out + weight * v;
            }
        }
    }

    /// This worker's columns of attention's output projection.
    fn project(&self, layer: &PackedLayer, worker: usize, owns: &mut [&mut Own]) {
        let (packed, width) = (self.packed, layer.plan.q_width);
        let columns = share(layer.o.outputs, worker, packed.pool.workers());
        let passes = self.lanes.iter().zip(owns).map(|(lane, own)| {
            // SAFETY: attention's output is complete, and not written before the next layer.
            let attended = unsafe { lane.room.attended.read() };
            let input = &mut own.o_input;
            input.x[..width].copy_from_slice(&attended[..width]);
            input.x[width..].fill(0.0);
            if layer.plan.o_in != Pointwise::Identity {
                apply_to_slice(&mut input.x[..width], layer.plan.o_in);
            }
            drop_small(&mut input.x[..width], layer.thresholds.o);
            input.list_nonzeros(width);
            own.nonzeros.o += usize::from(worker == 0) * input.list.len();
            // SAFETY: these columns are this worker's; the others read them after a barrier.
            let y = unsafe { lane.room.mid.write(columns.start..padded_end(&columns)) };
            Pass { input, y, work: &mut own.counts.o }
        });
        let mut passes: Vec<Pass<'_>> = passes.collect();
        layer.o.forward_all(packed.isa, &mut passes, &packed.identity, columns);
    }
}

impl<'a> Lane<'a> {
    pub fn masks(&self, n: usize) -> Option<&'a Masks> {
        self.forced.and_then(|forced| forced.layer(n))
    }
}

/// A head's query or key, normalised and turned to its position.
pub(crate) fn turned(
    packed: &Packed,
    norm: Option<&RowNorm>,
    position: usize,
    from: &[f32],
    to: &mut [f32],
) {
    let to = &mut to[..from.len()];
    match norm {
        Some(norm) => norm.apply(from, to),
        None => to.copy_from_slice(from),
    }
    if let Some((table, pairs)) = &packed.rope {
        table.turn(to, from.len(), *pairs, position as u32);
    }
}

/// Norm and site of the residual stream, and the list of what is not zero.
fn enter(norm: &RowNorm, threshold: f32, own: &mut Own, mask: Option<&[f32]>) {
    let hidden = own.x.len();
    let Input { x, .. } = &mut own.input;
    norm.apply(&own.x, &mut x[..hidden]);
    drop_small(&mut x[..hidden], threshold);
    if let Some(mask) = mask {
        force(&mut x[..hidden], mask);
    }
    own.input.list_nonzeros(hidden);
}

/// Puts non-zeros where a mask is one, zeros elsewhere.
pub(crate) fn force(x: &mut [f32], mask: &[f32]) {
    x.iter_mut().zip(mask).for_each(|(x, mask)| *x = mask * (x.abs() + 1e-3));
}

fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

/// The end of a share in whole lines.
fn padded_end(share: &std::ops::Range<usize>) -> usize {
    share.start + padded(share.len())
}
