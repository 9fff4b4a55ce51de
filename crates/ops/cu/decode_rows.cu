// Every row of outputs times one or two vectors: a warp for each row, so that sums cross no warp.
//
// Inputs lie in shared memory, and each lane reads eight vectors of weights at a time. The first
// are on their way before the kernel in front has ended.

#include "decode_enter.cuh"

// As in src/cuda/decode/rows.rs.
struct Rows {
    Feed feed;
    Out out;
    const void* weights[2];
    const float* scales[2];
    const float* up_bias;
    long long stride;
    int act;
    float act_p;
    int then;
    float then_p;
};

// Vectors of weights that a lane has on their way.
constexpr int DEEP = 8;

// Values `at..at+N` are read as fours that lie apart, so that a warp's lanes read neighbours.
template <int N>
__device__ __forceinline__ int place(int i, int vectors) {
    const int vector = i / N, k = i % N;
    return (k / 4 * vectors + vector) * 4 + k % 4;
}

// A row, or the two rows of a neuron: S of them.
template <typename W, int B, int N, int S>
struct Stream {
    static constexpr int EACH = DEEP / S;

    Packed<W, N> w[S][EACH];
    float sum[S][B];

    __device__ __forceinline__ void read(const Rows& a, int row, int from, int lane) {
        const long long start = row * a.stride;
#pragma unroll
        for (int s = 0; s < S; s++)
#pragma unroll
            for (int u = 0; u < EACH; u++) {
                const int element = (from + u * 32 + lane) * N;
                const bool there = row < a.out.outputs && element < a.stride;
                load_weights(w[s][u],
                             static_cast<const W*>(a.weights[s]) + (there ? start + element : 0),
                             there);
            }
    }

    // Behind a row's end weights are zeros, and so are the values.
    __device__ __forceinline__ void add(const float* x, int from, int vectors, int lane) {
#pragma unroll
        for (int u = 0; u < EACH; u++) {
            const int vector = from + u * 32 + lane;
            if (vector >= vectors) break;
#pragma unroll
            for (int k = 0; k < N; k += 4) {
#pragma unroll
                for (int b = 0; b < B; b++) {
                    const float4 v = *reinterpret_cast<const float4*>(
                        x + ((b * (N / 4) + k / 4) * vectors + vector) * 4);
#pragma unroll
                    for (int s = 0; s < S; s++) {
                        sum[s][b] = fmaf(v.x, weight_of(w[s][u], k), sum[s][b]);
                        sum[s][b] = fmaf(v.y, weight_of(w[s][u], k + 1), sum[s][b]);
                        sum[s][b] = fmaf(v.z, weight_of(w[s][u], k + 2), sum[s][b]);
                        sum[s][b] = fmaf(v.w, weight_of(w[s][u], k + 3), sum[s][b]);
                    }
                }
            }
        }
    }
};

template <typename W, int B, int N, int S>
__device__ __forceinline__ void rows(const Rows& a) {
    extern __shared__ __align__(16) float shared[];
    __shared__ float scratch[B * 32];
    __shared__ unsigned marks[32];
    const Feed& f = a.feed;
    const int t = threadIdx.x, lane = t & 31;
    const int vectors = a.stride / N, values = vectors * N;
    float* x = shared;  // [B][N / 4][vectors][4]
    float* next = x + B * values;
    const auto room = [&](bool there) {
        float* at = there ? next : nullptr;
        next += there ? values : 0;
        return at;
    };
    Parameters p;
    p.gain = room(f.normed);
    p.bias = room(f.normed && f.bias);
    p.mask = room(f.mask);
    p.unit = nullptr;

    const int warps = gridDim.x * WARPS;
    // Neighbours in a block, so that all blocks have as many.
    int row = (t >> 5) * gridDim.x + blockIdx.x;
    Stream<W, B, N, S> stream;
    release_next();
    stream.read(a, row, 0, lane);
    read_parameters(p, f, nullptr, 0, f.width);
    wait_for_previous();

    float mean[B], factor[B];
    const auto at = [&](int b, int i) { return b * values + place<N>(i, vectors); };
    const auto keep = [&](int b, int i, float v) { x[at(b, i)] = v; };
    if (f.normed)
        norm_of<B>(f, f.width, scratch, mean, factor, keep);
    else
        stage<B>(f, 0, f.width, keep);
    unsigned any_count = 0, counts[B];
#pragma unroll
    for (int b = 0; b < B; b++) counts[b] = 0;
    const bool first_block = blockIdx.x == 0;
#pragma unroll 1
    for (int i = t; i < values; i += THREADS) {
        const bool in = i < f.width;
        bool any = false;
#pragma unroll
        for (int b = 0; b < B; b++) {
            float v = 0.f;
            if (in) {
                v = entering(f, p, i, x[at(b, i)], mean[b], factor[b]);
                if (first_block && f.h) f.h[static_cast<long long>(b) * f.width + i] = v;
            }
            counts[b] += v != 0.f;
            any |= v != 0.f;
            x[at(b, i)] = v;
        }
        any_count += any;
    }
    __syncthreads();
    if (first_block && f.counts) write_counts<B>(any_count, counts, marks, f.counts);

#pragma unroll 1
    while (row < a.out.outputs) {
#pragma unroll
        for (int s = 0; s < S; s++)
#pragma unroll
            for (int b = 0; b < B; b++) stream.sum[s][b] = 0.f;
        const int following = row + warps;
        constexpr int STEP = 32 * Stream<W, B, N, S>::EACH;
#pragma unroll 1
        for (int from = 0; from < vectors; from += STEP) {
            stream.add(x, from, vectors, lane);
            const bool last = from + STEP >= vectors;
            stream.read(a, last ? following : row, last ? 0 : from + STEP, lane);
        }
        float mine = 0.f, up = 0.f;
#pragma unroll
        for (int b = 0; b < B; b++) {
            const float first = warp_sum(stream.sum[0][b]);
            const float second = S == 2 ? warp_sum(stream.sum[S - 1][b]) : 0.f;
            if (lane == b) mine = first, up = second;
        }
        if (lane < B) {
            if (a.scales[0]) mine *= __ldg(a.scales[0] + row);
            if (S == 1) {
                put(a.out, lane, row, mine);
            } else {
                if (a.scales[1]) up *= __ldg(a.scales[1] + row);
                if (a.out.bias) mine += __ldg(a.out.bias + row);
                if (a.up_bias) up += __ldg(a.up_bias + row);
                const float product = curve_value(a.act, a.act_p, mine) * up;
                a.out.y[static_cast<long long>(lane) * a.out.outputs + row] =
                    curve_value(a.then, a.then_p, product);
            }
        }
        row = following;
    }
}

#define ENTRY(SUFFIX, W, B, N)                                          \
    extern "C" __global__ void __launch_bounds__(THREADS, 2)            \
        rows_##SUFFIX##_##B(const __grid_constant__ Rows a) {           \
        rows<W, B, N, 1>(a);                                            \
    }                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS, 2)            \
        row_pairs_##SUFFIX##_##B(const __grid_constant__ Rows a) {      \
        rows<W, B, N, 2>(a);                                            \
    }
ENTRY(f32, float, 1, 4)
ENTRY(f32, float, 2, 4)
ENTRY(bf16, bf16, 1, 8)
ENTRY(bf16, bf16, 2, 8)
ENTRY(int8, int8_t, 1, 16)
ENTRY(int8, int8_t, 2, 16)
