// The gated MLP's middle: h = f(gate) * up with gu = [gate | up], forward and backward, and the L1
// gradient of h.
//
// With `vec` a thread has 16 bytes of a row's columns, else one column; `per_row` threads have the
// row.

#include "curve.cuh"

constexpr int THREADS = 256;

// Where a thread's columns are: of `gate` in gu (`up` is `ffn` further), and in h.
struct Place {
    long long wide, narrow;
};

// False for threads past the end.
__device__ __forceinline__ bool place(long long n, int ffn, unsigned per_row, int step,
                                      Place& at) {
    const long long i = (long long)blockIdx.x * THREADS + threadIdx.x;
    const long long all = n * per_row;
    if (i >= all) return false;
    // A division of 64 bits is slow, and seldom needed.
    const long long row = all >> 32 ? i / per_row : (unsigned)i / per_row;
    at.narrow = i * step;
    at.wide = at.narrow + row * ffn;
    return true;
}

template <typename T, typename C>
__device__ __forceinline__ void forward(C curve, const T* __restrict__ gu, T* __restrict__ h,
                                        long long n, int ffn, unsigned per_row, int vec) {
    constexpr int N = Vec<T>::N;
    Place at;
    if (!place(n, ffn, per_row, vec ? N : 1, at)) return;
    if (vec) {
        Vec<T> gate = load_vec(gu + at.wide);
        const Vec<T> up = load_vec(gu + at.wide + ffn);
#pragma unroll
        for (int k = 0; k < N; k++)
            gate.v[k] = from_f32<T>(curve.value(to_f32(gate.v[k])) * to_f32(up.v[k]));
        store_vec(h + at.narrow, gate);
    } else {
        const float value = curve.value(to_f32(gu[at.wide]));
        h[at.narrow] = from_f32<T>(value * to_f32(gu[at.wide + ffn]));
    }
}

// With `h`, that is computed again.
template <typename T, bool OUTPUT, typename C>
__device__ __forceinline__ void backward(C curve, const T* __restrict__ gu,
                                         const T* __restrict__ dh, T* __restrict__ dgu,
                                         T* __restrict__ h, long long n, int ffn,
                                         unsigned per_row, int vec) {
    constexpr int N = Vec<T>::N;
    Place at;
    if (!place(n, ffn, per_row, vec ? N : 1, at)) return;
    if (vec) {
        const Vec<T> gate = load_vec(gu + at.wide);
        const Vec<T> up = load_vec(gu + at.wide + ffn);
        const Vec<T> d = load_vec(dh + at.narrow);
        Vec<T> dgate, dup, out;
#pragma unroll
        for (int k = 0; k < N; k++) {
            const float u = to_f32(up.v[k]), g = to_f32(d.v[k]);
            float value;
            dgate.v[k] = from_f32<T>(curve.pull(to_f32(gate.v[k]), g * u, value));
            dup.v[k] = from_f32<T>(value * g);
            if (OUTPUT) out.v[k] = from_f32<T>(value * u);
        }
        store_vec(dgu + at.wide, dgate);
        store_vec(dgu + at.wide + ffn, dup);
        if (OUTPUT) store_vec(h + at.narrow, out);
    } else {
        const float u = to_f32(gu[at.wide + ffn]), g = to_f32(dh[at.narrow]);
        float value;
        dgu[at.wide] = from_f32<T>(curve.pull(to_f32(gu[at.wide]), g * u, value));
        dgu[at.wide + ffn] = from_f32<T>(value * g);
        if (OUTPUT) h[at.narrow] = from_f32<T>(value * u);
    }
}

#define ENTRY_OF(NAME, CURVE, T, SUFFIX)                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS)                                         \
        forward_##NAME##_##SUFFIX(const T* gu, T* h, long long n, int ffn, unsigned per_row,      \
                                  int vec, float p) {                                             \
        forward<T>(CURVE{p}, gu, h, n, ffn, per_row, vec);                                        \
    }                                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS)                                         \
        backward_##NAME##_##SUFFIX(const T* gu, const T* dh, T* dgu, long long n, int ffn,        \
                                   unsigned per_row, int vec, float p) {                          \
        backward<T, false>(CURVE{p}, gu, dh, dgu, nullptr, n, ffn, per_row, vec);                 \
    }                                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS)                                         \
        backward_output_##NAME##_##SUFFIX(const T* gu, const T* dh, T* dgu, T* h, long long n,    \
                                          int ffn, unsigned per_row, int vec, float p) {          \
        backward<T, true>(CURVE{p}, gu, dh, dgu, h, n, ffn, per_row, vec);                        \
    }
#define ENTRY(NAME, CURVE)            \
    ENTRY_OF(NAME, CURVE, bf16, bf16) \
    ENTRY_OF(NAME, CURVE, float, f32)
FOR_EACH_CURVE(ENTRY)

// dh += lambda sign(h), and the sum of |h| over each block's CHUNK elements.
constexpr int CHUNK = 16384;

__device__ __forceinline__ float signed_step(float h, float lambda) {
    return h == 0.f ? 0.f : lambda * copysignf(1.f, h);
}

template <typename T>
__device__ __forceinline__ void add_l1(const T* __restrict__ h, T* __restrict__ dh, double* sums,
                                       long long n, float lambda, int vec) {
    constexpr int N = Vec<T>::N;
    __shared__ double scratch[32];
    const long long base = (long long)blockIdx.x * CHUNK;
    const int len = (int)min((long long)CHUNK, n - base);
    const int vectors = vec ? len / N : 0;
    h += base;
    dh += base;
    double sum = 0.;
#pragma unroll 2
    for (int i = threadIdx.x; i < vectors; i += THREADS) {
        const Vec<T> a = load_vec(h + i * N);
        Vec<T> d = load_vec(dh + i * N);
        float part = 0.f;
#pragma unroll
        for (int k = 0; k < N; k++) {
            const float x = to_f32(a.v[k]);
            d.v[k] = from_f32<T>(to_f32(d.v[k]) + signed_step(x, lambda));
            part += fabsf(x);
        }
        store_vec(dh + i * N, d);
        sum += part;
    }
    for (int i = vectors * N + threadIdx.x; i < len; i += THREADS) {
        const float x = to_f32(h[i]);
        dh[i] = from_f32<T>(to_f32(dh[i]) + signed_step(x, lambda));
        sum += fabsf(x);
    }
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    add_l1_bf16(const bf16* h, bf16* dh, double* sums, long long n, float lambda, int vec) {
    add_l1(h, dh, sums, n, lambda, vec);
}
extern "C" __global__ void __launch_bounds__(THREADS)
    add_l1_f32(const float* h, float* dh, double* sums, long long n, float lambda, int vec) {
    add_l1(h, dh, sums, n, lambda, vec);
}
