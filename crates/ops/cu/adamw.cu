// AdamW over many tensors in one launch: parameter, gradient and both moments in one pass.
//
// A block has one chunk of one tensor. Arithmetic is in f32, with the numbers that the CPU's
// `Factors` has; the result is rounded to what the tensor holds. With a master copy the step is
// the master's, and the parameter gets it rounded.

#include "quad.cuh"

constexpr int THREADS = 256;

// As in src/cuda/adamw.rs.
struct Item {
    unsigned long long param, master, grad, m, v;
    double weight_decay;
    unsigned long long vec;
};
struct Chunk {
    unsigned long long start;
    unsigned item, len;
};
struct Numbers {
    float grad_scale, decay, beta1_rest, beta2, beta2_rest, step_size, root_scale, eps;
};

__device__ __forceinline__ void update(float& p, float& m, float& v, float g, const Numbers& f) {
    g *= f.grad_scale;
    m += f.beta1_rest * (g - m);
    v = f.beta2 * v + f.beta2_rest * g * g;
    p = p * f.decay - f.step_size * m / (sqrtf(v) * f.root_scale + f.eps);
}

// Nothing is read again before the next step, so the caches need not keep it. The intrinsics also
// say that the memory is global, which the compiler cannot know of addresses out of a struct.
__device__ __forceinline__ void read(Quad<float>& q, const float* p) {
    *reinterpret_cast<float4*>(&q) = __ldcs(reinterpret_cast<const float4*>(p));
}
__device__ __forceinline__ void read(Quad<bf16>& q, const bf16* p) {
    *reinterpret_cast<uint2*>(&q) = __ldcs(reinterpret_cast<const uint2*>(p));
}
__device__ __forceinline__ void write(float* p, const Quad<float>& q) {
    __stcs(reinterpret_cast<float4*>(p), *reinterpret_cast<const float4*>(&q));
}
__device__ __forceinline__ void write(bf16* p, const Quad<bf16>& q) {
    __stcs(reinterpret_cast<uint2*>(p), *reinterpret_cast<const uint2*>(&q));
}

// Four elements: all is read before anything is written.
template <typename W, typename G, typename M>
struct Four {
    Quad<W> w;
    Quad<G> g;
    Quad<M> m, v;
};

// P: the parameter; W: what the step is taken on, its master if that is not P.
template <typename P, typename W, bool MASTER, typename G, typename M>
__device__ __forceinline__ void step(const Item* items, const Chunk* chunks, double lr,
                                     Numbers f) {
    const Chunk chunk = chunks[blockIdx.x];
    const Item item = items[chunk.item];
    const long long start = (long long)chunk.start;
    P* param = reinterpret_cast<P*>(item.param) + start;
    W* master = reinterpret_cast<W*>(MASTER ? item.master : item.param) + start;
    const G* grad = reinterpret_cast<const G*>(item.grad) + start;
    M* m = reinterpret_cast<M*>(item.m) + start;
    M* v = reinterpret_cast<M*>(item.v) + start;
    // As the host would, without fusing.
    f.decay = (float)__dsub_rn(1., __dmul_rn(lr, item.weight_decay));

    constexpr int DEEP = 2;
    const int len = (int)chunk.len;
    const int quads = item.vec && start % 4 == 0 ? len / 4 : 0;
    auto load = [&](int i, Four<W, G, M>& a) {
        read(a.w, master + i * 4);
        read(a.g, grad + i * 4);
        read(a.m, m + i * 4);
        read(a.v, v + i * 4);
    };
    auto finish = [&](int i, Four<W, G, M>& a) {
        Quad<P> rounded;
#pragma unroll
        for (int k = 0; k < 4; k++) {
            float w = to_f32(a.w.v[k]), m = to_f32(a.m.v[k]), v = to_f32(a.v.v[k]);
            update(w, m, v, to_f32(a.g.v[k]), f);
            a.w.v[k] = from_f32<W>(w);
            a.m.v[k] = from_f32<M>(m);
            a.v.v[k] = from_f32<M>(v);
            if (MASTER) rounded.v[k] = from_f32<P>(w);
        }
        write(master + i * 4, a.w);
        write(m + i * 4, a.m);
        write(v + i * 4, a.v);
        if (MASTER) write(param + i * 4, rounded);
    };
    int i = threadIdx.x;
    for (; i + (DEEP - 1) * THREADS < quads; i += DEEP * THREADS) {
        Four<W, G, M> a[DEEP];
#pragma unroll
        for (int u = 0; u < DEEP; u++) load(i + u * THREADS, a[u]);
#pragma unroll
        for (int u = 0; u < DEEP; u++) finish(i + u * THREADS, a[u]);
    }
    for (; i < quads; i += THREADS) {
        Four<W, G, M> a;
        load(i, a);
        finish(i, a);
    }
    for (int j = quads * 4 + threadIdx.x; j < len; j += THREADS) {
        float w = to_f32(master[j]), first = to_f32(m[j]), second = to_f32(v[j]);
        update(w, first, second, to_f32(grad[j]), f);
        master[j] = from_f32<W>(w);
        m[j] = from_f32<M>(first);
        v[j] = from_f32<M>(second);
        if (MASTER) param[j] = from_f32<P>(w);
    }
}

// Entry points are named step_PARAMETER_GRADIENT_MOMENTS; `mixed` is a bf16 parameter with an f32
// master.
#define ENTRY(NAME, P, W, MASTER, G, G_NAME, M, M_NAME)                                       \
    extern "C" __global__ void __launch_bounds__(THREADS) step_##NAME##_##G_NAME##_##M_NAME(  \
        const Item* items, const Chunk* chunks, double lr, float grad_scale, float beta1_rest, \
        float beta2, float beta2_rest, float step_size, float root_scale, float eps) {        \
        const Numbers f{grad_scale, 1.f,       beta1_rest, beta2,                             \
                        beta2_rest, step_size, root_scale, eps};                              \
        step<P, W, MASTER, G, M>(items, chunks, lr, f);                                       \
    }
#define GRADIENTS(NAME, P, W, MASTER)                              \
    ENTRY(NAME, P, W, MASTER, float, f32, float, f32)              \
    ENTRY(NAME, P, W, MASTER, bf16, bf16, float, f32)              \
    ENTRY(NAME, P, W, MASTER, float, f32, bf16, bf16)              \
    ENTRY(NAME, P, W, MASTER, bf16, bf16, bf16, bf16)
GRADIENTS(f32, float, float, false)
GRADIENTS(bf16, bf16, bf16, false)
GRADIENTS(mixed, bf16, float, true)
