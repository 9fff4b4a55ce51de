//! Opening cuDNN.

use std::ffi::CString;
use std::sync::OnceLock;

use super::OP;
use super::shim::{self, DO_WITHOUT};
use crate::error::{Error, Result};

/// Older ones know neither all shapes nor the same arithmetic.
const OLDEST: usize = 90_600;

/// Opens cuDNN, once; its version.
///
/// # Errors
/// [`Error::Cuda`] where the library is missing or too old.
pub(super) fn open() -> Result<usize> {
    static VERSION: OnceLock<std::result::Result<usize, String>> = OnceLock::new();
    let open_it = || {
        let named = std::env::var("RELUFY_CUDNN_LIB").ok().filter(|name| !name.is_empty());
        let file = named.unwrap_or_else(|| "libcudnn.so.9".to_string());
        let path = CString::new(file.as_str()).map_err(|error| error.to_string())?;
        match shim::open(&path).map_err(|refusal| refusal.why())? {
            version @ OLDEST.. => Ok(version),
            version => Err(format!("{file} is version {version}, at least {OLDEST} is wanted")),
        }
    };
    VERSION.get_or_init(open_it).clone().map_err(|why| {
        let hint = "RELUFY_CUDNN_LIB names the path of libcudnn.so.9";
        Error::Cuda { op: OP, message: format!("cannot open cuDNN: {why} ({hint}; {DO_WITHOUT})") }
    })
}
