// What the norms' kernels share: where rows lie, sums over the threads of a row, parameters.
//
// LayerNorm and RMSNorm go over rows or heads, with a curve on the output: y = post(xhat g + b).
// Formulas as in src/norm.rs; what forward, `again` and backward have in common is rounded alike,
// so they see the same signs.
//
// A row is shared by `lanes` threads, a multiple of 32 or a smaller power of 2, each with up to V
// vectors in its registers: memory is read once. As many blocks run as fit at a time, and each goes
// through its rows; the loads of the next row are under way while this one is computed, so that
// neither memory nor arithmetic waits for the other.
#pragma once

#include "curve.cuh"

// Where a thread's part of a row begins.
struct Place {
    unsigned row;
    // Of the row's vectors; none of a row past the last.
    int vectors;
    // In a tensor that has the rows one after the other, and in one that has them as `Rows` says.
    long long dense, at;
};

// Row r begins at (r / heads) * stride + (r % heads) * width: whole rows (heads = 1, stride =
// width) or the heads in some columns of a matrix.
struct Rows {
    unsigned count, heads;
    long long stride;
    int width;
    __device__ __forceinline__ long long at(unsigned row) const {
        return row / heads * stride + row % heads * width;
    }
    // From the last row on: who wrote the rows wrote the last of them last, so they may be in the
    // cache, and the first are there for who comes next.
    __device__ __forceinline__ Place place(unsigned turn, int lane, int per_vector) const {
        if (turn >= count) return Place{0, 0, 0, 0};
        const unsigned row = count - 1 - turn;
        const long long dense = (long long)row * width + lane * per_vector;
        long long at = dense;
        if (heads != 1) at = this->at(row) + lane * per_vector;
        return Place{row, width / per_vector, dense, at};
    }
};

// The weight (the gain less `offset`) and the bias; no bias is a null pointer.
template <typename T>
struct Affine {
    const T* weight;
    const T* bias;
    float offset;
};

// Hides from the compiler that it knows the elements as floats already: it would keep those in
// registers, twice as many, to save a shift later.
__device__ __forceinline__ void keep_packed(Bits& v) {
    asm volatile("" : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)::"memory");
}
template <int V>
__device__ __forceinline__ void keep_packed(Bits (&v)[V]) {
#pragma unroll
    for (int k = 0; k < V; ++k) keep_packed(v[k]);
}

// The thread's gains and shifts. Without HELD they are loaded when they are needed, else once.
// PLAIN norms are RMSNorm without bias.
template <typename T, int V, bool PLAIN, bool HELD>
struct Gains {
    static constexpr int N = Vec<T>::N;
    Affine<T> affine;
    int lane, lanes;
    Bits w[HELD ? V : 1], b[HELD && !PLAIN ? V : 1];

    __device__ __forceinline__ Gains(Affine<T> affine, int lane, int lanes, int vectors)
        : affine(affine), lane(lane), lanes(lanes), w{}, b{} {
#pragma unroll
        for (int k = 0; k < V; ++k) {
            const int i = lane + k * lanes;
            if (!HELD || i >= vectors) continue;
            w[HELD ? k : 0] = load_bits(affine.weight + i * N);
            if (!PLAIN && affine.bias) b[HELD && !PLAIN ? k : 0] = load_bits(affine.bias + i * N);
        }
    }

    // Those of the thread's vector k, which the row has.
    __device__ __forceinline__ void of(int k, float (&gain)[N], float (&shift)[N]) const {
        Bits wk, bk = {};
        if (HELD) {
            wk = w[HELD ? k : 0];
            keep_packed(wk);
            if (!PLAIN) {
                bk = b[HELD && !PLAIN ? k : 0];
                keep_packed(bk);
            }
        } else {
            const int i = lane + k * lanes;
            wk = load_bits(affine.weight + i * N);
            if (!PLAIN && affine.bias) bk = load_bits(affine.bias + i * N);
        }
#pragma unroll
        for (int j = 0; j < N; ++j) {
            gain[j] = element<T>(wk, j) + affine.offset;
            shift[j] = PLAIN ? 0.f : element<T>(bk, j);
        }
    }
};

template <typename C>
__device__ __forceinline__ C curve(int kind, float p) {
    return C{p};
}
template <>
__device__ __forceinline__ AnyCurve curve<AnyCurve>(int kind, float p) {
    return AnyCurve{kind, p};
}

__device__ __forceinline__ float normalised(float x, float mean, float r) {
    return __fmul_rn(__fsub_rn(x, mean), r);
}
// The same for norms without a mean.
template <bool PLAIN>
__device__ __forceinline__ float normalised(float x, float mean, float r) {
    return PLAIN ? __fmul_rn(x, r) : normalised(x, mean, r);
}

// The vectors that a thread has of a row, from its first on; zeros past the end.
template <typename T, int V>
__device__ __forceinline__ void load_row(Bits (&v)[V], const T* from, int lane, int lanes,
                                         int vectors) {
#pragma unroll
    for (int k = 0; k < V; ++k) {
        v[k] = Bits{};
        if (lane + k * lanes < vectors) v[k] = load_bits(from + k * lanes * Vec<T>::N);
    }
}

// K sums over the threads of a row, for every one of them. Rows of several warps meet at a barrier
// of their own, of which a block has 15. The places of two calls alternate: who is late to read the
// first sums holds up the barrier of the second.
template <int K>
struct RowSums {
    // Of all rows of a block: each has two calls' K sums of up to 32 warps, in eights.
    static constexpr int PLACES = 2 * K * 64;
    float* places;
    int lanes, barrier, padded, turn;

    __device__ __forceinline__ RowSums(float* all, int lanes)
        : lanes(lanes),
          barrier(threadIdx.x / lanes + 1),
          padded(lanes > 32 ? (lanes / 32 + 7) / 8 * 8 : 0),
          turn(0) {
        places = all + threadIdx.x / lanes * 2 * K * padded;
        const int lane = threadIdx.x % lanes;
        if (lane < 2 * K * padded && lane % padded >= lanes / 32) places[lane] = 0.f;
    }

    __device__ __forceinline__ void operator()(float (&x)[K]) {
        if (lanes < 32) {
            for (int d = lanes >> 1; d > 0; d >>= 1)
#pragma unroll
                for (int k = 0; k < K; ++k) x[k] += __shfl_xor_sync(0xffffffffu, x[k], d);
            return;
        }
#pragma unroll
        for (int k = 0; k < K; ++k) x[k] = warp_sum(x[k]);
        if (lanes == 32) return;
        float* here = places + turn * K * padded;
        turn ^= 1;
        if ((threadIdx.x & 31) == 0) {
            const int warp = threadIdx.x % lanes / 32;
#pragma unroll
            for (int k = 0; k < K; ++k) here[k * padded + warp] = x[k];
        }
        asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(lanes) : "memory");
#pragma unroll
        for (int k = 0; k < K; ++k) x[k] = 0.f;
#pragma unroll 1
        for (int i = 0; i < padded; i += 8) {
#pragma unroll
            for (int k = 0; k < K; ++k) {
                const float4* four = reinterpret_cast<const float4*>(here + k * padded + i);
                const float4 a = four[0], b = four[1];
                x[k] += ((a.x + a.y) + (a.z + a.w)) + ((b.x + b.y) + (b.z + b.w));
            }
        }
    }
};
