// Attention of one new token of each sequence over an f32 cache of those before it; that over bf16
// is in decode_attention_bf16.cu. And what brings a prompt's keys and values into a cache.
//
// A block has a key head, up to G of the query heads that read it, and a share of the keys. Some
// lanes read one key together, 16 bytes each; every such group goes through keys of its own with
// the softmax of what it has seen so far, and the groups' sums are joined at the end. Where a
// sequence is shared out over blocks, the last of them joins the shares in their order.

#include "decode_attention.cuh"

constexpr int THREADS = 128;
constexpr int MOST = 256;  // columns of a head

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

template <int G>
__device__ __forceinline__ void attend(const Attend& a) {
    constexpr int N = 4;
    constexpr int NV = MOST / 32 / N;  // vectors of a lane
    constexpr int AHEAD = G <= 2 ? 4 : 2;
    __shared__ float queries[G][MOST];
    __shared__ __align__(16) float own[2][MOST];  // the token's key and value
    __shared__ float joined[THREADS * NV * N];    // [groups][columns]
    __shared__ float largest[THREADS], weights[THREADS];
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
    // Lanes of a key: a power of two, so that sums over them stay within a warp.
    const int vectors = a.padded / N;
    int lanes = 1;
    while (lanes < min(vectors, 32)) lanes *= 2;
    const int groups = THREADS / lanes, mine = t / lanes, part = t % lanes;
    const Share keys_here = share_of(position, a.window, share, shares);
    const int from = keys_here.from, to = keys_here.to, active = keys_here.active;
    if (share >= active) return;
    const bool last = share == active - 1;

    const float* qkv = a.qkv + static_cast<long long>(b) * width;
    const float* angles = a.angles + static_cast<long long>(position) * 2 * a.pairs;
    float row[MOST / 32];
    for (int h = warp; h < here; h += THREADS / 32) {
        load_head<MOST>(row, qkv + (first_head + h) * dim, dim);
        turn<MOST>(a, 0, row, a.gains[0], angles, queries[h]);
    }
    if (last && warp < 2) {
        // The key, which the first warp turns, or the value.
        load_head<MOST>(row, qkv + (a.heads + kv_head + warp * a.kv_heads) * dim, dim);
        if (warp == 0) turn<MOST>(a, 1, row, a.gains[1], angles, own[0]);
        for (int i = 0; i < MOST / 32 && warp == 1; i++) own[1][lane + 32 * i] = row[i];
    }
    __syncthreads();
    const long long head_at =
        (static_cast<long long>(b) * a.kv_heads + kv_head) * a.context * a.padded;
    float* const keys = static_cast<float*>(a.keys) + head_at;
    float* const values = static_cast<float*>(a.values) + head_at;
    // Nobody reads this row of the cache for this token.
    if (last && chunk == 0) {
        for (int d = t; d < a.padded; d += THREADS) {
            const long long at = static_cast<long long>(position) * a.padded + d;
            keys[at] = own[0][d];
            values[at] = own[1][d];
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
                q[g][v * N + k] = d < dim && g < here ? queries[g][d] : 0.f;
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
#pragma unroll
                for (int e = 0; e < N; e++) {
                    key[i * N + e] = in ? element<float>(k[u][i], e) : 0.f;
                    value[i * N + e] = in ? element<float>(v[u][i], e) : 0.f;
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

    unsigned* const counter = a.counters + b * gridDim.x + blockIdx.x;
    join_shares<G, THREADS>(a, partial, out, counter, here, shares, active);
}

#define ENTRY(G)                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS) attend_f32_##G(         \
        const __grid_constant__ Attend a) {                                       \
        attend<G>(a);                                                             \
    }
ENTRY(1)
ENTRY(2)
ENTRY(4)
ENTRY(8)
