//! Which way round each matrix of a layer is stored: what can be skipped is a row.

use relufy_model::layer::LayerPlan;
use relufy_ops::pointwise::Pointwise;
use relufy_spec::flops::SiteDensities;

use crate::thresholds::SiteThresholds;

/// So many times the bytes must a gated MLP read with `up` by neuron before `up` is stored by input:
/// a neuron's two rows side by side are read faster than rows of two matrices. Measured, time breaks
/// even at about 1.1, in f16 and int8; at 1.2 a token is 5 to 10 % faster.
const CLEARLY: f64 = 1.2;

/// For each matrix whether its rows are inputs, so that zeros among them are skipped; else they are
/// outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LayerLayout {
    pub qkv: bool,
    pub o: bool,
    /// The gate, or `up` of a plain MLP.
    pub first: bool,
    /// `up` of a gated MLP; else the gate skips its rows.
    pub up: bool,
}

impl LayerLayout {
    /// Inputs are rows where the site has an operation or a threshold; for `up` of a gated MLP it
    /// takes measured densities as well, which say that its inputs are clearly sparser than its gate.
    pub fn new(
        plan: &LayerPlan,
        thresholds: &SiteThresholds,
        densities: Option<&SiteDensities>,
    ) -> LayerLayout {
        let skips = |op, threshold: f32| op != Pointwise::Identity || threshold > 0.0;
        let first = skips(plan.up_in, thresholds.up);
        LayerLayout {
            qkv: skips(plan.qkv_in, thresholds.qkv),
            o: skips(plan.o_in, thresholds.o),
            first,
            up: plan.gated && first && densities.is_some_and(by_input_reads_less),
        }
    }
}

/// Whether a gated MLP with `up` by input reads clearly less. In units of one matrix: the gate's
/// inputs, then `up` by either, then `down` by neuron.
fn by_input_reads_less(densities: &SiteDensities) -> bool {
    // Where `down` has no operation of its own, its inputs are as dense as the gate.
    let (input, gate) = (densities.up, densities.down);
    input + 2.0 * gate >= CLEARLY * (2.0 * input + gate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inputs_must_be_clearly_sparser_than_the_gate() {
        let reads_less =
            |up, down| by_input_reads_less(&SiteDensities { qkv: 1.0, o: 1.0, up, down });
        // The paper's Llama and Falcon, then inputs much sparser than the gate.
        assert!(!reads_less(0.33, 0.35) && !reads_less(0.44, 0.05) && !reads_less(1.0, 1.0));
        assert!(reads_less(0.1, 0.35) && reads_less(0.5, 1.0));
    }
}
