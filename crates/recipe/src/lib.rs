//! Chains of commands, and the little world that they need no download for.
//!
//! [`world`] generates text with facts and questions about them, all from one seed.

mod error;
pub mod world;

pub use error::{Error, Result};
