//! The build script of every package whose tests can use the shared goldens: tells them
//! whether these are there, so that a test without them reports itself as ignored instead
//! of passing silently.

use std::path::{Path, PathBuf};

fn main() {
    println!("cargo:rustc-check-cfg=cfg(relufy_shared)");
    println!("cargo:rerun-if-env-changed=RELUFY_SHARED");
    let shared = std::env::var_os("RELUFY_SHARED").map_or_else(beside_workspace, PathBuf::from);
    println!("cargo:rerun-if-changed={}", shared.display());
    if let Ok(shared) = shared.canonicalize() {
        println!("cargo:rustc-cfg=relufy_shared");
        println!("cargo:rustc-env=RELUFY_SHARED_DIR={}", shared.display());
    }
}

/// `shared` beside the workspace, whose root holds the lock file.
fn beside_workspace() -> PathBuf {
    let package = std::env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from).unwrap_or_default();
    let root = package.ancestors().find(|folder| folder.join("Cargo.lock").is_file());
    root.unwrap_or(Path::new(".")).join("../shared")
}
