// Attention forward on the tensor cores, bf16: online softmax over tiles of keys (Dao,
// FlashAttention-2, 2023).

#include "attention.cuh"

// While a row's largest score grows by less than this (in powers of two), its sums keep the old
// one: what they hold stays far from overflow, and rescaling them costs.
constexpr float SLACK = 8.f;

// D columns a head, WARPS warps of MA times 16 queries, BN keys a tile. EXTRAS: soft cap or ALiBi,
// or a scale that is not positive.
template <int D, int MA, int WARPS, int BN, bool EXTRAS>
__device__ __forceinline__ void attention_forward(
    const bf16* q, const bf16* k, const bf16* v, bf16* out, float* lse, const int4* segments,
    const int2* items, long long q_stride, long long k_stride, long long v_stride, int n_q,
    int heads, int group, int per_chunk, SCORE_PARAMS) {
    constexpr int THREADS = WARPS * 32, BM = WARPS * MA * 16, TILE = BN * LD<D> * 2;
    extern __shared__ __align__(128) unsigned char memory[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;

    const int head = blockIdx.y * per_chunk + blockIdx.x % per_chunk;
    if (head >= heads) return;
    const int2 item = items[blockIdx.x / per_chunk];
    const Segment segment = load_segment(segments, item.x);
    const Score score(head, SCORE_ARGS);
    const float to_log2 = EXTRAS ? LOG2_E : scale * LOG2_E;

    const int first = item.y * BM, rows = min(BM, segment.q_len - first);
    const int position = segment.offset() + first;
    const int tile_end = (position + rows + BN - 1) / BN;
    const int tile_begin = max(0, position + 1 - window) / BN;

    const long long row = segment.q_start + first;
    q += row * q_stride + static_cast<long long>(head) * D;
    const int kv_head = head / group;
    k += segment.kv_start * k_stride + static_cast<long long>(kv_head) * D;
    v += segment.kv_start * v_stride + static_cast<long long>(kv_head) * D;

    // Queries | keys and values of two stages.
    bf16* const queries = reinterpret_cast<bf16*>(memory);
    const uint32_t sq = shared_address(memory), stages = sq + BM * LD<D> * 2;
    const auto load_keys = [&](int tile, int stage) {
        const uint32_t to = stages + stage * 2 * TILE;
        const int there = segment.kv_len - tile * BN;
        load_tile<D, BN, THREADS>(to, k + static_cast<long long>(tile) * BN * k_stride, k_stride,
                                  there);
        load_tile<D, BN, THREADS>(to + TILE, v + static_cast<long long>(tile) * BN * v_stride,
                                  v_stride, there);
    };
    load_tile<D, BM, THREADS>(sq, q, q_stride, rows);
    load_keys(tile_end - 1, 0);
    copies_commit();

    float o[MA][D / 8][4], row_max[MA][2], row_sum[MA][2];
    clear(o);
#pragma unroll
    for (int m = 0; m < MA; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) row_max[m][h] = -INFINITY, row_sum[m][h] = 0.f;

    // The warp's first query stands here.
    const int mine = position + warp * MA * 16;
    const uint32_t a = sq + warp * MA * 16 * LD<D> * 2 + lane_a<D>();
    int stage = 0;
    for (int tile = tile_end - 1; tile >= tile_begin; tile--, stage ^= 1) {
        copies_wait();
        __syncthreads();
        if (tile > tile_begin) load_keys(tile - 1, stage ^ 1);
        copies_commit();

        const int key = tile * BN;
        // Nothing here that one of the warp's queries sees.
        if (key > mine + MA * 16 - 1 || key + BN - 1 + window <= mine) continue;
        const uint32_t sk = stages + stage * 2 * TILE, sv = sk + TILE;
        float s[MA][BN / 8][4];
        clear(s);
        product<D, MA, BN>(s, a, sk + lane_b<D>());

        if (EXTRAS) {
#pragma unroll
            for (int m = 0; m < MA; m++)
#pragma unroll
                for (int n = 0; n < BN / 8; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        float derivative;
                        s[m][n][e] = score.template of<false>(
                            s[m][n][e], key + n * 8 + 2 * t + e % 2,
                            mine + m * 16 + g + e / 2 * 8, derivative);
                    }
        }
        if (key + BN - 1 > mine || key + window <= mine + MA * 16 - 1) {
#pragma unroll
            for (int m = 0; m < MA; m++)
#pragma unroll
                for (int n = 0; n < BN / 8; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        if (!sees(mine + m * 16 + g + e / 2 * 8, key + n * 8 + 2 * t + e % 2,
                                  window))
                            s[m][n][e] = -INFINITY;
        }

        float correction[MA][2];
        bool grew = false;
#pragma unroll
        for (int m = 0; m < MA; m++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float top = -INFINITY;
#pragma unroll
                for (int n = 0; n < BN / 8; n++)
                    top = fmaxf(top, fmaxf(s[m][n][2 * h], s[m][n][2 * h + 1]));
                top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
                top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
                // False where both are -inf: the row sees nothing yet.
                const bool up = (top - row_max[m][h]) * to_log2 > SLACK;
                correction[m][h] = up ? power_of_two((row_max[m][h] - top) * to_log2) : 1.f;
                row_max[m][h] = up ? top : row_max[m][h];
                grew |= up;
            }
        if (__any_sync(0xffffffffu, grew)) {
#pragma unroll
            for (int m = 0; m < MA; m++) {
#pragma unroll
                for (int n = 0; n < D / 8; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++) o[m][n][e] *= correction[m][e / 2];
                row_sum[m][0] *= correction[m][0];
                row_sum[m][1] *= correction[m][1];
            }
        }
#pragma unroll
        for (int m = 0; m < MA; m++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const float top = row_max[m][h] == -INFINITY ? 0.f : row_max[m][h] * to_log2;
                float sum = 0.f;
#pragma unroll
                for (int n = 0; n < BN / 8; n++)
#pragma unroll
                    for (int e = 2 * h; e < 2 * h + 2; e++) {
                        s[m][n][e] = power_of_two(s[m][n][e] * to_log2 - top);
                        sum += s[m][n][e];
                    }
                row_sum[m][h] += sum;
            }
        product_with<D, MA, BN, D>(o, s, sv + lane_b_transposed<D>());
    }

    float inverse[MA][2];
#pragma unroll
    for (int m = 0; m < MA; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float sum = row_sum[m][h];
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            inverse[m][h] = 1.f / sum;
            const int i = warp * MA * 16 + m * 16 + h * 8 + g;
            if (t == 0 && i < rows)
                lse[static_cast<long long>(head) * n_q + row + i] =
                    (row_max[m][h] * to_log2 + log2f(sum)) * LN_2;
        }
    // The warp's own queries make room for its output.
    __syncwarp();
    bf16* const mine_out = queries + warp * MA * 16 * LD<D>;
    put_rows<D, MA, D>(mine_out, o, inverse);
    __syncwarp();
    const long long out_stride = static_cast<long long>(heads) * D;
    store_rows<D, MA * 16, D>(out + (row + warp * MA * 16) * out_stride + head * D, out_stride,
                              mine_out, rows - warp * MA * 16);
}

#define FORWARD(NAME, D, MA, WARPS, BN, BLOCKS, EXTRAS)                                          \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS) NAME(                       \
        const bf16* q, const bf16* k, const bf16* v, bf16* out, float* lse, const int4* segments, \
        const int2* items, long long q_stride, long long k_stride, long long v_stride, int n_q,  \
        int heads, int group, int per_chunk, SCORE_PARAMS) {                                     \
        attention_forward<D, MA, WARPS, BN, EXTRAS>(q, k, v, out, lse, segments, items, q_stride, \
                                                    k_stride, v_stride, n_q, heads, group,       \
                                                    per_chunk, SCORE_ARGS);                      \
    }
#define FORWARDS(D, MA, WARPS, BN, BLOCKS)                             \
    FORWARD(attention_forward_##D, D, MA, WARPS, BN, BLOCKS, false)    \
    FORWARD(attention_forward_##D##_extras, D, MA, WARPS, BN, BLOCKS, true)

// The host knows the tiles' sizes too (`FAST` in src/cuda/attention).
FORWARDS(64, 2, 4, 64, 3)
FORWARDS(80, 2, 4, 64, 2)
FORWARDS(96, 2, 4, 64, 2)
FORWARDS(128, 2, 4, 64, 2)
FORWARDS(256, 1, 8, 64, 1)
