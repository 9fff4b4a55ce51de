//! The operations on a GPU against their CPU twins; ignored, with the reason, where there is none.
//!
//! `cargo test --release --features relufy-ops/cuda --test cuda` on a machine with a GPU. The trials
//! of `cargo test ... -- small` launch every kernel on little work, and fail if they miss one: for
//! `compute-sanitizer`, under which the others take hours.
#![allow(clippy::unwrap_used, reason = "a failure is the test's failure")]
#![allow(clippy::print_stderr, reason = "why tests are ignored")]

use libtest_mimic::{Arguments, Trial};

#[cfg(feature = "cuda")]
mod adamw;
#[cfg(feature = "cuda")]
mod attention;
#[cfg(feature = "cuda")]
mod common;
#[cfg(feature = "cuda")]
mod coverage;
#[cfg(feature = "cudnn")]
mod cudnn;
#[cfg(feature = "cuda")]
mod decode;
#[cfg(feature = "cuda")]
mod embedding;
#[cfg(feature = "cuda")]
mod gated;
#[cfg(feature = "cuda")]
mod linear;
#[cfg(feature = "cuda")]
mod loss;
#[cfg(feature = "cuda")]
mod norm;
#[cfg(feature = "cuda")]
mod pointwise;
#[cfg(feature = "cuda")]
mod reduce;
#[cfg(feature = "cuda")]
mod rope;
#[cfg(feature = "cuda")]
mod rows;

/// What the names of trials of little work begin with.
#[cfg(feature = "cuda")]
const SMALL: &str = "small";

fn main() {
    let arguments = Arguments::from_args();
    #[cfg(feature = "cuda")]
    if arguments.filter.as_deref() == Some(SMALL) && !arguments.list {
        return run_small(&arguments);
    }
    libtest_mimic::run(&arguments, trials()).exit();
}

/// Runs them, and says which kernels of the program none of them launched: decoding's have trials of
/// their own.
#[cfg(feature = "cuda")]
fn run_small(arguments: &Arguments) {
    common::POISONED.store(16, std::sync::atomic::Ordering::Relaxed);
    let trials = trials();
    if relufy_ops::device::open("cuda").is_err() {
        libtest_mimic::run(arguments, trials).exit();
    }
    let run = || Ok::<_, relufy_ops::Error>(libtest_mimic::run(arguments, trials));
    let (conclusion, profile) = relufy_ops::device::profile(common::gpu(), run).unwrap();
    let (all, missing) = coverage::missing(&profile);
    eprintln!("launched {} of {all} kernels", all - missing.len());
    if !missing.is_empty() {
        eprintln!("never launched: {}", missing.join(" "));
    }
    conclusion.exit();
}

#[cfg(feature = "cuda")]
fn trials() -> Vec<Trial> {
    let all: Vec<common::Trials> = vec![
        attention::trials(),
        adamw::trials(),
        gated::trials(),
        pointwise::trials(),
        reduce::trials(),
        rows::trials(),
        linear::trials(),
        loss::trials(),
        embedding::trials(),
        decode::trials(),
        norm::trials(),
        rope::trials(),
    ];
    #[cfg(feature = "cudnn")]
    let all = [all, vec![cudnn::trials()]].concat();
    match relufy_ops::device::open("cuda") {
        Ok(_) => all.into_iter().flatten().map(common::trial).collect(),
        Err(why) => {
            eprintln!("ignored: {why}");
            let ignored = |(name, _)| Trial::test(name, || Ok(())).with_ignored_flag(true);
            all.into_iter().flatten().map(ignored).collect()
        }
    }
}

#[cfg(not(feature = "cuda"))]
fn trials() -> Vec<Trial> {
    eprintln!("ignored: the operations on a GPU need a build with `--features relufy-ops/cuda`");
    vec![Trial::test("operations_on_a_gpu", || Ok(())).with_ignored_flag(true)]
}
