// Rows of a table by id, and the gradient of the table.
//
// Kernels take N elements at a time: a vector, or one where widths or addresses are odd.
#include "common.cuh"

template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
    T v[N];
};

template <typename T, int N>
__device__ __forceinline__ Pack<T, N> load(const T* p) {
    return *reinterpret_cast<const Pack<T, N>*>(p);
}

template <typename T, int N>
__device__ __forceinline__ void store(T* p, const Pack<T, N>& v) {
    *reinterpret_cast<Pack<T, N>*>(p) = v;
}

// Packs of a thread, `blockDim.x` apart.
constexpr int EACH = 4;

// x = m table[ids], or x += table[ids]; `packs` is the number of packs of a row.
template <typename T, int N, bool ADD>
__device__ __forceinline__ void gather(const T* table, const unsigned* ids, T* x, unsigned items,
                                       unsigned packs, float m) {
    const unsigned start = blockIdx.x * blockDim.x * EACH + threadIdx.x;
    Pack<T, N> from[EACH], old[EACH];
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
        const unsigned item = start + k * blockDim.x;
        if (item >= items) continue;
        const unsigned row = item / packs, pack = item % packs;
        from[k] = load<T, N>(table + ((long long)ids[row] * packs + pack) * N);
        if (ADD) old[k] = load<T, N>(x + (long long)item * N);
    }
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
        const unsigned item = start + k * blockDim.x;
        if (item >= items) continue;
        Pack<T, N> out;
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const float v = to_f32(from[k].v[j]);
            out.v[j] = from_f32<T>(ADD ? to_f32(old[k].v[j]) + v : m * v);
        }
        store<T, N>(x + (long long)item * N, out);
    }
}

template <int N, typename D>
__device__ __forceinline__ void put(D* to, bool add, const float (&sum)[N]) {
    // 16 bytes at a time: 8 numbers of f32 are two vectors.
    constexpr int M = N * sizeof(D) > 16 ? 16 / sizeof(D) : N;
#pragma unroll
    for (int i = 0; i < N; i += M) {
        Pack<D, M> out;
        if (add) out = load<D, M>(to + i);
#pragma unroll
        for (int j = 0; j < M; ++j) {
            out.v[j] = from_f32<D>(add ? to_f32(out.v[j]) + sum[i + j] : sum[i + j]);
        }
        store<D, M>(to + i, out);
    }
}

// Some places of one id: a stretch of the list of places, sorted by id.
struct Piece {
    unsigned id, from, to;
    // Where the sum goes: a row of `partial`, or with NONE straight to the table.
    unsigned slot;
    static constexpr unsigned NONE = 0xffffffffu;
};

// dtable[id] (+)= m times the sum of dx over a piece's places, in their order; blockIdx.x is the
// piece, blockIdx.y the stretch of columns.
template <typename T, typename D, int N>
__device__ __forceinline__ void scatter(const T* dx, const unsigned* places, const Piece* pieces,
                                        D* dtable, bool add, float* partial, unsigned packs,
                                        float m) {
    constexpr unsigned AHEAD = 8;
    const unsigned pack = blockIdx.y * blockDim.x + threadIdx.x;
    if (pack >= packs) return;
    const Piece piece = pieces[blockIdx.x];
    const long long width = (long long)packs * N;
    dx += pack * N;
    float sum[N] = {};
    for (unsigned at = piece.from; at < piece.to; at += AHEAD) {
        Pack<T, N> v[AHEAD];
#pragma unroll
        for (unsigned k = 0; k < AHEAD; ++k) {
            if (at + k < piece.to) v[k] = load<T, N>(dx + places[at + k] * width);
        }
#pragma unroll
        for (unsigned k = 0; k < AHEAD; ++k) {
            if (at + k >= piece.to) continue;
#pragma unroll
            for (int j = 0; j < N; ++j) sum[j] += to_f32(v[k].v[j]);
        }
    }
    if (piece.slot != Piece::NONE) {
        put<N>(partial + piece.slot * width + pack * N, false, sum);
        return;
    }
#pragma unroll
    for (int j = 0; j < N; ++j) sum[j] *= m;
    put<N>(dtable + piece.id * width + pack * N, add, sum);
}

// Adds up the pieces of the ids that have several: `groups` holds (id, first slot, slots, 0). A
// block has 32 columns of one id, in 8 strands.
template <typename D>
__device__ __forceinline__ void finish(const float* partial, const uint4* groups, D* dtable,
                                       bool add, int width, float m) {
    __shared__ float strands[8][32];
    const int lane = threadIdx.x & 31, strand = threadIdx.x >> 5;
    const int column = blockIdx.y * 32 + lane;
    const uint4 group = groups[blockIdx.x];
    float sum = 0.f;
    if (column < width) {
        partial += (long long)group.y * width + column;
#pragma unroll 4
        for (unsigned i = strand; i < group.z; i += 8) sum += partial[(long long)i * width];
    }
    strands[strand][lane] = sum;
    __syncthreads();
    if (strand == 0 && column < width) {
        for (int i = 1; i < 8; ++i) sum += strands[i][lane];
        const float total[1] = {m * sum};
        put<1>(dtable + (long long)group.x * width + column, add, total);
    }
}

#define GATHER(SUFFIX, N, ELEM, T)                                                              \
    extern "C" __global__ void __launch_bounds__(256) embedding_forward##SUFFIX##_##ELEM(       \
        const T* table, const unsigned* ids, T* x, unsigned items, unsigned packs, float m) {   \
        gather<T, N, false>(table, ids, x, items, packs, m);                                    \
    }                                                                                           \
    extern "C" __global__ void __launch_bounds__(256) embedding_add_rows##SUFFIX##_##ELEM(      \
        const T* table, const unsigned* ids, T* x, unsigned items, unsigned packs) {            \
        gather<T, N, true>(table, ids, x, items, packs, 1.f);                                   \
    }

#define SCATTER(SUFFIX, N, TO, D, ELEM, T)                                                      \
    extern "C" __global__ void __launch_bounds__(256)                                           \
        embedding_backward##SUFFIX##_##TO##_##ELEM(                                             \
            const T* dx, const unsigned* places, const Piece* pieces, D* dtable, int add,       \
            float* partial, unsigned packs, float m) {                                          \
        scatter<T, D, N>(dx, places, pieces, dtable, add, partial, packs, m);                   \
    }

#define FINISH(ELEM, D)                                                                         \
    extern "C" __global__ void __launch_bounds__(256) embedding_finish_##ELEM(                  \
        const float* partial, const uint4* groups, D* dtable, int add, int width, float m) {    \
        finish<D>(partial, groups, dtable, add, width, m);                                      \
    }

GATHER(, 8, bf16, bf16)
GATHER(, 4, f32, float)
GATHER(_odd, 1, bf16, bf16)
GATHER(_odd, 1, f32, float)
SCATTER(, 8, bf16, bf16, bf16, bf16)
SCATTER(, 8, f32, float, bf16, bf16)
SCATTER(, 4, bf16, bf16, f32, float)
SCATTER(, 4, f32, float, f32, float)
SCATTER(_odd, 1, bf16, bf16, bf16, bf16)
SCATTER(_odd, 1, f32, float, bf16, bf16)
SCATTER(_odd, 1, bf16, bf16, f32, float)
SCATTER(_odd, 1, f32, float, f32, float)
FINISH(bf16, bf16)
FINISH(f32, float)
