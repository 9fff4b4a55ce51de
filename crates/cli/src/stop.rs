//! Ctrl-C: the first asks a run to save and end, the second ends the program at once; what
//! keeps each result as it comes ends at the first.

use std::process;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;

use crate::out;

/// What a shell expects of a program that SIGINT ended.
pub const INTERRUPTED: u8 = 130;

/// A flag that SIGINT or SIGTERM raises.
///
/// # Errors
/// The system refuses the handler.
pub fn flag() -> anyhow::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let raised = stop.clone();
    then(move || {
        raised.store(true, Ordering::SeqCst);
        out::warn("\nstopping after this step and saving; once more to stop at once");
    })?;
    Ok(stop)
}

/// Calls `first` at the first SIGINT or SIGTERM; the second ends the program at once.
///
/// # Errors
/// The system refuses the handler.
pub fn then(first: impl Fn() + Send + 'static) -> anyhow::Result<()> {
    let again = AtomicBool::new(false);
    ctrlc::set_handler(move || {
        if again.swap(true, Ordering::SeqCst) {
            process::exit(i32::from(INTERRUPTED));
        }
        first();
    })
    .context("cannot watch for Ctrl-C")
}

/// Ends the program at SIGINT or SIGTERM, with a last word.
///
/// # Errors
/// The system refuses the handler.
pub fn at_once(word: String) -> anyhow::Result<()> {
    ctrlc::set_handler(move || {
        out::warn(&word);
        process::exit(i32::from(INTERRUPTED));
    })
    .context("cannot watch for Ctrl-C")
}
