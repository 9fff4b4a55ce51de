//! What cargo knows about the workspace: its root folder and the crates in it.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// The cargo that started us, so that a chore and the build agree on the toolchain.
pub fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// `cargo metadata` of the workspace that the current folder is in; its packages are the
/// workspace's own, with their dependencies as declared (nothing is resolved or fetched).
pub fn metadata() -> Result<Value> {
    let output = cargo()
        .args(["metadata", "--format-version", "1", "--no-deps"])
        .stderr(Stdio::inherit())
        .output()
        .context("cannot start `cargo metadata`")?;
    if !output.status.success() {
        bail!("`cargo metadata` failed ({})", output.status);
    }
    serde_json::from_slice(&output.stdout).context("`cargo metadata` wrote no valid JSON")
}

/// The workspace's root folder.
pub fn root() -> Result<PathBuf> {
    let metadata = metadata()?;
    let root = metadata["workspace_root"].as_str();
    Ok(PathBuf::from(root.context("`cargo metadata` names no workspace_root")?))
}
