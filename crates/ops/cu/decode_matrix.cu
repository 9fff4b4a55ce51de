// Weights: packing, filling with random numbers, and reading at the memory's speed.

#include "decode.cuh"

// As in src/cuda/decode/matrix.rs.
struct Pack {
    const void* from;
    void* to;
    float* scales;
    long long row_step, col_step, stride;
    int cols;
    int from_bf16;
};

struct Fill {
    void* to;
    float* scales;
    long long stride;
    int cols;
    unsigned seed;
    float bound;
};

struct Read {
    const uint4* from;
    long long vectors;
    unsigned* sums;
};

__device__ __forceinline__ float source(const Pack& p, long long row, int col) {
    const long long at = row * p.row_step + col * p.col_step;
    return p.from_bf16 ? to_f32(static_cast<const bf16*>(p.from)[at])
                       : static_cast<const float*>(p.from)[at];
}

// A block packs one row.
template <typename W>
__device__ __forceinline__ void pack(const Pack& p) {
    wait_for_previous();
    const long long row = blockIdx.x;
    W* to = static_cast<W*>(p.to) + row * p.stride;
    for (int i = threadIdx.x; i < p.stride; i += blockDim.x)
        to[i] = from_f32<W>(i < p.cols ? source(p, row, i) : 0.f);
}

extern "C" __global__ void pack_f32(const __grid_constant__ Pack p) { pack<float>(p); }
extern "C" __global__ void pack_bf16(const __grid_constant__ Pack p) { pack<bf16>(p); }
extern "C" __global__ void pack_int8(const __grid_constant__ Pack p) {
    __shared__ float scratch[32];
    wait_for_previous();
    const long long row = blockIdx.x;
    float largest = 0.f;
    for (int i = threadIdx.x; i < p.cols; i += blockDim.x)
        largest = fmaxf(largest, fabsf(source(p, row, i)));
    largest = block_max(largest, scratch);
    const float inverse = largest > 0.f ? __fdiv_rn(127.f, largest) : 0.f;
    int8_t* to = static_cast<int8_t*>(p.to) + row * p.stride;
    for (int i = threadIdx.x; i < p.stride; i += blockDim.x)
        to[i] = i < p.cols ? static_cast<int8_t>(roundf(source(p, row, i) * inverse)) : 0;
    if (threadIdx.x == 0) p.scales[row] = __fdiv_rn(largest, 127.f);
}

// A well mixed number for each place (the finaliser of MurmurHash3).
__device__ __forceinline__ unsigned mixed(unsigned x) {
    x ^= x >> 16;
    x *= 0x85ebca6bu;
    x ^= x >> 13;
    x *= 0xc2b2ae35u;
    return x ^ (x >> 16);
}

template <typename W, typename F>
__device__ __forceinline__ void fill(const Fill& p, F value) {
    wait_for_previous();
    const long long row = blockIdx.x;
    W* to = static_cast<W*>(p.to) + row * p.stride;
    const unsigned seed = mixed(p.seed + mixed(static_cast<unsigned>(row)));
    for (int i = threadIdx.x; i < p.stride; i += blockDim.x)
        // From -1 to 1.
        to[i] = i < p.cols ? value(static_cast<int>(mixed(seed + i)) * 4.656613e-10f) : W(0.f);
}

extern "C" __global__ void fill_f32(const __grid_constant__ Fill p) {
    fill<float>(p, [=](float u) { return u * p.bound; });
}
extern "C" __global__ void fill_bf16(const __grid_constant__ Fill p) {
    fill<bf16>(p, [=](float u) { return from_f32<bf16>(u * p.bound); });
}
extern "C" __global__ void fill_int8(const __grid_constant__ Fill p) {
    fill<int8_t>(p, [=](float u) { return static_cast<int8_t>(roundf(u * 127.f)); });
    if (threadIdx.x == 0) p.scales[blockIdx.x] = p.bound / 127.f;
}

extern "C" __global__ void __launch_bounds__(512) read(const __grid_constant__ Read p) {
    constexpr int U = 8;
    wait_for_previous();
    unsigned sum = 0;
    const long long all = static_cast<long long>(gridDim.x) * blockDim.x;
    for (long long i = blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x;
         i < p.vectors; i += U * all) {
        uint4 v[U];
#pragma unroll
        for (int u = 0; u < U; u++)
            v[u] = i + u * all < p.vectors ? __ldcs(p.from + i + u * all) : uint4{0, 0, 0, 0};
#pragma unroll
        for (int u = 0; u < U; u++) sum ^= v[u].x ^ v[u].y ^ v[u].z ^ v[u].w;
    }
    sum = __reduce_xor_sync(FULL, sum);
    if (threadIdx.x == 0) p.sums[blockIdx.x] = sum;
}
