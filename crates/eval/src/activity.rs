//! How many activations were not zero: counted per token row in the passes that score, and
//! summed per document, so that a density has a confidence interval over documents.
//!
//! A document's activity is that of its requests' tokens as if each request ran alone:
//! contexts and all continuation tokens but the last, which is only predicted. However the
//! work is shared between requests, the numbers are the same.

use std::ops::Range;

use relufy_model::{Point, Side, Tap, Want};
use relufy_spec::flops::{Densities, SiteDensities};
use relufy_spec::{DecoderSpec, Site};
use serde::{Deserialize, Serialize};

/// Non-zeros at each layer's sites over some tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Activity {
    /// Tokens that entered the model.
    pub tokens: u64,
    /// Non-zeros, `[layers][sites in the order of Site::ALL]`.
    pub nonzero: Vec<[u64; 4]>,
}

impl Activity {
    /// Of no token, in a model of so many layers.
    pub fn new(layers: usize) -> Activity {
        Activity { tokens: 0, nonzero: vec![[0; 4]; layers] }
    }

    /// Adds non-zeros at a site.
    pub(crate) fn count(&mut self, layer: usize, site: Site, nonzero: u64) {
        if let Some(sites) = self.nonzero.get_mut(layer) {
            sites[site.index()] += nonzero;
        }
    }

    /// Adds another's counts.
    pub fn add(&mut self, other: &Activity) {
        self.tokens += other.tokens;
        for (mine, theirs) in self.nonzero.iter_mut().flatten().zip(other.nonzero.iter().flatten())
        {
            *mine += theirs;
        }
    }

    /// Shares of non-zeros; NaN of no token.
    pub fn densities(&self, spec: &DecoderSpec) -> Densities {
        let layers = self
            .nonzero
            .iter()
            .zip(widths(spec))
            .map(|(nonzero, widths)| {
                let share = |site: Site| {
                    let at = site.index();
                    nonzero[at] as f64 / (self.tokens * widths[at] as u64) as f64
                };
                SiteDensities {
                    qkv: share(Site::QkvIn),
                    o: share(Site::OIn),
                    up: share(Site::UpIn),
                    down: share(Site::DownIn),
                }
            })
            .collect();
        Densities { layers }
    }
}

/// Counts the non-zeros of a pass, each run of token rows for its owner.
pub(crate) struct RowTap {
    /// Runs of rows, and the index of whose activity they are.
    rows: Vec<(Range<usize>, usize)>,
    activities: Vec<Activity>,
}

impl RowTap {
    /// For so many owners, in a model of so many layers.
    pub(crate) fn new(layers: usize, owners: usize) -> RowTap {
        RowTap { rows: Vec::new(), activities: vec![Activity::new(layers); owners] }
    }

    /// A pass begins: owners with their numbers of tokens, in the order of its rows.
    pub(crate) fn begin(&mut self, parts: impl IntoIterator<Item = (usize, usize)>) {
        self.rows.clear();
        let mut end = 0;
        for (owner, tokens) in parts {
            self.rows.push((end..end + tokens, owner));
            self.activities[owner].tokens += tokens as u64;
            end += tokens;
        }
    }

    /// An owner's activity so far.
    pub(crate) fn of(&self, owner: usize) -> &Activity {
        &self.activities[owner]
    }
}

impl Tap for RowTap {
    fn want(&self, point: Point) -> Want {
        if point.side == Side::At { Want::NonzeroRows } else { Want::Nothing }
    }

    fn nonzero_rows(&mut self, point: Point, nonzero: &[u32], _width: usize) {
        for (rows, owner) in &self.rows {
            let sum = nonzero[rows.clone()].iter().map(|&count| u64::from(count)).sum();
            self.activities[*owner].count(point.layer, point.site, sum);
        }
    }
}

/// How many elements a token has at each layer's sites, in the order of `Site::ALL`.
fn widths(spec: &DecoderSpec) -> impl Iterator<Item = [usize; 4]> + '_ {
    spec.layers.iter().map(|layer| Site::ALL.map(|site| layer.width_at(site, spec.hidden)))
}
