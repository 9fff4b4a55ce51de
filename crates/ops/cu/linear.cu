// Bias of a linear layer: its gradient is the sum of each column of dy.
#include "common.cuh"

// Rows of `width` elements; this block sums `rows_per_block` of them in the columns
// first .. first+count, 64 columns a block, and writes one row of `partial` [blocks.y, count].
// 256 threads: 32 pairs of columns, 8 rows at a time.
template <typename T>
__device__ void column_partials(const T* dy, long long n, long long width, long long first,
                                long long count, long long rows_per_block, float* partial) {
    __shared__ float sums[8][64];
    const int lane = threadIdx.x & 31, team = threadIdx.x >> 5;
    const long long column = (long long)blockIdx.x * 64 + lane;
    const long long begin = (long long)blockIdx.y * rows_per_block;
    const long long end = min(n, begin + rows_per_block);
    float low = 0.f, high = 0.f;
    const bool has_low = column < count, has_high = column + 32 < count;
    const T* at = dy + first + column;
#pragma unroll 4
    for (long long row = begin + team; row < end; row += 8) {
        if (has_low) low += to_f32(at[row * width]);
        if (has_high) high += to_f32(at[row * width + 32]);
    }
    sums[team][lane] = low;
    sums[team][lane + 32] = high;
    __syncthreads();
    if (threadIdx.x < 64) {
        float sum = 0.f;
#pragma unroll
        for (int t = 0; t < 8; ++t) sum += sums[t][threadIdx.x];
        const long long c = (long long)blockIdx.x * 64 + threadIdx.x;
        if (c < count) partial[(long long)blockIdx.y * count + c] = sum;
    }
}

// out (+)= the sum of the rows of `partial` [rows, count], in their order.
template <typename T>
__device__ void add_partials(const float* partial, int rows, long long count, T* out, int add) {
    const long long c = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= count) return;
    float sum = 0.f;
#pragma unroll 8
    for (int r = 0; r < rows; ++r) sum += partial[r * count + c];
    out[c] = from_f32<T>(add ? to_f32(out[c]) + sum : sum);
}

#define ENTRIES(T, SUFFIX)                                                                         \
    extern "C" __global__ void column_partials_##SUFFIX(                                           \
        const T* dy, long long n, long long width, long long first, long long count,               \
        long long rows_per_block, float* partial) {                                                \
        column_partials<T>(dy, n, width, first, count, rows_per_block, partial);                   \
    }                                                                                              \
    extern "C" __global__ void add_partials_##SUFFIX(const float* partial, int rows,               \
                                                     long long count, T* out, int add) {           \
        add_partials<T>(partial, rows, count, out, add);                                           \
    }

ENTRIES(float, f32)
ENTRIES(bf16, bf16)
