// Attention in f32 arithmetic for any head size, bf16 or f32 in memory: what the tensor cores'
// kernels do not know. Also delta = rowsum(dO * O), and the gathering of keys, which both use.
//
// A warp owns R queries (keys): its lanes each take a key (query) of a tile for the scores, and
// then columns of the head for the sums.

#include "attention.cuh"

constexpr int WARPS = 8, TILE = 32;

// Queries of a warp. With wide heads, more would not fit in shared memory.
template <int RD>
constexpr int R = RD <= 8 ? 4 : 2;

// Rows of a head in shared memory, `ld` apart and 0 from column `d` and row `rows` on.
template <typename T, int RD, int ROWS>
__device__ __forceinline__ void load_rows(float* to, int ld, const T* from, long long stride,
                                          int rows, int d) {
    for (int at = threadIdx.x; at < ROWS * RD * 32; at += WARPS * 32) {
        const int row = at / (RD * 32), column = at % (RD * 32);
        to[row * ld + column] =
            row < rows && column < d ? to_f32(from[row * stride + column]) : 0.f;
    }
}

// The products of a lane's row of a tile with the R rows of its warp.
template <int COUNT>
__device__ __forceinline__ void dots(float (&sum)[COUNT], const float* lanes, const float* warps,
                                     int ld, int d) {
#pragma unroll
    for (int r = 0; r < COUNT; r++) sum[r] = 0.f;
#pragma unroll 4
    for (int c = 0; c < d; c++) {
        const float x = lanes[c];
#pragma unroll
        for (int r = 0; r < COUNT; r++) sum[r] += x * warps[r * ld + c];
    }
}

// acc[c] += p of lane j times row j of the tile, for its columns lane + 32 c.
template <int RD>
__device__ __forceinline__ void add_rows(float (&acc)[RD], float p, const float* tile, int ld) {
    const int lane = threadIdx.x % 32;
#pragma unroll 4
    for (int j = 0; j < TILE; j++) {
        const float x = __shfl_sync(0xffffffffu, p, j);
#pragma unroll
        for (int c = 0; c < RD; c++) acc[c] += x * tile[j * ld + c * 32 + lane];
    }
}

template <typename T, int RD>
__device__ __forceinline__ void forward(const T* q, const T* k, const T* v, T* out, float* lse,
                                        const int4* segments, const int2* items,
                                        long long q_stride, long long k_stride, long long v_stride,
                                        int n_q, int heads, int group, int d, SCORE_PARAMS) {
    constexpr int N = R<RD>, BM = WARPS * N, W = RD * 32;
    extern __shared__ __align__(128) unsigned char memory[];
    float* const queries = reinterpret_cast<float*>(memory);
    float* const keys = queries + BM * W;
    float* const values = keys + TILE * (W + 1);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int head = blockIdx.y, kv_head = head / group;
    const int2 item = items[blockIdx.x];
    const Segment segment = load_segment(segments, item.x);
    const Score score(head, SCORE_ARGS);
    const int first = item.y * BM, rows = min(BM, segment.q_len - first);
    const int position = segment.offset() + first;
    const long long row = segment.q_start + first;
    q += row * q_stride + static_cast<long long>(head) * d;
    k += segment.kv_start * k_stride + static_cast<long long>(kv_head) * d;
    v += segment.kv_start * v_stride + static_cast<long long>(kv_head) * d;
    load_rows<T, RD, BM>(queries, W, q, q_stride, rows, d);

    float acc[N][RD], top[N], total[N];
#pragma unroll
    for (int r = 0; r < N; r++) {
        top[r] = -INFINITY, total[r] = 0.f;
#pragma unroll
        for (int c = 0; c < RD; c++) acc[r][c] = 0.f;
    }
    const float* const mine = queries + warp * N * W;
    for (int key = max(0, position + 1 - window) / TILE * TILE; key < position + rows;
         key += TILE) {
        __syncthreads();
        const int there = segment.kv_len - key;
        load_rows<T, RD, TILE>(keys, W + 1, k + key * k_stride, k_stride, there, d);
        load_rows<T, RD, TILE>(values, W + 1, v + key * v_stride, v_stride, there, d);
        __syncthreads();
        float s[N];
        dots(s, keys + lane * (W + 1), mine, W, d);
#pragma unroll
        for (int r = 0; r < N; r++) {
            const int at = position + warp * N + r;
            float derivative;
            s[r] = sees(at, key + lane, window)
                       ? score.template of<true>(s[r], key + lane, at, derivative)
                       : -INFINITY;
            const float larger = fmaxf(top[r], warp_max(s[r]));
            // The row sees nothing yet.
            if (larger == -INFINITY) continue;
            const float correction = expf(top[r] - larger), p = expf(s[r] - larger);
            top[r] = larger;
            total[r] = total[r] * correction + warp_sum(p);
#pragma unroll
            for (int c = 0; c < RD; c++) acc[r][c] *= correction;
            add_rows<RD>(acc[r], p, values, W + 1);
        }
    }
#pragma unroll
    for (int r = 0; r < N; r++) {
        const int i = warp * N + r;
        if (i >= rows) continue;
        if (lane == 0) lse[static_cast<long long>(head) * n_q + row + i] = top[r] + logf(total[r]);
        T* const to = out + (row + i) * heads * d + static_cast<long long>(head) * d;
#pragma unroll
        for (int c = 0; c < RD; c++)
            if (c * 32 + lane < d) to[c * 32 + lane] = from_f32<T>(acc[r][c] / total[r]);
    }
}

template <typename T, int RD>
__device__ __forceinline__ void queries_backward(
    const T* q, const T* k, const T* v, const T* dout, const float* lse, const float* delta, T* dq,
    const int4* segments, const int2* items, long long stride, int n_q, int heads, int group, int d,
    SCORE_PARAMS) {
    constexpr int N = R<RD>, BM = WARPS * N, W = RD * 32;
    extern __shared__ __align__(128) unsigned char memory[];
    float* const queries = reinterpret_cast<float*>(memory);
    float* const douts = queries + BM * W;
    float* const keys = douts + BM * W;
    float* const values = keys + TILE * (W + 1);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int head = blockIdx.y, kv_head = head / group;
    const int2 item = items[blockIdx.x];
    const Segment segment = load_segment(segments, item.x);
    const Score score(head, SCORE_ARGS);
    const int first = item.y * BM, rows = min(BM, segment.q_len - first);
    const int position = segment.offset() + first;
    const long long row = segment.q_start + first, out_stride = static_cast<long long>(heads) * d;
    k += segment.kv_start * stride + static_cast<long long>(kv_head) * d;
    v += segment.kv_start * stride + static_cast<long long>(kv_head) * d;
    load_rows<T, RD, BM>(queries, W, q + row * stride + head * d, stride, rows, d);
    load_rows<T, RD, BM>(douts, W, dout + row * out_stride + head * d, out_stride, rows, d);

    float grad[N][RD], row_lse[N], row_delta[N];
#pragma unroll
    for (int r = 0; r < N; r++) {
        const int i = warp * N + r;
        const long long cell = static_cast<long long>(head) * n_q + row + i;
        row_lse[r] = i < rows ? lse[cell] : 0.f;
        row_delta[r] = i < rows ? delta[cell] : 0.f;
#pragma unroll
        for (int c = 0; c < RD; c++) grad[r][c] = 0.f;
    }
    for (int key = max(0, position + 1 - window) / TILE * TILE; key < position + rows;
         key += TILE) {
        __syncthreads();
        const int there = segment.kv_len - key;
        load_rows<T, RD, TILE>(keys, W + 1, k + key * stride, stride, there, d);
        load_rows<T, RD, TILE>(values, W + 1, v + key * stride, stride, there, d);
        __syncthreads();
        float s[N], ds[N];
        dots(s, keys + lane * (W + 1), queries + warp * N * W, W, d);
        dots(ds, values + lane * (W + 1), douts + warp * N * W, W, d);
#pragma unroll
        for (int r = 0; r < N; r++) {
            const int at = position + warp * N + r;
            float gradient = 0.f;
            if (warp * N + r < rows && sees(at, key + lane, window)) {
                float derivative;
                const float x = score.template of<true>(s[r], key + lane, at, derivative);
                gradient = scale * expf(x - row_lse[r]) * (ds[r] - row_delta[r]) * derivative;
            }
            add_rows<RD>(grad[r], gradient, keys, W + 1);
        }
    }
#pragma unroll
    for (int r = 0; r < N; r++) {
        const int i = warp * N + r;
        if (i >= rows) continue;
        T* const to = dq + (row + i) * stride + static_cast<long long>(head) * d;
#pragma unroll
        for (int c = 0; c < RD; c++)
            if (c * 32 + lane < d) to[c * 32 + lane] = from_f32<T>(grad[r][c]);
    }
}

template <typename T, int RD>
__device__ __forceinline__ void keys_backward(
    const T* q, const T* k, const T* v, const T* dout, const float* lse, const float* delta, T* dk,
    T* dv, const int4* segments, const int2* items, long long stride, int n_q, int heads, int group,
    int d, SCORE_PARAMS) {
    constexpr int N = R<RD>, BK = WARPS * N, W = RD * 32;
    extern __shared__ __align__(128) unsigned char memory[];
    float* const keys = reinterpret_cast<float*>(memory);
    float* const values = keys + BK * W;
    float* const queries = values + BK * W;
    float* const douts = queries + TILE * (W + 1);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int kv_head = blockIdx.y;
    const int2 item = items[blockIdx.x];
    const Segment segment = load_segment(segments, item.x);
    const int first = item.y * BK, rows = min(BK, segment.kv_len - first);
    const int offset = segment.offset();
    const int query_begin = max(0, first - offset);
    const int query_end = min(segment.q_len, first + rows - 1 - offset + window);
    const long long key_row = segment.kv_start + first;
    const long long out_stride = static_cast<long long>(heads) * d;
    const long long to = key_row * stride + static_cast<long long>(kv_head) * d;
    load_rows<T, RD, BK>(keys, W, k + to, stride, rows, d);
    load_rows<T, RD, BK>(values, W, v + to, stride, rows, d);

    float key_grad[N][RD], value_grad[N][RD];
#pragma unroll
    for (int r = 0; r < N; r++)
#pragma unroll
        for (int c = 0; c < RD; c++) key_grad[r][c] = value_grad[r][c] = 0.f;
    for (int head = kv_head * group; head < (kv_head + 1) * group; head++) {
        const Score score(head, SCORE_ARGS);
        for (int query = query_begin / TILE * TILE; query < query_end; query += TILE) {
            __syncthreads();
            const int there = segment.q_len - query;
            const long long row = segment.q_start + query;
            load_rows<T, RD, TILE>(queries, W + 1, q + row * stride + head * d, stride, there, d);
            load_rows<T, RD, TILE>(douts, W + 1, dout + row * out_stride + head * d, out_stride,
                                   there, d);
            __syncthreads();
            const long long cell = static_cast<long long>(head) * n_q + row + lane;
            const float row_lse = lane < there ? lse[cell] : 0.f;
            const float row_delta = lane < there ? delta[cell] : 0.f;
            float s[N], ds[N];
            dots(s, queries + lane * (W + 1), keys + warp * N * W, W, d);
            dots(ds, douts + lane * (W + 1), values + warp * N * W, W, d);
            const int at = offset + query + lane;
#pragma unroll
            for (int r = 0; r < N; r++) {
                const int key = first + warp * N + r;
                float p = 0.f, gradient = 0.f;
                if (lane < there && sees(at, key, window)) {
                    float derivative;
                    const float x = score.template of<true>(s[r], key, at, derivative);
                    p = expf(x - row_lse);
                    gradient = scale * p * (ds[r] - row_delta) * derivative;
                }
                add_rows<RD>(value_grad[r], p, douts, W + 1);
                add_rows<RD>(key_grad[r], gradient, queries, W + 1);
            }
        }
    }
#pragma unroll
    for (int r = 0; r < N; r++) {
        const int i = warp * N + r;
        if (i >= rows) continue;
#pragma unroll
        for (int c = 0; c < RD; c++) {
            const int column = c * 32 + lane;
            if (column >= d) continue;
            dk[to + i * stride + column] = from_f32<T>(key_grad[r][c]);
            dv[to + i * stride + column] = from_f32<T>(value_grad[r][c]);
        }
    }
}

// delta[head][row] = dO . O of a head's columns of a row; eight lanes a product.
template <typename T>
__device__ __forceinline__ void row_dots(const T* out, const T* dout, float* delta, int n_q,
                                         int heads, int d, int vectors) {
    const long long at = (static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x) / 8;
    const long long pairs = static_cast<long long>(n_q) * heads;
    const int lane = threadIdx.x % 8;
    float sum = 0.f;
    if (at < pairs) {
        out += at * d;
        dout += at * d;
        if (vectors) {
            for (int c = lane; c < d / Vec<T>::N; c += 8) {
                const Vec<T> a = load_vec(out + c * Vec<T>::N), b = load_vec(dout + c * Vec<T>::N);
#pragma unroll
                for (int i = 0; i < Vec<T>::N; i++) sum += to_f32(a.v[i]) * to_f32(b.v[i]);
            }
        } else {
            for (int c = lane; c < d; c += 8) sum += to_f32(out[c]) * to_f32(dout[c]);
        }
    }
#pragma unroll
    for (int x = 4; x > 0; x /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, x);
    if (lane == 0 && at < pairs) delta[at % heads * n_q + at / heads] = sum;
}

// Keys and values of the listed rows, one row of the result after the other: [rows, 2 * width].
template <typename V>
__device__ __forceinline__ void gather(const V* k, const V* v, V* to, const int* rows,
                                       long long k_stride, long long v_stride, int width) {
    const long long row = rows[blockIdx.x];
    to += static_cast<long long>(blockIdx.x) * 2 * width;
    for (int c = threadIdx.x; c < width; c += blockDim.x) {
        to[c] = k[row * k_stride + c];
        to[width + c] = v[row * v_stride + c];
    }
}

#define GATHER(NAME, V)                                                                           \
    extern "C" __global__ void NAME(const V* k, const V* v, V* to, const int* rows,              \
                                    long long k_stride, long long v_stride, int width) {         \
        gather<V>(k, v, to, rows, k_stride, v_stride, width);                                    \
    }
GATHER(attention_gather_f32, uint32_t)
GATHER(attention_gather_bf16, uint16_t)
GATHER(attention_gather_vectors, uint4)

#define ROW_DOTS(SUFFIX, T)                                                                       \
    extern "C" __global__ void attention_delta_##SUFFIX(const T* out, const T* dout,             \
                                                        float* delta, int n_q, int heads, int d, \
                                                        int vectors) {                           \
        row_dots<T>(out, dout, delta, n_q, heads, d, vectors);                                   \
    }
ROW_DOTS(f32, float)
ROW_DOTS(bf16, bf16)

#define EXACT(SUFFIX, T, RD)                                                                      \
    extern "C" __global__ void __launch_bounds__(WARPS * 32)                                     \
        attention_exact_forward_##RD##_##SUFFIX(                                                 \
            const T* q, const T* k, const T* v, T* out, float* lse, const int4* segments,        \
            const int2* items, long long q_stride, long long k_stride, long long v_stride,       \
            int n_q, int heads, int group, int d, SCORE_PARAMS) {                                \
        forward<T, RD>(q, k, v, out, lse, segments, items, q_stride, k_stride, v_stride, n_q,    \
                       heads, group, d, SCORE_ARGS);                                             \
    }                                                                                            \
    extern "C" __global__ void __launch_bounds__(WARPS * 32)                                     \
        attention_exact_queries_##RD##_##SUFFIX(                                                 \
            const T* q, const T* k, const T* v, const T* dout, const float* lse,                 \
            const float* delta, T* dq, const int4* segments, const int2* items,                  \
            long long stride, int n_q, int heads, int group, int d, SCORE_PARAMS) {              \
        queries_backward<T, RD>(q, k, v, dout, lse, delta, dq, segments, items, stride, n_q,     \
                                heads, group, d, SCORE_ARGS);                                    \
    }                                                                                            \
    extern "C" __global__ void __launch_bounds__(WARPS * 32)                                     \
        attention_exact_keys_##RD##_##SUFFIX(                                                    \
            const T* q, const T* k, const T* v, const T* dout, const float* lse,                 \
            const float* delta, T* dk, T* dv, const int4* segments, const int2* items,           \
            long long stride, int n_q, int heads, int group, int d, SCORE_PARAMS) {              \
        keys_backward<T, RD>(q, k, v, dout, lse, delta, dk, dv, segments, items, stride, n_q,    \
                             heads, group, d, SCORE_ARGS);                                       \
    }
#define EXACTS(RD)          \
    EXACT(f32, float, RD)   \
    EXACT(bf16, bf16, RD)

// Columns of a head in units of 32.
EXACTS(1)
EXACTS(2)
EXACTS(4)
EXACTS(8)
EXACTS(16)
