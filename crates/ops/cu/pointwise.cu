// Activation functions over whole tensors.
//
// A block takes a tile of consecutive elements, in vectors where it is whole and aligned (`vec`),
// one by one where not.

#include "curve.cuh"

constexpr int THREADS = 256;
constexpr int VECTORS = 2;

template <typename T>
constexpr int TILE = THREADS * VECTORS * Vec<T>::N;

template <typename T, typename C>
__device__ __forceinline__ void forward(C curve, const T* __restrict__ x, T* __restrict__ y,
                                        long long n, int vec) {
    constexpr int N = Vec<T>::N;
    const long long base = (long long)blockIdx.x * TILE<T>;
    if (vec && base + TILE<T> <= n) {
        Vec<T> a[VECTORS];
#pragma unroll
        for (int u = 0; u < VECTORS; u++)
            a[u] = load_vec(x + base + (u * THREADS + threadIdx.x) * N);
#pragma unroll
        for (int u = 0; u < VECTORS; u++) {
#pragma unroll
            for (int k = 0; k < N; k++) a[u].v[k] = from_f32<T>(curve.value(to_f32(a[u].v[k])));
            store_vec(y + base + (u * THREADS + threadIdx.x) * N, a[u]);
        }
    } else {
        const long long end = min(n, base + TILE<T>);
        for (long long i = base + threadIdx.x; i < end; i += THREADS)
            y[i] = from_f32<T>(curve.value(to_f32(x[i])));
    }
}

// `dx` may be `dy`: a thread reads its elements before it writes them.
template <typename T, typename C>
__device__ __forceinline__ void backward(C curve, const T* __restrict__ x, const T* dy, T* dx,
                                         long long n, int vec) {
    constexpr int N = Vec<T>::N;
    const long long base = (long long)blockIdx.x * TILE<T>;
    float y;
    if (vec && base + TILE<T> <= n) {
        Vec<T> a[VECTORS], d[VECTORS];
#pragma unroll
        for (int u = 0; u < VECTORS; u++) {
            const long long at = base + (u * THREADS + threadIdx.x) * N;
            a[u] = load_vec(x + at);
            d[u] = load_vec(dy + at);
        }
#pragma unroll
        for (int u = 0; u < VECTORS; u++) {
#pragma unroll
            for (int k = 0; k < N; k++)
                d[u].v[k] = from_f32<T>(curve.pull(to_f32(a[u].v[k]), to_f32(d[u].v[k]), y));
            store_vec(dx + base + (u * THREADS + threadIdx.x) * N, d[u]);
        }
    } else {
        const long long end = min(n, base + TILE<T>);
        for (long long i = base + threadIdx.x; i < end; i += THREADS)
            dx[i] = from_f32<T>(curve.pull(to_f32(x[i]), to_f32(dy[i]), y));
    }
}

#define ENTRY_OF(NAME, CURVE, T, SUFFIX)                                              \
    extern "C" __global__ void __launch_bounds__(THREADS) forward_##NAME##_##SUFFIX(  \
        const T* x, T* y, long long n, int vec, float p) {                            \
        forward<T>(CURVE{p}, x, y, n, vec);                                           \
    }                                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS) backward_##NAME##_##SUFFIX( \
        const T* x, const T* dy, T* dx, long long n, int vec, float p) {              \
        backward<T>(CURVE{p}, x, dy, dx, n, vec);                                     \
    }
#define ENTRY(NAME, CURVE)              \
    ENTRY_OF(NAME, CURVE, bf16, bf16)   \
    ENTRY_OF(NAME, CURVE, float, f32)
FOR_EACH_CURVE(ENTRY)
