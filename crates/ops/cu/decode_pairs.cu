// Gate times `up` where one matrix has the columns of both side by side.

#include "decode.cuh"

// As in src/cuda/decode/pairs.rs.
struct Pairs {
    const float* sums;  // [batch, columns]
    float* products;    // [batch, ffn]
    const float* gate_bias;
    const float* up_bias;
    const float* mask;
    unsigned* counts;
    int ffn, columns;
    int half;  // gates side by side, behind which their `up` is
    int act;
    float act_p;
    int then;
    float then_p;
    int pad;
};

template <int B>
__device__ __forceinline__ void pairs(const Pairs& p) {
    __shared__ unsigned scratch[COUNTS];
    release_next();
    wait_for_previous();
    const auto column = [&](int b, int i) {
        return static_cast<long long>(b) * p.columns + i / p.half * (2 * p.half) + i % p.half;
    };
    const auto gate = [&](int b, int i) {
        const float sum = load(p.sums + column(b, i)) + (p.gate_bias ? p.gate_bias[i] : 0.f);
        return forced(curve_value(p.act, p.act_p, sum), p.mask, i);
    };
    // The last block counts.
    if (blockIdx.x == gridDim.x - 1) {
        unsigned any_count = 0, counts[B];
#pragma unroll
        for (int b = 0; b < B; b++) counts[b] = 0;
        for (int i = threadIdx.x; i < p.ffn; i += blockDim.x) {
            bool any = false;
#pragma unroll
            for (int b = 0; b < B; b++) {
                const bool open = gate(b, i) != 0.f;
                counts[b] += open;
                any |= open;
            }
            any_count += any;
        }
        if (p.counts) write_counts<B>(any_count, counts, scratch, p.counts);
        return;
    }
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= p.ffn) return;
#pragma unroll
    for (int b = 0; b < B; b++) {
        const float open = gate(b, i);
        float product = 0.f;
        if (open != 0.f) {
            const float up =
                load(p.sums + column(b, i) + p.half) + (p.up_bias ? p.up_bias[i] : 0.f);
            product = curve_value(p.then, p.then_p, open * up);
        }
        p.products[static_cast<long long>(b) * p.ffn + i] = product;
    }
}

extern "C" __global__ void __launch_bounds__(512) pairs_1(const __grid_constant__ Pairs p) { pairs<1>(p); }
extern "C" __global__ void __launch_bounds__(512) pairs_2(const __grid_constant__ Pairs p) { pairs<2>(p); }
extern "C" __global__ void __launch_bounds__(512) pairs_4(const __grid_constant__ Pairs p) { pairs<4>(p); }
extern "C" __global__ void __launch_bounds__(512) pairs_8(const __grid_constant__ Pairs p) { pairs<8>(p); }
