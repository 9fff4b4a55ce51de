// Reductions over whole tensors, and the small in-place steps of a training loop.
//
// A block has CHUNK consecutive elements. Sums of squares go through one partial sum a block, which
// `total` adds in a fixed order; counts are exact whatever the order, so they use integer atomics.

#include "quad.cuh"
#include "tiles.cuh"

constexpr int THREADS = 256;
constexpr int CHUNK = 16384;

// What nothing writes meanwhile. The intrinsic also says that the memory is global, which the
// compiler cannot know of an address out of a struct.
template <typename T>
__device__ __forceinline__ Vec<T> read_vec(const T* p) {
    Vec<T> v;
    *reinterpret_cast<uint4*>(&v) = __ldg(reinterpret_cast<const uint4*>(p));
    return v;
}

// Calls f with each of n elements, four vectors in flight.
template <typename T, typename F>
__device__ __forceinline__ void for_each(const T* __restrict__ x, int n, int first, int step,
                                         bool vec, F f) {
    constexpr int N = Vec<T>::N;
    int done = 0;
    if (vec) {
        const int vectors = n / N;
        int i = first;
        for (; i + 3 * step < vectors; i += 4 * step) {
            Vec<T> a[4];
#pragma unroll
            for (int u = 0; u < 4; u++) a[u] = read_vec(x + (long long)(i + u * step) * N);
#pragma unroll
            for (int u = 0; u < 4; u++)
#pragma unroll
                for (int k = 0; k < N; k++) f(to_f32(a[u].v[k]));
        }
        for (; i < vectors; i += step) {
            const Vec<T> a = read_vec(x + (long long)i * N);
#pragma unroll
            for (int k = 0; k < N; k++) f(to_f32(a.v[k]));
        }
        done = vectors * N;
    }
    for (int i = done + first; i < n; i += step) f(to_f32(x[i]));
}

// The same over this block's chunk of a tensor.
template <typename T, typename F>
__device__ __forceinline__ void for_chunk(const T* x, long long n, int vec, F f) {
    const long long base = (long long)blockIdx.x * CHUNK;
    for_each(x + base, (int)min((long long)CHUNK, n - base), threadIdx.x, THREADS, vec, f);
}

// In f64, as a square of f32 may be out of its range.
template <typename T>
__device__ __forceinline__ double squares(const T* x, int n, bool vec, double* scratch) {
    double sum = 0.;
    for_each(x, n, threadIdx.x, THREADS, vec, [&](float v) {
        const double wide = v;
        sum = fma(wide, wide, sum);
    });
    return block_sum(sum, scratch);
}

template <typename T>
__device__ __forceinline__ void squares_of_chunk(const T* x, double* partial, long long n,
                                                 int vec) {
    __shared__ double scratch[32];
    const long long base = (long long)blockIdx.x * CHUNK;
    const double sum = squares(x + base, (int)min((long long)CHUNK, n - base), vec, scratch);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// One of several tensors; as in src/cuda/reduce.rs.
struct Slice {
    unsigned long long ptr, len;
    unsigned is_bf16, vec;
};

extern "C" __global__ void __launch_bounds__(THREADS)
    squares_of_many(const Slice* slices, const unsigned* firsts, int count, double* partial) {
    __shared__ double scratch[32];
    const int at = owner_of_tile(firsts, count);
    const Slice slice = slices[at];
    const long long base = (long long)(blockIdx.x - firsts[at]) * CHUNK;
    const int n = (int)min((long long)CHUNK, (long long)slice.len - base);
    const double sum =
        slice.is_bf16
            ? squares(reinterpret_cast<const bf16*>(slice.ptr) + base, n, slice.vec, scratch)
            : squares(reinterpret_cast<const float*>(slice.ptr) + base, n, slice.vec, scratch);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// The L2 norm from its square, and what brings it down to `limit`, unless that is 0: as torch's
// `clip_grad_norm_` does, in f64. NaN where the norm is no finite number.
extern "C" __global__ void clip_factor(const double* square, double limit, double* norm,
                                       float* factor) {
    const double found = sqrt(square[0]);
    norm[0] = found;
    const double share = limit == 0. ? 1. : limit / (found + 1e-6);
    factor[0] = isfinite(found) ? (float)(share < 1. ? share : 1.) : NAN;
}

// One block: partial[0] = the sum of n numbers, in a fixed order.
extern "C" __global__ void __launch_bounds__(1024) total(double* partial, long long n) {
    __shared__ double scratch[32];
    double sum = 0.;
    for (long long i = threadIdx.x; i < n; i += 1024) sum += partial[i];
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) partial[0] = sum;
}

template <typename T>
__device__ __forceinline__ void nonzeros(const T* x, unsigned long long* count, long long n,
                                         int vec) {
    __shared__ unsigned scratch[32];
    unsigned found = 0;
    for_chunk(x, n, vec, [&](float v) { found += v != 0.f; });
    found = block_sum(found, scratch);
    if (threadIdx.x == 0 && found) atomicAdd(count, (unsigned long long)found);
}

// A warp has a row, or the block where rows are long (`whole`).
template <typename T>
__device__ __forceinline__ void nonzeros_of_rows(const T* x, unsigned* counts, long long n,
                                                 int width, int vec, int whole) {
    __shared__ unsigned scratch[32];
    const int warp = threadIdx.x / 32;
    const long long row = whole ? blockIdx.x : (long long)blockIdx.x * (THREADS / 32) + warp;
    unsigned found = 0;
    if (row < n)
        for_each(x + row * width, width, whole ? threadIdx.x : threadIdx.x % 32,
                 whole ? THREADS : 32, vec, [&](float v) { found += v != 0.f; });
    if (whole) {
        found = block_sum(found, scratch);
        if (threadIdx.x == 0) counts[row] = found;
    } else {
        found = __reduce_add_sync(0xffffffffu, found);
        if (threadIdx.x % 32 == 0 && row < n) counts[row] = found;
    }
}

// A lane has N columns, and a warp every eighth of the block's rows; `counts` were 0.
constexpr int ROWS = 128;

template <typename T, int N>
__device__ __forceinline__ void nonzeros_of_columns(const T* __restrict__ x,
                                                    unsigned long long* counts, long long n,
                                                    int width) {
    constexpr int WARPS = THREADS / 32, COLUMNS = 32 * N;
    struct alignas(sizeof(T) * N) Some {
        T v[N];
    };
    __shared__ unsigned found[WARPS][COLUMNS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first = blockIdx.y * COLUMNS;
    const int column = first + lane * N;
    unsigned mine[N] = {};
    if (column < width) {
        const long long end = min(n, (long long)(blockIdx.x + 1) * ROWS);
#pragma unroll 4
        for (long long row = (long long)blockIdx.x * ROWS + warp; row < end; row += WARPS) {
            const Some some = *reinterpret_cast<const Some*>(x + row * width + column);
#pragma unroll
            for (int k = 0; k < N; k++) mine[k] += to_f32(some.v[k]) != 0.f;
        }
    }
#pragma unroll
    for (int k = 0; k < N; k++) found[warp][lane * N + k] = mine[k];
    __syncthreads();
    for (int c = threadIdx.x; c < COLUMNS && first + c < width; c += THREADS) {
        unsigned sum = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += found[w][c];
        if (sum) atomicAdd(counts + first + c, (unsigned long long)sum);
    }
}

// `flag` was 0; 1 where an element is infinite or NaN.
template <typename T>
__device__ __forceinline__ void infinite(const T* x, unsigned* flag, long long n, int vec) {
    unsigned found = 0;
    for_chunk(x, n, vec,
              [&](float v) { found |= (__float_as_uint(v) & 0x7f800000u) == 0x7f800000u; });
    if (__syncthreads_or(found) && threadIdx.x == 0) atomicOr(flag, 1u);
}

// `top` was 0. Magnitudes order as their bits do, with NaN above infinity.
template <typename T>
__device__ __forceinline__ void largest(const T* x, unsigned* top, long long n, int vec) {
    __shared__ unsigned scratch[32];
    unsigned found = 0;
    for_chunk(x, n, vec,
              [&](float v) { found = max(found, __float_as_uint(v) & 0x7fffffffu); });
    found = block_max(found, scratch);
    if (threadIdx.x == 0 && found) atomicMax(top, found);
}

// Counts between `edges`: in shared memory if they fit, which the host knows. `counts` were 0.
template <typename T>
__device__ __forceinline__ void histogram(const T* x, const float* edges,
                                          unsigned long long* counts, long long n, int n_edges,
                                          int shared) {
    extern __shared__ unsigned memory[];
    const int bins = n_edges + 1;
    const float* known = edges;
    if (shared) {
        float* copy = reinterpret_cast<float*>(memory + bins);
        for (int i = threadIdx.x; i < bins; i += THREADS) memory[i] = 0;
        for (int i = threadIdx.x; i < n_edges; i += THREADS) copy[i] = edges[i];
        known = copy;
        __syncthreads();
    }
    // Neighbours are often alike, zeros above all: a run is counted at its end.
    int bin = 0;
    unsigned run = 0;
    auto flush = [&] {
        if (run == 0) return;
        if (shared)
            atomicAdd(memory + bin, run);
        else
            atomicAdd(counts + bin, (unsigned long long)run);
        run = 0;
    };
    const long long step = (long long)gridDim.x * THREADS;
    for (long long i = (long long)blockIdx.x * THREADS + threadIdx.x; i < n; i += step) {
        const float v = to_f32(x[i]);
        if (isnan(v)) continue;
        int low = 0, high = n_edges;
        while (low < high) {
            const int middle = (low + high) / 2;
            if (known[middle] <= v)
                low = middle + 1;
            else
                high = middle;
        }
        if (low != bin) flush();
        bin = low;
        run++;
    }
    flush();
    if (shared) {
        __syncthreads();
        for (int i = threadIdx.x; i < bins; i += THREADS)
            if (memory[i]) atomicAdd(counts + i, (unsigned long long)memory[i]);
    }
}

#define ENTRIES(T, SUFFIX)                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS)                                         \
        squares_##SUFFIX(const T* x, double* partial, long long n, int vec) {                     \
        squares_of_chunk(x, partial, n, vec);                                                     \
    }                                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS)                                         \
        nonzeros_##SUFFIX(const T* x, unsigned long long* count, long long n, int vec) {          \
        nonzeros(x, count, n, vec);                                                               \
    }                                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS) row_nonzeros_##SUFFIX(                  \
        const T* x, unsigned* counts, long long n, int width, int vec, int whole) {               \
        nonzeros_of_rows(x, counts, n, width, vec, whole);                                        \
    }                                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS) column_nonzeros_##SUFFIX(               \
        const T* x, unsigned long long* counts, long long n, int width) {                         \
        nonzeros_of_columns<T, 1>(x, counts, n, width);                                           \
    }                                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS) column_nonzeros_vec_##SUFFIX(           \
        const T* x, unsigned long long* counts, long long n, int width) {                         \
        nonzeros_of_columns<T, Vec<T>::N>(x, counts, n, width);                                   \
    }                                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS)                                         \
        infinite_##SUFFIX(const T* x, unsigned* flag, long long n, int vec) {                     \
        infinite(x, flag, n, vec);                                                                \
    }                                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS)                                         \
        largest_##SUFFIX(const T* x, unsigned* top, long long n, int vec) {                       \
        largest(x, top, n, vec);                                                                  \
    }                                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS)                                         \
        histogram_##SUFFIX(const T* x, const float* edges, unsigned long long* counts,            \
                           long long n, int n_edges, int shared) {                                \
        histogram(x, edges, counts, n, n_edges, shared);                                          \
    }                                                                                             \
    extern "C" __global__ void __launch_bounds__(QUAD_THREADS)                                    \
        scale_##SUFFIX(T* x, float factor, long long n, int vec) {                                \
        update_tile<true, false>(x, (const T*)nullptr, n, vec,                                    \
                                 [=](float d, float) { return d * factor; });                     \
    }                                                                                             \
    extern "C" __global__ void __launch_bounds__(QUAD_THREADS)                                    \
        fill_##SUFFIX(T* x, float value, long long n, int vec) {                                  \
        update_tile<false, false>(x, (const T*)nullptr, n, vec,                                   \
                                  [=](float, float) { return value; });                           \
    }                                                                                             \
    extern "C" __global__ void __launch_bounds__(QUAD_THREADS)                                    \
        add_bf16_to_##SUFFIX(T* dst, const bf16* src, long long n, int vec) {                     \
        update_tile<true, true>(dst, src, n, vec, [](float d, float s) { return d + s; });        \
    }                                                                                             \
    extern "C" __global__ void __launch_bounds__(QUAD_THREADS)                                    \
        add_f32_to_##SUFFIX(T* dst, const float* src, long long n, int vec) {                     \
        update_tile<true, true>(dst, src, n, vec, [](float d, float s) { return d + s; });        \
    }
ENTRIES(bf16, bf16)
ENTRIES(float, f32)
