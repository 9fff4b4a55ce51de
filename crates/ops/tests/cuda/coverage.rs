//! Which of the kernels of this program were launched.

use std::collections::BTreeSet;

use relufy_ops::device::Span;

/// Kernels that come with candle, which nothing here launches.
const FOREIGN: [&str; 2] = ["_Z", "mmvq_"];

/// Their names: in compiled code, what the driver must know of a kernel is a section named so.
fn compiled() -> BTreeSet<String> {
    const SECTION: &[u8] = b".nv.info.";
    let program = std::fs::read(std::env::current_exe().unwrap()).unwrap();
    let begins = |at: &usize| program[*at] == b'.' && program[*at..].starts_with(SECTION);
    (0..program.len())
        .filter(begins)
        .map(|at| {
            let name = program[at + SECTION.len()..].iter().take_while(|byte| **byte != 0);
            String::from_utf8_lossy(&name.copied().collect::<Vec<u8>>()).into_owned()
        })
        .filter(|name| name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_'))
        .filter(|name| !name.is_empty() && !FOREIGN.iter().any(|by| name.starts_with(by)))
        .collect()
}

/// How many kernels there are, and those that a profile does not name.
pub fn missing(profile: &[Span]) -> (usize, Vec<String>) {
    let launched = |name: &String| {
        profile
            .iter()
            .any(|span| span.label.split_once(": ").is_some_and(|(_, label)| label == name))
    };
    let compiled = compiled();
    (compiled.len(), compiled.into_iter().filter(|name| !launched(name)).collect())
}
