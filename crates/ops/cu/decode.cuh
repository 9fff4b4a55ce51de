// What the kernels of decoding share: waiting for the kernel before, loads, and what happens to
// activations in front of a matrix.
//
// A kernel may start while the one before ends. It then sees weights, which nobody writes; what
// kernels write it may touch only behind `wait_for_previous`, and only through `load`, which does
// not look into a cache that may be older. All such loads are volatile: they stay in order, behind
// the wait.
#pragma once

#include "curve.cuh"

// What a matrix reads: `Feed` of src/cuda/decode/input.rs.
struct Feed {
    const float* x;        // [batch, width]
    const float* gain;     // [width]; of a norm
    const float* bias;     // [width], or null
    const float* mask;     // [width], or null
    float* h;              // [batch, width], or null
    unsigned* counts;      // in any row, then in each; or null
    int width;
    int normed, centred;
    float eps;
    int op;
    float op_p;
    int then;
    float then_p;
};

// Where results go: `Out` of src/cuda/decode/project.rs.
struct Out {
    float* y;           // [batch, outputs]
    const float* bias;  // [outputs], or null
    int outputs;
    int add;
    float softcap;
    int pad;
};

constexpr unsigned FULL = 0xffffffffu;
constexpr int COUNTS = 9;

// Lets the next kernel start, which waits for the end of this one by itself.
__device__ __forceinline__ void release_next() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until the kernel before has ended and what it wrote can be seen.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ float load(const float* p) {
    float v;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
    return v;
}

__device__ __forceinline__ float4 load4(const float* p) {
    float4 v;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(p)
                 : "memory");
    return v;
}

__device__ __forceinline__ unsigned load(const unsigned* p) {
    unsigned v;
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}

// Brings a line nearer that a kernel reads behind the wait, but nobody writes.
__device__ __forceinline__ void prefetch(const void* p) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

// N weights as they are stored.
template <typename W, int N>
struct Packed {
    static constexpr int WORDS = N * sizeof(W) / 4;
    unsigned r[WORDS];
};

// Weights, or zeros where `there` is not. They are read once, so they need no place in L1.
template <typename W, int N>
__device__ __forceinline__ void load_weights(Packed<W, N>& to, const W* p, bool there) {
    static_assert(Packed<W, N>::WORDS == 4 || Packed<W, N>::WORDS == 2, "8 or 16 bytes");
    if constexpr (Packed<W, N>::WORDS == 4) {
        asm volatile(
            "{\n .reg .pred p;\n setp.ne.s32 p, %5, 0;\n"
            " mov.b32 %0, 0;\n mov.b32 %1, 0;\n mov.b32 %2, 0;\n mov.b32 %3, 0;\n"
            " @p ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
            : "=&r"(to.r[0]), "=&r"(to.r[1]), "=&r"(to.r[2]), "=&r"(to.r[3])
            : "l"(p), "r"(static_cast<int>(there)));
    } else {
        asm volatile(
            "{\n .reg .pred p;\n setp.ne.s32 p, %3, 0;\n mov.b32 %0, 0;\n mov.b32 %1, 0;\n"
            " @p ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];\n}"
            : "=&r"(to.r[0]), "=&r"(to.r[1])
            : "l"(p), "r"(static_cast<int>(there)));
    }
}

template <int N>
__device__ __forceinline__ void unpack(const Packed<float, N>& w, float (&v)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) v[i] = __uint_as_float(w.r[i]);
}

template <int N>
__device__ __forceinline__ void unpack(const Packed<bf16, N>& w, float (&v)[N]) {
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
        v[2 * i] = __uint_as_float(w.r[i] << 16);
        v[2 * i + 1] = __uint_as_float(w.r[i] & 0xffff0000u);
    }
}

// A byte plus 128 below the exponent of 2^23 is the float 2^23 + 128 + byte.
template <int N>
__device__ __forceinline__ void unpack(const Packed<int8_t, N>& w, float (&v)[N]) {
#pragma unroll
    for (int i = 0; i < N / 4; i++) {
        const unsigned positive = w.r[i] ^ 0x80808080u;
#pragma unroll
        for (int k = 0; k < 4; k++)
            v[4 * i + k] = __uint_as_float(__byte_perm(positive, 0x4b000000u, 0x7440 | k)) -
                           8388736.f;
    }
}

// Weight `k`, a constant. Where `unpack` fills an array, the compiler writes that to memory each
// time, though nobody reads it there.
template <int N>
__device__ __forceinline__ float weight_of(const Packed<float, N>& w, int k) {
    return __uint_as_float(w.r[k]);
}

template <int N>
__device__ __forceinline__ float weight_of(const Packed<bf16, N>& w, int k) {
    return __uint_as_float(k % 2 ? w.r[k / 2] & 0xffff0000u : w.r[k / 2] << 16);
}

// As `unpack` does it.
template <int N>
__device__ __forceinline__ float weight_of(const Packed<int8_t, N>& w, int k) {
    const unsigned positive = w.r[k / 4] ^ 0x80808080u;
    return __uint_as_float(__byte_perm(positive, 0x4b000000u, 0x7440 | k % 4)) - 8388736.f;
}

// Sums over a block, in every thread; `scratch` holds 32 floats for each of the B.
template <int B>
__device__ __forceinline__ void block_sums(float (&v)[B], float* scratch) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
#pragma unroll
    for (int b = 0; b < B; b++) {
        v[b] = warp_sum(v[b]);
        if (lane == 0) scratch[b * 32 + warp] = v[b];
    }
    __syncthreads();
#pragma unroll
    for (int b = 0; b < B; b++) v[b] = warp_sum(lane < warps ? scratch[b * 32 + lane] : 0.f);
    __syncthreads();
}

// The sum of `n` over the threads in front of this one, and over all; `scratch` holds 32 words.
__device__ __forceinline__ unsigned block_before(unsigned n, unsigned* scratch, unsigned& total) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    unsigned up_to = n;
#pragma unroll
    for (int d = 1; d < 32; d <<= 1) {
        const unsigned below = __shfl_up_sync(FULL, up_to, d);
        if (lane >= d) up_to += below;
    }
    if (lane == 31) scratch[warp] = up_to;
    __syncthreads();
    const unsigned of_warp = lane < warps ? scratch[lane] : 0;
    const unsigned before = __reduce_add_sync(FULL, lane < warp ? of_warp : 0);
    total = __reduce_add_sync(FULL, of_warp);
    __syncthreads();
    return before + up_to - n;
}

// Writes what a block's threads counted: in any row, and in each. `scratch` holds COUNTS words.
template <int B>
__device__ __forceinline__ void write_counts(unsigned any, const unsigned (&each)[B],
                                             unsigned* scratch, unsigned* counts) {
    const int lane = threadIdx.x & 31;
    __syncthreads();
    if (threadIdx.x < COUNTS) scratch[threadIdx.x] = 0;
    __syncthreads();
    const unsigned sum = __reduce_add_sync(FULL, any);
    if (lane == 0) atomicAdd(&scratch[0], sum);
#pragma unroll
    for (int b = 0; b < B; b++) {
        const unsigned row = __reduce_add_sync(FULL, each[b]);
        if (lane == 0) atomicAdd(&scratch[1 + b], row);
    }
    __syncthreads();
    if (threadIdx.x < COUNTS) counts[threadIdx.x] = scratch[threadIdx.x];
}

// The curves with an exponential, once in a kernel: every element of a thread would have each.
__device__ __noinline__ float smooth_value(int kind, float p, float x) {
    return AnyCurve{kind, p}.value(x);
}

// Whether an activation, by its number, has an exponential.
__device__ __forceinline__ bool is_smooth(int kind) { return kind > 0 && kind < 5; }

// One that has none, as `Identity`, `Relu`, `ShiftedRelu` and `FatRelu`: what passes, and when.
__device__ __forceinline__ float plain_value(int kind, float p, float x) {
    if (kind == 0) return x;
    const float y = kind == 6 ? x - p : x;
    const bool closed = kind == 7 ? x < p : y <= 0.f;
    return closed ? 0.f : y;
}

// An activation chosen at run time, by its number.
__device__ __forceinline__ float curve_value(int kind, float p, float x) {
    return is_smooth(kind) ? smooth_value(kind, p, x) : plain_value(kind, p, x);
}

// What makes a value under a mask differ from 0.
constexpr float FORCED = 1e-3f;

// A value under a mask: 0, or its magnitude and a little.
__device__ __forceinline__ float forced(float v, const float* mask, int at) {
    return mask ? __ldg(mask + at) * (fabsf(v) + FORCED) : v;
}

__device__ __forceinline__ float with_bias(const Out& o, int column, float v) {
    return o.bias ? v + __ldg(o.bias + column) : v;
}

// A sum with its bias, under the cap.
__device__ __forceinline__ float finished(const Out& o, float v) {
    return o.softcap > 0.f ? o.softcap * tanhf(v / o.softcap) : v;
}

// A sum becomes a result.
__device__ __forceinline__ void put(const Out& o, int b, int column, float v) {
    v = finished(o, with_bias(o, column, v));
    float* y = o.y + static_cast<long long>(b) * o.outputs + column;
    *y = o.add ? load(y) + v : v;
}
