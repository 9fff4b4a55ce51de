// A token's row of the embedding.
#pragma once

#include "decode.cuh"

// As in src/cuda/decode/token.rs.
struct Embed {
    const unsigned *tokens, *positions;
    const void* table;
    const float* scales;
    const void* learned;
    const float* learned_scales;
    float* x;
    long long stride, learned_stride;
    int rows, learned_rows, offset, width;
    float factor;
    int pad;
};

template <typename W>
__device__ __forceinline__ float stored(const void* table, const float* scales, long long stride,
                                        long long row, int column) {
    const float v = static_cast<float>(static_cast<const W*>(table)[row * stride + column]);
    return scales ? v * scales[row] : v;
}

// Column `column` of sequence b's token: NaN for one that no table has.
template <typename W>
__device__ __forceinline__ float embedded(const Embed& e, int b, int column) {
    const long long token = load(e.tokens + b);
    const long long place = static_cast<long long>(load(e.positions + b)) + e.offset;
    if (token >= e.rows || (e.learned && place >= e.learned_rows)) return nanf("");
    float v = stored<W>(e.table, e.scales, e.stride, token, column) * e.factor;
    if (e.learned)
        v += stored<W>(e.learned, e.learned_scales, e.learned_stride, place, column);
    return v;
}
