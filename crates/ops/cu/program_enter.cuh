// What enters a step's matrix: every block makes all of it, in shared memory.
#pragma once

#include "program_ring.cuh"

// Attention's result where a head's keys were shared out: the shares' sums, each times its part.
struct Join {
    const float* partial;
    const float* factors;  // [heads, active]; null where there is one share
    int dim, shares, active;

    __device__ __forceinline__ float value(int i) const {
        const int head = i / dim, d = i - head * dim;
        const float* from = partial + static_cast<long long>(head) * shares * (dim + 2) + d;
        float sum = 0.f;
#pragma unroll 4
        for (int s = 0; s < active; s++)
            sum = fmaf(factors[head * active + s], load(from + s * (dim + 2)), sum);
        return sum;
    }
};

// The part of each share of every head, from their largest scores and sums of weights, where there
// are several.
__device__ __forceinline__ Join join_of(const Step& s, float* factors) {
    const Attend& a = s.attend;
    const int position = fixed().position;
    Join join{a.partial, nullptr, a.head_dim, s.shares, 1};
    if (position >= min(a.context, a.max_pos)) return join;
    join.active = share_of(position, a.window, 0, s.shares).active;
    if (join.active == 1) return join;
    const long long stride = a.head_dim + 2;
#pragma unroll 1
    for (int head = threadIdx.x; head < a.heads; head += THREADS) {
        const float* from = a.partial + head * s.shares * stride + a.head_dim;
        float* const parts = factors + head * join.active;
        float top = -INFINITY, all = 0.f;
#pragma unroll 1
        for (int k = 0; k < join.active; k++) top = fmaxf(top, load(from + k * stride));
#pragma unroll 1
        for (int k = 0; k < join.active; k++) {
            parts[k] = expf(load(from + k * stride) - top);
            all += parts[k] * load(from + k * stride + 1);
        }
#pragma unroll 1
        for (int k = 0; k < join.active; k++) parts[k] /= all;
    }
    meet();
    join.factors = factors;
    return join;
}

// A thread has EACH neighbours among the inputs, and those again so many times EACH further on.
// Loops are not unrolled: what a step does once takes as long as its code takes to come.
constexpr int EACH = 4;

struct Four {
    float v[EACH];

    __device__ __forceinline__ static Four of(const float4 a) { return {{a.x, a.y, a.z, a.w}}; }
    __device__ __forceinline__ static Four at(const float* p) {
        return of(*reinterpret_cast<const float4*>(p));
    }
    // Of a list, or `none` where there is none.
    __device__ __forceinline__ static Four from(const float* list, int i, float none) {
        return list ? at(list + i) : of(make_float4(none, none, none, none));
    }
    __device__ __forceinline__ void put(float* p) const {
        *reinterpret_cast<float4*>(p) = make_float4(v[0], v[1], v[2], v[3]);
    }
};

// A list that nobody writes, in a place where it is at hand, if there is room: each thread copies
// what it reads itself.
__device__ __forceinline__ const float* at_hand(const float* list, int width, int flight, int& used) {
    const int bytes = (4 * width + 15) / 16 * 16;
    if (!list || used + bytes > flight) return list;
    float* const to = at_byte<float>(FIXED + used);
    used += bytes;
#pragma unroll 1
    for (int i = threadIdx.x * EACH; i < width; i += THREADS * EACH) copy_16(to + i, list + i);
    return to;
}

// An activation of each. Those with an exponential are applied one after the other, through `room`.
__device__ __forceinline__ void apply(int kind, float p, Four& x, float* room) {
    if (!is_smooth(kind)) {
#pragma unroll
        for (int k = 0; k < EACH; k++) x.v[k] = plain_value(kind, p, x.v[k]);
        return;
    }
    x.put(room);
#pragma unroll 1
    for (int k = 0; k < EACH; k++) room[k] = AnyCurve{kind, p}.value(room[k]);
    x = Four::at(room);
}

// What enters, in shared memory.
struct Entered {
    float* values;         // each input's
    float* scaled;         // the same times the units of their rows
    unsigned short* rows;  // those that are not zero
};

// Waits for the step before, and makes what enters; a list where the matrix lies by input. Returns
// how many are on it. All threads see the result behind the call.
__device__ __forceinline__ int enter(const Program& p, const Step& s, const Entered& to) {
    // Shared memory is read again behind every store to it: what loops need is in registers.
    Feed f = s.feed;
    const bool listed = s.by_input, counted = f.counts && blockIdx.x == 0;
    const float* unit = listed ? s.scales[0] : nullptr;
    const int width = f.width, first = threadIdx.x * EACH, step = THREADS * EACH;
    float* const values = to.values;
    // Where shares are joined, their parts have that place.
    int used = s.join ? p.flight : 0;
    f.gain = at_hand(f.gain, width, p.flight, used);
    f.bias = at_hand(f.bias, width, p.flight, used);
    f.mask = at_hand(f.mask, width, p.flight, used);
    unit = at_hand(unit, width, p.flight, used);
    wait_for_all(p);
    Join join{nullptr, nullptr, 1, 1, 1};
    if (s.join) join = join_of(s, parts_of_sums());
    // Each thread waits for its own inputs only.
    if (join.factors) {
#pragma unroll 1
        for (int i = threadIdx.x; i < width; i += THREADS) values[i] = join.value(i);
        meet();
    } else {
#pragma unroll 1
        for (int i = first; i < width; i += step) copy_16(values + i, f.x + i);
        asm volatile("cp.async.wait_all;" ::: "memory");
    }
    float mean = 0.f, factor = 1.f;
    if (f.normed) {
#pragma unroll 1
        for (int pass = f.centred ? 0 : 1; pass < 2; pass++) {
            float sum = 0.f;
#pragma unroll 1
            for (int i = first; i < width; i += step) {
                const Four x = Four::at(values + i);
#pragma unroll
                for (int k = 0; k < EACH; k++)
                    sum += pass ? (x.v[k] - mean) * (x.v[k] - mean) : x.v[k];
            }
            sum = sum_of_block(sum);
            if (pass)
                factor = 1.f / sqrtf(sum / width + f.eps);
            else
                mean = sum / width;
        }
    }
    unsigned mine = 0, seen = 0;  // on the list, and not zero
    const bool plain = !f.normed && !f.op && !f.mask && !f.then;
#pragma unroll 1
    for (int i = first; i < width; i += step) {
        Four x = Four::at(values + i);
        if (f.normed) {
            const Four gain = Four::from(f.gain, i, 1.f), bias = Four::from(f.bias, i, 0.f);
#pragma unroll
            for (int k = 0; k < EACH; k++)
                x.v[k] = (x.v[k] - mean) * factor * gain.v[k] + bias.v[k];
        }
        if (!plain) {
            apply(f.op, f.op_p, x, values + i);
            if (f.mask) {
                const Four mask = Four::from(f.mask, i, 1.f);
#pragma unroll
                for (int k = 0; k < EACH; k++) x.v[k] = mask.v[k] * (fabsf(x.v[k]) + FORCED);
            }
            apply(f.then, f.then_p, x, values + i);
            x.put(values + i);
        }
#pragma unroll
        for (int k = 0; k < EACH; k++) seen += x.v[k] != 0.f;
        if (unit) {
            const Four units = Four::from(unit, i, 1.f);
#pragma unroll
            for (int k = 0; k < EACH; k++) x.v[k] *= units.v[k];
            x.put(to.scaled + i);
#pragma unroll
            for (int k = 0; k < EACH; k++) mine += x.v[k] != 0.f;
        }
    }
    if (!unit) mine = seen;
    unsigned total = 0;
    if (listed) {
        // Each thread's inputs, thread by thread: always in the same order.
        unsigned at = sum_before(mine, total);
#pragma unroll 1
        for (int i = first; i < width; i += step) {
            const Four x = Four::at(to.scaled + i);
#pragma unroll
            for (int k = 0; k < EACH; k++) {
                const bool there = x.v[k] != 0.f;
                if (there) to.rows[at] = i + k;
                at += there;
            }
        }
    }
    if (counted) {
        unsigned all;
        sum_before(seen, all);
        if (threadIdx.x < 2) f.counts[threadIdx.x] = all;
    }
    // Rows of weights are filled up, and so is what they are multiplied by.
    if (threadIdx.x < (64 - width % 64) % 64) values[width + threadIdx.x] = 0.f;
    meet();
    return total;
}
