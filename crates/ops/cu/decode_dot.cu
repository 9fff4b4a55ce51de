// Rows of outputs times a vector.
//
// Each warp of a team has a part of the inputs, whose values it keeps in registers, and reads that
// part of every row that its block computes; a team covers a row, in several slabs where rows are
// long. A block has an even share of the rows, so that all blocks read the same number of bytes.
// Parts of sums lie in shared memory until all of a tile of rows are there.

#include "decode.cuh"

constexpr int WARPS = 16;
// Sums of a tile: rows times batch.
constexpr int SLOTS = 512;

// As in src/cuda/decode/rows.rs.
struct Dot {
    Feed feed;
    Out out;
    const void* weights[2];
    const float* scales[2];
    const float* up_bias;
    const float* gate;
    const float* mask;
    unsigned* counts;
    long long stride;
    int team, slabs;
    int act;
    float act_p;
    int then;
    float then_p;
    int words;
    int pad;
};

// What a row is: an output; a neuron's gate or its `up`, in turns; the `up` of a listed neuron.
enum Kind { PLAIN, PAIR, LISTED };

// Adds V values over the lanes of a warp: lane l holds the sum of value l / (32 / V).
template <int V>
__device__ __forceinline__ float fold(float (&v)[V], int lane) {
    int d = 16;
#pragma unroll
    for (int n = V / 2; n > 0; n /= 2, d /= 2) {
        const bool high = lane & d;
#pragma unroll
        for (int i = 0; i < n; i++) {
            const float keep = high ? v[i + n] : v[i];
            const float give = high ? v[i] : v[i + n];
            v[i] = keep + __shfl_xor_sync(FULL, give, d);
        }
    }
    float sum = v[0];
#pragma unroll
    for (; d > 0; d /= 2) sum += __shfl_xor_sync(FULL, sum, d);
    return sum;
}

// N elements of a row of `width` from `at` on, zeros behind its end. What kernels write is read
// through `load`.
template <int N, bool WRITTEN>
__device__ __forceinline__ void load_row(float (&v)[N], const float* row, int at, int width) {
    if (width % 4 == 0) {
#pragma unroll
        for (int i = 0; i < N; i += 4) {
            const bool in = at + i < width;
            const float* p = row + (in ? at + i : 0);
            const float4 a =
                WRITTEN ? load4(p) : __ldg(reinterpret_cast<const float4*>(p));
            v[i] = in ? a.x : 0.f, v[i + 1] = in ? a.y : 0.f;
            v[i + 2] = in ? a.z : 0.f, v[i + 3] = in ? a.w : 0.f;
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; i++) {
            const bool in = at + i < width;
            const float* p = row + (in ? at + i : 0);
            const float a = WRITTEN ? load(p) : __ldg(p);
            v[i] = in ? a : 0.f;
        }
    }
}

// A thread's part of what enters: N elements of a slab in all rows of the batch.
template <int B, int N>
struct Part {
    float x[B][N];
    float mean[B], factor[B];

    __device__ __forceinline__ void raw(const Feed& f, int at) {
#pragma unroll
        for (int b = 0; b < B; b++)
            load_row<N, true>(x[b], f.x + static_cast<long long>(b) * f.width, at, f.width);
    }

    // What enters the matrix.
    __device__ __forceinline__ void finish(const Feed& f, int at) {
        if (f.normed) {
            float gain[N], bias[N];
            load_row<N, false>(gain, f.gain, at, f.width);
#pragma unroll
            for (int k = 0; k < N; k++) bias[k] = 0.f;
            if (f.bias) load_row<N, false>(bias, f.bias, at, f.width);
#pragma unroll
            for (int b = 0; b < B; b++)
#pragma unroll
                for (int k = 0; k < N; k++)
                    x[b][k] = (x[b][k] - mean[b]) * factor[b] * gain[k] + bias[k];
        }
        if (f.op == 0 && f.then == 0 && !f.mask) return;
#pragma unroll
        for (int b = 0; b < B; b++)
#pragma unroll
            for (int k = 0; k < N; k++)
                x[b][k] = at + k < f.width ? entered(f, x[b][k], at + k) : 0.f;
    }
};

// The neurons of this block, `list[hi - lo]`: an even share of those whose gate is not zero. The
// others' products become 0.
template <int B>
__device__ __forceinline__ void list_neurons(const Dot& d, int& lo, int& hi, const unsigned*& list,
                                             unsigned* marks) {
    extern __shared__ unsigned shared[];
    constexpr int U = 16 / B;
    unsigned *bits = shared, *before = bits + d.words, *own = before + d.words;
    const int t = threadIdx.x, lane = t & 31, threads = blockDim.x;
    const int ffn = d.out.outputs;
    unsigned any_count = 0, counts[B];
#pragma unroll
    for (int b = 0; b < B; b++) counts[b] = 0;
    for (int first = t; first < d.words * 32; first += U * threads) {
        float v[B][U];
#pragma unroll
        for (int b = 0; b < B; b++)
#pragma unroll
            for (int u = 0; u < U; u++)
                v[b][u] = load(d.gate + static_cast<long long>(b) * ffn +
                               min(first + u * threads, ffn - 1));
#pragma unroll
        for (int u = 0; u < U; u++) {
            const int i = first + u * threads;
            // Whole warps leave.
            if (i >= d.words * 32) break;
            bool any = false;
#pragma unroll
            for (int b = 0; b < B; b++) {
                const bool open = i < ffn && forced(curve_value(d.act, d.act_p, v[b][u]), d.mask,
                                                   min(i, ffn - 1)) != 0.f;
                counts[b] += open;
                any |= open;
            }
            any_count += any;
            const unsigned which = __ballot_sync(FULL, any);
            if (lane == 0) bits[i / 32] = which;
        }
    }
    __syncthreads();
    // Each thread counts some words.
    const int each = (d.words + threads - 1) / threads;
    unsigned n = 0, total;
    for (int w = t * each; w < min((t + 1) * each, d.words); w++) n += __popc(bits[w]);
    n = block_before(n, marks, total);
    for (int w = t * each; w < min((t + 1) * each, d.words); w++) {
        before[w] = n;
        n += __popc(bits[w]);
    }
    const unsigned blocks = gridDim.x, block = blockIdx.x;
    lo = static_cast<int>(static_cast<unsigned long long>(total) * block / blocks);
    hi = static_cast<int>(static_cast<unsigned long long>(total) * (block + 1) / blocks);
    __syncthreads();
    for (int w = t; w < d.words; w += threads) {
        unsigned which = bits[w];
        int place = static_cast<int>(before[w]) - lo;
        if (place >= hi - lo || place + __popc(which) <= 0) continue;
        for (; which != 0; which &= which - 1, place++)
            if (place >= 0 && place < hi - lo) own[place] = w * 32 + __ffs(which) - 1;
    }
    const int from = static_cast<int>(static_cast<long long>(ffn) * block / blocks);
    const int to = static_cast<int>(static_cast<long long>(ffn) * (block + 1) / blocks);
    for (int i = from + t; i < to; i += threads)
        if (!(bits[i / 32] >> (i % 32) & 1))
#pragma unroll
            for (int b = 0; b < B; b++) d.out.y[static_cast<long long>(b) * ffn + i] = 0.f;
    if (block == 0 && d.counts) write_counts<B>(any_count, counts, marks, d.counts);
    __syncthreads();
    list = own;
}

template <Kind KIND, typename W, int B, int N, int R>
__device__ __forceinline__ void dot(const Dot& d) {
    __shared__ float sums[WARPS * SLOTS];
    __shared__ float scratch[B * 32];
    __shared__ unsigned marks[32];
    constexpr int TILE = SLOTS / B;
    const Feed& f = d.feed;
    const int t = threadIdx.x, lane = t & 31, warp = t >> 5;
    const int teams = (blockDim.x >> 5) / d.team, team = warp / d.team;
    const int step = d.team * 32 * N;
    const int at = (t - team * d.team * 32) * N;
    const W* const first_weights = static_cast<const W*>(d.weights[0]);
    const W* const other_weights = static_cast<const W*>(d.weights[1]);

    // Rows of this block.
    int lo, hi;
    const unsigned* list = nullptr;
    if constexpr (KIND != LISTED) {
        lo = static_cast<int>(static_cast<long long>(d.out.outputs) * blockIdx.x / gridDim.x);
        hi = static_cast<int>(static_cast<long long>(d.out.outputs) * (blockIdx.x + 1) / gridDim.x);
        if (KIND == PAIR) lo *= 2, hi *= 2;
    }

    // A place on the way through a tile: slab by slab, R rows of each team at a time. A slab has an
    // even number of steps, as two are under way.
    struct Cursor {
        int slab, row;
    };
    int tile = 0, tile_end = 0, slab_rows = 0;
    const int step_rows = teams * R;
    const auto next = [&](Cursor& c) {
        c.row += step_rows;
        if (c.row - team * R - tile >= slab_rows) {
            c.row = tile + team * R;
            c.slab++;
        }
    };
    const auto read = [&](Packed<W, N>(&w)[R], Cursor& c) {
        const int element = at + c.slab * step;
        const bool in = c.slab < d.slabs && element < d.stride;
#pragma unroll
        for (int u = 0; u < R; u++) {
            const int row = c.row + u;
            const bool there = in && row < tile_end;
            const W* p = first_weights;
            if (there) {
                if constexpr (KIND == PLAIN) p += row * d.stride + element;
                if constexpr (KIND == PAIR)
                    p = (row & 1 ? other_weights : first_weights) + (row >> 1) * d.stride + element;
                if constexpr (KIND == LISTED) p += list[row - lo] * d.stride + element;
            }
            load_weights(w[u], p, there);
        }
        next(c);
    };

    release_next();
    Packed<W, N> one[R], other[R];
    Cursor ahead;
    const auto start = [&] {
        tile_end = min(tile + TILE, hi);
        slab_rows = (tile_end - tile + 2 * step_rows - 1) / (2 * step_rows) * (2 * step_rows);
        ahead = Cursor{0, tile + team * R};
        read(one, ahead);
        read(other, ahead);
    };
    if constexpr (KIND != LISTED) {
        tile = lo;
        start();
    }
    prefetch_parameters(f);
    wait_for_previous();

    Part<B, N> part;
    part.raw(f, at);
    if constexpr (KIND == LISTED) {
        list_neurons<B>(d, lo, hi, list, marks);
        tile = lo;
        start();
    }
    // Passes over what enters: its mean, its variance, and its way in. Each ends with slab 0.
    const bool emit = blockIdx.x == 0 && (f.h || f.counts);
    unsigned any_count = 0, counts[B];
#pragma unroll
    for (int b = 0; b < B; b++) counts[b] = 0, part.mean[b] = 0.f, part.factor[b] = 1.f;
    for (int pass = f.centred ? 0 : f.normed ? 1 : 2; pass < 3; pass++) {
        float sum[B];
#pragma unroll
        for (int b = 0; b < B; b++) sum[b] = 0.f;
        for (int s = pass < 2 || emit ? d.slabs - 1 : 0; s >= 0; s--) {
            const int here = at + s * step;
            if (d.slabs > 1 && (pass < 2 || emit)) part.raw(f, here);
            if (pass == 2) part.finish(f, here);
            // Teams have the same places.
            if (team > 0 || (pass == 2 && !emit)) continue;
#pragma unroll
            for (int k = 0; k < N; k++) {
                if (here + k >= f.width) continue;
                bool any = false;
#pragma unroll
                for (int b = 0; b < B; b++) {
                    const float v = part.x[b][k];
                    if (pass < 2) {
                        const float d = v - part.mean[b];
                        sum[b] += pass == 0 ? d : d * d;
                    } else {
                        if (f.h) f.h[static_cast<long long>(b) * f.width + here + k] = v;
                        counts[b] += v != 0.f;
                        any |= v != 0.f;
                    }
                }
                any_count += any;
            }
        }
        if (pass == 2) break;
        block_sums<B>(sum, scratch);
#pragma unroll
        for (int b = 0; b < B; b++) {
            if (pass == 0)
                part.mean[b] = sum[b] / f.width;
            else
                part.factor[b] = 1.f / sqrtf(sum[b] / f.width + f.eps);
        }
    }
    if (emit && f.counts) write_counts<B>(any_count, counts, marks, f.counts);

    float* const my_sums = sums + warp * SLOTS;
    const auto multiply = [&](const Packed<W, N>(&w)[R], int slab, int row) {
        float v[R * B];
#pragma unroll
        for (int u = 0; u < R; u++) {
            float weights[N];
            unpack(w[u], weights);
#pragma unroll
            for (int b = 0; b < B; b++) {
                float sum = 0.f;
#pragma unroll
                for (int k = 0; k < N; k++) sum = fmaf(weights[k], part.x[b][k], sum);
                v[u * B + b] = sum;
            }
        }
        const float sum = fold<R * B>(v, lane);
        constexpr int SAME = 32 / (R * B);
        const int which = lane / SAME;
        if (lane % SAME == 0 && row + which / B < tile_end) {
            float* slot = my_sums + (row - tile) * B + which;
            *slot = slab == 0 ? sum : *slot + sum;
        }
    };
    // Of row `local` of the tile, over the warps of the team that had it.
    const auto total = [&](int local, int b) {
        const int of = local / R % teams;
        float sum = 0.f;
        for (int w = 0; w < d.team; w++) sum += sums[(of * d.team + w) * SLOTS + local * B + b];
        return sum;
    };

    int there = 0;  // the slab of `part`
    while (true) {
        for (int slab = 0; slab < d.slabs; slab++) {
            if (slab != there) {
                there = slab;
                part.raw(f, at + slab * step);
                part.finish(f, at + slab * step);
            }
            for (int row = tile + team * R; row - team * R < tile_end; row += 2 * step_rows) {
                multiply(one, slab, row);
                read(one, ahead);
                multiply(other, slab, row + step_rows);
                read(other, ahead);
            }
        }
        __syncthreads();
        const int rows = tile_end - tile;
        if constexpr (KIND == PLAIN) {
            for (int i = t; i < rows * B; i += blockDim.x) {
                const int row = tile + i / B;
                float v = total(i / B, i % B);
                if (d.scales[0]) v *= __ldg(d.scales[0] + row);
                put(d.out, i % B, row, v);
            }
        } else if constexpr (KIND == PAIR) {
            for (int i = t; i < rows / 2 * B; i += blockDim.x) {
                const int local = i / B * 2, b = i % B, neuron = (tile + local) / 2;
                float gate = total(local, b), up = total(local + 1, b);
                if (d.scales[0]) {
                    gate *= __ldg(d.scales[0] + neuron);
                    up *= __ldg(d.scales[1] + neuron);
                }
                if (d.out.bias) gate += __ldg(d.out.bias + neuron);
                if (d.up_bias) up += __ldg(d.up_bias + neuron);
                const float v = curve_value(d.act, d.act_p, gate) * up;
                d.out.y[static_cast<long long>(b) * d.out.outputs + neuron] =
                    curve_value(d.then, d.then_p, v);
            }
        } else {
            for (int i = t; i < rows * B; i += blockDim.x) {
                const int b = i % B, neuron = list[tile - lo + i / B];
                const long long place = static_cast<long long>(b) * d.out.outputs + neuron;
                float gate = curve_value(d.act, d.act_p, load(d.gate + place));
                gate = forced(gate, d.mask, neuron);
                float up = total(i / B, b);
                if (d.scales[0]) up *= __ldg(d.scales[0] + neuron);
                if (d.up_bias) up += __ldg(d.up_bias + neuron);
                d.out.y[place] = curve_value(d.then, d.then_p, gate * up);
            }
        }
        tile = tile_end;
        if (tile >= hi) break;
        // The sums of this tile are no longer read.
        __syncthreads();
        start();
    }
}

#define ENTRY_OF(NAME, KIND, SUFFIX, W, B, N, R)                                               \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, B * N <= 8 ? 2 : 1)               \
        NAME##_##SUFFIX##_##B(const __grid_constant__ Dot d) {                                 \
        dot<KIND, W, B, N, R>(d);                                                              \
    }
#define ENTRY(SUFFIX, W, B, N, R)                   \
    ENTRY_OF(dot, PLAIN, SUFFIX, W, B, N, R)        \
    ENTRY_OF(pair, PAIR, SUFFIX, W, B, N, R)        \
    ENTRY_OF(listed, LISTED, SUFFIX, W, B, N, R)
ENTRY(f32, float, 1, 4, 4)
ENTRY(f32, float, 2, 4, 4)
ENTRY(f32, float, 4, 4, 4)
ENTRY(f32, float, 8, 4, 2)
ENTRY(bf16, bf16, 1, 8, 4)
ENTRY(bf16, bf16, 2, 8, 4)
ENTRY(bf16, bf16, 4, 8, 4)
ENTRY(bf16, bf16, 8, 8, 2)
ENTRY(int8, int8_t, 1, 16, 4)
ENTRY(int8, int8_t, 2, 16, 4)
ENTRY(int8, int8_t, 4, 8, 4)
ENTRY(int8, int8_t, 8, 8, 2)
