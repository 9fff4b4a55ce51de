// Rotary positions in place: pairs of a head's elements turn by the angles of their row's position.
//
// `table` holds [max_pos][2][pairs]: the cosines of a position, then its sines. A thread keeps the
// cosines and sines of its pairs for several heads of one row.
#include "common.cuh"

// Heads of a thread. More would share the cosines, but leave registers for fewer threads, and then
// memory waits for arithmetic.
constexpr int HEADS = 2;

// x and y turned by an angle.
template <typename T>
__device__ __forceinline__ void turn(float x, float y, float cos, float sin, T& a, T& b) {
    a = from_f32<T>(x * cos - y * sin);
    b = from_f32<T>(y * cos + x * sin);
}

// M floats at an address that is a multiple of their size.
template <int M>
__device__ __forceinline__ void load_floats(float (&to)[M], const float* from) {
    if constexpr (M % 4 == 0) {
#pragma unroll
        for (int i = 0; i < M; i += 4) {
            const float4 v = *reinterpret_cast<const float4*>(from + i);
            to[i] = v.x, to[i + 1] = v.y, to[i + 2] = v.z, to[i + 3] = v.w;
        }
    } else {
        static_assert(M == 2, "half a vector of f32");
        const float2 v = *reinterpret_cast<const float2*>(from);
        to[0] = v.x, to[1] = v.y;
    }
}

// The vectors of one row: `per_head` places in a head, and HEADS heads `apart` from each other.
// Pairs are N elements here and N elements `pairs` further (HALF), or neighbours in one vector.
template <typename T, bool HALF>
__device__ __forceinline__ void turn_vectors(T* x, const float* table, const unsigned* positions,
                                             unsigned items, unsigned per_head, unsigned apart,
                                             unsigned heads, long long stride, int head_dim,
                                             int pairs, float sign) {
    constexpr int N = Vec<T>::N, M = HALF ? N : N / 2, PARTS = HALF ? 2 : 1;
    const unsigned item = blockIdx.x * blockDim.x + threadIdx.x;
    if (item >= items) return;
    const unsigned line = item / per_head, place = item % per_head;
    const unsigned row = line / apart, first = line % apart;
    const float* angles = table + 2ll * pairs * positions[row] + place * M;
    x += row * stride + place * N;
    Bits v[HEADS][PARTS] = {};
#pragma unroll
    for (int k = 0; k < HEADS; ++k) {
        const unsigned head = first + k * apart;
        if (head >= heads) continue;
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            v[k][part] = load_bits(x + (long long)head * head_dim + part * pairs);
        }
    }
    float cos[M], sin[M];
    load_floats(cos, angles);
    load_floats(sin, angles + pairs);
#pragma unroll
    for (int k = 0; k < HEADS; ++k) {
        const unsigned head = first + k * apart;
        if (head >= heads) continue;
        Vec<T> out[PARTS];
#pragma unroll
        for (int i = 0; i < M; ++i) {
            const float turned = sign * sin[i];
            if constexpr (HALF) {
                const float a = element<T>(v[k][0], i), b = element<T>(v[k][PARTS - 1], i);
                turn(a, b, cos[i], turned, out[0].v[i], out[PARTS - 1].v[i]);
            } else {
                const float a = element<T>(v[k][0], 2 * i), b = element<T>(v[k][0], 2 * i + 1);
                turn(a, b, cos[i], turned, out[0].v[2 * i], out[0].v[2 * i + 1]);
            }
        }
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            store_vec(x + (long long)head * head_dim + part * pairs, out[part]);
        }
    }
}

// A thread for each pair of each head, at any address.
template <typename T, bool HALF>
__device__ __forceinline__ void turn_pairs(T* x, const float* table, const unsigned* positions,
                                           unsigned items, unsigned heads, long long stride,
                                           int head_dim, int pairs, float sign) {
    const unsigned item = blockIdx.x * blockDim.x + threadIdx.x;
    if (item >= items) return;
    const unsigned line = item / pairs, pair = item % pairs;
    const unsigned row = line / heads, head = line % heads;
    const float* angles = table + 2ll * pairs * positions[row] + pair;
    x += row * stride + (long long)head * head_dim;
    const unsigned a = HALF ? pair : 2 * pair, b = HALF ? pair + pairs : 2 * pair + 1;
    turn(to_f32(x[a]), to_f32(x[b]), angles[0], sign * angles[pairs], x[a], x[b]);
}

#define ENTRIES(NAME, HALF, ELEM, T)                                                            \
    extern "C" __global__ void __launch_bounds__(256, 5) rope_##NAME##_##ELEM(                  \
        T* x, const float* table, const unsigned* positions, unsigned items, unsigned per_head, \
        unsigned apart, unsigned heads, long long stride, int head_dim, int pairs,              \
        float sign) {                                                                           \
        turn_vectors<T, HALF>(x, table, positions, items, per_head, apart, heads, stride,       \
                              head_dim, pairs, sign);                                           \
    }                                                                                           \
    extern "C" __global__ void __launch_bounds__(256) rope_##NAME##_pairs_##ELEM(               \
        T* x, const float* table, const unsigned* positions, unsigned items, unsigned heads,    \
        long long stride, int head_dim, int pairs, float sign) {                                \
        turn_pairs<T, HALF>(x, table, positions, items, heads, stride, head_dim, pairs, sign);  \
    }

ENTRIES(half, true, bf16, bf16)
ENTRIES(half, true, f32, float)
ENTRIES(interleaved, false, bf16, bf16)
ENTRIES(interleaved, false, f32, float)
