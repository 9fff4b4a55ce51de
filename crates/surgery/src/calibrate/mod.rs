//! Measures a model on text: how dense each activation site is, how its pre-activations
//! are distributed, and which shift of the ReLU would give a wanted sparsity (paper
//! section 5.3).

mod histogram;
mod shifts;
mod text;

use relufy_data::Progress;
use relufy_model::{Decoder, DensityTap, Point, Side, Tap, Tokens, Want};
use relufy_spec::Site;
use serde::{Deserialize, Serialize};

use histogram::EDGES;
pub use histogram::Histogram;
pub use shifts::{Shifts, fit_shifts};
pub use text::sequences;

use crate::{Error, Result};

/// How to measure.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// Tokens in one pass through the model; bounds the memory.
    pub batch_tokens: usize,
    /// The quantiles to report.
    pub quantiles: Vec<f64>,
    /// The sparsities to report a shift for.
    pub sparsities: Vec<f64>,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            batch_tokens: 2048,
            quantiles: vec![0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999],
            sparsities: vec![0.5, 0.7, 0.8, 0.9, 0.95, 0.99],
        }
    }
}

/// What was measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// Tokens that went through the model.
    pub tokens: u64,
    /// The edges of all histograms: bin `i` counts `edges[i - 1] <= x < edges[i]`.
    pub edges: Vec<f32>,
    /// The layers, from the first.
    pub layers: Vec<LayerCalibration>,
}

/// One layer, by site.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerCalibration {
    /// The input of the query, key and value projections.
    pub qkv: SiteCalibration,
    /// The input of the attention output projection.
    pub o: SiteCalibration,
    /// The input of the up and gate projections.
    pub up: SiteCalibration,
    /// The input of the down projection; its pre-activations are what the MLP's activation
    /// sees.
    pub down: SiteCalibration,
}

/// One site of one layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SiteCalibration {
    /// The share of non-zeros among what the matrices read.
    pub density: f64,
    /// Quantiles of the pre-activations.
    pub quantiles: Vec<Quantile>,
    /// For each wanted sparsity the `shift` with which `max(x - shift, 0)` gives it: that
    /// quantile of the pre-activations.
    pub shifts: Vec<Quantile>,
    /// Pre-activations: what the site's operation sees.
    pub histogram: Histogram,
}

/// A share of values, and the value below which they lie.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Quantile {
    /// The share.
    pub q: f64,
    /// The value.
    pub value: f64,
}

/// Runs `decoder` over `sequences` and measures every site of every layer.
///
/// # Errors
/// No tokens; a quantile or sparsity that is none; tokens or lengths that the model does
/// not take.
pub fn calibrate(
    decoder: &Decoder,
    sequences: &[Vec<u32>],
    options: &Options,
    progress: &dyn Progress,
) -> Result<Calibration> {
    for share in options.quantiles.iter().chain(&options.sparsities) {
        check_share(*share)?;
    }
    let mut tap = CalibrationTap::new(decoder);
    let tokens = run(decoder, sequences, options.batch_tokens, &mut tap, progress)?;
    let layers = (0..decoder.spec().layers.len())
        .map(|n| LayerCalibration {
            qkv: tap.site(n, Site::QkvIn, options),
            o: tap.site(n, Site::OIn, options),
            up: tap.site(n, Site::UpIn, options),
            down: tap.site(n, Site::DownIn, options),
        })
        .collect();
    Ok(Calibration { tokens, edges: Histogram::edges().to_vec(), layers })
}

fn check_share(share: f64) -> Result<()> {
    if share > 0.0 && share < 1.0 {
        return Ok(());
    }
    Err(Error::Calibration { why: format!("a share of {share}; it must lie between 0 and 1") })
}

/// Shows a tap all sequences, several in a pass. Returns the number of tokens.
fn run(
    decoder: &Decoder,
    sequences: &[Vec<u32>],
    batch_tokens: usize,
    tap: &mut dyn Tap,
    progress: &dyn Progress,
) -> Result<u64> {
    let total: usize = sequences.iter().map(Vec::len).sum();
    if total == 0 {
        return Err(Error::Calibration { why: "no tokens to measure on".to_owned() });
    }
    progress.start("calibrating (tokens)", Some(total as u64));
    let mut rest = sequences;
    while !rest.is_empty() {
        let mut tokens = 0;
        let fits = |sequence: &&Vec<u32>| {
            tokens += sequence.len();
            tokens <= batch_tokens
        };
        // At least one, however long it is.
        let take = rest.iter().take_while(fits).count().max(1);
        let (batch, others) = rest.split_at(take);
        let pass = Tokens::packed(batch.concat(), batch.iter().map(Vec::len));
        decoder.hidden(&pass, tap)?;
        progress.advance(pass.len() as u64);
        rest = others;
    }
    progress.finish();
    Ok(total as u64)
}

/// Counts pre-activations over the grid, and non-zeros.
struct CalibrationTap {
    /// By layer and site, in the order of [`Site::ALL`].
    histograms: Vec<[Histogram; 4]>,
    density: DensityTap,
    /// Layers whose branches read one norm: what `qkv` sees, `up` sees.
    shared: Vec<bool>,
}

impl CalibrationTap {
    fn new(decoder: &Decoder) -> CalibrationTap {
        let layers = &decoder.spec().layers;
        CalibrationTap {
            histograms: layers.iter().map(|_| Default::default()).collect(),
            density: DensityTap::new(layers.len()),
            shared: layers.iter().map(relufy_spec::Layer::shares_norm).collect(),
        }
    }

    fn site(&self, n: usize, site: Site, options: &Options) -> SiteCalibration {
        let source = if self.shared[n] && site == Site::UpIn { Site::QkvIn } else { site };
        let histogram = self.histograms[n][source.index()].clone();
        let at = |shares: &[f64]| {
            let value = |q: &f64| Some(Quantile { q: *q, value: histogram.quantile(*q)? });
            shares.iter().filter_map(value).collect()
        };
        SiteCalibration {
            density: self.density.layer(n, site),
            quantiles: at(&options.quantiles),
            shifts: at(&options.sparsities),
            histogram,
        }
    }
}

impl Tap for CalibrationTap {
    fn want(&self, point: Point) -> Want {
        match point.side {
            Side::Before => Want::Histogram(EDGES.clone()),
            Side::At => self.density.want(point),
        }
    }

    fn nonzero(&mut self, point: Point, nonzero: u64, total: u64) {
        self.density.nonzero(point, nonzero, total);
    }

    fn histogram(&mut self, point: Point, counts: &[u64]) {
        self.histograms[point.layer][point.site.index()].add(counts);
    }
}
