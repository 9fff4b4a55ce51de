// Four elements at a time, 8 or 16 bytes: what kernels use that read one type and write another.
#pragma once

#include "common.cuh"

template <typename T>
struct alignas(4 * sizeof(T)) Quad {
    T v[4];
};

template <typename T>
__device__ __forceinline__ Quad<T> load_quad(const T* p) {
    return *reinterpret_cast<const Quad<T>*>(p);
}

template <typename T>
__device__ __forceinline__ void store_quad(T* p, const Quad<T>& q) {
    *reinterpret_cast<Quad<T>*>(p) = q;
}

// A block's part of an elementwise kernel: consecutive elements, several quads a thread.
constexpr int QUAD_THREADS = 256;
constexpr int QUADS = 4;
constexpr int QUAD_TILE = QUAD_THREADS * QUADS * 4;

// dst = f(dst, src) for each element; dst is not read where f has no use for it. `src` may be
// null where f has none for that.
template <bool READS_DST, bool READS_SRC, typename D, typename S, typename F>
__device__ __forceinline__ void update_tile(D* __restrict__ dst, const S* __restrict__ src,
                                            long long n, int vec, F f) {
    const long long base = (long long)blockIdx.x * QUAD_TILE;
    if (vec && base + QUAD_TILE <= n) {
        Quad<D> d[QUADS];
        Quad<S> s[QUADS];
#pragma unroll
        for (int u = 0; u < QUADS; u++) {
            const long long at = base + (u * QUAD_THREADS + threadIdx.x) * 4;
            if (READS_DST) d[u] = load_quad(dst + at);
            if (READS_SRC) s[u] = load_quad(src + at);
        }
#pragma unroll
        for (int u = 0; u < QUADS; u++) {
            const long long at = base + (u * QUAD_THREADS + threadIdx.x) * 4;
#pragma unroll
            for (int k = 0; k < 4; k++)
                d[u].v[k] = from_f32<D>(f(READS_DST ? to_f32(d[u].v[k]) : 0.f,
                                          READS_SRC ? to_f32(s[u].v[k]) : 0.f));
            store_quad(dst + at, d[u]);
        }
    } else {
        const long long end = min(n, base + QUAD_TILE);
        for (long long i = base + threadIdx.x; i < end; i += QUAD_THREADS)
            dst[i] = from_f32<D>(
                f(READS_DST ? to_f32(dst[i]) : 0.f, READS_SRC ? to_f32(src[i]) : 0.f));
    }
}
