//! What `RELUFY_ATTENTION` says.

use std::sync::OnceLock;

use super::OP;
use crate::error::{Error, Result};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Choice {
    /// cuDNN where it applies.
    Auto,
    /// Never cuDNN.
    Own,
    /// Nothing but cuDNN.
    Cudnn,
}

impl Choice {
    /// Read once.
    ///
    /// # Errors
    /// [`Error::Invalid`] for another word.
    pub(super) fn get() -> Result<Choice> {
        static CHOICE: OnceLock<std::result::Result<Choice, String>> = OnceLock::new();
        let read = || match std::env::var("RELUFY_ATTENTION").as_deref() {
            Err(_) | Ok("" | "auto") => Ok(Choice::Auto),
            Ok("own") => Ok(Choice::Own),
            Ok("cudnn") => Ok(Choice::Cudnn),
            Ok(other) => {
                Err(format!("RELUFY_ATTENTION is `{other}`: expected `auto`, `own` or `cudnn`"))
            }
        };
        let message = |message: &String| Error::Invalid { op: OP, message: message.clone() };
        CHOICE.get_or_init(read).as_ref().copied().map_err(message)
    }
}
