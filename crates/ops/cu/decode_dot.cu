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
// Bytes of its rows that a block asks for before it needs them: those that memory delivers while
// the kernel before ends, and then what a thread's registers have no room for.
constexpr int AHEAD = 128 << 10;

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
    int rounds;
    int pad;
};

// What a row is: an output; a neuron's gate or its `up`, in turns; the `up` of a listed neuron.
enum Kind { PLAIN, PAIR, LISTED };

// Adds V values over the lanes of a warp: lane l holds the sum of value l / (32 / V). Each level
// has an array of its own: in one array, by loops, 16 values would lie in memory.
template <int V, int D = 16>
__device__ __forceinline__ float fold(const float (&v)[V], int lane) {
    if constexpr (V == 1) {
        float sum = v[0];
#pragma unroll
        for (int d = D; d > 0; d /= 2) sum += __shfl_xor_sync(FULL, sum, d);
        return sum;
    } else {
        const bool high = lane & D;
        float half[V / 2];
#pragma unroll
        for (int i = 0; i < V / 2; i++) {
            const float keep = high ? v[i + V / 2] : v[i];
            const float give = high ? v[i] : v[i + V / 2];
            half[i] = keep + __shfl_xor_sync(FULL, give, D);
        }
        return fold<V / 2, D / 2>(half, lane);
    }
}

// As `load`, of what nobody writes: it may be asked for before the wait, and stays there.
__device__ __forceinline__ float load_constant(const float* p) {
    float v;
    asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(v) : "l"(p));
    return v;
}

__device__ __forceinline__ float4 load_constant4(const float* p) {
    float4 v;
    asm volatile("ld.global.nc.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(p));
    return v;
}

// Asks for weights, a multiple of 16 bytes, that are read later: they come into L2.
__device__ __forceinline__ void ask_for(const void* p, unsigned bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes) : "memory");
#endif
}

// The same of `n` floats that every thread of a block knows of.
__device__ __forceinline__ void ask_for_floats(const float* p, int n) {
    constexpr int LINE = 32;
    for (int i = threadIdx.x * LINE; i < n + LINE - 1; i += blockDim.x * LINE)
        prefetch(p + min(i, n - 1));
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
            const float4 a = WRITTEN ? load4(p) : load_constant4(p);
            v[i] = in ? a.x : 0.f, v[i + 1] = in ? a.y : 0.f;
            v[i + 2] = in ? a.z : 0.f, v[i + 3] = in ? a.w : 0.f;
        }
    } else {
        // A rare way: it shall be short, since instructions have to be read, too.
        float some[N];
#pragma unroll 1
        for (int i = 0; i < N; i++) {
            const bool in = at + i < width;
            const float* p = row + (in ? at + i : 0);
            const float a = WRITTEN ? load(p) : load_constant(p);
            some[i] = in ? a : 0.f;
        }
#pragma unroll
        for (int i = 0; i < N; i++) v[i] = some[i];
    }
}

// Whether a curve has no exponential.
__device__ __forceinline__ bool is_straight(int kind) { return kind == 0 || kind >= 5; }

// `curve_value` of such a curve.
__device__ __forceinline__ float straight_value(int kind, float p, float x) {
    const float y = kind == 6 ? x - p : x;
    const bool closed = kind == 7 ? x < p : y <= 0.f;
    return closed && kind != 0 ? 0.f : y;
}

// Sums over a block, in every thread. `scratch` holds 32 floats for each of the B, and is not used
// for anything else.
template <int B>
__device__ __forceinline__ void sums_of_block(float (&v)[B], float* scratch) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
#pragma unroll
    for (int b = 0; b < B; b++) {
        v[b] = warp_sum(v[b]);
        if (lane == 0) scratch[b * 32 + warp] = v[b];
    }
    __syncthreads();
#pragma unroll
    for (int b = 0; b < B; b++) v[b] = warp_sum(lane < warps ? scratch[b * 32 + lane] : 0.f);
}

// A thread's part of what enters: N elements of a slab in all rows of the batch.
template <int B, int N>
struct Part {
    float x[B][N];
    float gain[N], bias[N];
    float mean[B], factor[B];

    __device__ __forceinline__ void raw(const Feed& f, int at) {
#pragma unroll
        for (int b = 0; b < B; b++)
            load_row<N, true>(x[b], f.x + static_cast<long long>(b) * f.width, at, f.width);
    }

    // The norm's parameters.
    __device__ __forceinline__ void parameters(const Feed& f, int at) {
        if (!f.normed) return;
        load_row<N, false>(gain, f.gain, at, f.width);
        if (f.bias) load_row<N, false>(bias, f.bias, at, f.width);
    }

    // What enters the matrix.
    __device__ __forceinline__ void finish(const Feed& f, int at) {
        if (f.normed) {
#pragma unroll
            for (int b = 0; b < B; b++)
#pragma unroll
                for (int k = 0; k < N; k++)
                    x[b][k] = (x[b][k] - mean[b]) * factor[b] * gain[k] + bias[k];
        }
        if (is_straight(f.op) && f.then == 0 && !f.mask) {
            if (f.op == 0) return;
#pragma unroll
            for (int b = 0; b < B; b++)
#pragma unroll
                for (int k = 0; k < N; k++) x[b][k] = straight_value(f.op, f.op_p, x[b][k]);
        } else {
            // Rare, and long: once for all elements, and no call, which would want registers.
            float some[B * N];
#pragma unroll
            for (int i = 0; i < B * N; i++) some[i] = x[i / N][i % N];
#pragma unroll 1
            for (int i = 0; i < B * N; i++) {
                const int column = at + i % N;
                if (column >= f.width) continue;
                float v = some[i];
#pragma unroll 1
                for (int last = 0; last < 2; last++) {
                    v = AnyCurve{last ? f.then : f.op, last ? f.then_p : f.op_p}.value(v);
                    if (!last) v = forced(v, f.mask, column);
                }
                some[i] = v;
            }
#pragma unroll
            for (int i = 0; i < B * N; i++) x[i / N][i % N] = some[i];
        }
    }
};

// The neurons of this block, `list[hi - lo]`: an even share of those whose gate is not zero, in an
// order that is the same in all blocks. The others' products become 0. Adds what this thread
// counted.
//
// In each of `d.rounds` a thread has 8 times 4 neurons and a word of bits for them. With all
// threads' 4 side by side loads are contiguous.
template <int B>
__device__ __forceinline__ void list_neurons(const Dot& d, int& lo, int& hi, const unsigned*& list,
                                             unsigned* scratch, unsigned& any_count,
                                             unsigned (&counts)[B]) {
    extern __shared__ unsigned shared[];
    constexpr int FOURS = 8, U = FOURS / B;
    const int t = threadIdx.x, threads = blockDim.x, ffn = d.out.outputs;
    unsigned *bits = shared, *own = bits + d.rounds * threads;
    const auto neuron = [&](int round, int bit) {
        return ((round * FOURS + bit / 4) * threads + t) * 4 + bit % 4;
    };
    unsigned n = 0, total;
#pragma unroll 1
    for (int round = 0; round < d.rounds; round++) {
        unsigned which = 0;
        if (ffn % 4 == 0 && is_straight(d.act)) {
#pragma unroll
            for (int first = 0; first < FOURS; first += U) {
                float v[B][U][4], mask[U][4];
#pragma unroll
                for (int u = 0; u < U; u++) {
                    const int i = neuron(round, 4 * (first + u));
                    const int at = i < ffn ? i : 0;
#pragma unroll
                    for (int b = 0; b < B; b++) {
                        const float4 a = load4(d.gate + static_cast<long long>(b) * ffn + at);
                        v[b][u][0] = a.x, v[b][u][1] = a.y, v[b][u][2] = a.z, v[b][u][3] = a.w;
                    }
                    if (d.mask) {
                        const float4 a = load_constant4(d.mask + at);
                        mask[u][0] = a.x, mask[u][1] = a.y, mask[u][2] = a.z, mask[u][3] = a.w;
                    }
                }
#pragma unroll
                for (int u = 0; u < U; u++) {
                    if (neuron(round, 4 * (first + u)) >= ffn) continue;
#pragma unroll
                    for (int k = 0; k < 4; k++) {
                        bool any = false;
#pragma unroll
                        for (int b = 0; b < B; b++) {
                            float gate = straight_value(d.act, d.act_p, v[b][u][k]);
                            if (d.mask) gate = mask[u][k] * (fabsf(gate) + 1e-3f);
                            counts[b] += gate != 0.f;
                            any |= gate != 0.f;
                        }
                        which |= static_cast<unsigned>(any) << (4 * (first + u) + k);
                    }
                }
            }
        } else {
#pragma unroll 1
            for (int bit = 0; bit < 32; bit++) {
                const int i = neuron(round, bit);
                if (i >= ffn) break;
                bool any = false;
#pragma unroll
                for (int b = 0; b < B; b++) {
                    const float raw = load(d.gate + static_cast<long long>(b) * ffn + i);
                    const bool open = forced(curve_value(d.act, d.act_p, raw), d.mask, i) != 0.f;
                    counts[b] += open;
                    any |= open;
                }
                which |= static_cast<unsigned>(any) << bit;
            }
        }
        bits[round * threads + t] = which;
        n += __popc(which);
    }
    any_count += n;
    const unsigned before = block_before(n, scratch, total);
    const unsigned blocks = gridDim.x, block = blockIdx.x;
    lo = static_cast<int>(static_cast<unsigned long long>(total) * block / blocks);
    hi = static_cast<int>(static_cast<unsigned long long>(total) * (block + 1) / blocks);
    int place = static_cast<int>(before) - lo;
    if (place < hi - lo && place + static_cast<int>(n) > 0) {
        for (int round = 0; round < d.rounds; round++)
            for (unsigned which = bits[round * threads + t]; which != 0; which &= which - 1, place++)
                if (place >= 0 && place < hi - lo) own[place] = neuron(round, __ffs(which) - 1);
    }
    const int from = static_cast<int>(static_cast<long long>(ffn) * block / blocks);
    const int to = static_cast<int>(static_cast<long long>(ffn) * (block + 1) / blocks);
    for (int i = from + t; i < to; i += threads) {
        const int four = i / 4, turn = four / threads;
        const unsigned which = bits[turn / FOURS * threads + four % threads];
        if (which >> (turn % FOURS * 4 + i % 4) & 1) continue;
#pragma unroll
        for (int b = 0; b < B; b++) d.out.y[static_cast<long long>(b) * ffn + i] = 0.f;
    }
    __syncthreads();
    list = own;
}

template <Kind KIND, typename W, int B, int N, int R>
__device__ __forceinline__ void dot(const Dot& d) {
    __shared__ float sums[WARPS * SLOTS];
    __shared__ float scratch[2][B * 32];
    __shared__ unsigned marks[32];
    constexpr int TILE = SLOTS / B;
    // Of two steps of all teams, which the L2 shall be ahead.
    constexpr int FAR = AHEAD / (2 * R * WARPS * 32 * 16);
    static_assert(FAR > 0, "prefetching");
    const Feed& f = d.feed;
    const int t = threadIdx.x, lane = t & 31, warp = t >> 5;
    const int teams = (blockDim.x >> 5) / d.team, team = warp / d.team;
    const int step = d.team * 32 * N;
    const int place = t - team * d.team * 32, at = place * N;
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
    const auto weights_of = [&](int row) {
        if constexpr (KIND == PLAIN) return first_weights + row * d.stride;
        if constexpr (KIND == PAIR)
            return (row & 1 ? other_weights : first_weights) + (row >> 1) * d.stride;
        if constexpr (KIND == LISTED) return first_weights + list[row - lo] * d.stride;
    };

    // A place on the way through a tile: slab by slab, R rows of each team at a time. A slab has an
    // even number of steps, as two are under way.
    struct Cursor {
        int slab, row;
    };
    int tile = 0, tile_end = 0, slab_rows = 0;
    const int step_rows = teams * R;
    const auto advance = [&](Cursor& c, int rows) {
        c.row += rows;
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
            if (there) p = weights_of(row) + element;
            load_weights(w[u], p, there);
        }
        advance(c, step_rows);
    };
    // Two steps' rows come into L2: some lanes of each team ask for one each.
    const auto ask = [&](Cursor& c) {
        if (place < 2 * R && c.slab < d.slabs) {
            const int row = c.row + place / R * step_rows + place % R;
            const long long element = static_cast<long long>(c.slab) * step;
            if (row < tile_end && element < d.stride)
                ask_for(weights_of(row) + element,
                        static_cast<unsigned>(min(static_cast<long long>(step), d.stride - element)) *
                            static_cast<unsigned>(sizeof(W)));
        }
        advance(c, 2 * step_rows);
    };
    Cursor far;
    const auto begin = [&](int row) {
        tile = row;
        tile_end = min(tile + TILE, hi);
        slab_rows = (tile_end - tile + 2 * step_rows - 1) / (2 * step_rows) * (2 * step_rows);
        far = Cursor{0, tile + team * R};
#pragma unroll 1
        for (int i = 0; i < FAR; i++) ask(far);
    };

    release_next();
    // Nobody writes weights and parameters: they are under way before the wait.
    Part<B, N> part;
#pragma unroll
    for (int k = 0; k < N; k++) part.gain[k] = 1.f, part.bias[k] = 0.f;
    part.parameters(f, at);
    if constexpr (KIND != LISTED) {
        begin(lo);
        const int shift = KIND == PAIR ? 1 : 0, first = lo >> shift, n = (hi - lo) >> shift;
        if (n > 0 && d.scales[0]) ask_for_floats(d.scales[0] + first, n);
        if (n > 0 && KIND == PAIR && d.scales[1]) ask_for_floats(d.scales[1] + first, n);
        if (n > 0 && d.out.bias) ask_for_floats(d.out.bias + first, n);
        if (n > 0 && KIND == PAIR && d.up_bias) ask_for_floats(d.up_bias + first, n);
    }
    wait_for_previous();

    const bool emit = blockIdx.x == 0 && (f.h || f.counts);
    unsigned any_count = 0, counts[B];
#pragma unroll
    for (int b = 0; b < B; b++) counts[b] = 0, part.mean[b] = 0.f, part.factor[b] = 1.f;
    // What the end needs of the first results, one a thread.
    float early = 0.f;
    if constexpr (KIND == LISTED) {
        list_neurons<B>(d, lo, hi, list, marks, any_count, counts);
        if (lo < hi) begin(lo);
        if (t < min(TILE, hi - lo) * B)
            early = load(d.gate + static_cast<long long>(t % B) * d.out.outputs + list[t / B]);
        if (t < hi - lo && d.scales[0]) prefetch(d.scales[0] + list[t]);
        if (t < hi - lo && d.up_bias) prefetch(d.up_bias + list[t]);
    } else if constexpr (KIND == PLAIN) {
        if (d.out.add && t < min(TILE, hi - lo) * B)
            early = load(d.out.y + static_cast<long long>(t % B) * d.out.outputs + lo + t / B);
    }
    // The norm's mean and variance. Both end with slab 0.
    int loaded = -1;
    if (f.normed) {
#pragma unroll 1
        for (int pass = f.centred ? 0 : 1; pass < 2; pass++) {
            float sum[B];
#pragma unroll
            for (int b = 0; b < B; b++) sum[b] = 0.f;
#pragma unroll 1
            for (int s = d.slabs - 1; s >= 0; s--) {
                const int here = at + s * step;
                if (loaded != s) part.raw(f, here);
                loaded = s;
                // Teams have the same places.
                if (team > 0) continue;
#pragma unroll
                for (int k = 0; k < N; k++) {
                    const bool in = here + k < f.width;
#pragma unroll
                    for (int b = 0; b < B; b++) {
                        const float v = in ? part.x[b][k] - part.mean[b] : 0.f;
                        sum[b] += pass == 0 ? v : v * v;
                    }
                }
            }
            sums_of_block<B>(sum, scratch[pass]);
#pragma unroll
            for (int b = 0; b < B; b++) {
                if (pass == 0)
                    part.mean[b] = sum[b] / f.width;
                else
                    part.factor[b] = 1.f / sqrtf(sum[b] / f.width + f.eps);
            }
        }
    }

    float* const my_sums = sums + warp * SLOTS;
    const auto multiply = [&](const Packed<W, N>(&w)[R], int slab, int row) {
        float v[R * B];
#pragma unroll
        for (int i = 0; i < R * B; i++) v[i] = 0.f;
#pragma unroll
        for (int k = 0; k < N; k++)
#pragma unroll
            for (int u = 0; u < R; u++) {
                const float weight = weight_of(w[u], k);
#pragma unroll
                for (int b = 0; b < B; b++)
                    v[u * B + b] = fmaf(weight, part.x[b][k], v[u * B + b]);
            }
        const float sum = fold(v, lane);
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

    int there = -1;  // the slab of `part`
#pragma unroll 1
    while (tile < hi && lo < hi) {
        Packed<W, N> one[R], other[R];
        Cursor ahead{0, tile + team * R};
        read(one, ahead);
        read(other, ahead);
#pragma unroll 1
        for (int slab = 0; slab < d.slabs; slab++) {
            if (slab != there) {
                const int here = at + slab * step;
                if (slab != loaded) part.raw(f, here);
                if (d.slabs > 1) part.parameters(f, here);
                part.finish(f, here);
                there = slab, loaded = -1;
                if (emit && team == 0 && tile == lo) {
#pragma unroll
                    for (int k = 0; k < N; k++) {
                        if (here + k >= f.width) continue;
                        bool any = false;
#pragma unroll
                        for (int b = 0; b < B; b++) {
                            const float v = part.x[b][k];
                            if (f.h) f.h[static_cast<long long>(b) * f.width + here + k] = v;
                            counts[b] += v != 0.f;
                            any |= v != 0.f;
                        }
                        any_count += any;
                    }
                }
            }
#pragma unroll 1
            for (int row = tile + team * R; row - team * R < tile_end; row += 2 * step_rows) {
                multiply(one, slab, row);
                read(one, ahead);
                ask(far);
                multiply(other, slab, row + step_rows);
                read(other, ahead);
            }
        }
        __syncthreads();
        const int rows = tile_end - tile;
        // Whether `early` is of result `i`.
        const auto known = [&](int i) { return tile == lo && i == t; };
        if constexpr (KIND == PLAIN) {
            const Out& o = d.out;
            for (int i = t; i < rows * B; i += blockDim.x) {
                const int row = tile + i / B;
                float v = total(i / B, i % B);
                if (d.scales[0]) v *= __ldg(d.scales[0] + row);
                if (o.bias) v += __ldg(o.bias + row);
                if (o.softcap > 0.f) v = o.softcap * tanhf(v / o.softcap);
                float* y = o.y + static_cast<long long>(i % B) * o.outputs + row;
                if (o.add) v += known(i) ? early : load(y);
                *y = v;
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
                float gate = curve_value(d.act, d.act_p, known(i) ? early : load(d.gate + place));
                gate = forced(gate, d.mask, neuron);
                float up = total(i / B, b);
                if (d.scales[0]) up *= __ldg(d.scales[0] + neuron);
                if (d.up_bias) up += __ldg(d.up_bias + neuron);
                d.out.y[place] = curve_value(d.then, d.then_p, gate * up);
            }
        }
        if (tile_end >= hi) break;
        // The sums of this tile are no longer read.
        __syncthreads();
        begin(tile_end);
    }
    unsigned* const records = KIND == LISTED ? d.counts : f.counts;
    if (blockIdx.x == 0 && records) write_counts<B>(any_count, counts, marks, records);
}

#define ENTRY_OF(NAME, KIND, SUFFIX, W, B, N, R)                                               \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, B * N <= 16 && B * R <= 8 ? 2 : 1)  \
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
ENTRY(bf16, bf16, 2, 8, 2)
ENTRY(bf16, bf16, 4, 8, 4)
ENTRY(bf16, bf16, 8, 8, 2)
ENTRY(int8, int8_t, 1, 16, 2)
ENTRY(int8, int8_t, 2, 16, 4)
ENTRY(int8, int8_t, 4, 8, 4)
ENTRY(int8, int8_t, 8, 8, 2)
