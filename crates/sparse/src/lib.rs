//! Decoding on the CPU that really skips the zeros.
//!
//! [`Engine::new`] packs a decoder's weights for reading by rows; a [`Session`] decodes one sequence with
//! them, [`Sessions`] several side by side. The zeros of a relufied model are exact, so skipping their
//! rows changes nothing but rounding, and a token's time falls with the bytes that are read.
//!
//! What is skipped: at queries, keys and values, at the gate (or a plain MLP's `up`), and at
//! attention's output, the rows of zero inputs where the site has a ReLU; in a gated MLP the rows of
//! `up` and `down` whose gate is zero; in a plain one those of `down` whose activation is. A site
//! without an operation is dense. Dense models run on the same code with full lists. A row of `up`
//! that is needed is multiplied with all inputs, also with zeros: [`Work`] counts both, what was
//! needed and what was done. Where densities were measured ([`Calibrated`]) and a layer's inputs are
//! clearly sparser than its gate, `up` is stored by input as well. A prompt goes in densely, many
//! tokens at a time.
//!
//! Models that are not exactly sparse may be given [`Thresholds`], below which a number counts as zero:
//! an approximation ([`Engine::is_exact`]). A [`PackedCache`] keeps packed weights in a file, so that
//! an engine starts without packing.
//!
//! Sums of f32 products, in a fixed order for a given number of threads.

mod batch;
pub mod bench;
mod cache;
mod counts;
#[cfg(feature = "cuda")]
mod cuda;
mod engine;
mod error;
mod force;
mod format;
mod kernels;
mod layout;
mod linear;
mod matrix;
mod neurons;
mod packed;
mod pool;
mod sequence;
mod session;
mod sessions;
mod shared;
mod side_by_side;
mod source;
mod thresholds;
mod tile;
mod walk;
mod weights;

pub use cache::{Opened, PackedCache, PackedEntry, PackedState};
pub use counts::{Counts, Work};
#[cfg(feature = "cuda")]
pub use cuda::{GpuEngine, GpuSession, Reads};
pub use engine::{Calibrated, Engine, Options};
pub use error::{Error, Result};
pub use format::Format;
pub use sequence::{Sequence, sequence};
pub use session::Session;
pub use sessions::Sessions;
pub use thresholds::{SiteThresholds, Thresholds};
