// Copies rows: row `from[i]` (or i) of one matrix becomes row `to[i]` of another.
//
// Nothing is computed, so one kernel for each size of a unit serves all element types.

#include <stdint.h>

constexpr int THREADS = 256;

// Strides, offset and width are in units; a list may be null.
template <typename U>
__device__ __forceinline__ void copy_rows(const U* __restrict__ src, U* __restrict__ dst,
                                          const long long* from, const long long* to, long long n,
                                          int width, long long src_stride, long long dst_stride) {
    const long long i = (long long)blockIdx.x * THREADS + threadIdx.x;
    const long long all = n * width;
    if (i >= all) return;
    const long long row = all >> 32 ? i / width : (unsigned)i / (unsigned)width;
    const long long column = i - row * width;
    dst[(to ? to[row] : row) * dst_stride + column] =
        src[(from ? from[row] : row) * src_stride + column];
}

#define ENTRY(U, BYTES)                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS)                                   \
        copy_rows_##BYTES(const U* src, U* dst, const long long* from, const long long* to, \
                          long long n, int width, long long src_stride,                     \
                          long long dst_stride) {                                           \
        copy_rows(src, dst, from, to, n, width, src_stride, dst_stride);                    \
    }
ENTRY(uint4, 16)
ENTRY(uint32_t, 4)
ENTRY(uint16_t, 2)
