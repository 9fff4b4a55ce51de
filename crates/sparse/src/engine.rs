//! A decoder that was packed for decoding.

use std::sync::Arc;

use relufy_model::Decoder;
use relufy_spec::flops::{Densities, SiteDensities};
use relufy_spec::{DecoderSpec, Layer};

use crate::layout::LayerLayout;
use crate::matrix::Matrix;
use crate::thresholds::{SiteThresholds, Thresholds};
use crate::weights::Weights;
use crate::{Error, Format, Result};

pub(crate) use crate::packed::{Packed, PackedLayer};

/// How weights are packed and who decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// How weights are stored.
    pub format: Format,
    /// Threads that decode one token together; 0 for all processors.
    pub threads: usize,
    /// The most tokens of a sequence; 0 for all positions of the model. Never more than those.
    pub context: usize,
}

impl Default for Options {
    /// f16 on all processors, with all positions.
    fn default() -> Options {
        Options { format: Format::F16, threads: 0, context: 0 }
    }
}

/// What was measured of a decoder on text.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Calibrated {
    /// The share of non-zeros at each site. A layout is chosen by it: `up` of a gated MLP is stored by
    /// input where its inputs are clearly sparser than the gate, else by neuron. The result is the
    /// same to rounding.
    pub densities: Option<Densities>,
    /// Magnitudes to take as zero. The result is another one.
    pub thresholds: Option<Thresholds>,
}

impl Calibrated {
    fn check(&self, spec: &DecoderSpec) -> Result<()> {
        if let Some(thresholds) = &self.thresholds {
            thresholds.check(spec)?;
        }
        check_densities(self.densities.as_ref(), spec)
    }

    pub(crate) fn densities(&self, n: usize) -> Option<&SiteDensities> {
        self.densities.as_ref()?.layers.get(n)
    }

    pub(crate) fn thresholds(&self, n: usize, layer: &Layer) -> SiteThresholds {
        self.thresholds.as_ref().map(|found| found.layer(n, layer)).unwrap_or_default()
    }
}

/// Demands one for each layer, where there are some.
pub(crate) fn check_densities(densities: Option<&Densities>, spec: &DecoderSpec) -> Result<()> {
    let (expected, found) = (spec.layers.len(), densities.map(|found| found.layers.len()));
    if let Some(found) = found.filter(|found| *found != expected) {
        let why = format!("densities of {found} layers for a decoder of {expected}");
        return Err(Error::Decoder(why));
    }
    Ok(())
}

/// A decoder packed for decoding. Copies share the weights and the threads; sequences of several
/// [`Session`](crate::Session)s are decoded in turns, token by token.
#[derive(Clone)]
pub struct Engine {
    pub(crate) packed: Arc<Packed>,
}

impl Engine {
    /// Packs a decoder's weights. The decoder is not needed afterwards.
    ///
    /// # Errors
    /// A decoder that is not on the CPU in f32; no memory, no thread.
    pub fn new(decoder: &Decoder, options: &Options) -> Result<Engine> {
        Engine::calibrated(decoder, options, &Calibrated::default())
    }

    /// The same with what was measured of the decoder.
    ///
    /// # Errors
    /// As [`Engine::new`]; measurements of another number of layers, thresholds that are none.
    pub fn calibrated(
        decoder: &Decoder,
        options: &Options,
        calibrated: &Calibrated,
    ) -> Result<Engine> {
        Engine::pack(decoder.spec(), &Weights::Params(decoder.params()), options, calibrated)
    }

    /// An engine with random weights (norms one, biases zero): for measurements, where only the
    /// shape matters.
    ///
    /// # Errors
    /// As [`Engine::new`].
    pub fn random(spec: &DecoderSpec, options: &Options, seed: u64) -> Result<Engine> {
        Engine::random_calibrated(spec, options, &Calibrated::default(), seed)
    }

    /// The same with a layout that follows densities.
    ///
    /// # Errors
    /// As [`Engine::calibrated`].
    pub fn random_calibrated(
        spec: &DecoderSpec,
        options: &Options,
        calibrated: &Calibrated,
        seed: u64,
    ) -> Result<Engine> {
        Engine::pack(spec, &Weights::Random(seed), options, calibrated)
    }

    pub(crate) fn pack(
        spec: &DecoderSpec,
        weights: &Weights<'_>,
        options: &Options,
        calibrated: &Calibrated,
    ) -> Result<Engine> {
        calibrated.check(spec)?;
        Ok(Engine { packed: Arc::new(Packed::new(spec, weights, options, calibrated)?) })
    }

    /// What the decoder is.
    pub fn spec(&self) -> &DecoderSpec {
        &self.packed.spec
    }

    /// How its weights are stored.
    pub fn format(&self) -> Format {
        self.packed.format
    }

    /// How many threads decode.
    pub fn threads(&self) -> usize {
        self.packed.pool.workers()
    }

    /// The most tokens of a sequence.
    pub fn context(&self) -> usize {
        self.packed.context
    }

    /// Whether it computes what the decoder does, but for rounding: no threshold takes a number as
    /// zero that is none.
    pub fn is_exact(&self) -> bool {
        let none = SiteThresholds::default();
        self.packed.layers.iter().all(|layer| layer.thresholds == none)
    }

    /// For each layer whether `up` of a gated MLP is stored by input.
    pub fn up_by_input(&self) -> impl ExactSizeIterator<Item = bool> {
        self.packed.layers.iter().map(|layer| layer.up.is_some())
    }

    /// Whether packing with these densities would give the same layout.
    pub fn suits(&self, densities: &Densities) -> bool {
        let layers = self.packed.layers.iter().zip(&densities.layers);
        let wanted = layers
            .map(|(layer, each)| LayerLayout::new(&layer.plan, &layer.thresholds, Some(each)).up);
        wanted.eq(self.up_by_input())
    }

    /// Bytes of the packed weights in memory.
    pub fn bytes(&self) -> usize {
        self.packed.matrices().map(Matrix::bytes).sum()
    }
}
