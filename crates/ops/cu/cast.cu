// Between f32 and bf16, rounded to the nearest, ties to even.

#include "quad.cuh"

extern "C" __global__ void __launch_bounds__(QUAD_THREADS)
    cast_bf16(const bf16* src, float* dst, long long n, int vec) {
    update_tile<false, true>(dst, src, n, vec, [](float, float s) { return s; });
}

extern "C" __global__ void __launch_bounds__(QUAD_THREADS)
    cast_f32(const float* src, bf16* dst, long long n, int vec) {
    update_tile<false, true>(dst, src, n, vec, [](float, float s) { return s; });
}
