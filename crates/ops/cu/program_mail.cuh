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
    __device__ __forceinline__ explicit Coming(const float* at) : from(at) { look(); }
    // One that was looked at.
    __device__ __forceinline__ Coming(const float* at, float seen)
        : from(at), word(__float_as_uint(seen)) {}
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

// Fours of words on their way, all at once: each `stride` behind the one before, `count` of them, and
// zeros behind those.
template <int N>
struct Fours {
    uint4 w[N];

    __device__ __forceinline__ void look(const float* from, int stride, int count) {
        const unsigned phase = fixed().phase;
#pragma unroll
        for (int k = 0; k < N; k++)
            asm volatile(
                "{\n .reg .pred p;\n setp.ne.s32 p, %5, 0;\n"
                " mov.b32 %0, %6;\n mov.b32 %1, %6;\n mov.b32 %2, %6;\n mov.b32 %3, %6;\n"
                " @p ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
                : "=&r"(w[k].x), "=&r"(w[k].y), "=&r"(w[k].z), "=&r"(w[k].w)
                : "l"(from + k * stride), "r"(static_cast<int>(k < count)), "r"(phase)
                : "memory");
    }
    __device__ __forceinline__ bool old() const {
        const unsigned phase = fixed().phase;
        unsigned other = 0;
#pragma unroll
        for (int k = 0; k < N; k++)
            other |= (w[k].x ^ phase) | (w[k].y ^ phase) | (w[k].z ^ phase) | (w[k].w ^ phase);
        return other & 1;
    }
    // Another number in place of one that came.
    __device__ __forceinline__ void put(int k, const float4& v) {
        w[k] = make_uint4(__float_as_uint(v.x), __float_as_uint(v.y), __float_as_uint(v.z),
                          __float_as_uint(v.w));
    }
    __device__ __forceinline__ float4 at(int k) const {
        return make_float4(without_sign(w[k].x), without_sign(w[k].y), without_sign(w[k].z),
                           without_sign(w[k].w));
    }
};

// How many times a block was done with a step. The count never goes back: a launch adds the same each
// time, and so tells which token this is.
__device__ __forceinline__ unsigned long long arrivals(const Program& p) {
    unsigned long long n;
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(n) : "l"(p.arrived) : "memory");
    return n;
}

// Of one thread, before anybody arrives.
__device__ __forceinline__ void begin_token(const Program& p) {
    const unsigned long long all = static_cast<unsigned long long>(p.step_count) * blocks();
    // Some blocks may have arrived at the first, but not all at the last without this one.
    const unsigned long long n = arrivals(p);
    fixed().arrived = static_cast<unsigned>(n - n % all);
    // The words are zeros before the first token.
    fixed().phase = ~(n / all) & 1;
    fixed().number = fixed().step = fixed().seen = 0;
}

// The step that the block's threads are at: nobody may ask behind a step's last meeting but thread 0, which
// counts on in front of the one at its end. In a register it would have a place in local memory.
__device__ __forceinline__ int step_number() {
    return static_cast<volatile int&>(fixed().number);
}

// In local memory its address would have a place as well.
__device__ __forceinline__ const Step& this_step() { return fixed().steps[step_number() % 2]; }

// This block is done with a step; the first one's results and what it cleared shall be seen behind that.
__device__ __forceinline__ void arrive(const Program& p, bool first) {
    if (thread() == 0) static_cast<volatile int&>(fixed().number)++;
    meet();
    if (thread()) return;
    if (first)
        asm volatile("red.release.gpu.global.add.u64 [%0], 1;" ::"l"(p.arrived) : "memory");
    else
        asm volatile("red.relaxed.gpu.global.add.u64 [%0], 1;" ::"l"(p.arrived) : "memory");
}

// What a thread does that nobody waits for: it keeps at hand how often blocks have arrived, and `bring`s
// the spare rows of a step when their place is free.
template <typename F>
__device__ __forceinline__ void watch(const Program& p, F bring) {
    volatile unsigned& seen = fixed().seen;
    const unsigned first = fixed().arrived, all = (p.step_count - 1) * blocks();
    unsigned n = 0;
    int brought = 0;
    while (n < all) {
        const int freed = static_cast<volatile int&>(fixed().freed);
        if (freed != brought) bring(brought = freed);
        unsigned long long now;
        asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(now) : "l"(p.arrived) : "memory");
        seen = n = static_cast<unsigned>(now) - first;
    }
}

// Whether almost all are done with what is before step n.
__device__ __forceinline__ bool most_are_done(int n) {
    const volatile unsigned& seen = fixed().seen;
    return n > 1 && seen + blocks() / 4 >= n * blocks();
}

// Each thread waits for that; in front of step 1 for all, and what they cleared.
__device__ __forceinline__ void wait_for_most(const Program& p, int n) {
    if (n > 1) {
        while (!most_are_done(n)) {
        }
        return;
    }
    if (thread() == 0)
        while (static_cast<unsigned>(arrivals(p)) - fixed().arrived < blocks()) {
        }
    meet();
}

// What was told is here: the rows of step n may come as they can.
__device__ __forceinline__ void begin_step(int n) {
    if (thread() == 0) static_cast<volatile int&>(fixed().step) = n;
}
