//! One token's way through the layers, as each worker walks it.
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
//! A parallel block has its MLP beside the output projection, and a barrier less. Sums of several
//! workers are added in the workers' order, so the same number of threads gives the same bits.

use relufy_model::layer::Joins;
use relufy_ops::attention::weights_of_one;
use relufy_ops::norm::RowNorm;
use relufy_ops::pointwise::{Pointwise, apply_to_slice};

use crate::counts::Work;
use crate::engine::{Packed, PackedLayer};
use crate::force::Forced;
use crate::kernels::{add_rows, bundles, dot_rows, fold_scales};
use crate::linear::{Input, compact, share};
use crate::matrix::padded;
use crate::session::{Own, Room};
use crate::shared::KvRows;
use crate::thresholds::drop_small;

/// One token on its way.
pub(crate) struct Walk<'a> {
    pub packed: &'a Packed,
    pub keys: &'a [KvRows],
    pub values: &'a [KvRows],
    pub room: &'a Room,
    pub forced: Option<&'a Forced>,
    pub token: u32,
    pub position: usize,
    /// Whether the head is needed.
    pub logits: bool,
}

impl Walk<'_> {
    /// A worker's part.
    ///
    /// # Safety
    /// Every worker of the pool calls it once, with its index, and nobody else uses the room.
    pub unsafe fn run(&self, worker: usize) {
        let (packed, room) = (self.packed, self.room);
        let workers = packed.pool.workers();
        let hidden = packed.spec.hidden;
        // SAFETY: each worker has its own index.
        let own = unsafe { room.own.get(worker) };
        packed.embed(self.token, self.position, &mut own.x, &mut own.input.x[..hidden]);
        for (n, layer) in packed.layers.iter().enumerate() {
            let masks = self.forced.and_then(|forced| forced.layer(n));
            let thresholds = &layer.thresholds;
            enter(&layer.attention_norm, thresholds.qkv, own, masks.map(|masks| &masks.qkv[..]));
            let first = usize::from(worker == 0);
            own.nonzeros.qkv += first * own.input.list.len();
            let columns = share(layer.qkv.outputs, worker, workers);
            // SAFETY: these columns are this worker's; the others read them after the barrier, and
            // have read what was there before an earlier one.
            let out = unsafe { room.qkv.write(columns.start..padded_end(&columns)) };
            own.counts.qkv +=
                layer.qkv.forward(packed.isa, &mut own.input, &packed.identity, columns, out);
            packed.pool.meet();
            // SAFETY: queries, keys and values are complete, and not written before the next layer.
            let qkv = unsafe { room.qkv.read() };
            self.attend(n, worker, qkv, own);
            packed.pool.meet();
            // SAFETY: attention's output is complete, and not written before the next layer.
            let attended = unsafe { room.attended.read() };
            self.project(layer, worker, attended, own);
            let parallel = layer.plan.joins != Joins::Sequential;
            if !parallel {
                packed.pool.meet();
                // SAFETY: complete, and not written before the next layer's barriers.
                add(&mut own.x, unsafe { room.mid.read() });
            }
            if let Some(norm) = &layer.mlp_norm {
                enter(norm, thresholds.up, own, masks.map(|masks| &masks.up[..]));
            }
            own.nonzeros.up += first * own.input.list.len();
            let part = worker * padded(hidden)..(worker + 1) * padded(hidden);
            // SAFETY: this part is this worker's; the others have read it before an earlier barrier.
            let sum = unsafe { room.partial.write(part) };
            self.mlp(layer, worker, masks.map(|masks| &masks.gate[..]), own, sum);
            packed.pool.meet();
            if parallel {
                // SAFETY: as above.
                add(&mut own.x, unsafe { room.mid.read() });
            }
            // SAFETY: complete, and not written before the next layer's barriers.
            for sum in unsafe { room.partial.read() }.chunks_exact(padded(hidden)) {
                add(&mut own.x, sum);
            }
        }
        if self.logits {
            enter(&packed.final_norm, 0.0, own, None);
            let columns = share(packed.head.outputs, worker, workers);
            // SAFETY: these columns are this worker's; they are read after all have finished.
            let out = unsafe { room.logits.write(columns.start..padded_end(&columns)) };
            let logits = columns.len();
            own.counts.head +=
                packed.head.forward(packed.isa, &mut own.input, &packed.identity, columns, out);
            if let Some(cap) = packed.spec.head.softcap {
                let cap = cap as f32;
                out[..logits].iter_mut().for_each(|x| *x = cap * (*x / cap).tanh());
            }
        }
    }

    /// Attention of this worker's heads, over the cache and the token itself.
    fn attend(&self, n: usize, worker: usize, qkv: &[f32], own: &mut Own) {
        let (packed, position) = (self.packed, self.position);
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
                // The group's first head belongs to one worker.
                if head.is_multiple_of(group) {
                    // SAFETY: no other worker writes this row, and none reads it for this token.
                    unsafe {
                        self.keys[n].store(kv_head, position, &k[..dim]);
                        self.values[n].store(kv_head, position, &v[..dim]);
                    }
                }
                loaded = Some(kv_head);
            }
            let from = head * dim;
            turned(packed, layer.q_norm.as_ref(), position, &qkv[from..from + dim], q);
            // SAFETY: rows before this position are not written during this token.
            let (keys, values) = unsafe {
                (self.keys[n].rows(kv_head, position), self.values[n].rows(kv_head, position))
            };
            let scores = &mut own.scores[..before.len() + 1];
            dot_rows(packed.isa, &keys, before, q, scores);
            scores[before.len()] = q[..dim].iter().zip(&k[..dim]).map(|(q, k)| q * k).sum();
            weights_of_one(scores, heads, head, first);
            out.fill(0.0);
            add_rows(packed.isa, &values, before, scores, 0..dim, out);
            let weight = scores[before.len()];
            // SAFETY: this head's columns are this worker's.
            let to = unsafe { self.room.attended.write(head * dim..(head + 1) * dim) };
            for ((to, out), v) in to.iter_mut().zip(&*out).zip(&*v) {
                *to = out + weight * v;
            }
        }
    }

    /// This worker's columns of attention's output projection.
    fn project(&self, layer: &PackedLayer, worker: usize, attended: &[f32], own: &mut Own) {
        let (packed, width) = (self.packed, layer.plan.q_width);
        let input = &mut own.o_input;
        input.x[..width].copy_from_slice(&attended[..width]);
        input.x[width..].fill(0.0);
        if layer.plan.o_in != Pointwise::Identity {
            apply_to_slice(&mut input.x[..width], layer.plan.o_in);
        }
        drop_small(&mut input.x[..width], layer.thresholds.o);
        input.list_nonzeros(width);
        own.nonzeros.o += usize::from(worker == 0) * input.list.len();
        let columns = share(layer.o.outputs, worker, packed.pool.workers());
        // SAFETY: these columns are this worker's; the others read them after a barrier.
        let out = unsafe { self.room.mid.write(columns.start..padded_end(&columns)) };
        own.counts.o += layer.o.forward(packed.isa, input, &packed.identity, columns, out);
    }

    /// This worker's neurons: the gate, then `up` and `down` where it is not zero.
    fn mlp(
        &self,
        layer: &PackedLayer,
        worker: usize,
        mask: Option<&[f32]>,
        own: &mut Own,
        sum: &mut [f32],
    ) {
        let (packed, plan) = (self.packed, &layer.plan);
        sum.fill(0.0);
        if worker == 0 {
            sum.iter_mut().zip(&layer.down_bias).for_each(|(sum, bias)| *sum = *bias);
        }
        let mine = share(plan.ffn, worker, packed.pool.workers());
        if mine.is_empty() {
            return;
        }
        let hidden = packed.spec.hidden;
        let (isa, identity) = (packed.isa, &packed.identity);
        own.counts.up +=
            layer.first.forward(isa, &mut own.input, identity, mine.clone(), &mut own.gate);
        let gate = &mut own.gate[..mine.len()];
        apply_to_slice(gate, plan.activation);
        drop_small(gate, layer.thresholds.gate);
        if let Some(mask) = mask {
            force(gate, &mask[mine.clone()]);
        }
        let (list, values) = (&mut own.down_list, &mut own.down_values);
        let down = layer.down_rows();
        if plan.gated {
            compact(gate, mine.start, &mut own.neurons, &mut own.active);
            let neurons = &own.neurons[..];
            let count = neurons.len();
            own.products.resize(count, 0.0);
            let products = &mut own.products[..];
            let needed = (own.input.list.len() * count) as u64;
            if let Some(up) = &layer.up {
                let work = up.forward(isa, &mut own.input, identity, mine.clone(), &mut own.up);
                own.counts.up += Work { needed, ..work };
                for ((product, neuron), gate) in products.iter_mut().zip(neurons).zip(&own.active) {
                    *product = gate * own.up[*neuron as usize - mine.start];
                }
            } else {
                let up = layer.neurons.part(0);
                own.counts.up += Work {
                    needed,
                    done: (hidden * count) as u64,
                    bytes: up.row_bytes(hidden) * count as u64,
                };
                if plan.down_in == Pointwise::Identity {
                    let (x, active) = (&own.input.x[..], &own.active[..]);
                    let both = (&up, &down);
                    bundles(isa, both, neurons, active, &layer.up_bias, x, products, sum);
                    let nonzero = products.iter().filter(|product| **product != 0.0).count();
                    own.nonzeros.down += nonzero;
                    own.counts.down += Work {
                        needed: (hidden * nonzero) as u64,
                        done: (hidden * count) as u64,
                        bytes: down.row_bytes(hidden) * count as u64,
                    };
                    return;
                }
                dot_rows(isa, &up, neurons, &own.input.x, products);
                for ((product, neuron), gate) in products.iter_mut().zip(neurons).zip(&own.active) {
                    let bias = layer.up_bias.get(*neuron as usize).copied().unwrap_or(0.0);
                    *product = gate * (*product + bias);
                }
            }
            if plan.down_in != Pointwise::Identity {
                apply_to_slice(products, plan.down_in);
            }
            list.clear();
            values.clear();
            for (product, neuron) in products.iter().zip(neurons).filter(|(p, _)| **p != 0.0) {
                list.push(*neuron);
                values.push(*product);
            }
        } else {
            if plan.down_in != Pointwise::Identity {
                apply_to_slice(gate, plan.down_in);
            }
            compact(gate, mine.start, list, values);
        }
        own.nonzeros.down += list.len();
        let factors = fold_scales(&down, list, values, &mut own.scaled);
        add_rows(isa, &down, list, factors, 0..hidden, sum);
        let macs = (hidden * list.len()) as u64;
        let bytes = down.row_bytes(hidden) * list.len() as u64;
        own.counts.down += Work { needed: macs, done: macs, bytes };
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
fn force(x: &mut [f32], mask: &[f32]) {
    x.iter_mut().zip(mask).for_each(|(x, mask)| *x = mask * (x.abs() + 1e-3));
}

fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

/// The end of a share in whole lines.
fn padded_end(share: &std::ops::Range<usize>) -> usize {
    share.start + padded(share.len())
}
