// AdamW over many tensors in one launch: parameter, gradient and both moments in one pass.
//
// A block has one tile of one tensor, so that the blocks at work have neighbouring memory, as those
// of a copy do. Arithmetic is in f32, with the numbers that the CPU's `Factors` has; the result is
// rounded to what the tensor holds. With a master copy the step is the master's, and the parameter
// gets it rounded.

#include "quad.cuh"
#include "tiles.cuh"

constexpr int THREADS = 256;
// Quads of a thread.
constexpr int DEEP = 2;
constexpr int TILE = THREADS * DEEP * 4;

// As in src/cuda/adamw.rs.
struct Item {
    unsigned long long param, master, grad, m, v;
    double weight_decay;
    unsigned long long len;
    unsigned first, vec;
};
struct Numbers {
    float grad_scale, decay, beta1_rest, beta2, beta2_rest, step_size, root_scale, eps;
};

// Root and quotient are the hardware's, 1 and 2 units off at most in what is added to p.
__device__ __forceinline__ void update(float& p, float& m, float& v, float g, const Numbers& f) {
    g *= f.grad_scale;
    m += f.beta1_rest * (g - m);
    v = f.beta2 * v + f.beta2_rest * g * g;
    float root;
    asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(v));
    p = p * f.decay - __fdividef(f.step_size * m, root * f.root_scale + f.eps);
}

// The compiler cannot know that an address out of a table is of global memory.
__device__ __forceinline__ void read(Quad<float>& q, const float* p) {
    asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(q.v[0]), "=f"(q.v[1]), "=f"(q.v[2]), "=f"(q.v[3])
                 : "l"(__cvta_generic_to_global(p))
                 : "memory");
}
__device__ __forceinline__ void read(Quad<bf16>& q, const bf16* p) {
    uint2 words;
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];"
                 : "=r"(words.x), "=r"(words.y)
                 : "l"(__cvta_generic_to_global(p))
                 : "memory");
    q = *reinterpret_cast<const Quad<bf16>*>(&words);
}
__device__ __forceinline__ void write(float* p, const Quad<float>& q) {
    asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)),
                 "f"(q.v[0]), "f"(q.v[1]), "f"(q.v[2]), "f"(q.v[3])
                 : "memory");
}
__device__ __forceinline__ void write(bf16* p, const Quad<bf16>& q) {
    const uint2 words = *reinterpret_cast<const uint2*>(&q);
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(p)),
                 "r"(words.x), "r"(words.y)
                 : "memory");
}

// Four elements: all is read before anything is written.
template <typename W, typename G, typename M>
struct Four {
    Quad<W> w;
    Quad<G> g;
    Quad<M> m, v;
};

// P: the parameter; W: what the step is taken on, its master if that is not P. `clip` is the factor
// of gradients if that is on the device, and no finite number if there must be no step.
template <typename P, typename W, bool MASTER, typename G, typename M>
__device__ __forceinline__ void step(const Item* items, const unsigned* firsts, int n,
                                     const float* clip, double lr, Numbers f) {
    if (clip) f.grad_scale = __ldg(clip);
    const Item item = items[owner_of_tile(firsts, n)];
    if (!isfinite(f.grad_scale)) return;
    const long long start = (long long)(blockIdx.x - item.first) * TILE;
    P* param = reinterpret_cast<P*>(item.param) + start;
    W* master = reinterpret_cast<W*>(MASTER ? item.master : item.param) + start;
    const G* grad = reinterpret_cast<const G*>(item.grad) + start;
    M* m = reinterpret_cast<M*>(item.m) + start;
    M* v = reinterpret_cast<M*>(item.v) + start;
    // As the host would, without fusing.
    f.decay = (float)__dsub_rn(1., __dmul_rn(lr, item.weight_decay));

    const int len = (int)min((long long)TILE, (long long)item.len - start);
    if (item.vec && len == TILE) {
        Four<W, G, M> all[DEEP];
#pragma unroll
        for (int u = 0; u < DEEP; u++) {
            const int at = (threadIdx.x + u * THREADS) * 4;
            read(all[u].w, master + at);
            read(all[u].g, grad + at);
            read(all[u].m, m + at);
            read(all[u].v, v + at);
        }
        // No load is to wait for arithmetic, after which the compiler would put some of them.
        __syncwarp();
#pragma unroll
        for (int u = 0; u < DEEP; u++) {
            const int at = (threadIdx.x + u * THREADS) * 4;
            Four<W, G, M>& a = all[u];
            Quad<P> rounded;
#pragma unroll
            for (int k = 0; k < 4; k++) {
                float w = to_f32(a.w.v[k]), first = to_f32(a.m.v[k]), second = to_f32(a.v.v[k]);
                update(w, first, second, to_f32(a.g.v[k]), f);
                a.w.v[k] = from_f32<W>(w);
                a.m.v[k] = from_f32<M>(first);
                a.v.v[k] = from_f32<M>(second);
                if (MASTER) rounded.v[k] = from_f32<P>(w);
            }
            write(master + at, a.w);
            write(m + at, a.m);
            write(v + at, a.v);
            if (MASTER) write(param + at, rounded);
        }
    } else {
#pragma unroll 1
        for (int j = threadIdx.x; j < len; j += THREADS) {
            float w = to_f32(master[j]), first = to_f32(m[j]), second = to_f32(v[j]);
            update(w, first, second, to_f32(grad[j]), f);
            master[j] = from_f32<W>(w);
            m[j] = from_f32<M>(first);
            v[j] = from_f32<M>(second);
            if (MASTER) param[j] = from_f32<P>(w);
        }
    }
}

// Entry points are named step_PARAMETER_GRADIENT_MOMENTS; `mixed` is a bf16 parameter with an f32
// master.
#define ENTRY(NAME, P, W, MASTER, G, G_NAME, M, M_NAME)                                       \
    extern "C" __global__ void __launch_bounds__(THREADS) step_##NAME##_##G_NAME##_##M_NAME(  \
        const Item* items, const unsigned* firsts, int n, const float* clip, double lr,       \
        float grad_scale, float beta1_rest, float beta2, float beta2_rest, float step_size,   \
        float root_scale, float eps) {                                                        \
        const Numbers f{grad_scale, 1.f,       beta1_rest, beta2,                             \
                        beta2_rest, step_size, root_scale, eps};                              \
        step<P, W, MASTER, G, M>(items, firsts, n, clip, lr, f);                              \
    }
#define GRADIENTS(NAME, P, W, MASTER)                              \
    ENTRY(NAME, P, W, MASTER, float, f32, float, f32)              \
    ENTRY(NAME, P, W, MASTER, bf16, bf16, float, f32)              \
    ENTRY(NAME, P, W, MASTER, float, f32, bf16, bf16)              \
    ENTRY(NAME, P, W, MASTER, bf16, bf16, bf16, bf16)
GRADIENTS(f32, float, float, false)
GRADIENTS(bf16, bf16, bf16, false)
GRADIENTS(mixed, bf16, float, true)
