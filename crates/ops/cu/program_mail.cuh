// What the blocks tell each other.
//
// The results of a step go to words that belong to it alone: each is written once in a token. A word's
// last bit tells whether it is this token's, as it changes from token to token, so readers wait for the
// word itself. No fence has to stand between a result and a sign that it is there: it would wait for
// its turn among the weights that are on their way. A result loses its last bit to that.
//
// Blocks also count who is done, so that nobody reads again and again what takes long to come; and
// the first step ends with a true barrier, behind which all have seen what it cleared.
#pragma once

#include "program.cuh"

__device__ __forceinline__ void tell(float* to, float v) {
    const unsigned word = (__float_as_uint(v) & ~1u) | fixed().phase;
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(word) : "memory");
}

__device__ __forceinline__ bool is_old(unsigned word) { return (word ^ fixed().phase) & 1; }
__device__ __forceinline__ float without_sign(unsigned word) { return __uint_as_float(word & ~1u); }

// A word on its way: looked at before it is needed.
struct Coming {
    const float* from;
    unsigned word;

    __device__ __forceinline__ void look() {
        asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(word) : "l"(from) : "memory");
    }
    __device__ __forceinline__ explicit Coming(const float* at) : from(at), word(0) {
        if (from) look();
    }
    __device__ __forceinline__ float value() {
        while (is_old(word)) look();
        return without_sign(word);
    }
};

__device__ __forceinline__ float told(const float* from) { return Coming(from).value(); }

__device__ __forceinline__ float2 told_pair(const float* from) {
    unsigned x, y;
    do {
        asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];"
                     : "=r"(x), "=r"(y)
                     : "l"(from)
                     : "memory");
    } while (is_old(x) || is_old(y));
    return make_float2(without_sign(x), without_sign(y));
}

// Fours, each `stride` behind the one before, and zeros behind the first `count`. All are on their way
// at once.
template <int N>
__device__ __forceinline__ void told_fours(float4 (&v)[N], const float* from, int stride, int count) {
    const unsigned phase = fixed().phase;
    uint4 w[N];
    unsigned other;
    do {
#pragma unroll
        for (int k = 0; k < N; k++)
            asm volatile(
                "{\n .reg .pred p;\n setp.ne.s32 p, %5, 0;\n"
                " mov.b32 %0, %6;\n mov.b32 %1, %6;\n mov.b32 %2, %6;\n mov.b32 %3, %6;\n"
                " @p ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
                : "=&r"(w[k].x), "=&r"(w[k].y), "=&r"(w[k].z), "=&r"(w[k].w)
                : "l"(from + k * stride), "r"(static_cast<int>(k < count)), "r"(phase)
                : "memory");
        other = 0;
#pragma unroll
        for (int k = 0; k < N; k++)
            other |= (w[k].x ^ phase) | (w[k].y ^ phase) | (w[k].z ^ phase) | (w[k].w ^ phase);
    } while (other & 1);
#pragma unroll
    for (int k = 0; k < N; k++)
        v[k] = make_float4(without_sign(w[k].x), without_sign(w[k].y), without_sign(w[k].z),
                           without_sign(w[k].w));
}

// How many times a block was done with a step. The count never goes back: a launch adds the same each
// time, and so tells which token this is.
__device__ __forceinline__ unsigned long long arrivals(const Program& p) {
    unsigned long long n;
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(n) : "l"(p.arrived) : "memory");
    return n;
}

// Of one thread, before anybody meets.
__device__ __forceinline__ void begin_meetings(const Program& p) {
    const unsigned long long all =
        max(static_cast<unsigned long long>(p.step_count - 1) * gridDim.x, 1ull);
    // Some blocks may have arrived at the first, but not all at the last without this one.
    const unsigned long long n = arrivals(p);
    fixed().target = n - n % all;
    // The words are zeros before the first token.
    fixed().phase = ~(n / all) & 1;
    fixed().step = 0;
}

// This block is done with its step.
__device__ __forceinline__ void arrive(const Program& p) {
    meet();
    if (threadIdx.x) return;
    if (fixed().step == 0)
        asm volatile("red.release.gpu.global.add.u64 [%0], 1;" ::"l"(p.arrived) : "memory");
    else
        asm volatile("red.relaxed.gpu.global.add.u64 [%0], 1;" ::"l"(p.arrived) : "memory");
}

// Almost all are done with the step before, behind the first step all.
__device__ __forceinline__ void wait_for_most(const Program& p) {
    if (threadIdx.x == 0) {
        const unsigned long long all = fixed().target += gridDim.x;
        if (fixed().step == 0) {
            while (arrivals(p) < all) {
            }
        } else {
            unsigned long long n;
            do asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(n) : "l"(p.arrived) : "memory");
            while (n + gridDim.x / 16 < all);
        }
    }
    // What each thread copied to shared memory meanwhile is there for all as well.
    asm volatile("cp.async.wait_all;" ::: "memory");
    meet();
}

// What was told is here: the step's rows may come as they can.
__device__ __forceinline__ void begin_step() {
    if (threadIdx.x == 0) {
        volatile int& step = fixed().step;
        step = step + 1;
    }
}
