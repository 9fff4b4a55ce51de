// What the attention kernels share: segments, scores, tiles in shared memory.
//
// A block owns a tile of queries (or of keys) of one segment and one head and walks the tiles of
// keys (queries) that its own can see. The host lists the (segment, tile) pairs, the longest walks
// first. A segment's last query stands at its last key: query i at key kv_len - q_len + i.
#pragma once

#include "attention_mma.cuh"

constexpr float LOG2_E = 1.44269504088896340736f;
constexpr float LN_2 = 0.69314718055994530942f;

struct Segment {
    int q_start, q_len, kv_start, kv_len;

    // The key at which query 0 stands.
    __device__ __forceinline__ int offset() const { return kv_len - q_len; }
};

__device__ __forceinline__ Segment load_segment(const int4* segments, int at) {
    const int4 s = segments[at];
    return {s.x, s.y, s.z, s.w};
}

// What turns a product q . k into a score: the parameters as the host passes them.
#define SCORE_PARAMS \
    float scale, int window, float softcap, const float *slopes, float factor, int alibi_bf16
#define SCORE_ARGS scale, window, softcap, slopes, factor, alibi_bf16

struct Score {
    float scale, cap, inner, slope, factor;
    int alibi;  // 0: none, 1: as published, 2: rounded to bf16, without the query's place

    __device__ __forceinline__ Score(int head, SCORE_PARAMS)
        : scale(scale),
          cap(softcap),
          inner(softcap > 0.f ? scale / softcap : 0.f),
          slope(slopes ? slopes[head] : 0.f),
          factor(factor),
          alibi(slopes ? 1 + alibi_bf16 : 0) {
        (void)window;
    }

    __device__ __forceinline__ float penalty(int key, int position) const {
        if (alibi == 0) return 0.f;
        const float steep = alibi == 1 ? slope * static_cast<float>(key - position)
                                       : to_f32(from_f32<bf16>(slope * static_cast<float>(key)));
        return factor * steep;
    }

    // The score of a key and a query that stands at key `position`; `derivative` becomes that of
    // the soft cap.
    template <bool EXACT>
    __device__ __forceinline__ float of(float product, int key, int position,
                                        float& derivative) const {
        derivative = 1.f;
        float x = product * scale;
        if (cap > 0.f) {
            float t = product * inner;
            if (EXACT) {
                t = tanhf(t);
            } else {
                t = 1.f - __fdividef(2.f, power_of_two(2.f * LOG2_E * t) + 1.f);
            }
            derivative = 1.f - t * t;
            x = cap * t;
        }
        return x + penalty(key, position);
    }
};

// Whether the query at key `position` sees the key.
__device__ __forceinline__ bool sees(int position, int key, int window) {
    return key <= position && key + window > position;
}

// Elements between rows of a tile in shared memory: an odd number of 16-byte chunks, so that eight
// rows lie in different banks.
template <int D>
constexpr int LD = D + 8;

// Starts copies of `ROWS` rows of a head into a tile; rows from `rows` on become 0, and where they
// would lie is not read.
template <int D, int ROWS, int THREADS>
__device__ __forceinline__ void load_tile(uint32_t to, const bf16* from, long long stride,
                                          int rows) {
    constexpr int CHUNKS = D / 8, TURNS = (ROWS * CHUNKS + THREADS - 1) / THREADS;
    if constexpr (THREADS % CHUNKS == 0) {
        // A thread stays in its column: one pointer and few registers.
        constexpr int STEP = THREADS / CHUNKS;
        static_assert(ROWS % STEP == 0, "every thread copies as many chunks");
        const int row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
        from += row * stride + chunk * 8;
        to += (row * LD<D> + chunk * 8) * 2;
#pragma unroll
        for (int i = 0; i < TURNS; i++) {
            copy_16(to + i * STEP * LD<D> * 2, from, row + i * STEP < rows);
            from += STEP * stride;
        }
    } else {
#pragma unroll
        for (int i = 0; i < TURNS; i++) {
            const int at = threadIdx.x + i * THREADS;
            const int row = at / CHUNKS, chunk = at % CHUNKS;
            if (TURNS * THREADS == ROWS * CHUNKS || row < ROWS)
                copy_16(to + (row * LD<D> + chunk * 8) * 2, from + row * stride + chunk * 8,
                        row < rows);
        }
    }
}

// Copies `ROWS` rows of a warp's part of a tile, `COLS` of each, to memory in 16-byte pieces. Rows
// from `rows` on stay away.
template <int D, int ROWS, int COLS>
__device__ __forceinline__ void store_rows(bf16* to, long long stride, const bf16* from, int rows) {
    constexpr int CHUNKS = COLS / 8;
    for (int at = threadIdx.x % 32; at < ROWS * CHUNKS; at += 32) {
        const int row = at / CHUNKS, chunk = at % CHUNKS;
        if (row < rows) {
            store_vec(to + row * stride + chunk * 8, load_vec(from + row * LD<D> + chunk * 8));
        }
    }
}

// Puts a warp's accumulators, times `factor` for each of its rows, into its rows of a tile.
template <int D, int MA, int COLS>
__device__ __forceinline__ void put_rows(bf16* to, const float (&acc)[MA][COLS / 8][4],
                                         const float (&factor)[MA][2]) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int m = 0; m < MA; m++)
#pragma unroll
        for (int n = 0; n < COLS / 8; n++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const float f = factor[m][h];
                *reinterpret_cast<uint32_t*>(to + (m * 16 + h * 8 + g) * LD<D> + n * 8 + 2 * t) =
                    pack(acc[m][n][2 * h] * f, acc[m][n][2 * h + 1] * f);
            }
}

// Where a lane points for fragments of a tile: of A, of B from rows that are B's columns, and of B
// from rows that are its rows.
template <int D>
__device__ __forceinline__ uint32_t lane_a() {
    const int lane = threadIdx.x % 32;
    return (lane % 16 * LD<D> + lane / 16 * 8) * 2;
}
template <int D>
__device__ __forceinline__ uint32_t lane_b() {
    const int lane = threadIdx.x % 32;
    return ((lane % 8 + lane / 16 * 8) * LD<D> + lane / 8 % 2 * 8) * 2;
}
template <int D>
__device__ __forceinline__ uint32_t lane_b_transposed() {
    return lane_a<D>();
}

// c[m][n] += A B^T over D columns; A's rows at `a`, those of B at `b`, as lanes point.
template <int D, int MA, int N>
__device__ __forceinline__ void product(float (&c)[MA][N / 8][4], uint32_t a, uint32_t b) {
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        uint32_t fa[MA][4];
#pragma unroll
        for (int m = 0; m < MA; m++) load_matrices(fa[m], a + (m * 16 * LD<D> + k * 16) * 2);
#pragma unroll
        for (int n = 0; n < N / 16; n++) {
            uint32_t fb[4];
            load_matrices(fb, b + (n * 16 * LD<D> + k * 16) * 2);
#pragma unroll
            for (int m = 0; m < MA; m++) {
                mma(c[m][2 * n], fa[m], fb[0], fb[1]);
                mma(c[m][2 * n + 1], fa[m], fb[2], fb[3]);
            }
        }
    }
}

// Two such products side by side: twice as many sums that do not wait for one another.
template <int D, int MA, int N>
__device__ __forceinline__ void products(float (&c)[MA][N / 8][4], uint32_t a, uint32_t b,
                                         float (&c2)[MA][N / 8][4], uint32_t a2, uint32_t b2) {
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        uint32_t fa[MA][4], fa2[MA][4];
#pragma unroll
        for (int m = 0; m < MA; m++) {
            load_matrices(fa[m], a + (m * 16 * LD<D> + k * 16) * 2);
            load_matrices(fa2[m], a2 + (m * 16 * LD<D> + k * 16) * 2);
        }
#pragma unroll
        for (int n = 0; n < N / 16; n++) {
            uint32_t fb[4], fb2[4];
            load_matrices(fb, b + (n * 16 * LD<D> + k * 16) * 2);
            load_matrices(fb2, b2 + (n * 16 * LD<D> + k * 16) * 2);
#pragma unroll
            for (int m = 0; m < MA; m++) {
                mma(c[m][2 * n], fa[m], fb[0], fb[1]);
                mma(c2[m][2 * n], fa2[m], fb2[0], fb2[1]);
                mma(c[m][2 * n + 1], fa[m], fb[2], fb[3]);
                mma(c2[m][2 * n + 1], fa2[m], fb2[2], fb2[3]);
            }
        }
    }
}

// c[m][n] += P B over K rows of B, `COLS` of its columns; P lies in accumulators and is rounded.
template <int D, int MA, int K, int COLS>
__device__ __forceinline__ void product_with(float (&c)[MA][COLS / 8][4],
                                             const float (&p)[MA][K / 8][4], uint32_t b) {
#pragma unroll
    for (int k = 0; k < K / 16; k++) {
        uint32_t fa[MA][4];
#pragma unroll
        for (int m = 0; m < MA; m++) {
            fa[m][0] = pack(p[m][2 * k][0], p[m][2 * k][1]);
            fa[m][1] = pack(p[m][2 * k][2], p[m][2 * k][3]);
            fa[m][2] = pack(p[m][2 * k + 1][0], p[m][2 * k + 1][1]);
            fa[m][3] = pack(p[m][2 * k + 1][2], p[m][2 * k + 1][3]);
        }
#pragma unroll
        for (int n = 0; n < COLS / 16; n++) {
            uint32_t fb[4];
            load_transposed(fb, b + (k * 16 * LD<D> + n * 16) * 2);
#pragma unroll
            for (int m = 0; m < MA; m++) {
                mma(c[m][2 * n], fa[m], fb[0], fb[1]);
                mma(c[m][2 * n + 1], fa[m], fb[2], fb[3]);
            }
        }
    }
}

template <int MA, int N>
__device__ __forceinline__ void clear(float (&c)[MA][N][4]) {
#pragma unroll
    for (int m = 0; m < MA; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) c[m][n][e] = 0.f;
}
