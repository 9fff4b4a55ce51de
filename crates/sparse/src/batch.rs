//! Many tokens of a prompt at once: each weight is read once for all of them, and multiplied densely. Zeros are not skipped: tokens have different ones, and with
//! many tokens the arithmetic is what takes time.

use std::ops::Range;

use relufy_model::layer::Joins;
use relufy_ops::attention::weights_of_one;
use relufy_ops::norm::RowNorm;
use relufy_ops::pointwise::{Pointwise, apply_to_slice};

use crate::Result;
use crate::counts::{Counts, Work};
use crate::engine::{Packed, PackedLayer};
use crate::kernels::{Isa, add_rows, dot_rows};
use crate::linear::share;
use crate::matrix::{Rows, padded};
use crate::shared::{KvRows, PerWorker, SharedVec};
use crate::thresholds::drop_small;
use crate::tile::{HIGH, Tile};
use crate::walk::turned;

/// The most tokens of one pass: with fewer, decoding weights and arranging them for the product takes as
/// long as the product.
pub(crate) const MOST: usize = 128;

/// Fewer tokens than this skip zeros, a few side by side: decoding the tiles would take longer.
pub(crate) const LEAST: usize = 48;

/// Some tokens on their way.
pub(crate) struct Batch<'a> {
    pub packed: &'a Packed,
    pub keys: &'a [KvRows],
    pub values: &'a [KvRows],
    pub room: &'a BatchRoom,
    pub tokens: &'a [u32],
    /// Of the first token.
    pub position: usize,
}

/// Activations of up to [`MOST`] tokens, a row each.
pub(crate) struct BatchRoom {
    x: SharedVec,
    /// What the matrices after a norm read.
    h: SharedVec,
    qkv: SharedVec,
    attended: SharedVec,
    mid: SharedVec,
    /// `[workers, tokens, hidden]`.
    partial: SharedVec,
    own: PerWorker<Own>,
}

/// A worker's own room.
struct Own {
    tile: Tile,
    out: Vec<f32>,
    /// The gate, where `up` is computed for all neurons before it is used.
    gates: Vec<f32>,
    /// One block of neurons.
    products: Vec<f32>,
    heads: [Vec<f32>; 4],
    scores: Vec<f32>,
    counts: Counts,
    /// The first product that was refused; none is, by construction.
    failed: Result<()>,
}

impl BatchRoom {
    pub fn new(packed: &Packed, tokens: usize) -> BatchRoom {
        let hidden = packed.spec.hidden;
        let plans = || packed.layers.iter().map(|layer| &layer.plan);
        let q_width = plans().map(|plan| plan.q_width).max().unwrap_or(0);
        let qkv = plans().map(|plan| plan.q_width + 2 * plan.kv_width).max().unwrap_or(0);
        let ffn = plans().map(|plan| plan.ffn).max().unwrap_or(0);
        let dim = plans().map(|plan| plan.heads.head_dim).max().unwrap_or(0);
        let widest = padded(qkv.max(ffn).max(hidden));
        let both = packed.layers.iter().any(|layer| layer.up.is_some());
        let workers = packed.pool.workers();
        BatchRoom {
            x: SharedVec::new(tokens * hidden),
            h: SharedVec::new(tokens * hidden),
            qkv: SharedVec::new(tokens * qkv),
            attended: SharedVec::new(tokens * q_width),
            mid: SharedVec::new(tokens * hidden),
            partial: SharedVec::new(workers * tokens * hidden),
            own: PerWorker::new(workers, || Own {
                tile: Tile::new(tokens, hidden.max(q_width)),
                out: vec![0.0; tokens * widest],
                gates: if both { vec![0.0; tokens * widest] } else { Vec::new() },
                products: vec![0.0; tokens * HIGH],
                heads: std::array::from_fn(|_| vec![0.0; padded(dim)]),
                scores: vec![0.0; packed.context],
                counts: Counts::default(),
                failed: Ok(()),
            }),
        }
    }

    /// What was done since the last call.
    pub fn take_counts(&mut self) -> Result<Counts> {
        let mut sum = Counts::default();
        for own in self.own.iter_mut() {
            sum += std::mem::take(&mut own.counts);
            std::mem::replace(&mut own.failed, Ok(()))?;
        }
        Ok(sum)
    }
}

impl Batch<'_> {
    /// A worker's part.
    ///
    /// # Safety
    /// Every worker of the pool calls it once, with its index, and nobody else uses the room.
    pub unsafe fn run(&self, worker: usize) {
        // SAFETY: each worker has its own index.
        let own = unsafe { self.room.own.get(worker) };
        // SAFETY: the caller's promise.
        unsafe { self.walk(worker, own) };
    }

    /// # Safety
    /// As [`Batch::run`].
    unsafe fn walk(&self, worker: usize, own: &mut Own) {
        let (packed, room) = (self.packed, self.room);
        let (workers, count) = (packed.pool.workers(), self.tokens.len());
        let hidden = packed.spec.hidden;
        let mine = count * worker / workers..count * (worker + 1) / workers;
        let row = |t: usize| t * hidden..(t + 1) * hidden;
        // A barrier stands between each of the steps below. SAFETY of all shared slices: a step
        // writes rows of this worker's tokens or columns of its share only, and reads what no
        // worker writes in the same step.
        for t in mine.clone() {
            // SAFETY: as above.
            let (x, h) = unsafe { (room.x.write(row(t)), room.h.write(row(t))) };
            packed.embed(self.tokens[t], self.position + t, x, h);
        }
        for (n, layer) in packed.layers.iter().enumerate() {
            let plan = &layer.plan;
            self.enter(&layer.attention_norm, layer.thresholds.qkv, mine.clone());
            packed.pool.meet();
            let width = layer.qkv.outputs;
            // SAFETY: as above.
            let h = unsafe { &room.h.read()[..count * hidden] };
            let columns = share(width, worker, workers);
            own.project(packed.isa, &layer.qkv, h, count, columns.clone());
            own.counts.qkv += layer.qkv.dense_work(h, columns.len(), count);
            own.give(&room.qkv, width, columns, count);
            packed.pool.meet();
            // SAFETY: as above.
            let qkv = unsafe { room.qkv.read() };
            self.store(n, layer, worker, qkv, own);
            packed.pool.meet();
            self.attend(n, layer, worker, qkv, own);
            packed.pool.meet();
            // SAFETY: as above; each worker applies the site's operation to its own copy.
            let attended = unsafe { &room.attended.read()[..count * plan.q_width] };
            let applied;
            let input = match (plan.o_in, layer.thresholds.o) {
                (Pointwise::Identity, 0.0) => attended,
                (op, threshold) => {
                    let mut copy = attended.to_vec();
                    apply_to_slice(&mut copy, op);
                    drop_small(&mut copy, threshold);
                    applied = copy;
                    &applied
                }
            };
            let columns = share(hidden, worker, workers);
            own.project(packed.isa, &layer.o, input, count, columns.clone());
            own.counts.o += layer.o.dense_work(input, columns.len(), count);
            own.give(&room.mid, hidden, columns, count);
            packed.pool.meet();
            let parallel = plan.joins != Joins::Sequential;
            if parallel && let Some(norm) = &layer.mlp_norm {
                self.enter(norm, layer.thresholds.up, mine.clone());
            }
            for t in mine.clone() {
                // SAFETY: as above.
                let (x, mid) = unsafe { (room.x.write(row(t)), &room.mid.read()[row(t)]) };
                x.iter_mut().zip(mid).for_each(|(x, mid)| *x += mid);
            }
            if !parallel && let Some(norm) = &layer.mlp_norm {
                self.enter(norm, layer.thresholds.up, mine.clone());
            }
            packed.pool.meet();
            let part = worker * count * hidden..(worker + 1) * count * hidden;
            // SAFETY: as above.
            let (h, sum) = unsafe { (&room.h.read()[..count * hidden], room.partial.write(part)) };
            own.mlp(packed, layer, worker, h, sum);
            packed.pool.meet();
            // SAFETY: as above.
            let partial = unsafe { &room.partial.read()[..workers * count * hidden] };
            for t in mine.clone() {
                // SAFETY: as above.
                let x = unsafe { room.x.write(row(t)) };
                for part in partial.chunks_exact(count * hidden) {
                    x.iter_mut().zip(&part[row(t)]).for_each(|(x, part)| *x += part);
                }
            }
        }
    }

    /// Norm and site of some tokens' residual streams.
    fn enter(&self, norm: &RowNorm, threshold: f32, tokens: Range<usize>) {
        let hidden = self.packed.spec.hidden;
        for t in tokens {
            let row = t * hidden..(t + 1) * hidden;
            // SAFETY: these tokens are this worker's, and no one reads `h` in this step.
            let (x, h) = unsafe { (self.room.x.write(row.clone()), self.room.h.write(row)) };
            norm.apply(x, h);
            drop_small(h, threshold);
        }
    }

    /// Puts keys and values of this worker's key heads into the cache.
    fn store(&self, n: usize, layer: &PackedLayer, worker: usize, qkv: &[f32], own: &mut Own) {
        let (plan, dim) = (&layer.plan, layer.plan.heads.head_dim);
        let (width, kv_heads) = (layer.qkv.outputs, plan.heads.kv_heads);
        let workers = self.packed.pool.workers();
        let [_, k, ..] = &mut own.heads;
        for head in kv_heads * worker / workers..kv_heads * (worker + 1) / workers {
            for t in 0..self.tokens.len() {
                let position = self.position + t;
                let row = &qkv[t * width..(t + 1) * width];
                let at = plan.q_width + head * dim;
                turned(self.packed, layer.k_norm.as_ref(), position, &row[at..at + dim], k);
                let v = &row[at + plan.kv_width..][..dim];
                // SAFETY: this head is this worker's, and no one reads the cache in this step.
                unsafe {
                    self.keys[n].store(head, position, &k[..dim]);
                    self.values[n].store(head, position, v);
                }
            }
        }
    }

    /// Attention of this worker's heads, token by token.
    fn attend(&self, n: usize, layer: &PackedLayer, worker: usize, qkv: &[f32], own: &mut Own) {
        let (packed, plan) = (self.packed, &layer.plan);
        let (heads, dim) = (&plan.heads, plan.heads.head_dim);
        let (width, group) = (layer.qkv.outputs, heads.heads / heads.kv_heads);
        let workers = packed.pool.workers();
        let [q, _, _, out] = &mut own.heads;
        for head in heads.heads * worker / workers..heads.heads * (worker + 1) / workers {
            for t in 0..self.tokens.len() {
                let position = self.position + t;
                let from = t * width + head * dim;
                turned(packed, layer.q_norm.as_ref(), position, &qkv[from..from + dim], q);
                let first = heads.window.map_or(0, |window| (position + 1).saturating_sub(window));
                let seen = &packed.identity[first..position + 1];
                // SAFETY: no one writes to the cache in this step.
                let (keys, values) = unsafe {
                    let kv_head = head / group;
                    let len = position + 1;
                    (self.keys[n].rows(kv_head, len), self.values[n].rows(kv_head, len))
                };
                let scores = &mut own.scores[..seen.len()];
                dot_rows(packed.isa, &keys, seen, q, scores);
                weights_of_one(scores, heads, head, first);
                out.fill(0.0);
                add_rows(packed.isa, &values, seen, scores, 0..dim, out);
                let at = t * plan.q_width + head * dim;
                // SAFETY: this head's columns are this worker's.
                unsafe { self.room.attended.write(at..at + dim) }.copy_from_slice(&out[..dim]);
            }
        }
    }
}

impl Own {
    /// `input` times this worker's columns of a projection, into `out` `[count, columns]`.
    fn project(
        &mut self,
        isa: Isa,
        linear: &crate::linear::Linear,
        input: &[f32],
        count: usize,
        columns: Range<usize>,
    ) {
        if columns.is_empty() {
            return;
        }
        let (rows, inputs) = (linear.matrix().all(), input.len() / count);
        let width = columns.len();
        let out = &mut self.out[..count * width];
        match linear.bias().get(columns.clone()) {
            Some(bias) => out.chunks_exact_mut(width).for_each(|out| out.copy_from_slice(bias)),
            None => out.fill(0.0),
        }
        let done = match linear.by_input() {
            true => self.tile.add_inputs(isa, &rows, (0..inputs, columns), (input, count), out),
            false => {
                self.tile.turn(input, count);
                self.tile.add_outputs(isa, &rows, columns, count, out)
            }
        };
        self.note(done);
    }

    /// Hands `out` over to all.
    fn give(&self, to: &SharedVec, width: usize, columns: Range<usize>, count: usize) {
        if columns.is_empty() {
            return;
        }
        for (t, row) in self.out[..count * columns.len()].chunks_exact(columns.len()).enumerate() {
            // SAFETY: these columns are this worker's, and no one reads them in this step.
            let to = unsafe { to.write(t * width + columns.start..t * width + columns.end) };
            to.copy_from_slice(row);
        }
    }

    /// This worker's neurons, a block after the other.
    fn mlp(
        &mut self,
        packed: &Packed,
        layer: &PackedLayer,
        worker: usize,
        h: &[f32],
        sum: &mut [f32],
    ) {
        let (plan, hidden) = (&layer.plan, packed.spec.hidden);
        let count = h.len() / hidden;
        sum.fill(0.0);
        if worker == 0 && !layer.down_bias.is_empty() {
            sum.chunks_exact_mut(hidden).for_each(|sum| sum.copy_from_slice(&layer.down_bias));
        }
        let mine = share(plan.ffn, worker, packed.pool.workers());
        if mine.is_empty() {
            return;
        }
        self.project(packed.isa, &layer.first, h, count, mine.clone());
        self.counts.up += layer.first.dense_work(h, mine.len(), count);
        let width = mine.len();
        let gates = &mut self.out[..count * width];
        apply_to_slice(gates, plan.activation);
        drop_small(gates, layer.thresholds.gate);
        if plan.gated {
            let tokens = gates.chunks_exact(width).zip(h.chunks_exact(hidden));
            let needed = tokens.map(|(gate, h)| nonzeros(gate) * nonzeros(h)).sum();
            self.counts.up += match &layer.up {
                Some(up) => Work { needed, ..up.dense_work(h, width, count) },
                None => {
                    let rows = width as u64;
                    let bytes = rows * layer.neurons.part(0).row_bytes(hidden);
                    Work { needed, done: rows * (hidden * count) as u64, bytes }
                }
            };
        }
        if let Some(up) = &layer.up {
            std::mem::swap(&mut self.out, &mut self.gates);
            self.project(packed.isa, up, h, count, mine.clone());
            let products = self.out[..count * width].iter_mut();
            products.zip(&self.gates).for_each(|(up, gate)| *up *= gate);
        }
        let (up, down) = (layer.up_rows(), layer.down_rows());
        if up.is_some() {
            self.tile.turn(h, count);
        }
        let mut active = 0;
        for start in (0..width).step_by(HIGH) {
            let block = start..width.min(start + HIGH);
            let rows = mine.start + block.start..mine.start + block.end;
            let both = (up.as_ref(), &down);
            match self.block(packed.isa, both, layer, (h, count), (block, width), rows, sum) {
                Ok(nonzero) => active += nonzero,
                Err(error) => self.note(Err(error)),
            }
        }
        self.counts.down += Work {
            needed: active * hidden as u64,
            done: (width * count * hidden) as u64,
            bytes: width as u64 * down.row_bytes(hidden),
        };
    }

    /// A block of neurons: `up` where it is stored by neuron, and `down`. How many products are not
    /// zero.
    #[allow(clippy::too_many_arguments, reason = "one call says all about a block")]
    fn block(
        &mut self,
        isa: Isa,
        (up, down): (Option<&Rows<'_>>, &Rows<'_>),
        layer: &PackedLayer,
        (h, count): (&[f32], usize),
        (block, width): (Range<usize>, usize),
        rows: Range<usize>,
        sum: &mut [f32],
    ) -> Result<u64> {
        let (plan, hidden, size) = (&layer.plan, h.len() / count, block.len());
        let products = &mut self.products[..count * size];
        if let Some(up) = up {
            match layer.up_bias.get(rows.clone()) {
                Some(bias) => products.chunks_exact_mut(size).for_each(|p| p.copy_from_slice(bias)),
                None => products.fill(0.0),
            }
            self.tile.add_outputs(isa, up, rows.clone(), count, products)?;
        } else {
            products.fill(1.0);
        }
        let activated = self.out[..count * width].chunks_exact(width);
        for (products, activated) in products.chunks_exact_mut(size).zip(activated) {
            products.iter_mut().zip(&activated[block.clone()]).for_each(|(p, a)| *p *= a);
        }
        if plan.down_in != Pointwise::Identity {
            apply_to_slice(products, plan.down_in);
        }
        self.tile.add_inputs(isa, down, (rows, 0..hidden), (products, count), sum)?;
        Ok(nonzeros(&self.products[..count * size]))
    }

    fn note(&mut self, done: Result<()>) {
        if self.failed.is_ok() {
            self.failed = done;
        }
    }
}

fn nonzeros(x: &[f32]) -> u64 {
    x.iter().filter(|x| **x != 0.0).count() as u64
}
