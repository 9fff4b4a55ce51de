// Sums of rows: the weights that leave the inputs which are not zero.
//
// A block has a tile of columns and a share of the list of inputs. Each thread reads N columns of
// some rows at a time, several rows ahead; groups of threads that have the same columns take
// different rows, and their sums are added at the end. Where the list is shared out over blocks,
// the last of them adds the parts in the order of the shares.

#include "decode.cuh"

constexpr int THREADS = 512;

// As in src/cuda/decode/project.rs.
struct Add {
    Feed feed;
    Out out;
    const void* weights;
    const float* scales;
    float* partial;
    unsigned* counters;
    long long stride;
    int columns, shares, chunk;
    int pad;
};

// The values of one input in all rows of the batch.
template <int B>
__device__ __forceinline__ void load_values(float (&v)[B], const float* values) {
    if constexpr (B == 1) {
        v[0] = values[0];
    } else if constexpr (B == 2) {
        const float2 a = *reinterpret_cast<const float2*>(values);
        v[0] = a.x, v[1] = a.y;
    } else {
#pragma unroll
        for (int i = 0; i < B; i += 4) {
            const float4 a = *reinterpret_cast<const float4*>(values + i);
            v[i] = a.x, v[i + 1] = a.y, v[i + 2] = a.z, v[i + 3] = a.w;
        }
    }
}

// Copies inputs `start..start+n` to shared memory, `[n][B]`; `each` sees every value. A thread has
// the same places as in later passes, so nobody need wait.
template <int B, typename F>
__device__ __forceinline__ void stage(const Feed& f, int start, int n, float* values, bool keep,
                                      F each) {
    constexpr int U = 16 / B;
    for (int first = threadIdx.x; first < n; first += U * THREADS) {
        float v[B][U];
#pragma unroll
        for (int b = 0; b < B; b++) {
            const float* x = f.x + static_cast<long long>(b) * f.width + start;
#pragma unroll
            for (int u = 0; u < U; u++) v[b][u] = load(x + min(first + u * THREADS, n - 1));
        }
#pragma unroll
        for (int u = 0; u < U; u++) {
            const int i = first + u * THREADS;
            if (i >= n) break;
#pragma unroll
            for (int b = 0; b < B; b++) {
                if (keep) values[i * B + b] = v[b][u];
                each(b, v[b][u]);
            }
        }
    }
}

template <typename W, int B, int N>
struct Adder {
    static constexpr int AHEAD = 4;

    float acc[B][N];
    const W* weights;
    long long stride;
    const unsigned short* list;
    const float* values;
    int groups;
    bool mine;

    struct Rows {
        Packed<W, N> w[AHEAD];
        int at[AHEAD];  // -1 behind the end
    };

    __device__ __forceinline__ void read(Rows& rows, int p, int end) {
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            const int q = p + u * groups;
            const bool there = mine && q < end;
            rows.at[u] = there ? list[q] : -1;
            load_weights(rows.w[u], weights + (there ? rows.at[u] * stride : 0), there);
        }
    }

    __device__ __forceinline__ void add(const Rows& rows) {
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            float x[B], w[N];
            load_values<B>(x, values + max(rows.at[u], 0) * B);
            unpack(rows.w[u], w);
#pragma unroll
            for (int b = 0; b < B; b++) {
                // Not times a zero weight: the value may be infinite.
                const float v = rows.at[u] < 0 ? 0.f : x[b];
#pragma unroll
                for (int k = 0; k < N; k++) acc[b][k] = fmaf(v, w[k], acc[b][k]);
            }
        }
    }

    // Rows `p`, `p + groups`, ... of the list, in two sets: one is on its way while the other is
    // added.
    __device__ __forceinline__ void sum(int p, int end) {
        Rows one, other;
        const int step = AHEAD * groups;
        read(one, p, end);
        read(other, p + step, end);
        for (; p < end; p += 2 * step) {
            add(one);
            read(one, p + 2 * step, end);
            add(other);
            read(other, p + 3 * step, end);
        }
    }
};

template <typename W, int B, int N>
__device__ __forceinline__ void add(const Add& a) {
    extern __shared__ __align__(16) unsigned char shared[];
    __shared__ float scratch[B * 32];
    __shared__ unsigned marks[32];
    __shared__ unsigned arrived;
    const Feed& f = a.feed;
    const int t = threadIdx.x, lane = t & 31;
    float* values = reinterpret_cast<float*>(shared);                     // [chunk][B]
    unsigned* bits = reinterpret_cast<unsigned*>(values + a.chunk * B);   // [chunk / 32]
    unsigned* before = bits + a.chunk / 32;                               // [chunk / 32]
    unsigned short* list = reinterpret_cast<unsigned short*>(before + a.chunk / 32);  // [chunk]

    release_next();
    prefetch_parameters(f);
    wait_for_previous();

    const int width = f.width;
    const bool whole = width <= a.chunk;
    const bool first_block = blockIdx.x == 0 && blockIdx.y == 0;
    float mean[B], factor[B];
    if (f.normed) {
        float sum[B];
#pragma unroll
        for (int b = 0; b < B; b++) sum[b] = mean[b] = 0.f;
        stage<B>(f, 0, width, values, whole,
                 [&](int b, float v) { sum[b] += f.centred ? v : v * v; });
        block_sums<B>(sum, scratch);
        if (f.centred) {
#pragma unroll
            for (int b = 0; b < B; b++) mean[b] = sum[b] / width, sum[b] = 0.f;
            const auto each = [&](int b, float v) { sum[b] += (v - mean[b]) * (v - mean[b]); };
            if (whole) {
                for (int i = t; i < width; i += THREADS)
#pragma unroll
                    for (int b = 0; b < B; b++) each(b, values[i * B + b]);
            } else {
                stage<B>(f, 0, width, values, false, each);
            }
            block_sums<B>(sum, scratch);
        }
#pragma unroll
        for (int b = 0; b < B; b++) factor[b] = 1.f / sqrtf(sum[b] / width + f.eps);
    }

    Adder<W, B, N> adder;
#pragma unroll
    for (int b = 0; b < B; b++)
#pragma unroll
        for (int k = 0; k < N; k++) adder.acc[b][k] = 0.f;
    const int lanes = a.columns / N;
    const int group = t / lanes, lane_column = t % lanes * N;
    const int column = blockIdx.x * a.columns + lane_column;
    adder.groups = THREADS / lanes;
    adder.mine = group < adder.groups && column < a.stride;
    adder.stride = a.stride;
    adder.list = list;
    adder.values = values;

    unsigned any_count = 0, counts[B];
#pragma unroll
    for (int b = 0; b < B; b++) counts[b] = 0;

    for (int start = 0; start < width; start += a.chunk) {
        const int n = min(a.chunk, width - start);
        const int words = (n + 31) / 32;
        // The list and values of the chunk before are no longer read.
        if (start > 0) __syncthreads();
        if (!(f.normed && whole)) stage<B>(f, start, n, values, true, [](int, float) {});
        for (int i = t; i < words * 32; i += THREADS) {
            bool any = false;
            if (i < n) {
                const int at = start + i;
                const float gain = f.normed ? __ldg(f.gain + at) : 1.f;
                const float bias = f.normed && f.bias ? __ldg(f.bias + at) : 0.f;
                const float unit = a.scales ? __ldg(a.scales + at) : 1.f;
#pragma unroll
                for (int b = 0; b < B; b++) {
                    float v = values[i * B + b];
                    if (f.normed) v = (v - mean[b]) * factor[b] * gain + bias;
                    v = entered(f, v, at);
                    if (first_block && f.h) f.h[static_cast<long long>(b) * width + at] = v;
                    counts[b] += v != 0.f;
                    any |= v != 0.f;
                    values[i * B + b] = v * unit;
                }
            }
            const unsigned which = __ballot_sync(FULL, any);
            if (lane == 0) bits[i / 32] = which;
            any_count += any;
        }
        __syncthreads();
        // A chunk has at most as many words as a block has threads.
        unsigned total;
        const unsigned mine = block_before(t < words ? __popc(bits[t]) : 0, marks, total);
        if (t < words) before[t] = mine;
        __syncthreads();
        for (int i = t; i < n; i += THREADS) {
            const unsigned which = bits[i / 32];
            if (which >> lane & 1)
                list[before[i / 32] + __popc(which & ((1u << lane) - 1))] = i;
        }
        __syncthreads();
        const int from = total * blockIdx.y / a.shares, to = total * (blockIdx.y + 1) / a.shares;
        adder.weights = static_cast<const W*>(a.weights) + start * a.stride + column;
        adder.sum(from + group, to);
    }
    if (first_block && f.counts) write_counts<B>(any_count, counts, marks, f.counts);

    // The sums of the groups, row of the batch by row: each thread has up to one column at last.
    float* sums = reinterpret_cast<float*>(shared);  // [groups][columns]
    float* parts = sums + THREADS * N;               // [THREADS / columns][columns]
    const int per = THREADS / a.columns, c = t % a.columns, part = t / a.columns;
    float total[B];
    __syncthreads();
#pragma unroll
    for (int b = 0; b < B; b++) {
        if (group < adder.groups) {
            float4* to = reinterpret_cast<float4*>(sums + group * a.columns + lane_column);
#pragma unroll
            for (int k = 0; k < N; k += 4)
                to[k / 4] = make_float4(adder.acc[b][k], adder.acc[b][k + 1], adder.acc[b][k + 2],
                                        adder.acc[b][k + 3]);
        }
        __syncthreads();
        if (part < per) {
            float sum = 0.f;
#pragma unroll 4
            for (int g = part; g < adder.groups; g += per) sum += sums[g * a.columns + c];
            parts[part * a.columns + c] = sum;
        }
        __syncthreads();
        total[b] = 0.f;
        if (t < a.columns)
            for (int p = 0; p < per; p++) total[b] += parts[p * a.columns + t];
    }

    if (a.shares > 1) {
        float* partial = a.partial + static_cast<long long>(blockIdx.x) * a.shares * B * a.columns;
        if (t < a.columns)
#pragma unroll
            for (int b = 0; b < B; b++) partial[(blockIdx.y * B + b) * a.columns + t] = total[b];
        __threadfence();
        __syncthreads();
        if (t == 0) arrived = atomicAdd(a.counters + blockIdx.x, 1);
        __syncthreads();
        if (arrived != a.shares - 1) return;
        __threadfence();
        if (t == 0) a.counters[blockIdx.x] = 0;
        if (t < a.columns) {
#pragma unroll
            for (int b = 0; b < B; b++) {
                total[b] = 0.f;
#pragma unroll 8
                for (int s = 0; s < a.shares; s++)
                    total[b] += load(partial + (s * B + b) * a.columns + t);
            }
        }
    }
    const int output = blockIdx.x * a.columns + t;
    if (t < a.columns && output < a.out.outputs)
#pragma unroll
        for (int b = 0; b < B; b++) put(a.out, b, output, total[b]);
}

#define ENTRY(SUFFIX, W, B, N)                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS, B * N <= 16 ? 2 : 1)                \
        add_##SUFFIX##_##B(const __grid_constant__ Add a) {                                   \
        add<W, B, N>(a);                                                                      \
    }
ENTRY(f32, float, 1, 4)
ENTRY(f32, float, 2, 4)
ENTRY(f32, float, 4, 4)
ENTRY(f32, float, 8, 4)
ENTRY(bf16, bf16, 1, 8)
ENTRY(bf16, bf16, 2, 8)
ENTRY(bf16, bf16, 4, 8)
ENTRY(bf16, bf16, 8, 8)
ENTRY(int8, int8_t, 1, 16)
ENTRY(int8, int8_t, 2, 16)
ENTRY(int8, int8_t, 4, 8)
ENTRY(int8, int8_t, 8, 8)
