// Sums of the rows of listed inputs: a block has some columns of all of them.
#pragma once

#include "program_enter.cuh"

// A thread's pieces of rows: one of every `groups` in the list, from its group's first on.
template <typename W>
struct Adder {
    static constexpr int N = Weights<W>::N;
    static constexpr int SET = 2, SETS = AHEAD / SET;

    float acc[N];
    const W* weights;
    unsigned stride;
    const unsigned short* rows;
    const float* values;
    int groups, end;
    bool mine;

    __device__ __forceinline__ static unsigned char* place(int set, int u) {
        return shared + FIXED + (set * SET + u) * PIECE + thread() * 16;
    }

    // The pieces of a set, which come one after the other.
    __device__ __forceinline__ void bring_set(int set, int first) {
#pragma unroll
        for (int u = 0; u < SET; u++) {
            const int q = first + u * groups;
            if (!mine || q >= end) continue;
            copy_16_of_128(place(set, u), weights + static_cast<uint64_t>(rows[q]) * stride);
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    }

    __device__ __forceinline__ void add_set(int set, int first) {
#pragma unroll
        for (int u = 0; u < SET; u++) {
            const int q = first + u * groups;
            if (q >= end) break;
            const Weights<W> piece(place(set, u));
            const float x = values[rows[q]];
#pragma unroll
            for (int k = 0; k < N; k++) acc[k] = fmaf(x, weight_of(piece.w, k), acc[k]);
        }
    }

    __device__ __forceinline__ void sum(int first) {
        const int step = SET * groups;
        int next = first;
#pragma unroll 1
        for (int set = 0; set < SETS; set++, next += step) bring_set(set, next);
        int set = 0;
#pragma unroll 1
        for (int q = first; q < end; q += step, next += step) {
            asm volatile("cp.async.wait_group %0;" ::"n"(SETS - 1) : "memory");
            if (mine) add_set(set, q);
            bring_set(set, next);
            set = (set + 1) % SETS;
        }
    }
};

// The sum of column t of the block's, in thread t. The list is no longer read behind the call.
template <typename W>
__device__ __forceinline__ float columns(const Step& s, const Entered& in, int total) {
    constexpr int N = Adder<W>::N;
    const Columns shared_out = s.columns;
    const int t = thread(), lanes = shared_out.lanes, width = lanes * N;
    const int group = divided(t, shared_out.by_lanes), lane_column = (t - group * lanes) * N;
    const int column = blockIdx.x * width + lane_column;
    Adder<W> adder;
#pragma unroll
    for (int k = 0; k < N; k++) adder.acc[k] = 0.f;
    adder.groups = shared_out.groups;
    adder.mine = group < adder.groups && column < s.stride[0];
    adder.weights = static_cast<const W*>(s.weights[0]) + column;
    adder.stride = s.stride[0];
    adder.rows = in.rows;
    adder.values = in.scaled;
    adder.end = total;
    adder.sum(group);
    asm volatile("cp.async.wait_all;" ::: "memory");

    // The sums of the groups lie where the threads' own pieces came, fours of columns one behind the other:
    // each thread adds a column's of some groups, then a column's parts.
    constexpr int FOURS = N / 4;
    static_assert(FOURS <= AHEAD, "has room");
    if (group < adder.groups)
#pragma unroll
        for (int k = 0; k < FOURS; k++)
            *reinterpret_cast<float4*>(shared + FIXED + k * PIECE + thread() * 16) =
                make_float4(adder.acc[4 * k], adder.acc[4 * k + 1], adder.acc[4 * k + 2],
                            adder.acc[4 * k + 3]);
    meet();
    const int per = shared_out.parts;
    const int part = divided(t, shared_out.by_width), place = t - part * width;
    // Neighbours read neighbours: the k-th fours of all lanes.
    const int k = FOURS == 1 ? 0 : divided(place, shared_out.by_fours), in_fours = place - k * lanes * 4;
    float sum = 0.f;
    if (part < per) {
        const float* const first = at_byte<float>(FIXED + k * PIECE) + in_fours;
#pragma unroll 8
        for (int g = part; g < adder.groups; g += per) sum += first[g * lanes * 4];
    }
    float* parts = fixed().sums;  // [per, width]
    if (part < per) parts[part * width + in_fours / 4 * N + k * 4 + in_fours % 4] = sum;
    meet();
    sum = 0.f;
    if (t < width)
#pragma unroll 4
        for (int n = 0; n < per; n++) sum += parts[n * width + t];
    return sum;
}
