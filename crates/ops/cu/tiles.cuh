// Work over many tensors in one launch: a block has one tile, and finds out whose it is.
#pragma once

// The index of the tensor with the block's tile: `firsts` has each tensor's first tile, ascending
// from 0. All threads look at once, so it takes one load and one barrier for as many tensors as the
// block has threads. Every thread must call it.
__device__ __forceinline__ int owner_of_tile(const unsigned* firsts, int n) {
    int before = 0;
    for (int base = 0; base < n; base += blockDim.x) {
        const int i = base + threadIdx.x;
        const int begun = __syncthreads_count(i < n && __ldg(firsts + i) <= blockIdx.x);
        before += begun;
        if (begun < (int)blockDim.x) break;
    }
    return before - 1;
}
