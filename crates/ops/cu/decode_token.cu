// Into the residual stream, and from logits to the next token.

#include "embed.cuh"

// As in src/cuda/decode/token.rs.
struct Next {
    const float* logits;
    unsigned* words;
    int len;
    int pad;
};

template <typename W>
__device__ __forceinline__ void embed(const Embed& e) {
    release_next();
    wait_for_previous();
    const int column = blockIdx.x * blockDim.x + threadIdx.x, b = blockIdx.y;
    if (column >= e.width) return;
    e.x[static_cast<long long>(b) * e.width + column] = embedded<W>(e, b, column);
}

extern "C" __global__ void embed_f32(const __grid_constant__ Embed e) { embed<float>(e); }
extern "C" __global__ void embed_bf16(const __grid_constant__ Embed e) { embed<bf16>(e); }
extern "C" __global__ void embed_int8(const __grid_constant__ Embed e) { embed<int8_t>(e); }

// The larger, the first of equals.
__device__ __forceinline__ void better(float& best, int& at, float v, int i) {
    if (v > best || (v == best && i < at)) {
        best = v;
        at = i;
    }
}

// A block for each row.
extern "C" __global__ void __launch_bounds__(1024) argmax(const __grid_constant__ Next p) {
    constexpr int U = 8;
    __shared__ float bests[32];
    __shared__ int places[32];
    release_next();
    wait_for_previous();
    const float* logits = p.logits + static_cast<long long>(blockIdx.x) * p.len;
    float best = -INFINITY;
    int at = INT32_MAX;
    for (int first = threadIdx.x; first < p.len; first += U * blockDim.x) {
        float v[U];
#pragma unroll
        for (int u = 0; u < U; u++) v[u] = load(logits + min(first + u * 1024, p.len - 1));
#pragma unroll
        for (int u = 0; u < U; u++) better(best, at, v[u], min(first + u * 1024, p.len - 1));
    }
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    for (int pass = 0; pass < 2; pass++) {
#pragma unroll
        for (int d = 16; d > 0; d >>= 1) {
            const float v = __shfl_xor_sync(FULL, best, d);
            const int i = __shfl_xor_sync(FULL, at, d);
            better(best, at, v, i);
        }
        if (pass == 0) {
            if (lane == 0) {
                bests[warp] = best;
                places[warp] = at;
            }
            __syncthreads();
            best = bests[lane];
            at = places[lane];
        }
    }
    if (threadIdx.x == 0) p.words[blockIdx.x] = at == INT32_MAX ? 0 : at;
}

extern "C" __global__ void advance(const __grid_constant__ Next p) {
    release_next();
    wait_for_previous();
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < p.len) p.words[i] = load(p.words + i) + 1;
}
