//! Decoding on a GPU that really skips the zeros.
//!
//! [`GpuEngine`] packs a decoder's weights in the layouts of the engine on the CPU; a [`GpuSession`]
//! decodes one sequence with them, or some side by side. A token of one sequence is one kernel, and
//! of several one graph of kernels ([`relufy_ops::decode`]): what is not zero is found on the GPU,
//! and the host sees no more than the logits.
//!
//! Sequences side by side read the union of their rows, each once. Where that is nearly everything,
//! reading all of it is faster: [`GpuEngine::fastest`] finds out. More than 8 sequences are for the
//! tensor cores of the dense decoder.

mod choice;
mod counts;
mod engine;
mod layer;
mod layout;
mod prompt;
mod room;
mod session;
mod walk;
mod weights;

pub use choice::Reads;
pub use engine::GpuEngine;
pub(crate) use room::Masks;
pub use session::GpuSession;
