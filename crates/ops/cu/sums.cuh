// Sums in f64 and of counts over a block.
#pragma once

#include "common.cuh"

__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
    for (int d = 16; d > 0; d >>= 1) x += __shfl_xor_sync(0xffffffffu, x, d);
    return x;
}

// The sum over a block whose threads are a multiple of 32, in every thread. `scratch` holds 32
// numbers; it may be used again after the call.
__device__ __forceinline__ double block_sum(double x, double* scratch) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    x = warp_sum(x);
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    x = warp_sum(lane < warps ? scratch[lane] : 0.);
    __syncthreads();
    return x;
}

__device__ __forceinline__ unsigned block_sum(unsigned x, unsigned* scratch) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    x = __reduce_add_sync(0xffffffffu, x);
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    x = __reduce_add_sync(0xffffffffu, lane < warps ? scratch[lane] : 0u);
    __syncthreads();
    return x;
}

__device__ __forceinline__ unsigned block_max(unsigned x, unsigned* scratch) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    x = __reduce_max_sync(0xffffffffu, x);
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    x = __reduce_max_sync(0xffffffffu, lane < warps ? scratch[lane] : 0u);
    __syncthreads();
    return x;
}
