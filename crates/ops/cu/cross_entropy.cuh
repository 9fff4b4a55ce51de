// Cross-entropy and its gradient with one read and one write of each row of logits.
//
// A block takes row after row. The one it works on is in registers; the next are on their way into
// shared memory meanwhile. A thread copies only the vectors that it reads itself, so nobody waits
// for another's copies, and a row costs one barrier.
#pragma once

#include "common.cuh"

// Of a block: 32 warps, so that a warp sums up what all have.
constexpr int ROW_THREADS = 1024;

// 2^x as the hardware has it; what would be denormal is 0.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float exp_fast(float x) { return exp2_fast(x * 1.4426950408889634f); }

// Queues the copy of 16 bytes into shared memory.
template <typename T>
__device__ __forceinline__ void copy_vec_async(Vec<T>* to, const T* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                     (unsigned)__cvta_generic_to_shared(to)),
                 "l"(from)
                 : "memory");
}
__device__ __forceinline__ void end_of_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits for all groups of this thread's copies but the newest LEFT.
template <int LEFT>
__device__ __forceinline__ void await_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// The largest logit, and the sum of exp(logit - max).
struct Exponentials {
    float max, sum;

    // Of what several lanes or warps have. One that saw only -inf has 0 as its sum.
    __device__ __forceinline__ Exponentials over_warp() const {
        const float most = warp_max(max);
        return {most, warp_sum(sum == 0.f ? 0.f : sum * exp_fast(max - most))};
    }
};

// A thread's vectors of a row, in registers: V of them at most, as f32.
template <typename T, int V>
struct InRegisters {
    static constexpr int N = Vec<T>::N;
    // The row is read from shared memory once, which may then take another.
    static constexpr bool LEAVES_ROOM = true;
    float x[V][N];

    // The largest logit of those before `vocab`.
    __device__ __forceinline__ float load(Vec<T>* row, int vectors, int vocab) {
        float most = -INFINITY;
#pragma unroll
        for (int u = 0; u < V; u++) {
            const int i = (int)threadIdx.x + u * ROW_THREADS;
            if (i < vectors) {
                // As words: the compiler would read element by element.
                const uint4 words = reinterpret_cast<const uint4*>(row)[i];
                const Vec<T> v = *reinterpret_cast<const Vec<T>*>(&words);
#pragma unroll
                for (int j = 0; j < N; j++) x[u][j] = to_f32(v.v[j]);
            }
            if (i * N + N > vocab) {
#pragma unroll
                for (int j = 0; j < N; j++)
                    if (i * N + j >= vocab) x[u][j] = -INFINITY;
            }
#pragma unroll
            for (int j = 0; j < N; j++) most = fmaxf(most, x[u][j]);
        }
        return most;
    }
    // Logits become exp(logit - base); their sum.
    __device__ __forceinline__ float exponentials(float base) {
        float sum = 0.f;
#pragma unroll
        for (int u = 0; u < V; u++)
#pragma unroll
            for (int j = 0; j < N; j++) sum += x[u][j] = exp_fast(x[u][j] - base);
        return sum;
    }
    __device__ __forceinline__ void store(T* out, int vectors, float, float factor) const {
#pragma unroll
        for (int u = 0; u < V; u++) {
            const int i = (int)threadIdx.x + u * ROW_THREADS;
            if (i >= vectors) continue;
            Vec<T> d;
#pragma unroll
            for (int j = 0; j < N; j++) d.v[j] = from_f32<T>(x[u][j] * factor);
            store_vec(out + i * N, d);
        }
    }
};

// The same for longer rows: they stay in shared memory, and exponentials are made twice.
template <typename T>
struct InShared {
    static constexpr int N = Vec<T>::N;
    static constexpr bool LEAVES_ROOM = false;
    const uint4* at;
    int count;

    template <typename F>
    __device__ __forceinline__ void for_each(F f) const {
#pragma unroll 2
        for (int i = threadIdx.x; i < count; i += ROW_THREADS) {
            const uint4 words = at[i];
            const Vec<T> v = *reinterpret_cast<const Vec<T>*>(&words);
            f(i, v);
        }
    }
    __device__ __forceinline__ float load(Vec<T>* row, int vectors, int vocab) {
        at = reinterpret_cast<const uint4*>(row);
        count = vectors;
        // Whoever has the last vector hides what is past the end.
        if ((vectors - 1) % ROW_THREADS == (int)threadIdx.x)
            for (int c = vocab; c < vectors * N; c++)
                row[vectors - 1].v[c % N] = from_f32<T>(-INFINITY);
        // What was written as T is read as words.
        asm volatile("" ::: "memory");
        float most = -INFINITY;
        for_each([&](int, const Vec<T>& v) {
#pragma unroll
            for (int j = 0; j < N; j++) most = fmaxf(most, to_f32(v.v[j]));
        });
        return most;
    }
    __device__ __forceinline__ float exponentials(float base) const {
        float sum = 0.f;
        for_each([&](int, const Vec<T>& v) {
#pragma unroll
            for (int j = 0; j < N; j++) sum += exp_fast(to_f32(v.v[j]) - base);
        });
        return sum;
    }
    __device__ __forceinline__ void store(T* out, int, float base, float factor) const {
        for_each([&](int i, Vec<T> v) {
#pragma unroll
            for (int j = 0; j < N; j++)
                v.v[j] = from_f32<T>(exp_fast(to_f32(v.v[j]) - base) * factor);
            store_vec(out + i * N, v);
        });
    }
};

// As `cross_entropy` in loss.cu, for logits without bias and cap. `Held` is how a thread has its
// vectors of a row; `slots` rows have room in shared memory.
template <typename T, typename Held>
__device__ __forceinline__ void cross_entropy_once(T* logits, long long rows, long long stride,
                                                   int vocab, const int* targets, float scale,
                                                   int gradient, int slots, float* losses) {
    constexpr int N = Vec<T>::N;
    extern __shared__ uint4 memory[];
    // Rows take turns, so that one barrier a row is enough.
    __shared__ Exponentials of_warps[2][ROW_THREADS / 32];
    Vec<T>* const room = reinterpret_cast<Vec<T>*>(memory);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int vectors = (vocab + N - 1) / N;
    const long long step = gridDim.x;

    // A group of copies also where there is no row, so that groups can be counted.
    auto fetch = [&](long long row, int slot) {
        if (row < rows) {
            const T* const from = logits + row * stride;
            Vec<T>* const to = room + slot * vectors;
#pragma unroll 4
            for (int i = threadIdx.x; i < vectors; i += ROW_THREADS)
                copy_vec_async(to + i, from + i * N);
        }
        end_of_copies();
    };
    for (int slot = 0; slot < slots; slot++) fetch(blockIdx.x + slot * step, slot);

    int slot = 0, turn = 0;
    int next_target = blockIdx.x < rows ? targets[blockIdx.x] : 0;
    for (long long row = blockIdx.x; row < rows; row += step) {
        const int target = next_target;
        if (row + step < rows) next_target = targets[row + step];
        T* const out = logits + row * stride;
        Vec<T>* const in = room + slot * vectors;
        if (slots == 2)
            await_copies<1>();
        else
            await_copies<0>();

        Held held;
        const float most = held.load(in, vectors, vocab);
        // Of the block's threads one has the target.
        const bool ignored = target < 0;
        const bool mine = !ignored && target / N % ROW_THREADS == (int)threadIdx.x;
        float at_target = 0.f;
        if (mine) at_target = to_f32(reinterpret_cast<const T*>(in)[target]);
        if (Held::LEAVES_ROOM) fetch(row + slots * step, slot);

        if (ignored) {
            if (threadIdx.x == 0) losses[row] = 0.f;
            if (gradient) {
                Vec<T> zero;
#pragma unroll
                for (int j = 0; j < N; j++) zero.v[j] = from_f32<T>(0.f);
#pragma unroll 1
                for (int i = threadIdx.x; i < vectors; i += ROW_THREADS)
                    store_vec(out + i * N, zero);
            }
        } else {
            // Relative to the thread's own maximum: the block's is not known yet. Where all is
            // -inf the sum is 0, and NaN where one is NaN.
            const float base = most == -INFINITY ? 0.f : most;
            const float sum = held.exponentials(base);
            const Exponentials of_warp = Exponentials{most, sum}.over_warp();
            if (lane == 0) of_warps[turn][warp] = of_warp;
            __syncthreads();
            const Exponentials all = of_warps[turn][lane].over_warp();
            turn ^= 1;
            const float lse = all.max + __logf(all.sum);
            if (mine) losses[row] = lse - at_target;
            if (gradient) {
                const float share = sum == 0.f ? 0.f : exp_fast(most - all.max) / all.sum;
                held.store(out, vectors, base, scale * share);
                // The same thread wrote the target's vector just now.
                if (mine) out[target] = from_f32<T>(scale * (exp_fast(at_target - lse) - 1.f));
            }
        }
        if (!Held::LEAVES_ROOM) fetch(row + slots * step, slot);
        slot = slot + 1 == slots ? 0 : slot + 1;
    }
}
