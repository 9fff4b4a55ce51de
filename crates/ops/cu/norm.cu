// LayerNorm and RMSNorm over rows or heads, with a curve on the output: y = post(xhat g + b).
//
// A row stays in the registers of the threads that share it, `lanes` of them (a power of 2, not
// always a whole warp), each with up to V vectors; so memory is read once. Rows that cannot be cut
// into vectors, or are too wide, take the kernels called `loop`.
//
// Row r begins at (r / heads) * stride + (r % heads) * width: whole rows (heads = 1, stride =
// width) or the heads in some columns of a matrix. Formulas as in src/norm.rs; what forward,
// `again` and backward have in common is rounded alike, so they see the same signs.
#include "curve.cuh"

struct Rows {
    unsigned count, heads;
    long long stride;
    int width;
    __device__ __forceinline__ long long at(unsigned row) const {
        if (heads == 1) return row * stride;
        return row / heads * stride + (long long)(row % heads) * width;
    }
};

// The weight (the gain less `offset`) and the bias; no bias is a null pointer.
template <typename T>
struct Affine {
    const T* weight;
    const T* bias;
    float offset;
};

template <typename C>
__device__ __forceinline__ C curve(int kind, float p) {
    return C{p};
}
template <>
__device__ __forceinline__ AnyCurve curve<AnyCurve>(int kind, float p) {
    return AnyCurve{kind, p};
}

__device__ __forceinline__ float normalised(float x, float mean, float r) {
    return __fmul_rn(__fsub_rn(x, mean), r);
}

// Hides from the compiler that it knows the elements as floats already: it would keep those in
// registers, twice as many, to save a shift later.
template <typename T, int V>
__device__ __forceinline__ void keep_packed(Vec<T> (&v)[V]) {
#pragma unroll
    for (int k = 0; k < V; ++k) {
        uint4& bits = reinterpret_cast<uint4&>(v[k]);
        asm volatile("" : "+r"(bits.x), "+r"(bits.y), "+r"(bits.z), "+r"(bits.w)::"memory");
    }
}

// Two sums over the threads of a row, for every one of them. Rows of several warps meet at a
// barrier of their own. The places of two calls alternate: who is late to read the first sums
// holds up the barrier of the second.
struct RowSums {
    float2* slots;
    int lanes, barrier, turn;

    __device__ __forceinline__ RowSums(float2* all, int lanes)
        : slots(all + threadIdx.x / lanes * (lanes / 32) * 2),
          lanes(lanes),
          barrier(threadIdx.x / lanes + 1),
          turn(0) {}

    __device__ __forceinline__ float2 operator()(float a, float b) {
        for (int d = min(lanes, 32) >> 1; d > 0; d >>= 1) {
            a += __shfl_xor_sync(0xffffffffu, a, d);
            b += __shfl_xor_sync(0xffffffffu, b, d);
        }
        if (lanes > 32) {
            const int warps = lanes >> 5;
            float2* here = slots + turn * warps;
            turn ^= 1;
            if ((threadIdx.x & 31) == 0) here[(threadIdx.x & (lanes - 1)) >> 5] = make_float2(a, b);
            asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(lanes) : "memory");
            a = b = 0.f;
            for (int i = 0; i < warps; ++i) {
                a += here[i].x;
                b += here[i].y;
            }
        }
        return make_float2(a, b);
    }
};

// A block has at most 16 warps, each with a place for either of two calls.
constexpr int SLOTS = 2 * 16;

// `known` takes the statistics from `means` and `rstds` instead of writing them there. `kept`
// receives a copy of x, one row after the other; y may be x.
template <typename T, typename C, int V>
__device__ __forceinline__ void forward(C post, const T* x, T* y, T* kept, Affine<T> affine,
                                        float eps, bool centred, float* means, float* rstds,
                                        bool known, Rows rows, int lanes) {
    constexpr int N = Vec<T>::N;
    __shared__ float2 slots[SLOTS];
    RowSums sums(slots, lanes);
    const int lane = threadIdx.x & (lanes - 1), vectors = rows.width / N;
    const unsigned row = blockIdx.x * (blockDim.x / lanes) + threadIdx.x / lanes;
    // Threads without a row or a vector take part in the sums with zeros.
    const int mine = row < rows.count ? vectors : 0;
    const long long at = rows.at(row);

    Vec<T> v[V];
#pragma unroll
    for (int k = 0; k < V; ++k) {
        const int i = lane + k * lanes;
        if (i < mine) v[k] = load_vec(x + at + i * N);
    }
    if (kept) {
        kept += (long long)row * rows.width;
#pragma unroll
        for (int k = 0; k < V; ++k) {
            const int i = lane + k * lanes;
            if (i < mine) store_vec(kept + i * N, v[k]);
        }
    }
    float mean = 0.f, r = 0.f;
    if (known) {
        if (mine) {
            mean = centred ? means[row] : 0.f;
            r = rstds[row];
        }
    } else {
        if (centred) {
            float sum = 0.f;
#pragma unroll
            for (int k = 0; k < V; ++k) {
                if (lane + k * lanes >= mine) continue;
#pragma unroll
                for (int j = 0; j < N; ++j) sum += to_f32(v[k].v[j]);
            }
            mean = sums(sum, 0.f).x / rows.width;
            keep_packed(v);
        }
        float squares = 0.f;
#pragma unroll
        for (int k = 0; k < V; ++k) {
            if (lane + k * lanes >= mine) continue;
#pragma unroll
            for (int j = 0; j < N; ++j) {
                const float d = to_f32(v[k].v[j]) - mean;
                squares = fmaf(d, d, squares);
            }
        }
        r = 1.f / sqrtf(sums(squares, 0.f).x / rows.width + eps);
        if (mine && lane == 0) {
            if (centred) means[row] = mean;
            rstds[row] = r;
        }
        keep_packed(v);
    }
#pragma unroll
    for (int k = 0; k < V; ++k) {
        const int i = lane + k * lanes;
        if (i >= mine) continue;
        const Vec<T> w = load_vec(affine.weight + i * N);
        Vec<T> b, out;
        if (affine.bias) b = load_vec(affine.bias + i * N);
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const float g = to_f32(w.v[j]) + affine.offset;
            const float shift = affine.bias ? to_f32(b.v[j]) : 0.f;
            const float xhat = normalised(to_f32(v[k].v[j]), mean, r);
            out.v[j] = from_f32<T>(post.value(__fmaf_rn(xhat, g, shift)));
        }
        store_vec(y + at + i * N, out);
    }
}

// x lies one row after the other; dy and dx as `rows` says, and dx may be dy. `partial` receives
// [1 + BIAS][blocks][width] sums: each block takes the same rows each time, and adds in a fixed
// order. Shared memory: [1 + BIAS][width] floats where a block has several rows at a time.
template <typename T, typename C, int V, bool BIAS>
__device__ __forceinline__ void backward(C post, const T* x, const T* dy, T* dx, bool add,
                                         Affine<T> affine, bool centred, const float* means,
                                         const float* rstds, float* partial, Rows rows,
                                         int lanes) {
    constexpr int N = Vec<T>::N;
    __shared__ float2 slots[SLOTS];
    extern __shared__ float4 shared[];
    RowSums sums(slots, lanes);
    const int lane = threadIdx.x & (lanes - 1), vectors = rows.width / N;
    const unsigned groups = blockDim.x / lanes, group = threadIdx.x / lanes;
    float dgain[V][N] = {}, dshift[BIAS ? V : 1][N] = {};

    // The trips are the same for all threads: sums need whole warps.
    for (unsigned base = blockIdx.x * groups; base < rows.count; base += gridDim.x * groups) {
        const unsigned row = base + group;
        const int mine = row < rows.count ? vectors : 0;
        const long long at = rows.at(row);
        const T* x_row = x + (long long)row * rows.width;
        Vec<T> xs[V], dys[V], olds[V];
#pragma unroll
        for (int k = 0; k < V; ++k) {
            const int i = lane + k * lanes;
            if (i >= mine) continue;
            xs[k] = load_vec(x_row + i * N);
            dys[k] = load_vec(dy + at + i * N);
            // Not needed yet, but under way.
            if (add) olds[k] = load_vec(dx + at + i * N);
        }
        const float mean = mine && centred ? means[row] : 0.f;
        const float r = mine ? rstds[row] : 0.f;
        float along = 0.f, level = 0.f;
#pragma unroll
        for (int k = 0; k < V; ++k) {
            const int i = lane + k * lanes;
            if (i >= mine) continue;
            const Vec<T> w = load_vec(affine.weight + i * N);
            Vec<T> b;
            if (BIAS) b = load_vec(affine.bias + i * N);
#pragma unroll
            for (int j = 0; j < N; ++j) {
                const float g = to_f32(w.v[j]) + affine.offset;
                const float shift = BIAS ? to_f32(b.v[j]) : 0.f;
                const float xhat = normalised(to_f32(xs[k].v[j]), mean, r);
                float y;
                const float dz = post.pull(__fmaf_rn(xhat, g, shift), to_f32(dys[k].v[j]), y);
                dgain[k][j] = fmaf(dz, xhat, dgain[k][j]);
                if (BIAS) dshift[k][j] += dz;
                along = fmaf(dz * g, xhat, along);
                level = fmaf(dz, g, level);
            }
        }
        const float2 both = sums(along, level);
        along = both.x / rows.width;
        level = centred ? both.y / rows.width : 0.f;
        // Computed again: registers are dearer.
        keep_packed(xs);
        keep_packed(dys);
#pragma unroll
        for (int k = 0; k < V; ++k) {
            const int i = lane + k * lanes;
            if (i >= mine) continue;
            const Vec<T> w = load_vec(affine.weight + i * N);
            Vec<T> b, out;
            if (BIAS) b = load_vec(affine.bias + i * N);
#pragma unroll
            for (int j = 0; j < N; ++j) {
                const float g = to_f32(w.v[j]) + affine.offset;
                const float shift = BIAS ? to_f32(b.v[j]) : 0.f;
                const float xhat = normalised(to_f32(xs[k].v[j]), mean, r);
                float y;
                const float dz = post.pull(__fmaf_rn(xhat, g, shift), to_f32(dys[k].v[j]), y);
                const float c = fmaf(-xhat, along, fmaf(dz, g, -level));
                out.v[j] = from_f32<T>(add ? fmaf(r, c, to_f32(olds[k].v[j])) : r * c);
            }
            store_vec(dx + at + i * N, out);
        }
    }

    // Rows that share a warp first, then one warp, or row, after the other.
    for (int d = lanes; d < 32; d <<= 1) {
#pragma unroll
        for (int k = 0; k < V; ++k) {
#pragma unroll
            for (int j = 0; j < N; ++j) {
                dgain[k][j] += __shfl_xor_sync(0xffffffffu, dgain[k][j], d);
                if (BIAS) dshift[k][j] += __shfl_xor_sync(0xffffffffu, dshift[k][j], d);
            }
        }
    }
    const int apart = max(lanes, 32), turns = blockDim.x / apart, turn = threadIdx.x / apart;
    const bool writes = (threadIdx.x & (apart - 1)) < lanes;
    float* kept = reinterpret_cast<float*>(shared);
    float* out = partial + (long long)blockIdx.x * rows.width;
    const long long set = (long long)gridDim.x * rows.width;
    for (int now = 0; now < turns; ++now) {
        if (turn == now && writes) {
            const bool first = now == 0, last = now == turns - 1;
#pragma unroll
            for (int k = 0; k < V; ++k) {
                const int i = lane + k * lanes;
                if (i >= vectors) continue;
#pragma unroll
                for (int j = 0; j < N; j += 4) {
#pragma unroll
                    for (int s = 0; s < 1 + BIAS; ++s) {
                        const float* own = s == 0 ? &dgain[k][j] : &dshift[BIAS ? k : 0][j];
                        const int column = i * N + j;
                        float4* here = reinterpret_cast<float4*>(kept + s * rows.width + column);
                        float4 sum = first ? make_float4(0.f, 0.f, 0.f, 0.f) : *here;
                        sum.x += own[0], sum.y += own[1], sum.z += own[2], sum.w += own[3];
                        if (last) here = reinterpret_cast<float4*>(out + s * set + column);
                        *here = sum;
                    }
                }
            }
        }
        __syncthreads();
    }
}

// Any width, a block to a row.
template <typename T>
__device__ __forceinline__ void forward_loop(AnyCurve post, const T* x, T* y, T* kept,
                                             Affine<T> affine, float eps, bool centred,
                                             float* means, float* rstds, bool known, Rows rows) {
    __shared__ float scratch[32];
    const unsigned row = blockIdx.x;
    const long long at = rows.at(row);
    x += at;
    y += at;
    float mean = 0.f, r;
    if (kept) {
        kept += (long long)row * rows.width;
        for (int i = threadIdx.x; i < rows.width; i += blockDim.x) kept[i] = x[i];
    }
    if (known) {
        if (centred) mean = means[row];
        r = rstds[row];
    } else {
        if (centred) {
            float sum = 0.f;
            for (int i = threadIdx.x; i < rows.width; i += blockDim.x) sum += to_f32(x[i]);
            mean = block_sum(sum, scratch) / rows.width;
        }
        float squares = 0.f;
        for (int i = threadIdx.x; i < rows.width; i += blockDim.x) {
            const float d = to_f32(x[i]) - mean;
            squares = fmaf(d, d, squares);
        }
        r = 1.f / sqrtf(block_sum(squares, scratch) / rows.width + eps);
        if (threadIdx.x == 0) {
            if (centred) means[row] = mean;
            rstds[row] = r;
        }
    }
    for (int i = threadIdx.x; i < rows.width; i += blockDim.x) {
        const float g = to_f32(affine.weight[i]) + affine.offset;
        const float shift = affine.bias ? to_f32(affine.bias[i]) : 0.f;
        const float xhat = normalised(to_f32(x[i]), mean, r);
        y[i] = from_f32<T>(post.value(__fmaf_rn(xhat, g, shift)));
    }
}

// The gradients of one element: dz, with xhat and g.
template <typename T>
__device__ __forceinline__ float pulled(AnyCurve post, float x, float dy, float mean, float r,
                                        Affine<T> affine, int column, float& xhat, float& g) {
    g = to_f32(affine.weight[column]) + affine.offset;
    xhat = normalised(x, mean, r);
    float y;
    const float shift = affine.bias ? to_f32(affine.bias[column]) : 0.f;
    return post.pull(__fmaf_rn(xhat, g, shift), dy, y);
}

template <typename T>
__device__ __forceinline__ void backward_loop(AnyCurve post, const T* x, const T* dy, T* dx,
                                              bool add, Affine<T> affine, bool centred,
                                              const float* means, const float* rstds, Rows rows) {
    __shared__ float scratch[32];
    const unsigned row = blockIdx.x;
    const long long at = rows.at(row);
    x += (long long)row * rows.width;
    dy += at;
    dx += at;
    const float mean = centred ? means[row] : 0.f, r = rstds[row];
    float along = 0.f, level = 0.f, xhat, g;
    for (int i = threadIdx.x; i < rows.width; i += blockDim.x) {
        const float dz = pulled(post, to_f32(x[i]), to_f32(dy[i]), mean, r, affine, i, xhat, g);
        along = fmaf(dz * g, xhat, along);
        level = fmaf(dz, g, level);
    }
    along = block_sum(along, scratch) / rows.width;
    level = block_sum(level, scratch) / rows.width;
    if (!centred) level = 0.f;
    for (int i = threadIdx.x; i < rows.width; i += blockDim.x) {
        const float dz = pulled(post, to_f32(x[i]), to_f32(dy[i]), mean, r, affine, i, xhat, g);
        const float c = fmaf(-xhat, along, fmaf(dz, g, -level));
        dx[i] = from_f32<T>(add ? fmaf(r, c, to_f32(dx[i])) : r * c);
    }
}

// The parameters' partial sums for `backward_loop`, and before it: it may write over dy. A block
// has 32 columns of `share` rows, in 8 strands; `partial` as in `backward`, with both sets.
template <typename T>
__device__ __forceinline__ void backward_loop_params(AnyCurve post, const T* x, const T* dy,
                                                     Affine<T> affine, bool centred,
                                                     const float* means, const float* rstds,
                                                     float* partial, unsigned share, Rows rows) {
    __shared__ float2 strands[8][32];
    const int lane = threadIdx.x & 31, strand = threadIdx.x >> 5;
    const int column = blockIdx.x * 32 + lane;
    const unsigned from = blockIdx.y * share, to = min(rows.count, from + share);
    float dgain = 0.f, dshift = 0.f, xhat, g;
    if (column < rows.width) {
        for (unsigned row = from + strand; row < to; row += 8) {
            const float mean = centred ? means[row] : 0.f, r = rstds[row];
            const float v = to_f32(x[(long long)row * rows.width + column]);
            const float d = to_f32(dy[rows.at(row) + column]);
            const float dz = pulled(post, v, d, mean, r, affine, column, xhat, g);
            dgain = fmaf(dz, xhat, dgain);
            dshift += dz;
        }
    }
    strands[strand][lane] = make_float2(dgain, dshift);
    __syncthreads();
    if (strand == 0 && column < rows.width) {
        for (int i = 1; i < 8; ++i) {
            dgain += strands[i][lane].x;
            dshift += strands[i][lane].y;
        }
        float* out = partial + (long long)blockIdx.y * rows.width + column;
        out[0] = dgain;
        out[(long long)gridDim.y * rows.width] = dshift;
    }
}

__device__ __forceinline__ void deposit(void* out, int how, int at, float sum) {
    constexpr int BF16 = 1, ADD = 2;
    if (how & BF16) {
        bf16* to = reinterpret_cast<bf16*>(out) + at;
        *to = from_f32<bf16>(how & ADD ? to_f32(*to) + sum : sum);
    } else {
        float* to = reinterpret_cast<float*>(out) + at;
        *to = how & ADD ? *to + sum : sum;
    }
}

// Adds up `partial` [2][blocks][width] into a weight's and a bias's gradient, either of which may
// be null. A block of 32 x 32 threads has 32 columns; blockIdx.y chooses the gradient. The bits of
// `how` are 1 for bf16 and 2 for adding to what is there.
extern "C" __global__ void __launch_bounds__(1024)
norm_add_partials(const float* partial, int blocks, int width, void* dweight, int weight_how,
                  void* dbias, int bias_how) {
    __shared__ float strands[32][33];
    const int lane = threadIdx.x & 31, strand = threadIdx.x >> 5;
    void* out = blockIdx.y == 0 ? dweight : dbias;
    if (!out) return;
    partial += (long long)blockIdx.y * blocks * width;
    const int column = blockIdx.x * 32 + lane;
    float sum = 0.f;
    if (column < width) {
#pragma unroll 4
        for (int i = strand; i < blocks; i += 32) sum += partial[(long long)i * width + column];
    }
    strands[strand][lane] = sum;
    __syncthreads();
    sum = warp_sum(strands[lane][strand]);
    const int mine = blockIdx.x * 32 + strand;
    if (lane == 0 && mine < width) {
        deposit(out, blockIdx.y == 0 ? weight_how : bias_how, mine, sum);
    }
}

#define FORWARD(NAME, C, V, ELEM, T)                                                            \
    extern "C" __global__ void __launch_bounds__(512, 1) norm_forward_##NAME##_##V##_##ELEM(       \
        int kind, float p, const T* x, T* y, T* kept, const T* weight, const T* bias,           \
        float offset, float eps, int centred, float* means, float* rstds, int known,            \
        unsigned count, unsigned heads, long long stride, int width, int lanes) {               \
        forward<T, C, V>(curve<C>(kind, p), x, y, kept, Affine<T>{weight, bias, offset}, eps,   \
                         centred, means, rstds, known, Rows{count, heads, stride, width},       \
                         lanes);                                                                \
    }

// At most 64 registers where that is enough, for more warps.
#define BACKWARD(NAME, C, V, SETS, ELEM, T)                                                     \
    extern "C" __global__ void __launch_bounds__(512, V == 1 ? 2 : 1)                           \
        norm_backward_##NAME##_##V##_##SETS##_##ELEM(                                           \
            int kind, float p, const T* x, const T* dy, T* dx, int add, const T* weight,        \
            const T* bias, float offset, int centred, const float* means, const float* rstds,   \
            float* partial, unsigned count, unsigned heads, long long stride, int width,        \
            int lanes) {                                                                        \
        backward<T, C, V, SETS == 2>(curve<C>(kind, p), x, dy, dx, add,                         \
                                     Affine<T>{weight, bias, offset}, centred, means, rstds,    \
                                     partial, Rows{count, heads, stride, width}, lanes);        \
    }

#define LOOPS(ELEM, T)                                                                          \
    extern "C" __global__ void norm_forward_loop_##ELEM(                                        \
        int kind, float p, const T* x, T* y, T* kept, const T* weight, const T* bias,           \
        float offset, float eps, int centred, float* means, float* rstds, int known,            \
        unsigned count, unsigned heads, long long stride, int width) {                          \
        forward_loop<T>(AnyCurve{kind, p}, x, y, kept, Affine<T>{weight, bias, offset}, eps,    \
                        centred, means, rstds, known, Rows{count, heads, stride, width});       \
    }                                                                                           \
    extern "C" __global__ void norm_backward_loop_##ELEM(                                       \
        int kind, float p, const T* x, const T* dy, T* dx, int add, const T* weight,            \
        const T* bias, float offset, int centred, const float* means, const float* rstds,       \
        unsigned count, unsigned heads, long long stride, int width) {                          \
        backward_loop<T>(AnyCurve{kind, p}, x, dy, dx, add, Affine<T>{weight, bias, offset},    \
                         centred, means, rstds, Rows{count, heads, stride, width});             \
    }                                                                                           \
    extern "C" __global__ void norm_backward_loop_params_##ELEM(                                \
        int kind, float p, const T* x, const T* dy, const T* weight, const T* bias,             \
        float offset, int centred, const float* means, const float* rstds, float* partial,      \
        unsigned share, unsigned count, unsigned heads, long long stride, int width) {          \
        backward_loop_params<T>(AnyCurve{kind, p}, x, dy, Affine<T>{weight, bias, offset},      \
                                centred, means, rstds, partial, share,                          \
                                Rows{count, heads, stride, width});                             \
    }

#define CHEAP(NAME, C, ELEM, T)    \
    FORWARD(NAME, C, 1, ELEM, T)   \
    FORWARD(NAME, C, 2, ELEM, T)   \
    FORWARD(NAME, C, 3, ELEM, T)   \
    FORWARD(NAME, C, 4, ELEM, T)   \
    FORWARD(NAME, C, 8, ELEM, T)   \
    BACKWARD(NAME, C, 1, 1, ELEM, T) \
    BACKWARD(NAME, C, 2, 1, ELEM, T) \
    BACKWARD(NAME, C, 3, 1, ELEM, T) \
    BACKWARD(NAME, C, 4, 1, ELEM, T) \
    BACKWARD(NAME, C, 1, 2, ELEM, T) \
    BACKWARD(NAME, C, 2, 2, ELEM, T) \
    BACKWARD(NAME, C, 3, 2, ELEM, T)

#define ALL(ELEM, T)                     \
    CHEAP(identity, Identity, ELEM, T)   \
    CHEAP(relu, Relu, ELEM, T)           \
    FORWARD(any, AnyCurve, 1, ELEM, T)   \
    FORWARD(any, AnyCurve, 2, ELEM, T)   \
    BACKWARD(any, AnyCurve, 1, 1, ELEM, T) \
    BACKWARD(any, AnyCurve, 2, 1, ELEM, T) \
    BACKWARD(any, AnyCurve, 1, 2, ELEM, T) \
    BACKWARD(any, AnyCurve, 2, 2, ELEM, T) \
    LOOPS(ELEM, T)

ALL(bf16, bf16)
ALL(f32, float)
