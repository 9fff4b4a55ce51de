#!/usr/bin/env bash
# Builds relufy for NVIDIA GPUs: the release binary with the feature `cudnn`, compiled with the
# toolkit that scripts/cuda-toolchain.sh finds or fetches. Neither a GPU nor a driver is needed.
#
#     scripts/build-cuda.sh                     # into target/cuda/release/relufy
#     scripts/build-cuda.sh --no-cudnn          # the feature `cuda`: own attention kernels only
#     scripts/build-cuda.sh --check-kernels     # only nvcc over crates/ops/cu, for sm_80 and sm_90
#     scripts/build-cuda.sh --pack .carry/bin   # for a machine without a compiler
#
#     --no-cudnn        without cuDNN's attention
#     --check-kernels   compile each kernel file for sm_80 and sm_90, report spills, build nothing
#     --pack DIR        put the program and the GPU tests (those named `cuda` of each crate) into DIR,
#                       stripped, as relufy.xz, ops-cuda.xz and so on
#     --test NAME       pack the test programs of this name too; may be repeated
#     --fetch           fetch the toolkit even where one is installed
#
# Where it runs, the program needs a driver of CUDA 13 (r580 or later) and libcublas, libcublasLt,
# libcurand, libcudart and libnvrtc of CUDA 13; cuDNN 9 is opened only when attention asks for it
# (RELUFY_CUDNN_LIB names its file). A PyTorch for CUDA 13 brings them all:
#
#     site=$(python3 -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
#     export LD_LIBRARY_PATH=$site/nvidia/cu13/lib RELUFY_CUDNN_LIB=$site/nvidia/cudnn/lib/libcudnn.so.9
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
fail() {
    echo "build-cuda: error: $*" >&2
    exit 1
}
usage() {
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
}

features=cudnn
check=false
pack=
tests=(cuda)
toolchain=()
while [ $# -gt 0 ]; do
    case $1 in
        --no-cudnn) features=cuda ;;
        --check-kernels) check=true ;;
        --fetch) toolchain+=(--fetch) ;;
        --pack | --test)
            [ $# -ge 2 ] || fail "$1 needs a value (--help explains)"
            if [ "$1" = --pack ]; then pack=$2; else tests+=("$2"); fi
            shift
            ;;
        -h | --help)
            usage
            exit 0
            ;;
        *) fail "unknown argument $1 (--help explains)" ;;
    esac
    shift
done
[ "$features" = cuda ] || toolchain+=(--cudnn)

environment=$(scripts/cuda-toolchain.sh "${toolchain[@]}")
eval "$environment"

check_kernels() {
    local report kernels=0 failed=0
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    for source in crates/ops/cu/*.cu; do
        [ -e "$source" ] || fail "there is no kernel in crates/ops/cu"
        for arch in sm_80 sm_90; do
            report=$scratch/report
            if nvcc -cubin -arch="$arch" -O3 -std=c++17 -lineinfo -Wno-deprecated-gpu-targets \
                -Xptxas -v -o "$scratch/out.cubin" "$source" >"$report" 2>&1; then
                echo "ok      $arch $source"
                # ptxas names a kernel on one line and its spills on a later one.
                awk -v arch="$arch" '/Compiling entry function/ { name = $0; sub(/^[^\047]*\047/, "", name); sub(/\047.*/, "", name) }
                    /bytes spill stores/ && !/ 0 bytes spill stores/ { sub(/^ */, ""); print "        spills in " name ": " $0 }' "$report"
                grep -E 'warning' "$report" | sed 's/^/        /' || true
            else
                echo "FAILED  $arch $source"
                sed 's/^/        /' "$report"
                failed=$((failed + 1))
            fi
            kernels=$((kernels + 1))
        done
    done
    [ "$failed" = 0 ] || fail "$failed of $kernels compilations failed"
}

if $check; then
    check_kernels
    exit 0
fi

cargo build --release --features "$features" --bin relufy
binary=$CARGO_TARGET_DIR/release/relufy

# The test programs of this name, one a line: its package and name, and its file.
test_programs() {
    cargo test --no-run --release --workspace --features "$features" --test "$1" --message-format json |
        python3 -c 'import json, pathlib, sys
for message in map(json.loads, sys.stdin):
    target = message.get("target", {})
    if message.get("executable") and target.get("name") == sys.argv[1] and "test" in target.get("kind", []):
        package = pathlib.Path(message["manifest_path"]).parent.name
        print(package + "-" + target["name"], message["executable"])' "$1"
}

# add PROGRAM NAME: strips and compresses it into the folder.
add() {
    strip -o "$pack/$2" "$1"
    xz -T0 -6 -f "$pack/$2"
    chmod 644 "$pack/$2.xz"
    echo "  $pack/$2.xz ($(du -h "$pack/$2.xz" | cut -f1))"
}

if [ -n "$pack" ]; then
    mkdir -p "$pack"
    echo "packed:"
    add "$binary" relufy
    for name in "${tests[@]}"; do
        programs=$(test_programs "$name")
        [ -n "$programs" ] || fail "there is no test program $name"
        while read -r packed program; do
            add "$program" "$packed"
        done <<<"$programs"
    done
    echo "there: xz -dc $pack/relufy.xz >relufy && chmod +x relufy"
fi

cat <<MESSAGE
built $binary (feature $features)
It needs libcublas, libcublasLt, libcurand, libcudart and libnvrtc of CUDA 13 and a driver from r580 on.
With a PyTorch for CUDA 13:
    site=\$(python3 -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    export LD_LIBRARY_PATH=\$site/nvidia/cu13/lib
MESSAGE
[ "$features" = cuda ] || echo "    export RELUFY_CUDNN_LIB=\$site/nvidia/cudnn/lib/libcudnn.so.9"
