// What enters a matrix, made by every block for itself: the norm, what is done to each input, and
// all of it in shared memory. Cheaper than a kernel of its own.
//
// Every thread has the same inputs in every pass over them: each THREADSth, so nobody waits in
// between. Loops stay small: the code of a kernel comes from memory too, and this runs once.
#pragma once

#include "decode.cuh"

constexpr int WARPS = 16, THREADS = 32 * WARPS;

// What is done to inputs in front of a matrix, in shared memory: what no kernel writes, so it is
// read before the wait. Null where there is none.
struct Parameters {
    float *gain, *bias, *mask, *unit;
};

// Those of inputs `start..start+n`; `scales` are the units.
__device__ __forceinline__ void read_parameters(const Parameters& p, const Feed& f,
                                                const float* scales, int start, int n) {
#pragma unroll 1
    for (int which = 0; which < 4; which++) {
        float* to = which == 0 ? p.gain : which == 1 ? p.bias : which == 2 ? p.mask : p.unit;
        const float* from = which == 0 ? f.gain : which == 1 ? f.bias : which == 2 ? f.mask : scales;
        if (!to) continue;
#pragma unroll 8
        for (int i = threadIdx.x; i < n; i += THREADS) to[i] = __ldg(from + start + i);
    }
}

// Inputs `start..start+n` as they are: `each` sees every row, place from `start` on, and value.
template <int B, typename F>
__device__ __forceinline__ void stage(const Feed& f, int start, int n, F each) {
    constexpr int U = 8 / B;
#pragma unroll 1
    for (int first = threadIdx.x; first < n; first += U * THREADS) {
        float v[U][B];
#pragma unroll
        for (int u = 0; u < U; u++)
#pragma unroll
            for (int b = 0; b < B; b++)
                v[u][b] = load(f.x + static_cast<long long>(b) * f.width + start +
                               min(first + u * THREADS, n - 1));
#pragma unroll
        for (int u = 0; u < U; u++) {
            const int i = first + u * THREADS;
            if (i < n)
#pragma unroll
                for (int b = 0; b < B; b++) each(b, i, v[u][b]);
        }
    }
}

// A norm's mean, and what it multiplies by; reads `chunk` inputs at a time, and `keep` sees each
// with its place in the chunk.
template <int B, typename F>
__device__ __forceinline__ void norm_of(const Feed& f, int chunk, float* scratch, float (&mean)[B],
                                        float (&factor)[B], F keep) {
#pragma unroll
    for (int b = 0; b < B; b++) mean[b] = factor[b] = 0.f;
#pragma unroll 1
    for (int pass = f.centred ? 0 : 1; pass < 2; pass++) {
        float sum[B];
#pragma unroll
        for (int b = 0; b < B; b++) sum[b] = 0.f;
#pragma unroll 1
        for (int start = 0; start < f.width; start += chunk)
            stage<B>(f, start, min(chunk, f.width - start), [&](int b, int i, float v) {
                const float d = v - mean[b];
                sum[b] += pass ? d * d : d;
                keep(b, i, v);
            });
        block_sums<B>(sum, scratch);
#pragma unroll
        for (int b = 0; b < B; b++)
            if (pass)
                factor[b] = 1.f / sqrtf(sum[b] / f.width + f.eps);
            else
                mean[b] = sum[b] / f.width;
    }
}

// Input `i` of those whose parameters are there, as it enters the matrix.
__device__ __forceinline__ float entering(const Feed& f, const Parameters& p, int i, float v,
                                          float mean, float factor) {
    if (p.gain) v = (v - mean) * factor * p.gain[i] + (p.bias ? p.bias[i] : 0.f);
    v = curve_value(f.op, f.op_p, v);
    if (p.mask) v = p.mask[i] * (fabsf(v) + FORCED);
    return curve_value(f.then, f.then_p, v);
}
