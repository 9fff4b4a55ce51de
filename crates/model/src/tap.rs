//! Seeing activations without forking the forward pass: a tap declares what it wants at
//! which point, and only that is produced.

use std::sync::Arc;

use candle_core::Tensor;
use relufy_ops::reduce::{self, NonzeroCounts};
use relufy_spec::Site;
use relufy_spec::flops::{Densities, SiteDensities};

use crate::Result;

/// Which side of a site's operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// What the site's operation sees; at [`Site::DownIn`] the pre-activation: what the
    /// MLP's activation sees (of the gate, where there is one).
    Before,
    /// What the matrices read.
    At,
}

/// A place in the decoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Point {
    /// The layer.
    pub layer: usize,
    /// The site.
    pub site: Site,
    /// Before its operation, or after.
    pub side: Side,
}

/// What a tap wants at a point.
#[derive(Clone, Debug, Default)]
pub enum Want {
    /// Nothing; costs nothing.
    #[default]
    Nothing,
    /// How many elements are not zero.
    Nonzero,
    /// How many elements of each token are not zero.
    NonzeroRows,
    /// How many elements fall between successive edges (ascending); one count below the
    /// first edge and one from the last on, so `edges + 1` counts.
    Histogram(Arc<[f32]>),
    /// The values themselves, `[n_tokens, width]`.
    Values,
}

/// Whoever wants to see activations.
pub trait Tap {
    /// What is wanted at a point; asked once a layer and pass.
    fn want(&self, point: Point) -> Want {
        let _ = point;
        Want::Nothing
    }

    /// The answer to [`Want::Nonzero`], at the end of the pass.
    fn nonzero(&mut self, point: Point, nonzero: u64, total: u64) {
        let _ = (point, nonzero, total);
    }

    /// The answer to [`Want::NonzeroRows`]: a count for each token of the pass, out of `width`
    /// elements.
    fn nonzero_rows(&mut self, point: Point, nonzero: &[u32], width: usize) {
        let _ = (point, nonzero, width);
    }

    /// The answer to [`Want::Histogram`].
    fn histogram(&mut self, point: Point, counts: &[u64]) {
        let _ = (point, counts);
    }

    /// The answer to [`Want::Values`].
    ///
    /// # Errors
    /// Whatever the tap cannot do with them ends the pass.
    fn values(&mut self, point: Point, values: &Tensor) -> Result<()> {
        let _ = (point, values);
        Ok(())
    }
}

/// Sees nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoTap;

impl Tap for NoTap {}

/// Gives a tap what it wants of `values` at a point.
pub(crate) fn show(tap: &mut dyn Tap, point: Point, values: &Tensor) -> Result<()> {
    match tap.want(point) {
        Want::Nothing => {}
        Want::Nonzero => {
            tap.nonzero(point, reduce::count_nonzero(values)?, values.elem_count() as u64);
        }
        Want::NonzeroRows => {
            let counts = reduce::count_nonzero_rows(values)?;
            let width = values.elem_count().checked_div(counts.len()).unwrap_or(0);
            tap.nonzero_rows(point, &counts, width);
        }
        Want::Histogram(edges) => tap.histogram(point, &reduce::histogram(values, &edges)?),
        Want::Values => tap.values(point, values)?,
    }
    Ok(())
}

/// Stands in for a tap during a pass, and gives it its [`Want::Nonzero`] answers at the end: a GPU
/// would have to stop for each of them.
pub(crate) struct Deferred<'a> {
    tap: &'a mut dyn Tap,
    counts: NonzeroCounts,
    /// What was counted, and out of how many.
    asked: Vec<(Point, u64)>,
}

impl<'a> Deferred<'a> {
    pub fn new(tap: &'a mut dyn Tap) -> Deferred<'a> {
        Deferred { tap, counts: NonzeroCounts::default(), asked: Vec::new() }
    }

    /// Tells the tap.
    pub fn finish(self) -> Result<()> {
        for (nonzero, (point, total)) in self.counts.read()?.into_iter().zip(self.asked) {
            self.tap.nonzero(point, nonzero, total);
        }
        Ok(())
    }
}

impl Tap for Deferred<'_> {
    fn want(&self, point: Point) -> Want {
        match self.tap.want(point) {
            Want::Nonzero => Want::Values,
            other => other,
        }
    }

    fn nonzero_rows(&mut self, point: Point, nonzero: &[u32], width: usize) {
        self.tap.nonzero_rows(point, nonzero, width);
    }

    fn histogram(&mut self, point: Point, counts: &[u64]) {
        self.tap.histogram(point, counts);
    }

    fn values(&mut self, point: Point, values: &Tensor) -> Result<()> {
        if !matches!(self.tap.want(point), Want::Nonzero) {
            return self.tap.values(point, values);
        }
        self.counts.count(values)?;
        self.asked.push((point, values.elem_count() as u64));
        Ok(())
    }
}

/// Counts the non-zeros that the matrices read, per layer and site.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DensityTap {
    counts: Vec<[Count; 4]>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Count {
    nonzero: u64,
    total: u64,
}

impl Count {
    fn density(self) -> f64 {
        if self.total == 0 { f64::NAN } else { self.nonzero as f64 / self.total as f64 }
    }
}

impl DensityTap {
    /// For a decoder of so many layers.
    pub fn new(layers: usize) -> DensityTap {
        DensityTap { counts: vec![[Count::default(); 4]; layers] }
    }

    /// The share of non-zeros at a site of a layer; NaN before anything was counted.
    pub fn layer(&self, layer: usize, site: Site) -> f64 {
        self.counts.get(layer).map_or(f64::NAN, |sites| sites[site.index()].density())
    }

    /// The share of non-zeros at a site, over all layers.
    pub fn mean(&self, site: Site) -> f64 {
        let mut sum = Count::default();
        for sites in &self.counts {
            sum.nonzero += sites[site.index()].nonzero;
            sum.total += sites[site.index()].total;
        }
        sum.density()
    }

    /// Whether nothing was counted yet.
    pub fn is_empty(&self) -> bool {
        self.counts.iter().flatten().all(|count| count.total == 0)
    }

    /// All densities, as FLOPs are counted from.
    pub fn densities(&self) -> Densities {
        let layers = (0..self.counts.len())
            .map(|n| SiteDensities {
                qkv: self.layer(n, Site::QkvIn),
                o: self.layer(n, Site::OIn),
                up: self.layer(n, Site::UpIn),
                down: self.layer(n, Site::DownIn),
            })
            .collect();
        Densities { layers }
    }

    /// Forgets what was counted.
    pub fn reset(&mut self) {
        *self = DensityTap::new(self.counts.len());
    }

    /// Adds another tap's counts.
    pub fn merge(&mut self, other: &DensityTap) {
        for (mine, theirs) in self.counts.iter_mut().flatten().zip(other.counts.iter().flatten()) {
            mine.nonzero += theirs.nonzero;
            mine.total += theirs.total;
        }
    }
}

impl Tap for DensityTap {
    fn want(&self, point: Point) -> Want {
        if point.side == Side::At { Want::Nonzero } else { Want::Nothing }
    }

    fn nonzero(&mut self, point: Point, nonzero: u64, total: u64) {
        if let Some(sites) = self.counts.get_mut(point.layer) {
            let count = &mut sites[point.site.index()];
            count.nonzero += nonzero;
            count.total += total;
        }
    }
}
