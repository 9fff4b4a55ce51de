//! How fast decoding is, and how fast it could be.
//!
//! Whatever decodes is [`Timed`]: the engine on the CPU ([`Timer`]) or on a GPU (`GpuTimer`), or the
//! decoder that everything else uses ([`DecoderTimer`]). [`take_turns`] lets several of them decode
//! one after the other, again and again, beside a plain read of memory, because a machine's speed
//! drifts: what is reported are medians, and ratios within a turn.
//!
//! Zeros are a real model's on real text, or forced: masks with an exact number of ones, drawn anew
//! for every token, take the place of what the activations say. Listing the non-zeros and all else
//! is done as in earnest.

mod cpu;
mod curves;
mod decoder;
#[cfg(feature = "cuda")]
mod gpu;
mod read;
mod text;
mod turns;

use relufy_spec::flops::SiteDensities;
use relufy_spec::{Activation, DecoderSpec, SiteOps};

use crate::{Counts, Result};

pub use cpu::Timer;
pub use curves::{Curve, Curves, Part, Point};
pub use decoder::DecoderTimer;
#[cfg(feature = "cuda")]
pub use gpu::{GpuTimer, gpu_bandwidth};
pub use read::RawRead;
pub use text::Text;
pub use turns::{Faster, Pace, Speed, Step, Turns, median, take_turns};

/// Something that decodes and says how long it took.
pub trait Timed {
    /// Decodes a token, or one of each sequence: the seconds it took.
    ///
    /// # Errors
    /// Whatever the engine cannot do.
    fn step(&mut self) -> Result<f64>;

    /// What the last step did.
    ///
    /// # Errors
    /// A device that does not answer.
    fn counts(&mut self) -> Result<Counts>;

    /// What the last step thought of the token that follows in its text: minus the logarithm of its
    /// probability. `None` where there is no text.
    fn surprise(&self) -> Option<f64> {
        None
    }

    /// What was not zero of the last step's token, at each site. `None` where nobody counts.
    fn densities(&self) -> Option<SiteDensities> {
        None
    }

    /// Sequences that a step continues.
    fn batch(&self) -> usize {
        1
    }
}

/// The same shape where nothing is ever zero, so that an engine of it reads every weight, each
/// matrix in the layout that is best for that: no operation at any site, and SiLU in the MLP. What it
/// computes is another model; how long it takes is what the weights take when nothing is skipped.
pub fn nothing_skipped(spec: &DecoderSpec) -> DecoderSpec {
    let mut spec = spec.clone();
    for layer in &mut spec.layers {
        layer.sites = SiteOps::default();
        layer.mlp.activation = Activation::Silu;
    }
    spec
}

/// The densities of what any of `batch` independent sequences needs.
pub fn union(each: SiteDensities, batch: usize) -> SiteDensities {
    let any = |density: f64| 1.0 - (1.0 - density).powi(batch as i32);
    let SiteDensities { qkv, o, up, down } = each;
    SiteDensities { qkv: any(qkv), o: any(o), up: any(up), down: any(down) }
}
