//! Compiles the CUDA kernels of `cu/` under the feature `cuda`, one fat binary a file; without
//! the feature there is nothing to do.

use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=cu");
    for variable in ["NVCC", "CUDA_HOME", "CUDA_PATH", "CUDA_COMPUTE_CAP", "RELUFY_CUDNN"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    if std::env::var_os("CARGO_FEATURE_CUDA").is_some() {
        compile_kernels();
    }
    #[cfg(feature = "cudnn")]
    compile_cudnn();
}

/// One fat binary for each `cu/*.cu`.
fn compile_kernels() {
    let mut files: Vec<PathBuf> = match std::fs::read_dir("cu") {
        Ok(entries) => entries.flatten().map(|entry| entry.path()).collect(),
        Err(error) => fail(&format!("cannot list cu: {error}")),
    };
    files.sort();
    let read = |path: &Path| std::fs::read_to_string(path).unwrap_or_default();
    let mut running = Vec::new();
    for source in files.iter().filter(|path| path.extension().is_some_and(|ext| ext == "cu")) {
        let name = source.file_stem().unwrap_or_default();
        let image = out_dir().join(name).with_extension("fatbin");
        let mut command = Command::new(nvcc());
        command.args(["-fatbin", "-O3", "-std=c++17", "-lineinfo", "-Wno-deprecated-gpu-targets"]);
        command.args(targets()).arg("-o").arg(&image).arg(source);
        // A change of one kernel leads here, and some take a minute.
        let parts = with_headers(source.clone());
        let text: String = parts.iter().map(|path| read(path)).collect();
        let made_of = format!("{command:?}\n{text}");
        let stamp = image.with_extension("stamp");
        if image.is_file() && std::fs::read_to_string(&stamp).is_ok_and(|known| known == made_of) {
            continue;
        }
        match command.spawn() {
            Ok(child) => running.push((source, child, stamp, made_of)),
            Err(error) => fail(&format!("cannot start {:?}: {error}", command.get_program())),
        }
    }
    for (source, mut child, stamp, made_of) in running {
        if !child.wait().is_ok_and(|status| status.success()) {
            fail(&format!("nvcc could not compile {}", source.display()));
        }
        if let Err(error) = std::fs::write(&stamp, made_of) {
            fail(&format!("cannot write {}: {error}", stamp.display()));
        }
    }
}

/// A source and the headers of its folder that it includes, each once, theirs as well.
fn with_headers(source: PathBuf) -> Vec<PathBuf> {
    let mut parts = vec![source];
    let mut at = 0;
    while let Some(part) = parts.get(at) {
        let text = std::fs::read_to_string(part).unwrap_or_default();
        let named =
            text.lines().filter_map(|line| line.strip_prefix("#include \"")?.strip_suffix('"'));
        for path in named.map(|name| Path::new("cu").join(name)) {
            if !parts.contains(&path) {
                parts.push(path);
            }
        }
        at += 1;
    }
    parts
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
    // Hopper's own instructions have an "a", and run on no other.
    let own = |capability: &&str| if *capability == "90" { "90a" } else { capability }.to_owned();
    capabilities
        .iter()
        .map(own)
        .map(|capability| format!("-gencode=arch=compute_{capability},code=sm_{capability}"))
        .chain([format!("-gencode=arch=compute_{last},code=compute_{last}")])
        .collect()
}

/// The C++ shim around cuDNN's frontend. It opens cuDNN at run time, so that only headers are
/// needed here.
#[cfg(feature = "cudnn")]
fn compile_cudnn() {
    const SOURCE: &str = "cu/cudnn.cpp";
    let toolkit = nvcc().parent().and_then(Path::parent).map(Path::to_path_buf);
    let named = std::env::var_os("RELUFY_CUDNN").map(PathBuf::from);
    let system = ["/usr/local/cuda", "/usr"].map(PathBuf::from);
    let roots: Vec<PathBuf> = named.into_iter().chain(toolkit).chain(system).collect();
    // A root holds headers as a system does, or as the folders of NVIDIA's Python packages.
    let folders: Vec<PathBuf> = ["cudnn_frontend.h", "cudnn.h", "cuda_runtime.h"]
        .into_iter()
        .map(|header| {
            let places = ["include", "nvidia/cudnn/include", "include/x86_64-linux-gnu"];
            let mut all = roots.iter().flat_map(|root| places.map(|place| root.join(place)));
            all.find(|folder| folder.join(header).is_file()).unwrap_or_else(|| {
                fail(&format!(
                    "the feature `cudnn` needs {header}, which is not below {roots:?}; \
                     `scripts/cuda-toolchain.sh --cudnn` fetches the headers and prints \
                     RELUFY_CUDNN, where they are looked for first"
                ))
            })
        })
        .collect();
    // The frontend takes most of a minute to compile, and a change of any kernel leads here.
    let stamp = out_dir().join("cudnn.stamp");
    let source = std::fs::read_to_string(SOURCE).unwrap_or_default();
    let made_of = format!("{folders:?}\n{}\n{source}", include_str!("build.rs"));
    if std::fs::read_to_string(&stamp).is_ok_and(|known| known == made_of) {
        println!("cargo:rustc-link-search=native={}", out_dir().display());
        println!("cargo:rustc-link-lib=static=relufy_cudnn");
        println!("cargo:rustc-link-lib=stdc++");
    } else {
        let mut build = cc::Build::new();
        for folder in &folders {
            build.flag("-isystem").flag(folder);
        }
        build
            .cpp(true)
            .std("c++17")
            // What it does at run time is to start kernels.
            .opt_level(1)
            .debug(false)
            .flag("-fvisibility=hidden")
            .define("NV_CUDNN_FRONTEND_USE_DYNAMIC_LOADING", None)
            .define("CUDNN_FRONTEND_SKIP_JSON_LIB", None)
            .file(SOURCE)
            .compile("relufy_cudnn");
        if let Err(error) = std::fs::write(&stamp, made_of) {
            fail(&format!("cannot write {}: {error}", stamp.display()));
        }
    }
    println!("cargo:rustc-link-lib=dylib=dl");
}

/// The compiler: `NVCC`, that of the toolkit in `CUDA_HOME` or `CUDA_PATH`, or the one on the PATH.
fn nvcc() -> PathBuf {
    let of_toolkit =
        |variable| std::env::var_os(variable).map(|home| Path::new(&home).join("bin").join("nvcc"));
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
#[allow(clippy::print_stderr, reason = "cargo shows what a failed build script printed")]
fn fail(message: &str) -> ! {
    eprintln!("error: {message}");
    eprintln!("hint: the feature `cuda` needs a CUDA toolkit; scripts/build-cuda.sh fetches one");
    std::process::exit(1)
}
