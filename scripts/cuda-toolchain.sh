#!/usr/bin/env bash
# Prints the environment that a CUDA build needs, and fetches a toolkit where none is installed:
#
#     eval "$(scripts/cuda-toolchain.sh)"
#
# With nvcc on the PATH (or CUDA_HOME set) that toolkit is used. Otherwise the compiler and the
# libraries come from PyPI into .cuda/toolkit (about 2 GB, ignored by git); only python3 with pip
# and a C++ compiler are needed. Neither root nor a driver or a GPU is.
#
#     --fetch   fetch the toolkit even where one is installed
#     --cudnn   also fetch cuDNN's headers and its C++ frontend (feature `cudnn`)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
folder=$root/.cuda
say() { echo "cuda-toolchain: $*" >&2; }
fail() {
    say "error: $*"
    exit 1
}

fetch=false
cudnn=false
for argument in "$@"; do
    case $argument in
        --fetch) fetch=true ;;
        --cudnn) cudnn=true ;;
        -h | --help)
            sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        *) fail "unknown argument $argument (--help explains)" ;;
    esac
done

# Releases that build and run together: CUDA 13.0 Update 2, for drivers from r580 on.
packages=(
    nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88
    nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85 nvidia-cuda-nvrtc==13.0.88
    nvidia-curand==10.4.0.35 nvidia-cublas==13.1.0.3
)
# Headers and the library that the feature `cudnn` opens at run time.
cudnn_packages=(nvidia-cudnn-cu13==9.19.0.56 nvidia-cudnn-frontend==1.22.1)

# get TARGET PACKAGE...: installs packages side by side into a folder, once.
get() {
    local target=$1
    shift
    local stamp=$target/.complete
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$*" ]; then
        return
    fi
    command -v python3 >/dev/null || fail "python3 is missing: install it, or a CUDA toolkit"
    say "fetching $* (once)"
    rm -rf "$target.new"
    python3 -m pip install --quiet --no-deps --no-compile --disable-pip-version-check \
        --target "$target.new" "$@" >&2 || fail "pip could not fetch the packages"
    printf '%s' "$*" >"$target.new/.complete"
    rm -rf "$target"
    mv "$target.new" "$target"
}

home=${CUDA_HOME:-${CUDA_PATH:-}}
if [ -z "$home" ] && command -v nvcc >/dev/null; then
    home=$(cd "$(dirname "$(command -v nvcc)")/.." && pwd)
fi
if $fetch || [ -z "$home" ] || [ "${home#"$folder"}" != "$home" ]; then
    get "$folder/toolkit" "${packages[@]}"
    home=$folder/toolkit/nvidia/cu13
    # What an installed toolkit has and the packages lack: lib64, and names without a version.
    ln -sfn lib "$home/lib64"
    for library in "$home"/lib/lib*.so.*; do
        name=$(basename "$library")
        ln -sfn "$name" "$home/lib/${name%%.so.*}.so"
    done
else
    say "using the toolkit in $home"
fi
[ -x "$home/bin/nvcc" ] || fail "$home has no bin/nvcc"

if $cudnn; then
    get "$folder/cudnn" "${cudnn_packages[@]}"
fi

# The driver's library comes with the driver. Without one the linker gets a stub which defines the
# functions that cudarc declares; the program loads the real libcuda.so.1 where it runs.
stubs=$folder/stubs
if [ -e "$home/lib64/stubs/libcuda.so" ]; then
    stubs=$home/lib64/stubs
elif [ ! -e "$stubs/libcuda.so" ]; then
    (cd "$root" && cargo fetch --quiet) || fail "cargo could not fetch the dependencies"
    cudarc=$(cd "$root" && cargo metadata --quiet --format-version 1 --features cuda |
        python3 -c 'import json, sys
print([p["manifest_path"] for p in json.load(sys.stdin)["packages"] if p["name"] == "cudarc"][0])')
    mkdir -p "$stubs"
    grep -oE 'pub unsafe fn cu[A-Za-z0-9_]+' "$(dirname "$cudarc")/src/driver/sys/mod.rs" |
        awk '!seen[$4]++ { print "int " $4 "(void) { return 999; }" }' >"$stubs/libcuda.c"
    cc -shared -fPIC -w -Wl,-soname,libcuda.so.1 -o "$stubs/libcuda.so" "$stubs/libcuda.c"
    say "made a stub of libcuda for the linker"
fi

cat <<ENV
export CUDA_HOME='$home' CUDA_PATH='$home' CUDA_ROOT='$home' CUDA_TOOLKIT_ROOT_DIR='$home'
export PATH='$home/bin':"\$PATH"
export CUDARC_CUDA_VERSION="\${CUDARC_CUDA_VERSION:-13000}"
export CUDA_COMPUTE_CAP="\${CUDA_COMPUTE_CAP:-90}"
# Once, however often this is evaluated: other flags make cargo build everything again.
case "\${RUSTFLAGS:-}" in
*"$stubs"*) ;;
*) export RUSTFLAGS="\${RUSTFLAGS:-} -L native=$home/lib64 -L native=$stubs" ;;
esac
export CARGO_TARGET_DIR="\${CARGO_TARGET_DIR:-$root/target/cuda}"
ENV
if $cudnn; then
    echo "export RELUFY_CUDNN='$folder/cudnn'"
fi
