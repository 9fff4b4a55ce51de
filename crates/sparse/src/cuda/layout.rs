//! Which way round `up` of a gated MLP is stored on a GPU.

use relufy_model::layer::LayerPlan;
use relufy_ops::decode::Format;
use relufy_ops::pointwise::Pointwise;
use relufy_spec::flops::{Densities, SiteDensities};

use super::choice::Reads;

/// What a layout depends on beside the decoder.
#[derive(Clone, Copy)]
pub(super) struct Layout<'a> {
    pub format: Format,
    pub reads: Reads,
    /// What was measured, or will be forced.
    pub densities: Option<&'a Densities>,
}

impl Layout<'_> {
    /// Whether rows of inputs behind an operation are skipped.
    pub fn skips(&self, op: Pointwise) -> bool {
        self.reads == Reads::Needed && op != Pointwise::Identity
    }

    /// Whether products of a gated MLP, or activations of a plain one, are skipped.
    pub fn skips_neurons(&self, plan: &LayerPlan) -> bool {
        self.reads == Reads::Needed
            && (is_sparse(plan.activation) || plan.down_in != Pointwise::Identity)
    }

    /// Whether layer `n` has `up` by input.
    pub fn up_by_input(&self, n: usize, plan: &LayerPlan, hidden: usize) -> bool {
        let densities = self.densities.and_then(|found| found.layers.get(n));
        let bytes = hidden * plan.ffn * self.format.bytes();
        plan.gated && self.skips(plan.up_in) && reads_no_more(plan.activation, bytes, densities)
    }
}

/// Bytes that could be read in the time that a step takes longer when `up` waits for the gate. On an H200
/// it was between 6 and 14 MB, in a 7 B model at the paper's densities, in bf16 and int8; a layer's `up`
/// has 90 in bf16.
const WAIT: f64 = 10e6;

/// Whether no more of `up` is read by input than by open gates, after a wait for those. Without measured
/// densities only gates that are never zero say so.
fn reads_no_more(activation: Pointwise, bytes: usize, densities: Option<&SiteDensities>) -> bool {
    let read = |density: f64| density * bytes as f64;
    match densities {
        _ if !is_sparse(activation) => true,
        // Where `down` has no operation of its own, its inputs are as dense as the gate.
        Some(density) => read(density.up) <= read(density.down) + WAIT,
        None => false,
    }
}

/// Whether an activation is zero for inputs of some range.
fn is_sparse(activation: Pointwise) -> bool {
    use Pointwise::{FatRelu, Relu, ShiftedRelu};
    matches!(activation, Relu | ShiftedRelu { .. } | FatRelu { .. })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether 90 MB of `up` (or half of that) are read by input.
    fn by_input(activation: Pointwise, format: Format, up: f64, down: f64) -> bool {
        let bytes = 4096 * 11008 * format.bytes();
        reads_no_more(activation, bytes, Some(&SiteDensities { up, down, ..SiteDensities::DENSE }))
    }

    #[test]
    fn a_wait_for_the_gate_is_worth_some_bytes() {
        let bf16 = |up, down| by_input(Pointwise::Relu, Format::Bf16, up, down);
        // The paper's Llama and Falcon, then a tenth of 90 MB more and a fifth.
        assert!(bf16(0.33, 0.35) && !bf16(0.44, 0.05));
        assert!(bf16(0.45, 0.35) && !bf16(0.55, 0.35));
        let int8 = |up, down| by_input(Pointwise::Relu, Format::Int8, up, down);
        assert!(int8(0.33, 0.35) && !int8(0.44, 0.05) && int8(0.55, 0.35));
    }

    #[test]
    fn without_densities_only_gates_that_are_never_zero_say_so() {
        assert!(!reads_no_more(Pointwise::Relu, 1 << 20, None));
        assert!(reads_no_more(Pointwise::Silu, 1 << 30, None));
        assert!(by_input(Pointwise::Silu, Format::Bf16, 1.0, 0.0));
    }
}
