// What attention of a token shares between kernels: a head in front of its products, scores, and
// how a sequence is shared out over blocks.
#pragma once

#include "decode.cuh"

// As in src/cuda/decode/attention.rs.
struct Attend {
    const float* qkv;
    const unsigned* positions;
    void *keys, *values;
    const float* angles;  // [max_pos, 2, pairs]
    const float* gains[2];
    const float* slopes;
    float* out;
    float* partial;
    unsigned* counters;
    int heads, kv_heads, head_dim, padded, context;
    int max_pos, pairs, interleaved;
    int centred[2];
    float eps[2];
    float scale;
    int window;
    float softcap, factor;
    int alibi_bf16;
    int chunks;
};

constexpr int MOST_SHARES = 16;  // `Room::SPLITS`

// The keys of the cache that one block reads.
struct Share {
    int from, to;
    int active;  // blocks of this head that have keys, at least 1
};

// Keys are shared out by tiles. Joining shares has a price of its own: one block takes a few keys
// alone, and several have enough each for a tile a warp.
__device__ __forceinline__ Share share_of(int position, int window, int share, int shares) {
    constexpr int TILE = 16, WHOLE = 256, LEAST = 128;
    const int first = max(0, position - (window - 1));
    const int before = position - first;
    const int tiles = (before + TILE - 1) / TILE;
    const int wanted = before <= WHOLE ? 1 : min(shares, (before + LEAST - 1) / LEAST);
    const int each = (tiles + wanted - 1) / wanted;
    Share s;
    s.active = each ? (tiles + each - 1) / each : 1;
    s.from = first + share * each * TILE;
    s.to = min(s.from + each * TILE, position);
    return s;
}

// A head of a token, zeros behind it: a warp has up to COLUMNS.
template <int COLUMNS>
__device__ __forceinline__ void load_head(float (&v)[COLUMNS / 32], const float* from, int dim) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int i = 0; i < COLUMNS / 32; i++) {
        const float x = load(from + min(lane + 32 * i, dim - 1));
        v[i] = lane + 32 * i < dim ? x : 0.f;
    }
}

// A query (`which` 0) or a key (1) of a warp, normalised where there is a gain, and turned, to
// COLUMNS places of shared memory.
template <int COLUMNS>
__device__ __forceinline__ void turn(const Attend& a, int which, float (&v)[COLUMNS / 32],
                                     const float* gain, const float* angles, float* to) {
    const int lane = threadIdx.x & 31, dim = a.head_dim;
    if (gain) {
        float mean = 0.f, sum = 0.f;
        if (a.centred[which]) {
#pragma unroll
            for (int i = 0; i < COLUMNS / 32; i++) mean += v[i];
            mean = warp_sum(mean) / dim;
        }
#pragma unroll
        for (int i = 0; i < COLUMNS / 32; i++) {
            const float d = lane + 32 * i < dim ? v[i] - mean : 0.f;
            sum += d * d;
        }
        const float factor = 1.f / sqrtf(warp_sum(sum) / dim + a.eps[which]);
#pragma unroll
        for (int i = 0; i < COLUMNS / 32; i++)
            if (lane + 32 * i < dim) v[i] = (v[i] - mean) * factor * gain[lane + 32 * i];
    }
#pragma unroll
    for (int i = 0; i < COLUMNS / 32; i++) to[lane + 32 * i] = v[i];
    __syncwarp();
    for (int j = lane; j < a.pairs; j += 32) {
        const int p = a.interleaved ? 2 * j : j, q = a.interleaved ? 2 * j + 1 : j + a.pairs;
        const float cos = angles[j], sin = angles[a.pairs + j];
        const float x = to[p], y = to[q];
        to[p] = x * cos - y * sin;
        to[q] = y * cos + x * sin;
    }
    __syncwarp();
}

// 16 bytes of the cache, or zeros where `there` is not. What the kernel before wrote may be read.
__device__ __forceinline__ uint4 load_cache(const void* p, bool there = true) {
    uint4 v;
    asm volatile(
        "{\n .reg .pred p;\n setp.ne.s32 p, %5, 0;\n"
        " mov.b32 %0, 0;\n mov.b32 %1, 0;\n mov.b32 %2, 0;\n mov.b32 %3, 0;\n"
        " @p ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
        : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
        : "l"(p), "r"(static_cast<int>(there))
        : "memory");
    return v;
}

__device__ __forceinline__ float score(const Attend& a, float product, float slope, int key,
                                       int position) {
    float x = product * a.scale;
    if (a.softcap > 0.f) x = a.softcap * tanhf(product * (a.scale / a.softcap));
    if (!a.slopes) return x;
    const float steep = a.alibi_bf16
                            ? to_f32(from_f32<bf16>(slope * static_cast<float>(key)))
                            : slope * static_cast<float>(key - position);
    return x + a.factor * steep;
}

// The last block of a head's shares joins them, in their order. Of each query head and share
// `partial` has a sum over values, the largest score and the sum of weights.
template <int G, int THREADS>
__device__ __forceinline__ void join_shares(const Attend& a, const float* partial, float* out,
                                            unsigned* counter, int here, int shares, int active) {
    __shared__ unsigned arrived;
    __shared__ float factors[G < 2 ? 2 : G][MOST_SHARES];
    const int t = threadIdx.x, dim = a.head_dim;
    const long long stride = dim + 2;
    __syncthreads();
    if (t == 0) {
        __threadfence();
        arrived = atomicAdd(counter, 1);
        __threadfence();
    }
    __syncthreads();
    if (arrived != active - 1) return;
    if (t == 0) *counter = 0;
    // Half a warp has the shares of one head.
    for (int i = t; i < max(G * MOST_SHARES, 32); i += THREADS) {
        const int g = i / MOST_SHARES, s = i % MOST_SHARES;
        const float* from =
            partial + (min(g, here - 1) * shares + min(s, active - 1)) * stride + dim;
        const float top = load(from), weights = load(from + 1);
        float largest = top;
#pragma unroll
        for (int d = MOST_SHARES / 2; d > 0; d /= 2)
            largest = fmaxf(largest, __shfl_xor_sync(FULL, largest, d));
        const float factor = s < active ? expf(top - largest) : 0.f;
        float all = s < active ? weights * factor : 0.f;
#pragma unroll
        for (int d = MOST_SHARES / 2; d > 0; d /= 2) all += __shfl_xor_sync(FULL, all, d);
        factors[g][s] = factor / all;
    }
    __syncthreads();
    // All loads of two columns before the first is used: a load takes longer than the sum.
    constexpr int U = 2;
    for (int first = t; first < here * dim; first += U * THREADS) {
        float x[U][MOST_SHARES];
#pragma unroll
        for (int u = 0; u < U; u++) {
            const int e = min(first + u * THREADS, here * dim - 1);
            const float* from = partial + e / dim * shares * stride + e % dim;
#pragma unroll
            for (int s = 0; s < MOST_SHARES; s++)
                x[u][s] = load(from + min(s, active - 1) * stride);
        }
#pragma unroll
        for (int u = 0; u < U; u++) {
            const int e = first + u * THREADS;
            if (e >= here * dim) break;
            float sum = 0.f;
#pragma unroll
            for (int s = 0; s < MOST_SHARES; s++)
                if (s < active) sum = fmaf(factors[e / dim][s], x[u][s], sum);
            out[e] = sum;
        }
    }
}
