// Attention of one new token of each sequence over the cache of those before it.
//
// A block has a key head, up to G of the query heads that read it, and a share of the keys. Some
// lanes read one key together, 16 bytes each; every such group goes through keys of its own with
// the softmax of what it has seen so far, and the groups' sums are joined at the end. Where a
// sequence is shared out over blocks, the last of them joins the shares in their order.

#include "decode.cuh"

constexpr int THREADS = 128;
constexpr int MOST = 256;  // columns of a head

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

struct Store {
    const void* from;
    void* to;
    int n, at, kv_heads, context, head_dim, padded;
    int from_bf16;
    int pad;
};

// Keys or values of a prompt into a sequence's cache.
template <typename T>
__device__ __forceinline__ void store(const Store& s) {
    wait_for_previous();
    const long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    const long long row = i / s.padded;
    const int d = static_cast<int>(i % s.padded);
    if (row >= static_cast<long long>(s.n) * s.kv_heads) return;
    const long long token = row / s.kv_heads, head = row % s.kv_heads;
    float v = 0.f;
    if (d < s.head_dim) {
        const long long at = row * s.head_dim + d;
        v = s.from_bf16 ? to_f32(static_cast<const bf16*>(s.from)[at])
                        : static_cast<const float*>(s.from)[at];
    }
    static_cast<T*>(s.to)[(head * s.context + s.at + token) * s.padded + d] = from_f32<T>(v);
}

extern "C" __global__ void store_f32(const __grid_constant__ Store s) { store<float>(s); }
extern "C" __global__ void store_bf16(const __grid_constant__ Store s) { store<bf16>(s); }

// A head's query (`which` 0) or key (1), normalised and turned, by one warp: `to` has MOST places,
// zeros behind the head.
__device__ __forceinline__ void turned(const Attend& a, int which, int position, const float* from,
                                       float* to) {
    const int lane = threadIdx.x & 31, dim = a.head_dim;
    float v[MOST / 32];
#pragma unroll
    for (int i = 0; i < MOST / 32; i++) {
        const float x = load(from + min(lane + 32 * i, dim - 1));
        v[i] = lane + 32 * i < dim ? x : 0.f;
    }
    if (a.gains[which]) {
        float mean = 0.f, sum = 0.f;
        if (a.centred[which]) {
#pragma unroll
            for (int i = 0; i < MOST / 32; i++) mean += v[i];
            mean = warp_sum(mean) / dim;
        }
#pragma unroll
        for (int i = 0; i < MOST / 32; i++) {
            const float d = lane + 32 * i < dim ? v[i] - mean : 0.f;
            sum += d * d;
        }
        const float factor = 1.f / sqrtf(warp_sum(sum) / dim + a.eps[which]);
#pragma unroll
        for (int i = 0; i < MOST / 32; i++)
            if (lane + 32 * i < dim)
                v[i] = (v[i] - mean) * factor * __ldg(a.gains[which] + lane + 32 * i);
    }
#pragma unroll
    for (int i = 0; i < MOST / 32; i++) to[lane + 32 * i] = v[i];
    __syncwarp();
    const float* angles = a.angles + static_cast<long long>(position) * 2 * a.pairs;
    for (int j = lane; j < a.pairs; j += 32) {
        const int p = a.interleaved ? 2 * j : j, q = a.interleaved ? 2 * j + 1 : j + a.pairs;
        const float cos = __ldg(angles + j), sin = __ldg(angles + a.pairs + j);
        const float x = to[p], y = to[q];
        to[p] = x * cos - y * sin;
        to[q] = y * cos + x * sin;
    }
}

template <int N>
__device__ __forceinline__ void convert(const uint4& r, float (&v)[N]) {
    if constexpr (N == 4) {
        v[0] = __uint_as_float(r.x), v[1] = __uint_as_float(r.y);
        v[2] = __uint_as_float(r.z), v[3] = __uint_as_float(r.w);
    } else {
        const unsigned w[4] = {r.x, r.y, r.z, r.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            v[2 * i] = __uint_as_float(w[i] << 16);
            v[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u);
        }
    }
}

__device__ __forceinline__ uint4 load_cache(const void* p) {
    uint4 v;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p)
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

template <typename T, int G>
__device__ __forceinline__ void attend(const Attend& a) {
    constexpr int N = 16 / sizeof(T);
    constexpr int NV = MOST / 32 / N;  // vectors of a lane
    constexpr int AHEAD = G <= 2 ? 4 : 2;
    __shared__ float queries[G][MOST];
    __shared__ __align__(16) float own[2][MOST];  // the token's key and value
    __shared__ float joined[THREADS * NV * N];    // [groups][columns]
    __shared__ float largest[THREADS], weights[THREADS];
    __shared__ unsigned arrived;
    const int t = threadIdx.x, lane = t & 31, warp = t >> 5;
    const int kv_head = blockIdx.x / a.chunks, chunk = blockIdx.x % a.chunks;
    const int share = blockIdx.y, shares = gridDim.y, b = blockIdx.z;
    const int group = a.heads / a.kv_heads, dim = a.head_dim;
    const int first_head = kv_head * group + chunk * G;
    const int here = min(G, group - chunk * G);  // query heads of this block
    const int width = (a.heads + 2 * a.kv_heads) * dim;

    release_next();
    wait_for_previous();
    const unsigned place = load(a.positions + b);
    float* out = a.out + (static_cast<long long>(b) * a.heads + first_head) * dim;
    if (place >= static_cast<unsigned>(min(a.context, a.max_pos))) {
        if (share == 0)
            for (int i = t; i < here * dim; i += THREADS) out[i] = nanf("");
        return;
    }
    const int position = static_cast<int>(place);
    const int first = max(0, position - (a.window - 1));
    const int before = position - first;  // keys of the cache that are seen
    // Lanes of a key: a power of two, so that sums over them stay within a warp.
    const int vectors = a.padded / N;
    int lanes = 1;
    while (lanes < min(vectors, 32)) lanes *= 2;
    const int groups = THREADS / lanes, mine = t / lanes, part = t % lanes;
    // At least so many keys a block that joining shares pays.
    constexpr int LEAST = 64;
    const int each = max((before + shares - 1) / shares, LEAST);
    const int active = max(1, (before + each - 1) / each);
    if (share >= active) return;
    const bool last = share == active - 1;

    const float* qkv = a.qkv + static_cast<long long>(b) * width;
    for (int h = warp; h < G; h += THREADS / 32)
        turned(a, 0, position, qkv + (first_head + min(h, here - 1)) * dim, queries[h]);
    if (last) {
        const float* k = qkv + (a.heads + kv_head) * dim;
        if (warp == 0) turned(a, 1, position, k, own[0]);
        if (warp == 1)
            for (int d = lane; d < MOST; d += 32)
                own[1][d] = d < dim ? load(k + a.kv_heads * dim + d) : 0.f;
    }
    __syncthreads();
    const long long head_at =
        (static_cast<long long>(b) * a.kv_heads + kv_head) * a.context * a.padded;
    T* const keys = static_cast<T*>(a.keys) + head_at;
    T* const values = static_cast<T*>(a.values) + head_at;
    // Nobody reads this row of the cache for this token.
    if (last && chunk == 0) {
        for (int d = t; d < a.padded; d += THREADS) {
            const long long at = static_cast<long long>(position) * a.padded + d;
            keys[at] = from_f32<T>(own[0][d]);
            values[at] = from_f32<T>(own[1][d]);
        }
    }

    float q[G][NV * N], acc[G][NV * N], most[G], sum[G], slope[G];
#pragma unroll
    for (int g = 0; g < G; g++) {
        most[g] = -INFINITY;
        sum[g] = 0.f;
        slope[g] = a.slopes ? __ldg(a.slopes + first_head + min(g, here - 1)) : 0.f;
#pragma unroll
        for (int v = 0; v < NV; v++)
#pragma unroll
            for (int k = 0; k < N; k++) {
                const int d = (part + v * lanes) * N + k;
                q[g][v * N + k] = d < dim ? queries[g][d] : 0.f;
                acc[g][v * N + k] = 0.f;
            }
    }
    // A key's scores and its value join what was seen; `there` is the same in all its lanes.
    const auto take = [&](const float (&k)[NV * N], const float (&v)[NV * N], int key, bool there) {
#pragma unroll
        for (int g = 0; g < G; g++) {
            float product = 0.f;
#pragma unroll
            for (int i = 0; i < NV * N; i++) product = fmaf(q[g][i], k[i], product);
            for (int d = lanes / 2; d > 0; d /= 2) product += __shfl_xor_sync(FULL, product, d);
            if (!there) continue;
            const float s = score(a, product, slope[g], key, position);
            const float top = fmaxf(most[g], s);
            const float keep = expf(most[g] - top), weight = expf(s - top);
            most[g] = top;
            sum[g] = sum[g] * keep + weight;
#pragma unroll
            for (int i = 0; i < NV * N; i++)
                acc[g][i] = fmaf(weight, v[i], acc[g][i] * keep);
        }
    };
    const int from = first + share * each, to = min(from + each, position);
    for (int base = from; base < to; base += AHEAD * groups) {
        uint4 k[AHEAD][NV], v[AHEAD][NV];
#pragma unroll
        for (int u = 0; u < AHEAD; u++)
#pragma unroll
            for (int i = 0; i < NV; i++) {
                const int vector = part + i * lanes;
                const bool in = vector < vectors;
                const long long at =
                    static_cast<long long>(min(base + u * groups + mine, to - 1)) * a.padded +
                    (in ? vector : 0) * N;
                k[u][i] = load_cache(keys + at);
                v[u][i] = load_cache(values + at);
            }
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            float key[NV * N], value[NV * N];
#pragma unroll
            for (int i = 0; i < NV; i++) {
                const bool in = part + i * lanes < vectors;
                float x[N], y[N];
                convert<N>(k[u][i], x);
                convert<N>(v[u][i], y);
#pragma unroll
                for (int e = 0; e < N; e++) {
                    key[i * N + e] = in ? x[e] : 0.f;
                    value[i * N + e] = in ? y[e] : 0.f;
                }
            }
            const int at = base + u * groups + mine;
            take(key, value, at, at < to);
        }
    }
    if (last) {
        float key[NV * N], value[NV * N];
#pragma unroll
        for (int i = 0; i < NV * N; i++) {
            const int d = (part + i / N * lanes) * N + i % N;
            key[i] = d < dim ? own[0][d] : 0.f;
            value[i] = d < dim ? own[1][d] : 0.f;
        }
        take(key, value, position, mine == 0);
    }

    // The groups join: some may have seen nothing.
    const int columns = lanes * NV * N;
    float* const partial =
        a.partial + (static_cast<long long>(b) * a.heads + first_head) * shares * (dim + 2);
#pragma unroll
    for (int g = 0; g < G; g++) {
        __syncthreads();
        if (part == 0) largest[mine] = most[g], weights[mine] = sum[g];
#pragma unroll
        for (int i = 0; i < NV * N; i++)
            joined[mine * columns + (part + i / N * lanes) * N + i % N] = acc[g][i];
        __syncthreads();
        if (g >= here) continue;
        float top = -INFINITY, all = 0.f;
        for (int k = 0; k < groups; k++) top = fmaxf(top, largest[k]);
        for (int k = 0; k < groups; k++) all += weights[k] * expf(largest[k] - top);
        float* const to = partial + (static_cast<long long>(g) * shares + share) * (dim + 2);
        for (int d = t; d < dim; d += THREADS) {
            float x = 0.f;
            for (int k = 0; k < groups; k++) x += joined[k * columns + d] * expf(largest[k] - top);
            if (active == 1)
                out[g * dim + d] = x / all;
            else
                to[d] = x;
        }
        if (active > 1 && t == 0) to[dim] = top, to[dim + 1] = all;
    }
    if (active == 1) return;

    // The shares join.
    __threadfence();
    __syncthreads();
    unsigned* const counter = a.counters + b * gridDim.x + blockIdx.x;
    if (t == 0) arrived = atomicAdd(counter, 1);
    __syncthreads();
    if (arrived != active - 1) return;
    __threadfence();
    if (t == 0) *counter = 0;
    for (int g = 0; g < here; g++) {
        const float* const from = partial + static_cast<long long>(g) * shares * (dim + 2);
        float top = -INFINITY, all = 0.f;
        for (int s = 0; s < active; s++) top = fmaxf(top, load(from + s * (dim + 2) + dim));
        for (int s = 0; s < active; s++)
            all += load(from + s * (dim + 2) + dim + 1) *
                   expf(load(from + s * (dim + 2) + dim) - top);
        for (int d = t; d < dim; d += THREADS) {
            float x = 0.f;
            for (int s = 0; s < active; s++)
                x += load(from + s * (dim + 2) + d) * expf(load(from + s * (dim + 2) + dim) - top);
            out[g * dim + d] = x / all;
        }
    }
}

#define ENTRY(SUFFIX, T, G)                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS) attend_##SUFFIX##_##G(             \
        const __grid_constant__ Attend a) {                                                  \
        attend<T, G>(a);                                                                     \
    }
ENTRY(f32, float, 1)
ENTRY(f32, float, 2)
ENTRY(f32, float, 4)
ENTRY(f32, float, 8)
ENTRY(bf16, bf16, 1)
ENTRY(bf16, bf16, 2)
ENTRY(bf16, bf16, 4)
ENTRY(bf16, bf16, 8)
