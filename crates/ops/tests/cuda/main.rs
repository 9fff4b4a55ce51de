//! The operations on a GPU against their CPU twins; ignored, with the reason, where there is none.
//!
//! `cargo test --release --features relufy-ops/cuda --test cuda` on a machine with a GPU.
#![allow(clippy::unwrap_used, reason = "a failure is the test's failure")]
#![allow(clippy::print_stderr, reason = "why tests are ignored")]

use libtest_mimic::{Arguments, Trial};

#[cfg(feature = "cuda")]
mod adamw;
#[cfg(feature = "cuda")]
mod attention;
#[cfg(feature = "cuda")]
mod common;
#[cfg(feature = "cudnn")]
mod cudnn;
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

fn main() {
    libtest_mimic::run(&Arguments::from_args(), trials()).exit();
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
