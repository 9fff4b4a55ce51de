//! Tells the tests whether the shared models are there, so that a test without them
//! reports itself as ignored instead of passing silently.

use std::path::PathBuf;

fn main() {
    println!("cargo:rustc-check-cfg=cfg(relufy_shared)");
    println!("cargo:rerun-if-env-changed=RELUFY_SHARED");
    let shared = std::env::var_os("RELUFY_SHARED").map_or_else(
        || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../shared")),
        PathBuf::from,
    );
    println!("cargo:rerun-if-changed={}", shared.display());
    if let Ok(shared) = shared.canonicalize() {
        println!("cargo:rustc-cfg=relufy_shared");
        println!("cargo:rustc-env=RELUFY_SHARED_DIR={}", shared.display());
    }
}
