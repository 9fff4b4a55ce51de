//! A worker's neurons of some sequences' tokens: the gate first, which says what is read of `up` and `down`.

use std::ops::Range;

use relufy_ops::pointwise::{Pointwise, apply_to_slice};

use crate::counts::Work;
use crate::engine::{Packed, PackedLayer};
use crate::kernels::{ADDED, BUNDLED, add_rows, bundles, dot_rows, fold_scales};
use crate::linear::{Pass, compact, share};
use crate::matrix::padded;
use crate::session::Own;
use crate::side_by_side::{parts, union};
use crate::thresholds::drop_small;
use crate::walk::{Walk, force};

impl Walk<'_> {
    /// This worker's neurons: the gate, then `up` and `down` where it is not zero.
    pub fn mlp(&self, n: usize, worker: usize, owns: &mut [&mut Own]) {
        let packed = self.packed;
        let (layer, hidden) = (&packed.layers[n], packed.spec.hidden);
        let plan = &layer.plan;
        let mut sums = Vec::with_capacity(owns.len());
        for lane in self.lanes {
            let part = worker * padded(hidden)..(worker + 1) * padded(hidden);
            // SAFETY: this part is this worker's; the others have read it before an earlier barrier.
            let sum = unsafe { lane.room.partial.write(part) };
            sum.fill(0.0);
            if worker == 0 {
                sum.iter_mut().zip(&layer.down_bias).for_each(|(sum, bias)| *sum = *bias);
            }
            sums.push(sum);
        }
        let mine = share(plan.ffn, worker, packed.pool.workers());
        if mine.is_empty() {
            return;
        }
        let gates = owns.iter_mut().map(|own| Pass {
            input: &mut own.input,
            y: &mut own.gate,
            work: &mut own.counts.up,
        });
        let mut gates: Vec<Pass<'_>> = gates.collect();
        layer.first.forward_all(packed.isa, &mut gates, &packed.identity, mine.clone());
        for (lane, own) in self.lanes.iter().zip(&mut *owns) {
            let gate = &mut own.gate[..mine.len()];
            apply_to_slice(gate, plan.activation);
            drop_small(gate, layer.thresholds.gate);
            if let Some(masks) = lane.masks(n) {
                force(gate, &masks.gate[mine.clone()]);
            }
        }
        if plan.gated {
            for own in &mut *owns {
                compact(&own.gate[..mine.len()], mine.start, &mut own.neurons, &mut own.active);
                own.products.resize(own.neurons.len(), 0.0);
            }
            if layer.up.is_none() && plan.down_in == Pointwise::Identity {
                return bundled(packed, layer, owns, &mut sums);
            }
            gated_up(packed, layer, mine, owns);
        } else {
            for own in &mut *owns {
                let gate = &mut own.gate[..mine.len()];
                if plan.down_in != Pointwise::Identity {
                    apply_to_slice(gate, plan.down_in);
                }
                compact(gate, mine.start, &mut own.down_list, &mut own.down_values);
            }
        }
        down(packed, layer, owns, &mut sums);
    }
}

/// `up` and `down` of the listed neurons in one pass.
fn bundled(packed: &Packed, layer: &PackedLayer, owns: &mut [&mut Own], sums: &mut [&mut [f32]]) {
    let hidden = packed.spec.hidden;
    let (up, down) = (layer.neurons.part(0), layer.down_rows());
    let (up_bytes, down_bytes) = (up.row_bytes(hidden), down.row_bytes(hidden));
    let lists = || owns.iter().map(|own| &own.neurons[..]);
    let (read, parts) = (union(lists()), parts(lists(), BUNDLED, up_bytes + down_bytes));
    for (n, part) in parts {
        let own = &mut *owns[n];
        let (list, gate) = (&own.neurons[part.clone()], &own.active[part.clone()]);
        let (x, products) = (&own.input.x[..], &mut own.products[part]);
        bundles(packed.isa, (&up, &down), list, gate, &layer.up_bias, x, products, sums[n]);
    }
    for (n, own) in owns.iter_mut().enumerate() {
        let read = if n == 0 { read as u64 } else { 0 };
        let done = (hidden * own.neurons.len()) as u64;
        let needed = (own.input.list.len() * own.neurons.len()) as u64;
        let nonzero = own.products.iter().filter(|product| **product != 0.0).count();
        own.nonzeros.down += nonzero;
        own.counts.up += Work { needed, done, bytes: up_bytes * read };
        let needed = (hidden * nonzero) as u64;
        own.counts.down += Work { needed, done, bytes: down_bytes * read };
    }
}

/// `up` of the listed neurons, and what of its products with the gate is not zero.
fn gated_up(packed: &Packed, layer: &PackedLayer, mine: Range<usize>, owns: &mut [&mut Own]) {
    let (isa, hidden) = (packed.isa, packed.spec.hidden);
    if let Some(up) = &layer.up {
        let mut works = vec![Work::default(); owns.len()];
        let passes = owns.iter_mut().zip(&mut works).map(|(own, work)| Pass {
            input: &mut own.input,
            y: &mut own.up,
            work,
        });
        let mut passes: Vec<Pass<'_>> = passes.collect();
        up.forward_all(isa, &mut passes, &packed.identity, mine.clone());
        for (own, work) in owns.iter_mut().zip(works) {
            let needed = (own.input.list.len() * own.neurons.len()) as u64;
            own.counts.up += Work { needed, ..work };
            let listed = own.neurons.iter().zip(&own.active);
            for (product, (neuron, gate)) in own.products.iter_mut().zip(listed) {
                *product = gate * own.up[*neuron as usize - mine.start];
            }
        }
    } else {
        let up = layer.neurons.part(0);
        let row_bytes = up.row_bytes(hidden);
        let lists = || owns.iter().map(|own| &own.neurons[..]);
        let (bytes, parts) = (row_bytes * union(lists()) as u64, parts(lists(), 1, row_bytes));
        for (n, part) in parts {
            let own = &mut *owns[n];
            let products = &mut own.products[part.clone()];
            dot_rows(isa, &up, &own.neurons[part], &own.input.x, products);
        }
        for (n, own) in owns.iter_mut().enumerate() {
            let needed = (own.input.list.len() * own.neurons.len()) as u64;
            let done = (hidden * own.neurons.len()) as u64;
            own.counts.up += Work { needed, done, bytes: if n == 0 { bytes } else { 0 } };
            let listed = own.neurons.iter().zip(&own.active);
            for (product, (neuron, gate)) in own.products.iter_mut().zip(listed) {
                let bias = layer.up_bias.get(*neuron as usize).copied().unwrap_or(0.0);
                *product = gate * (*product + bias);
            }
        }
    }
    for own in owns {
        if layer.plan.down_in != Pointwise::Identity {
            apply_to_slice(&mut own.products, layer.plan.down_in);
        }
        own.down_list.clear();
        own.down_values.clear();
        let listed = own.products.iter().zip(&own.neurons);
        for (product, neuron) in listed.filter(|(product, _)| **product != 0.0) {
            own.down_list.push(*neuron);
            own.down_values.push(*product);
        }
    }
}

/// `down` of the listed neurons.
fn down(packed: &Packed, layer: &PackedLayer, owns: &mut [&mut Own], sums: &mut [&mut [f32]]) {
    let hidden = packed.spec.hidden;
    let down = layer.down_rows();
    let row_bytes = down.row_bytes(hidden);
    for own in &mut *owns {
        fold_scales(&down, &own.down_list, &own.down_values, &mut own.scaled);
    }
    let lists = || owns.iter().map(|own| &own.down_list[..]);
    let (bytes, parts) = (row_bytes * union(lists()) as u64, parts(lists(), ADDED, row_bytes));
    for (n, part) in parts {
        let own = &*owns[n];
        let factors = if down.scales.is_empty() { &own.down_values } else { &own.scaled };
        let list = &own.down_list[part.clone()];
        add_rows(packed.isa, &down, list, &factors[part], 0..hidden, sums[n]);
    }
    for (n, own) in owns.iter_mut().enumerate() {
        own.nonzeros.down += own.down_list.len();
        let macs = (hidden * own.down_list.len()) as u64;
        let bytes = if n == 0 { bytes } else { 0 };
        own.counts.down += Work { needed: macs, done: macs, bytes };
    }
}
