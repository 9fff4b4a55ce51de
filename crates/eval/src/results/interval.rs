//! Densities with their confidence intervals.
//!
//! Tokens of one document resemble each other, so documents, not tokens, are what was drawn
//! at random. A density is a ratio of sums over documents, of non-zeros `y` to elements `x`;
//! its standard error is that of the linearised ratio estimator (Cochran, Sampling
//! Techniques, section 6): `sqrt(n / (n - 1) * sum((y - r x)^2)) / sum(x)`.

use relufy_spec::flops::{Densities, SiteDensities};
use relufy_spec::{DecoderSpec, Site};
use serde::{Deserialize, Serialize};

use crate::activity::Activity;

/// The normal distribution's 97.5 % quantile.
const NORMAL_975: f64 = 1.959_963_984_540_054;

/// The share of non-zero elements in what each site's matrices read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DensityReport {
    /// Over all layers.
    pub mean: SiteDensities,
    /// For each layer.
    pub layers: Vec<SiteDensities>,
    /// How far the densities of other documents of the same kind would lie.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error_95: Option<DensityError>,
}

/// Half the width of each density's 95 % confidence interval over documents.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DensityError {
    /// Documents that the interval rests on.
    pub documents: u64,
    /// Of the densities over all layers.
    pub mean: SiteDensities,
    /// Of each layer's.
    pub layers: Vec<SiteDensities>,
}

impl From<Densities> for DensityReport {
    fn from(densities: Densities) -> DensityReport {
        DensityReport { mean: densities.mean(), layers: densities.layers, error_95: None }
    }
}

/// Activity over documents, and how it varies between them.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Spread {
    /// Of all documents.
    pub(crate) total: Activity,
    documents: u64,
    /// Of the documents' tokens.
    tokens: Squares,
    /// `[layers + 1][sites]`; the last row is the mean over the layers.
    sites: Vec<[Squares; 4]>,
}

/// Sums over documents of `y^2` and `y x`, where `x` is a document's tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Squares {
    squares: f64,
    cross: f64,
    sum: f64,
}

impl Squares {
    fn add(&mut self, y: f64, x: f64) {
        self.squares += y * y;
        self.cross += y * x;
        self.sum += y;
    }

    fn merge(&mut self, other: &Squares) {
        self.squares += other.squares;
        self.cross += other.cross;
        self.sum += other.sum;
    }
}

impl Spread {
    /// Of no document.
    pub(crate) fn new(layers: usize) -> Spread {
        Spread {
            total: Activity::new(layers),
            documents: 0,
            tokens: Squares::default(),
            sites: vec![[Squares::default(); 4]; layers + 1],
        }
    }

    /// Adds a document.
    pub(crate) fn add(&mut self, document: &Activity, spec: &DecoderSpec) {
        self.total.add(document);
        self.documents += 1;
        let tokens = document.tokens as f64;
        self.tokens.add(tokens, tokens);
        let mut mean = [0.0; 4];
        let layers = spec.layers.len().max(1) as f64;
        for ((sums, nonzero), layer) in
            self.sites.iter_mut().zip(&document.nonzero).zip(&spec.layers)
        {
            for (at, site) in Site::ALL.into_iter().enumerate() {
                // In tokens, so that layers of different widths have one mean.
                let y = nonzero[at] as f64 / layer.width_at(site, spec.hidden) as f64;
                sums[at].add(y, tokens);
                mean[at] += y / layers;
            }
        }
        if let Some(sums) = self.sites.last_mut() {
            sums.iter_mut().zip(mean).for_each(|(sums, y)| sums.add(y, tokens));
        }
    }

    /// Adds another's documents.
    pub(crate) fn merge(&mut self, other: &Spread) {
        self.total.add(&other.total);
        self.documents += other.documents;
        self.tokens.merge(&other.tokens);
        for (mine, theirs) in self.sites.iter_mut().flatten().zip(other.sites.iter().flatten()) {
            mine.merge(theirs);
        }
    }

    /// Densities and their intervals; none of fewer than two documents.
    pub(crate) fn report(&self, spec: &DecoderSpec) -> DensityReport {
        let mut report = DensityReport::from(self.total.densities(spec));
        let error = |sums: &[Squares; 4]| {
            let [qkv, o, up, down] = sums.map(|sums| NORMAL_975 * self.stderr(&sums));
            // `Site::ALL` is in the order of the fields.
            SiteDensities { qkv, o, up, down }
        };
        if let (2.., Some((mean, layers))) = (self.documents, self.sites.split_last()) {
            report.error_95 = Some(DensityError {
                documents: self.documents,
                mean: error(mean),
                layers: layers.iter().map(error).collect(),
            });
        }
        report
    }

    fn stderr(&self, y: &Squares) -> f64 {
        let n = self.documents as f64;
        let ratio = y.sum / self.tokens.sum;
        let residual = y.squares - 2.0 * ratio * y.cross + ratio * ratio * self.tokens.squares;
        // Sums of squares cancel where a site is dense: what is left is rounding.
        let least = 1e-14 * y.squares;
        if residual <= least { 0.0 } else { (n / (n - 1.0) * residual).sqrt() / self.tokens.sum }
    }
}

#[cfg(test)]
mod tests {
    use relufy_spec::family;
    use serde_json::json;

    use super::*;

    fn spec() -> DecoderSpec {
        let config = json!({
            "model_type": "opt", "vocab_size": 10, "hidden_size": 8, "word_embed_proj_dim": 8,
            "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 32,
            "activation_function": "relu", "do_layer_norm_before": true
        });
        family::parse(&config).unwrap().spec
    }

    fn document(tokens: u64, up: [u64; 2]) -> Activity {
        let layer = |up| [8 * tokens, 8 * tokens, up, 32 * tokens];
        Activity { tokens, nonzero: up.map(layer).to_vec() }
    }

    #[test]
    fn documents_of_one_length_have_the_error_of_a_mean() {
        let spec = spec();
        // Densities 1/4, 1/2 and 3/4 of layer 0 (up reads 8 elements), 1/2 always of layer 1.
        let documents = [20, 40, 60].map(|up| document(10, [up, 40]));
        let mut spread = Spread::new(2);
        documents.iter().for_each(|document| spread.add(document, &spec));
        let report = spread.report(&spec);
        let error = report.error_95.unwrap();
        assert_eq!((report.layers[0].up, report.layers[1].up, report.mean.up), (0.5, 0.5, 0.5));
        // Sample deviation 1/4 of three documents.
        let expected = NORMAL_975 * 0.25 / 3f64.sqrt();
        assert!((error.layers[0].up - expected).abs() < 1e-12, "{error:?}");
        assert!((error.mean.up - expected / 2.0).abs() < 1e-12, "{error:?}");
        assert_eq!((error.layers[1].up, error.layers[0].qkv, error.mean.down), (0.0, 0.0, 0.0));
        assert_eq!(error.documents, 3);
    }

    #[test]
    fn documents_weigh_by_their_length() {
        let spec = spec();
        let mut spread = Spread::new(2);
        let documents = [document(10, [40, 0]), document(30, [60, 0])];
        documents.iter().for_each(|document| spread.add(document, &spec));
        // r = 100 / 320; residuals in tokens: 5 - 10 r and 7.5 - 30 r.
        let r: f64 = 100.0 / 320.0;
        let residual = (5.0 - 10.0 * r).powi(2) + (7.5 - 30.0 * r).powi(2);
        let expected = NORMAL_975 * (2.0 * residual).sqrt() / 40.0;
        let report = spread.report(&spec);
        assert_eq!(report.layers[0].up, r);
        assert!((report.error_95.unwrap().layers[0].up - expected).abs() < 1e-12);

        let (mut one, mut two) = (Spread::new(2), Spread::new(2));
        one.add(&documents[0], &spec);
        assert_eq!(one.report(&spec).error_95, None, "one document has no spread");
        two.add(&documents[1], &spec);
        one.merge(&two);
        assert_eq!(one, spread);
    }
}
