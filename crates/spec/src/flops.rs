//! The one place that counts what a token costs.
//!
//! **Unit.** One multiply-accumulate (MAC) through a linear weight counts 1, as in the
//! "FLOPs" columns of the paper's table 1 (not 2). Counted is one token through queries,
//! keys, values, output, gate, up, down and, where a convention says so, the head.
//! Embedding look-ups, biases, norms and activations cost nothing here. Products of
//! queries with keys and of probabilities with values depend on the context's length and
//! stand apart: [`attention_macs`].
//!
//! **Sparsity.** A zero at a matrix's input saves that input's column. In a gated MLP a
//! zero of the gate also saves the row of `up` that it would be multiplied with. `down`'s
//! input is zero where the gate is (an exact zero of `up` is rare), so its density stands
//! for the gate's.

use serde::{Deserialize, Serialize};

use crate::{DecoderSpec, Layer, MlpKind, Site};

/// The fraction of non-zero elements at each site of a layer, 0 to 1.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SiteDensities {
    /// At the input of the query, key and value projections.
    pub qkv: f64,
    /// At the input of the attention output projection.
    pub o: f64,
    /// At the input of the up and gate projections.
    pub up: f64,
    /// At the input of the down projection.
    pub down: f64,
}

impl SiteDensities {
    /// No zero anywhere.
    pub const DENSE: SiteDensities = SiteDensities { qkv: 1.0, o: 1.0, up: 1.0, down: 1.0 };

    /// From sparsities in per cent, as the paper's tables give them; attention's output is
    /// dense there.
    pub fn from_sparsity_percent(qkv: f64, up: f64, down: f64) -> SiteDensities {
        let density = |percent: f64| 1.0 - percent / 100.0;
        SiteDensities { qkv: density(qkv), o: 1.0, up: density(up), down: density(down) }
    }

    /// The mean of some, site by site; NaN of none.
    pub fn mean(all: &[SiteDensities]) -> SiteDensities {
        let mean =
            |at: fn(&SiteDensities) -> f64| all.iter().map(at).sum::<f64>() / all.len() as f64;
        SiteDensities {
            qkv: mean(|each| each.qkv),
            o: mean(|each| each.o),
            up: mean(|each| each.up),
            down: mean(|each| each.down),
        }
    }

    /// The density at `site`.
    pub fn get(&self, site: Site) -> f64 {
        match site {
            Site::QkvIn => self.qkv,
            Site::OIn => self.o,
            Site::UpIn => self.up,
            Site::DownIn => self.down,
        }
    }
}

/// The densities of all layers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Densities {
    /// One a layer, from the first.
    pub layers: Vec<SiteDensities>,
}

impl Densities {
    /// The same in each of `layers` layers.
    pub fn uniform(layers: usize, each: SiteDensities) -> Densities {
        Densities { layers: vec![each; layers] }
    }

    /// No zero anywhere.
    pub fn dense(layers: usize) -> Densities {
        Densities::uniform(layers, SiteDensities::DENSE)
    }

    /// The mean over the layers; dense where there are none.
    pub fn mean(&self) -> SiteDensities {
        match self.layers.is_empty() {
            true => SiteDensities::DENSE,
            false => SiteDensities::mean(&self.layers),
        }
    }
}

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Convention {
    /// The layers only. Savings multiply: of a gated MLP's `up`, the columns of non-zero
    /// inputs in the rows of non-zero gates are left.
    Blocks,
    /// As `Blocks`, and the head.
    WithHead,
    /// What the paper's Llama and Falcon rows agree with, as far as they agree: the head
    /// counts where it has weights of its own (Llama, not Falcon, whose head is its
    /// embedding); `up` of a gated MLP is charged once, for the larger of its two
    /// sparsities; attention's output projection is always dense.
    PaperCompat,
}

impl Convention {
    /// Every convention.
    pub const ALL: [Convention; 3] =
        [Convention::Blocks, Convention::WithHead, Convention::PaperCompat];

    /// What tables and files call it.
    pub fn name(self) -> &'static str {
        match self {
            Convention::Blocks => "blocks only",
            Convention::WithHead => "with head",
            Convention::PaperCompat => "paper-compat",
        }
    }
}

/// MACs of one token in each convention.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct FlopsReport {
    /// [`Convention::Blocks`].
    pub blocks: f64,
    /// [`Convention::WithHead`].
    pub with_head: f64,
    /// [`Convention::PaperCompat`].
    pub paper_compat: f64,
}

impl FlopsReport {
    /// Counts `spec` at `densities` in every convention.
    pub fn new(spec: &DecoderSpec, densities: &Densities) -> FlopsReport {
        let count = |convention| macs_per_token(spec, densities, convention);
        FlopsReport {
            blocks: count(Convention::Blocks),
            with_head: count(Convention::WithHead),
            paper_compat: count(Convention::PaperCompat),
        }
    }

    /// The count in one convention.
    pub fn get(&self, convention: Convention) -> f64 {
        match convention {
            Convention::Blocks => self.blocks,
            Convention::WithHead => self.with_head,
            Convention::PaperCompat => self.paper_compat,
        }
    }
}

/// MACs of one token at mean densities. Layers that `densities` does not list are dense.
pub fn macs_per_token(spec: &DecoderSpec, densities: &Densities, convention: Convention) -> f64 {
    let each = densities.layers.iter().copied().chain(std::iter::repeat(SiteDensities::DENSE));
    let blocks: f64 = spec
        .layers
        .iter()
        .zip(each)
        .map(|(layer, density)| layer_macs(spec.hidden, layer, density, convention))
        .sum();
    let head = match convention {
        Convention::Blocks => false,
        Convention::WithHead => true,
        Convention::PaperCompat => !spec.head.tied,
    };
    if head { blocks + head_macs(spec) as f64 } else { blocks }
}

fn layer_macs(hidden: usize, layer: &Layer, density: SiteDensities, convention: Convention) -> f64 {
    let size = LayerSizes::new(hidden, layer);
    let paper = convention == Convention::PaperCompat;
    let o_density = if paper { 1.0 } else { density.o };
    let up_density = match layer.mlp.kind {
        MlpKind::Plain => density.up,
        MlpKind::Gated if paper => density.up + density.up.min(density.down),
        MlpKind::Gated => density.up + density.up * density.down,
    };
    size.qkv as f64 * density.qkv
        + size.o as f64 * o_density
        + size.up as f64 * up_density
        + size.down as f64 * density.down
}

/// MACs of a layer's dense matrices; in a gated MLP `up` is one of two of its size.
struct LayerSizes {
    qkv: u64,
    o: u64,
    up: u64,
    down: u64,
}

impl LayerSizes {
    fn new(hidden: usize, layer: &Layer) -> LayerSizes {
        let product = |a: usize, b: usize| (a as u64).saturating_mul(b as u64);
        LayerSizes {
            qkv: product(hidden, layer.attention.qkv_width()),
            o: product(layer.attention.q_width(), hidden),
            up: product(hidden, layer.mlp.ffn),
            down: product(layer.mlp.ffn, hidden),
        }
    }
}

/// MACs of one token through the head, tied or not.
pub fn head_macs(spec: &DecoderSpec) -> u64 {
    (spec.hidden as u64).saturating_mul(spec.vocab as u64)
}

/// How many elements one token has non-zero at each place of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ActiveCounts {
    /// Inputs of the query, key and value projections, of `hidden`.
    pub qkv: usize,
    /// Inputs of the attention output projection, of `heads * head_dim`.
    pub o: usize,
    /// Inputs of the up and gate projections, of `hidden`.
    pub up: usize,
    /// Outputs of the gate's activation, of `ffn`; not read in a plain MLP.
    pub gate: usize,
    /// Inputs of the down projection, of `ffn`.
    pub down: usize,
}

/// The MACs that one token needs in one layer, exactly: what an engine does that skips
/// every zero and nothing else.
pub fn active_macs(hidden: usize, layer: &Layer, active: &ActiveCounts) -> u64 {
    let product = |a: usize, b: usize| (a as u64).saturating_mul(b as u64);
    let up_rows = match layer.mlp.kind {
        MlpKind::Plain => layer.mlp.ffn,
        // All rows of the gate, and those of `up` that the gate lets through.
        MlpKind::Gated => layer.mlp.ffn.saturating_add(active.gate),
    };
    [
        product(active.qkv, layer.attention.qkv_width()),
        product(active.o, hidden),
        product(active.up, up_rows),
        product(active.down, hidden),
    ]
    .into_iter()
    .fold(0, u64::saturating_add)
}

/// MACs of one token's attention scores and weighted values, all layers, when `context`
/// keys can be seen (itself included); a layer's window limits them.
pub fn attention_macs(spec: &DecoderSpec, context: usize) -> u64 {
    spec.layers
        .iter()
        .map(|layer| {
            let seen = layer.attention.window.map_or(context, |window| window.min(context));
            2 * (layer.attention.q_width() as u64).saturating_mul(seen as u64)
        })
        .fold(0, u64::saturating_add)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::family::parse;
    use serde_json::json;

    fn spec(config: serde_json::Value) -> DecoderSpec {
        parse(&config).unwrap().spec
    }

    fn llama_7b() -> DecoderSpec {
        spec(json!({"model_type": "llama"}))
    }

    fn falcon_7b() -> DecoderSpec {
        spec(json!({"model_type": "falcon"}))
    }

    fn opt(hidden: usize, layers: usize) -> DecoderSpec {
        spec(json!({
            "model_type": "opt", "hidden_size": hidden, "num_hidden_layers": layers,
            "num_attention_heads": 32, "ffn_dim": 4 * hidden, "word_embed_proj_dim": hidden
        }))
    }

    fn giga(spec: &DecoderSpec, sparsity: [f64; 3], convention: Convention) -> f64 {
        let [qkv, down, up] = sparsity;
        let each = SiteDensities::from_sparsity_percent(qkv, up, down);
        macs_per_token(spec, &Densities::uniform(spec.layers.len(), each), convention) / 1e9
    }

    /// Sparsities in the paper's order (QKV, down, up); expected are our own products of
    /// its sparsities, to the digits written; the printed FLOPs stand behind.
    #[test]
    fn the_papers_rows() {
        use Convention::*;
        let (llama, falcon) = (llama_7b(), falcon_7b());
        let (opt_2_7b, opt_6_7b) = (opt(2560, 32), opt(4096, 32));
        for (spec, sparsity, convention, expected, printed) in [
            (&llama, [0.0, 0.0, 0.0], WithHead, 6.607, 6.6),
            (&llama, [0.0, 0.0, 0.0], PaperCompat, 6.607, 6.6),
            (&llama, [0.0, 62.0, 0.0], PaperCompat, 4.818, 4.8),
            (&llama, [51.0, 65.0, 67.0], PaperCompat, 2.914, 2.9),
            (&falcon, [0.0, 1.0, 0.0], Blocks, 6.600, 6.6),
            (&falcon, [0.0, 1.0, 0.0], PaperCompat, 6.600, 6.6),
            (&falcon, [0.0, 94.0, 0.0], PaperCompat, 4.142, 4.1),
            (&falcon, [56.0, 95.0, 56.0], PaperCompat, 2.255, 2.2),
            (&opt_2_7b, [0.0, 96.0, 0.0], WithHead, 1.840, 1.8),
            (&opt_2_7b, [50.0, 96.0, 35.0], Blocks, 1.103, 1.1),
            (&opt_6_7b, [0.0, 97.0, 0.0], WithHead, 4.565, 4.5),
        ] {
            let found = giga(spec, sparsity, convention);
            assert!((found - expected).abs() < 0.0006, "{found} for {expected} ({convention:?})");
            assert!((found - printed).abs() < 0.1, "{found} for the paper's {printed}");
        }
    }

    #[test]
    fn other_ways_to_count_differ() {
        let llama = llama_7b();
        assert!((giga(&llama, [0.0; 3], Convention::Blocks) - 6.476).abs() < 0.0006);
        // Both sparsities of `up` multiplied, with the head: not what the paper prints.
        let multiplied = giga(&llama, [51.0, 65.0, 67.0], Convention::WithHead);
        assert!((multiplied - 2.605).abs() < 0.0006, "{multiplied}");
    }

    #[test]
    fn exact_counts_agree_with_densities() {
        let llama = llama_7b();
        let (hidden, layer) = (llama.hidden, &llama.layers[0]);
        let full = ActiveCounts { qkv: 4096, o: 4096, up: 4096, gate: 11_008, down: 11_008 };
        let all = active_macs(hidden, layer, &full);
        assert_eq!(all, 4 * 4096 * 4096 + 3 * 4096 * 11_008);
        let dense = macs_per_token(&llama, &Densities::dense(32), Convention::Blocks);
        assert_eq!(all as f64 * 32.0, dense);

        let some = ActiveCounts { qkv: 1024, o: 4096, up: 2048, gate: 2752, down: 2752 };
        let each = SiteDensities { qkv: 0.25, o: 1.0, up: 0.5, down: 0.25 };
        let mean = macs_per_token(&llama, &Densities::uniform(32, each), Convention::Blocks);
        assert_eq!(active_macs(hidden, layer, &some) as f64 * 32.0, mean);
    }

    #[test]
    fn windows_limit_attention() {
        let mut llama = llama_7b();
        assert_eq!(attention_macs(&llama, 100), 32 * 2 * 4096 * 100);
        llama.layers[0].attention.window = Some(10);
        assert_eq!(attention_macs(&llama, 100), 31 * 2 * 4096 * 100 + 2 * 4096 * 10);
    }

    #[test]
    fn the_mean_is_over_layers() {
        let mut densities = Densities::dense(2);
        densities.layers[1].up = 0.5;
        assert_eq!(densities.mean(), SiteDensities { up: 0.75, ..SiteDensities::DENSE });
    }
}
