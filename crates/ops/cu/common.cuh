// What the kernels share: element types, conversions, 16-byte vectors, sums over warps and blocks.
//
// Tensors are bf16 or f32, and every sum is made in f32. No kernel adds with atomics: results are
// the same each time.
#pragma once

#include <cuda_bf16.h>
#include <stdint.h>

using bf16 = __nv_bfloat16;

__device__ __forceinline__ float to_f32(float x) { return x; }
__device__ __forceinline__ float to_f32(bf16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_f32(float x);
template <>
__device__ __forceinline__ float from_f32<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ bf16 from_f32<bf16>(float x) {
    return __float2bfloat16_rn(x);
}

// 16 bytes of elements: 8 of bf16, 4 of f32.
template <typename T>
struct alignas(16) Vec {
    static constexpr int N = 16 / sizeof(T);
    T v[N];
};

template <typename T>
__device__ __forceinline__ Vec<T> load_vec(const T* p) {
    return *reinterpret_cast<const Vec<T>*>(p);
}

template <typename T>
__device__ __forceinline__ void store_vec(T* p, const Vec<T>& v) {
    *reinterpret_cast<Vec<T>*>(p) = v;
}

// The same as it lies in memory. What a thread holds across branches it holds like this: there the
// compiler gives each bf16 of a Vec a register of its own, twice as many.
using Bits = uint4;

template <typename T>
__device__ __forceinline__ Bits load_bits(const T* p) {
    return *reinterpret_cast<const Bits*>(p);
}

// Element j, a constant.
template <typename T>
__device__ __forceinline__ float element(const Bits& v, int j) {
    constexpr int PER_WORD = 4 / sizeof(T);
    const int at = j / PER_WORD;
    const unsigned word = at == 0 ? v.x : at == 1 ? v.y : at == 2 ? v.z : v.w;
    if (PER_WORD == 1) return __uint_as_float(word);
    // A bf16 is the upper half of a float.
    return __uint_as_float(j % 2 ? word & 0xffff0000u : word << 16);
}

// The sum of floats or doubles over a warp, in every thread.
template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
    for (int d = 16; d > 0; d >>= 1) x += __shfl_xor_sync(0xffffffffu, x, d);
    return x;
}
__device__ __forceinline__ unsigned warp_sum(unsigned x) {
    return __reduce_add_sync(0xffffffffu, x);
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int d = 16; d > 0; d >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, d));
    return x;
}
__device__ __forceinline__ unsigned warp_max(unsigned x) {
    return __reduce_max_sync(0xffffffffu, x);
}

// Each warp's result over a block whose threads are a multiple of 32, `none` past the last: the
// warps' lanes get one each. `scratch` holds 32 numbers.
template <typename T>
__device__ __forceinline__ T of_warps(T x, T none, T* scratch) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    x = lane < warps ? scratch[lane] : none;
    // Then it may be used again.
    __syncthreads();
    return x;
}

// The sum, or the largest, over a block whose threads are a multiple of 32, in every thread.
// `scratch` holds 32 numbers; it may be used again after the call.
template <typename T>
__device__ __forceinline__ T block_sum(T x, T* scratch) {
    return warp_sum(of_warps(warp_sum(x), T(0), scratch));
}
__device__ __forceinline__ float block_max(float x, float* scratch) {
    return warp_max(of_warps(warp_max(x), -INFINITY, scratch));
}
__device__ __forceinline__ unsigned block_max(unsigned x, unsigned* scratch) {
    return warp_max(of_warps(warp_max(x), 0u, scratch));
}
