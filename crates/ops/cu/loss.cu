// Cross-entropy, distillation and scores over rows of logits, one block a row.
//
// A row is read twice: for its sum of exponentials, then for its gradient, which takes its place;
// the second time it comes out of the cache. Rows that fit into a block's registers are read once
// (cross_entropy.cuh). Rows lie `stride` elements apart, a multiple of the vector, so that vectors
// never cross rows; elements past `vocab` are not looked at, and their gradient is 0.
#include "cross_entropy.cuh"

// A running maximum and the sum of exp(x - maximum).
struct Softmax {
    float max = -INFINITY;
    float sum = 0.f;

    __device__ __forceinline__ void add(float x) {
        if (x > max) {
            sum = sum * __expf(max - x) + 1.f;
            max = x;
        } else if (x != -INFINITY) {
            // Also for NaN, which must stay visible.
            sum += __expf(x - max);
        }
    }
};

// The log-sum-exp of the block's running sums, in every thread.
__device__ __forceinline__ float log_sum_exp(const Softmax& own, float* scratch) {
    const float max = block_max(own.max, scratch);
    // A thread that saw nothing has -inf; exp(-inf - max) is 0, but not where all is -inf.
    const float part = own.sum == 0.f ? 0.f : own.sum * __expf(own.max - max);
    return max + __logf(block_sum(part, scratch));
}

// What is done to a product before it is a logit: + bias, then the soft cap.
template <typename T>
struct Adjust {
    const T* bias;
    float cap;

    __device__ __forceinline__ float operator()(float x, int column) const {
        if (bias) x += to_f32(bias[column]);
        return cap > 0.f ? cap * tanhf(x / cap) : x;
    }
    // The derivative, from the adjusted logit.
    __device__ __forceinline__ float slope(float logit) const {
        if (cap <= 0.f) return 1.f;
        const float t = logit / cap;
        return 1.f - t * t;
    }
};

// losses[row] = -log p(target); with `gradient`, the row becomes scale * (p - onehot). A target of
// -100 has no loss and no gradient.
template <typename T>
__device__ void cross_entropy(T* logits, long long stride, int vocab, const T* bias, float cap,
                              const int* targets, float scale, int gradient, float* losses) {
    __shared__ float scratch[32];
    constexpr int N = Vec<T>::N;
    T* row = logits + (long long)blockIdx.x * stride;
    const int target = targets[blockIdx.x];
    const int vectors = (vocab + N - 1) / N;
    if (target < 0) {
        if (threadIdx.x == 0) losses[blockIdx.x] = 0.f;
        if (gradient) {
            Vec<T> zero;
#pragma unroll
            for (int j = 0; j < N; ++j) zero.v[j] = from_f32<T>(0.f);
            for (int i = threadIdx.x; i < vectors; i += blockDim.x) store_vec(row + i * N, zero);
        }
        return;
    }
    const Adjust<T> adjust{bias, cap};
    Softmax own;
    for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
        const Vec<T> v = load_vec(row + i * N);
        // One rescaling for the vector.
        float x[N], most = -INFINITY;
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const int c = i * N + j;
            x[j] = c < vocab ? adjust(to_f32(v.v[j]), c) : -INFINITY;
            most = fmaxf(most, x[j]);
        }
        if (most > own.max) {
            own.sum *= __expf(own.max - most);
            own.max = most;
        }
        if (own.max == -INFINITY) continue;
#pragma unroll
        for (int j = 0; j < N; ++j) own.sum += __expf(x[j] - own.max);
    }
    const float lse = log_sum_exp(own, scratch);
    if (threadIdx.x == 0) losses[blockIdx.x] = lse - adjust(to_f32(row[target]), target);
    if (!gradient) return;
    // The target's logit must have been read before it is written over.
    __syncthreads();
    for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
        Vec<T> v = load_vec(row + i * N);
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const int c = i * N + j;
            float d = 0.f;
            if (c < vocab) {
                const float x = adjust(to_f32(v.v[j]), c);
                d = scale * (__expf(x - lse) - (c == target ? 1.f : 0.f)) * adjust.slope(x);
            }
            v.v[j] = from_f32<T>(d);
        }
        store_vec(row + i * N, v);
    }
}

// The same with a teacher: losses[row] and kls[row] = KL(teacher || student) at the temperature;
// the gradient is that of (1-w) CE + w T^2 KL.
template <typename T>
__device__ void distil(T* logits, long long stride, int vocab, const T* bias, float cap,
                       const T* taught, const T* taught_bias, float taught_cap, const int* targets,
                       float scale, int gradient, float temperature, float weight, float* losses,
                       float* kls) {
    __shared__ float scratch[32];
    T* row = logits + (long long)blockIdx.x * stride;
    const T* teacher = taught + (long long)blockIdx.x * stride;
    const int target = targets[blockIdx.x];
    if (target < 0) {
        if (threadIdx.x == 0) losses[blockIdx.x] = kls[blockIdx.x] = 0.f;
        if (gradient) {
            for (int c = threadIdx.x; c < stride; c += blockDim.x) row[c] = from_f32<T>(0.f);
        }
        return;
    }
    const Adjust<T> adjust{bias, cap}, adjust_taught{taught_bias, taught_cap};
    const float cool = 1.f / temperature;
    Softmax plain, cooled, of_teacher;
    for (int c = threadIdx.x; c < vocab; c += blockDim.x) {
        const float x = adjust(to_f32(row[c]), c);
        plain.add(x);
        cooled.add(x * cool);
        of_teacher.add(adjust_taught(to_f32(teacher[c]), c) * cool);
    }
    const float lse = log_sum_exp(plain, scratch);
    const float lse_cooled = log_sum_exp(cooled, scratch);
    const float lse_teacher = log_sum_exp(of_teacher, scratch);
    float kl = 0.f;
    for (int c = threadIdx.x; c < vocab; c += blockDim.x) {
        const float log_q = adjust(to_f32(row[c]), c) * cool - lse_cooled;
        const float log_p = adjust_taught(to_f32(teacher[c]), c) * cool - lse_teacher;
        const float p = __expf(log_p);
        if (p > 0.f || p != p) kl += p * (log_p - log_q);
    }
    kl = block_sum(kl, scratch);
    if (threadIdx.x == 0) {
        losses[blockIdx.x] = lse - adjust(to_f32(row[target]), target);
        kls[blockIdx.x] = kl;
    }
    if (!gradient) return;
    __syncthreads();
    for (int c = threadIdx.x; c < stride; c += blockDim.x) {
        float d = 0.f;
        if (c < vocab) {
            const float x = adjust(to_f32(row[c]), c);
            const float q = __expf(x * cool - lse_cooled);
            const float p = __expf(adjust_taught(to_f32(teacher[c]), c) * cool - lse_teacher);
            const float hard = __expf(x - lse) - (c == target ? 1.f : 0.f);
            d = scale * ((1.f - weight) * hard + weight * temperature * (q - p)) * adjust.slope(x);
        }
        row[c] = from_f32<T>(d);
    }
}

// Of a row of f32 products: its log-sum-exp and the first of its largest logits, -1 if one is NaN.
template <typename T>
__device__ void summarise(const float* logits, long long stride, int vocab, const T* bias,
                          float cap, float* lses, int* largest) {
    __shared__ float scratch[32];
    __shared__ int first[32];
    const float* row = logits + (long long)blockIdx.x * stride;
    const Adjust<T> adjust{bias, cap};
    Softmax own;
    int at = vocab;
    float most = -INFINITY;
    bool nan = false;
    for (int c = threadIdx.x; c < vocab; c += blockDim.x) {
        const float x = adjust(row[c], c);
        own.add(x);
        nan |= x != x;
        if (x > most || at == vocab) {
            most = x;
            at = c;
        }
    }
    const float lse = log_sum_exp(own, scratch);
    const float max = block_max(nan ? -INFINITY : most, scratch);
    const bool any_nan = __syncthreads_or(nan);
    int best = most == max ? at : vocab;
#pragma unroll
    for (int d = 16; d > 0; d >>= 1) best = min(best, __shfl_xor_sync(0xffffffffu, best, d));
    if ((threadIdx.x & 31) == 0) first[threadIdx.x >> 5] = best;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int w = 1; w < (int)(blockDim.x >> 5); ++w) best = min(best, first[w]);
        lses[blockIdx.x] = any_nan ? NAN : lse;
        largest[blockIdx.x] = any_nan ? -1 : best;
    }
}

// picked[i] = the logit of (row, token) i.
template <typename T>
__device__ void pick(const float* logits, long long stride, const T* bias, float cap,
                     const int* rows, const int* tokens, int count, float* picked) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    picked[i] = Adjust<T>{bias, cap}(logits[rows[i] * stride + tokens[i]], tokens[i]);
}

// logits[i] = adjusted, in place.
template <typename T>
__device__ void adjust_all(float* logits, long long n, int vocab, const T* bias, float cap) {
    const Adjust<T> adjust{bias, cap};
    const long long total = n * vocab;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < total;
         i += (long long)gridDim.x * blockDim.x) {
        logits[i] = adjust(logits[i], (int)(i % vocab));
    }
}

// sums[b] = the sum of the n losses from b * n on, in a fixed order; a block each.
extern "C" __global__ void __launch_bounds__(1024)
    sum_losses(const float* losses, long long n, double* sums) {
    __shared__ double scratch[32];
    double sum = 0.;
    for (long long i = threadIdx.x; i < n; i += 1024) sum += losses[blockIdx.x * n + i];
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// Rows of 4096 vectors at most in registers, as 32 numbers a thread; of f32 those of 8192.
#define ONCE(NAME, T, ...)                                                                         \
    extern "C" __global__ void __launch_bounds__(ROW_THREADS, 1)                                   \
        NAME(T* logits, long long rows, long long stride, int vocab, const int* targets,           \
             float scale, int gradient, int slots, float* losses) {                                \
        cross_entropy_once<T, __VA_ARGS__>(logits, rows, stride, vocab, targets, scale, gradient,  \
                                           slots, losses);                                         \
    }
ONCE(cross_entropy_once_f32, float, InRegisters<float, 8>)
ONCE(cross_entropy_once_bf16, bf16, InRegisters<bf16, 4>)
ONCE(cross_entropy_long_f32, float, InShared<float>)
ONCE(cross_entropy_long_bf16, bf16, InShared<bf16>)

#define ENTRIES(T, SUFFIX)                                                                         \
    extern "C" __global__ void __launch_bounds__(1024) cross_entropy_##SUFFIX(                     \
        T* logits, long long stride, int vocab, const T* bias, float cap, const int* targets,      \
        float scale, int gradient, float* losses) {                                                \
        cross_entropy<T>(logits, stride, vocab, bias, cap, targets, scale, gradient, losses);      \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(1024) distil_##SUFFIX(                            \
        T* logits, long long stride, int vocab, const T* bias, float cap, const T* taught,         \
        const T* taught_bias, float taught_cap, const int* targets, float scale, int gradient,     \
        float temperature, float weight, float* losses, float* kls) {                              \
        distil<T>(logits, stride, vocab, bias, cap, taught, taught_bias, taught_cap, targets,      \
                  scale, gradient, temperature, weight, losses, kls);                              \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(1024) summarise_##SUFFIX(                         \
        const float* logits, long long stride, int vocab, const T* bias, float cap, float* lses,   \
        int* largest) {                                                                            \
        summarise<T>(logits, stride, vocab, bias, cap, lses, largest);                             \
    }                                                                                              \
    extern "C" __global__ void pick_##SUFFIX(const float* logits, long long stride, const T* bias, \
                                             float cap, const int* rows, const int* tokens,        \
                                             int count, float* picked) {                           \
        pick<T>(logits, stride, bias, cap, rows, tokens, count, picked);                           \
    }                                                                                              \
    extern "C" __global__ void adjust_all_##SUFFIX(float* logits, long long n, int vocab,          \
                                                   const T* bias, float cap) {                     \
        adjust_all<T>(logits, n, vocab, bias, cap);                                                \
    }

ENTRIES(float, f32)
ENTRIES(bf16, bf16)
