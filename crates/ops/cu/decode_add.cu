// Sums of rows: the weights that leave the inputs which are not zero.
//
// A block has a tile of columns and a share of the list of inputs. Each thread reads N columns of
// some rows at a time, several rows ahead; groups of threads that have the same columns take
// different rows, and their sums are added at the end. Where the list is shared out over blocks,
// the last of them adds the parts in the order of the shares.

#include "decode_enter.cuh"

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

template <typename W, int B, int N>
struct Adder {
    static constexpr int AHEAD = 4;

    float acc[B][N];
    const W* weights;
    unsigned stride;
    const unsigned short* list;
    const float* values;
    int groups;
    bool mine;

    struct Rows {
        Packed<W, N> w[AHEAD];
    };

    __device__ __forceinline__ void read(Rows& rows, int p, int end) {
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            const int q = p + u * groups;
            const bool there = mine && q < end;
            const unsigned row = there ? list[q] : 0;
            load_weights(rows.w[u], weights + static_cast<uint64_t>(row) * stride, there);
        }
    }

    // Where a row came from is looked up again: registers are for rows on their way.
    __device__ __forceinline__ void add(const Rows& rows, int p, int end) {
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            const int q = p + u * groups;
            if (q >= end) break;
            float x[B], w[N];
            load_values<B>(x, values + list[q] * B);
            unpack(rows.w[u], w);
#pragma unroll
            for (int b = 0; b < B; b++)
#pragma unroll
                for (int k = 0; k < N; k++) acc[b][k] = fmaf(x[b], w[k], acc[b][k]);
        }
    }

    // Rows `p`, `p + groups`, ... of the list, in two sets: one is on its way while the other is
    // added.
    __device__ __forceinline__ void sum(int p, int end) {
        Rows one, other;
        const int step = AHEAD * groups;
        read(one, p, end);
        read(other, p + step, end);
#pragma unroll 1
        for (; p < end; p += 2 * step) {
            add(one, p, end);
            read(one, p + 2 * step, end);
            add(other, p + step, end);
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
    const int t = threadIdx.x;
    float* values = reinterpret_cast<float*>(shared);  // [chunk][B]
    float* next = values + a.chunk * B;
    const auto room = [&](bool there) {
        float* at = there ? next : nullptr;
        next += there ? a.chunk : 0;
        return at;
    };
    Parameters p;
    p.gain = room(f.normed);
    p.bias = room(f.normed && f.bias);
    p.mask = room(f.mask);
    p.unit = room(a.scales);
    unsigned short* list = reinterpret_cast<unsigned short*>(next);  // [chunk]
    const int width = f.width;
    release_next();
    read_parameters(p, f, a.scales, 0, min(a.chunk, width));
    wait_for_previous();

    const bool first_block = blockIdx.x == 0 && blockIdx.y == 0;
    float mean[B], factor[B];
    // A row wider than a chunk passes through, and is read again.
    if (f.normed)
        norm_of<B>(f, a.chunk, scratch, mean, factor,
                   [&](int b, int i, float v) { values[i * B + b] = v; });
    const bool staged = f.normed && width <= a.chunk;
    const bool plain = !f.normed && !f.op && !f.then && !f.mask && !f.h;

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

#pragma unroll 1
    for (int start = 0; start < width; start += a.chunk) {
        const int n = min(a.chunk, width - start);
        if (start > 0) {
            // The list and values of the chunk before are no longer read.
            __syncthreads();
            read_parameters(p, f, a.scales, start, n);
        }
        // Which of this thread's inputs are not zero: a chunk has at most 32 of each.
        unsigned which = 0;
        if (!staged)
            stage<B>(f, start, n, [&](int b, int i, float v) {
                values[i * B + b] = v;
                if (!plain || v == 0.f) return;
                which |= 1u << i / THREADS;
                counts[b]++;
            });
#pragma unroll 2
        for (int i = t; i < n && !plain; i += THREADS) {
#pragma unroll
            for (int b = 0; b < B; b++) {
                const float v = entering(f, p, i, values[i * B + b], mean[b], factor[b]);
                if (first_block && f.h) f.h[static_cast<long long>(b) * width + start + i] = v;
                values[i * B + b] = v;
                if (v == 0.f) continue;
                which |= 1u << i / THREADS;
                counts[b]++;
            }
        }
        // The list has each thread's inputs, thread by thread: always in the same order.
        unsigned total;
        unsigned to_write = block_before(__popc(which), marks, total);
        any_count += __popc(which);
#pragma unroll 1
        for (; which; which &= which - 1) {
            const int i = t + (__ffs(which) - 1) * THREADS;
            list[to_write++] = i;
            if (p.unit)
#pragma unroll
                for (int b = 0; b < B; b++) values[i * B + b] *= p.unit[i];
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
    float total[B], before[B];
    const int output = blockIdx.x * a.columns + t;
    const bool puts = t < a.columns && output < a.out.outputs;
    // On its way while sums are made: nobody else writes it.
#pragma unroll
    for (int b = 0; b < B; b++)
        before[b] = puts && a.out.add
                        ? load(a.out.y + static_cast<long long>(b) * a.out.outputs + output)
                        : 0.f;
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
#pragma unroll 2
            for (int g = part; g < adder.groups; g += per) sum += sums[g * a.columns + c];
            parts[part * a.columns + c] = sum;
        }
        __syncthreads();
        total[b] = 0.f;
        if (t < a.columns)
#pragma unroll 1
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
    if (puts)
#pragma unroll
        for (int b = 0; b < B; b++) {
            const float sum = finished(a.out, with_bias(a.out, output, total[b]));
            a.out.y[static_cast<long long>(b) * a.out.outputs + output] = before[b] + sum;
        }
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
