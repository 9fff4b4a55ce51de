//! `cargo xtask docs`: the API documentation of every crate builds without a warning.

use anyhow::{Context, Result, bail};

use crate::workspace;

/// Runs rustdoc over the workspace's own crates with warnings denied.
///
/// In the release profile: the dependencies' metadata is then the same that
/// `cargo clippy --release --workspace` has made.
pub fn run() -> Result<()> {
    let flags = deny_warnings(std::env::var("RUSTDOCFLAGS").ok().as_deref());
    let status = workspace::cargo()
        .args(["doc", "--workspace", "--no-deps", "--release", "--locked"])
        .env("RUSTDOCFLAGS", flags)
        .status()
        .context("cannot start `cargo doc`")?;
    if !status.success() {
        bail!("`cargo doc` failed ({status})");
    }
    Ok(())
}

/// The caller's flags, with ours after them so that they win.
fn deny_warnings(inherited: Option<&str>) -> String {
    format!("{} -D warnings", inherited.unwrap_or_default()).trim_start().to_owned()
}

#[cfg(test)]
mod tests {
    use super::deny_warnings;

    #[test]
    fn the_callers_flags_are_kept_and_ours_come_last() {
        assert_eq!(deny_warnings(None), "-D warnings");
        assert_eq!(deny_warnings(Some("--cfg docs")), "--cfg docs -D warnings");
    }
}
