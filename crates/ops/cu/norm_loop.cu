// Norms of any width and address, a block to a row, which goes through memory again for each use.
#include "norm.cuh"

template <typename T>
__device__ __forceinline__ void forward(AnyCurve post, const T* x, T* y, T* kept,
                                        Affine<T> affine, float eps, bool centred, float* means,
                                        float* rstds, bool known, Rows rows) {
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
__device__ __forceinline__ void backward(AnyCurve post, const T* x, const T* dy, T* dx, bool add,
                                         Affine<T> affine, const float* means,
                                         const float* rstds, Rows rows) {
    __shared__ float scratch[32];
    const unsigned row = blockIdx.x;
    const long long at = rows.at(row);
    x += (long long)row * rows.width;
    dy += at;
    dx += at;
    const float mean = means ? means[row] : 0.f, r = rstds[row];
    float along = 0.f, level = 0.f, xhat, g;
    for (int i = threadIdx.x; i < rows.width; i += blockDim.x) {
        const float dz = pulled(post, to_f32(x[i]), to_f32(dy[i]), mean, r, affine, i, xhat, g);
        along = fmaf(dz * g, xhat, along);
        level = fmaf(dz, g, level);
    }
    along = block_sum(along, scratch) / rows.width;
    level = block_sum(level, scratch) / rows.width;
    if (!means) level = 0.f;
    for (int i = threadIdx.x; i < rows.width; i += blockDim.x) {
        const float dz = pulled(post, to_f32(x[i]), to_f32(dy[i]), mean, r, affine, i, xhat, g);
        const float c = fmaf(-xhat, along, fmaf(dz, g, -level));
        dx[i] = from_f32<T>(add ? fmaf(r, c, to_f32(dx[i])) : r * c);
    }
}

// The parameters' partial sums for `backward`, and before it: it may write over dy. A block
// has 32 columns of `share` rows, in 8 strands; `partial` receives [2][blocks][width] sums.
template <typename T>
__device__ __forceinline__ void params(AnyCurve post, const T* x, const T* dy, Affine<T> affine,
                                       const float* means, const float* rstds, float* partial,
                                       unsigned share, Rows rows) {
    __shared__ float2 strands[8][32];
    const int lane = threadIdx.x & 31, strand = threadIdx.x >> 5;
    const int column = blockIdx.x * 32 + lane;
    const unsigned from = blockIdx.y * share, to = min(rows.count, from + share);
    float dgain = 0.f, dshift = 0.f, xhat, g;
    if (column < rows.width) {
        for (unsigned row = from + strand; row < to; row += 8) {
            const float mean = means ? means[row] : 0.f, r = rstds[row];
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

#define ENTRIES(ELEM, T)                                                                        \
    extern "C" __global__ void forward_##ELEM(                                                  \
        int kind, float p, const T* x, T* y, T* kept, const T* weight, const T* bias,           \
        float offset, float eps, int centred, float* means, float* rstds, int known,            \
        unsigned count, unsigned heads, long long stride, int width) {                          \
        forward<T>(AnyCurve{kind, p}, x, y, kept, Affine<T>{weight, bias, offset}, eps,         \
                   centred, means, rstds, known, Rows{count, heads, stride, width});            \
    }                                                                                           \
    extern "C" __global__ void backward_##ELEM(                                                 \
        int kind, float p, const T* x, const T* dy, T* dx, int add, const T* weight,            \
        const T* bias, float offset, const float* means, const float* rstds, unsigned count,    \
        unsigned heads, long long stride, int width) {                                          \
        backward<T>(AnyCurve{kind, p}, x, dy, dx, add, Affine<T>{weight, bias, offset}, means,  \
                    rstds, Rows{count, heads, stride, width});                                  \
    }                                                                                           \
    extern "C" __global__ void params_##ELEM(                                                   \
        int kind, float p, const T* x, const T* dy, const T* weight, const T* bias,             \
        float offset, const float* means, const float* rstds, float* partial, unsigned share,   \
        unsigned count, unsigned heads, long long stride, int width) {                          \
        params<T>(AnyCurve{kind, p}, x, dy, Affine<T>{weight, bias, offset}, means, rstds,      \
                  partial, share, Rows{count, heads, stride, width});                           \
    }

ENTRIES(bf16, bf16)
ENTRIES(f32, float)
