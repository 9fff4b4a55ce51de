//! Compiles the CUDA kernels of `cu/` under the feature `cuda`, one fat binary a file; without
//! the feature there is nothing to do.

use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=cu");
    for variable in ["NVCC", "CUDA_HOME", "CUDA_PATH", "CUDA_COMPUTE_CAP"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    if std::env::var_os("CARGO_FEATURE_CUDA").is_some() {
        compile_kernels();
    }
    if std::env::var_os("CARGO_FEATURE_CUDNN").is_some() {
        compile_cudnn();
    }
}

/// One fat binary for each `cu/*.cu`.
fn compile_kernels() {
    let sources = match std::fs::read_dir("cu") {
        Ok(entries) => entries.flatten().map(|entry| entry.path()),
        Err(error) => fail(&format!("cannot list cu: {error}")),
    };
    let mut running = Vec::new();
    for source in sources.filter(|path| path.extension().is_some_and(|ext| ext == "cu")) {
        let name = source.file_stem().unwrap_or_default();
        let image = out_dir().join(name).with_extension("fatbin");
        let mut command = Command::new(nvcc());
        command.args(["-fatbin", "-O3", "-std=c++17", "-lineinfo", "-Wno-deprecated-gpu-targets"]);
        command.args(targets()).arg("-o").arg(&image).arg(&source);
        match command.spawn() {
            Ok(child) => running.push((source, child)),
            Err(error) => fail(&format!("cannot start {:?}: {error}", command.get_program())),
        }
    }
    for (source, mut child) in running {
        if !child.wait().is_ok_and(|status| status.success()) {
            fail(&format!("nvcc could not compile {}", source.display()));
        }
    }
}

/// The code to generate: of the capabilities in `CUDA_COMPUTE_CAP` (`90` or `80,90`), or of sm_80
/// and sm_90; and PTX of the last, which drivers compile for GPUs that came later.
fn targets() -> Vec<String> {
    let named = std::env::var("CUDA_COMPUTE_CAP").unwrap_or_default();
    let mut capabilities: Vec<&str> =
        named.split([',', ' ']).filter(|capability| !capability.is_empty()).collect();
    if capabilities.is_empty() {
        capabilities = vec!["80", "90"];
    }
    let last = capabilities.last().copied().unwrap_or_default();
    capabilities
        .iter()
        .map(|capability| format!("-gencode=arch=compute_{capability},code=sm_{capability}"))
        .chain([format!("-gencode=arch=compute_{last},code=compute_{last}")])
        .collect()
}

/// The C++ shim around cuDNN's frontend, which opens cuDNN at run time.
fn compile_cudnn() {}

/// The compiler: `NVCC`, that of the toolkit in `CUDA_HOME` or `CUDA_PATH`, or the one on the PATH.
fn nvcc() -> PathBuf {
    let of_toolkit = |variable| {
        std::env::var_os(variable).map(|home| Path::new(&home).join("bin").join("nvcc"))
    };
    std::env::var_os("NVCC")
        .map(PathBuf::from)
        .or_else(|| of_toolkit("CUDA_HOME"))
        .or_else(|| of_toolkit("CUDA_PATH"))
        .unwrap_or_else(|| PathBuf::from("nvcc"))
}

fn out_dir() -> PathBuf {
    std::env::var_os("OUT_DIR").map(PathBuf::from).unwrap_or_default()
}

/// Stops the build with a message that says what to do.
fn fail(message: &str) -> ! {
    eprintln!("error: {message}");
    eprintln!("hint: the feature `cuda` needs a CUDA toolkit; scripts/build-cuda.sh fetches one");
    std::process::exit(1)
}
