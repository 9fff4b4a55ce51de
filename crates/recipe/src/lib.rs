//! Chains of commands, and the little world that they need no download for.
//!
//! [`world`] generates text with facts and questions about them, all from one seed;
//! [`quickstart`] does the toolkit's whole job on it.

mod error;
pub mod quickstart;
pub mod world;

pub use error::{Error, Result};
