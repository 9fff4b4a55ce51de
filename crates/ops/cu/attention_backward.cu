// Attention backward on the tensor cores, bf16. With P = exp(S - lse) and delta = rowsum(dO * O):
// dV = P^T dO, dS = P * (dO V^T - delta), dQ = scale dS K, dK = scale dS^T Q.
//
// Nothing is added by two blocks: a block owns a tile of keys and sums dK and dV over all queries,
// and in a second kernel one owns a tile of queries and sums dQ over all keys. The scores are made
// twice, and the result is the same each time.

#include "attention.cuh"

// Gradients of dK and dV. D columns a head, WARPS warps of MA times 16 keys, BQ queries a tile, QC
// of them at a time; a block writes one of PARTS parts of the columns.
template <int D, int MA, int WARPS, int BQ, int QC, int PARTS, bool EXTRAS>
__device__ __forceinline__ void attention_keys(
    const bf16* q, const bf16* k, const bf16* v, const bf16* dout, const float* lse,
    const float* delta, bf16* dk, bf16* dv, float* partial, const int4* segments, const int2* items,
    long long stride, int n_q, int n_k, int kv_heads, int group, int per_chunk, int splits,
    SCORE_PARAMS) {
    constexpr int THREADS = WARPS * 32, BK = WARPS * MA * 16, COLS = D / PARTS;
    constexpr int TILE = BQ * LD<D> * 2, STAGE = 2 * TILE + 2 * BQ * 4;
    static_assert(2 * BQ <= THREADS, "a thread copies one lse or delta");
    extern __shared__ __align__(128) unsigned char memory[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;

    // The block's work: item, key head, split of the group's heads, part of the columns.
    int at = blockIdx.x;
    const int part = at % PARTS;
    at /= PARTS;
    const int split = at % splits;
    at /= splits;
    const int kv_head = blockIdx.y * per_chunk + at % per_chunk;
    if (kv_head >= kv_heads) return;
    const int2 item = items[at / per_chunk];
    const Segment segment = load_segment(segments, item.x);
    const float to_log2 = scale * LOG2_E;

    const int first = item.y * BK, rows = min(BK, segment.kv_len - first);
    const int offset = segment.offset();
    // The queries that see one of the keys, in tiles.
    const int query_begin = max(0, first - offset);
    const int query_end = min(segment.q_len, first + rows - 1 - offset + window);
    const int tile_begin = query_begin / BQ;
    const int tiles = max(0, (query_end + BQ - 1) / BQ - tile_begin);
    const int head_begin = kv_head * group + group * split / splits;
    const int head_end = kv_head * group + group * (split + 1) / splits;
    const int steps = tiles * (head_end - head_begin);

    // Keys | values | queries, dO, lse and delta of two stages.
    const uint32_t sk = shared_address(memory), sv = sk + BK * LD<D> * 2;
    const uint32_t stages = sv + BK * LD<D> * 2;
    const long long key_row = segment.kv_start + first;
    const long long out_stride = static_cast<long long>(kv_heads) * group * D;
    const auto load_queries = [&](int head, int tile, int stage) {
        const uint32_t to = stages + stage * STAGE;
        const int there = segment.q_len - tile * BQ;
        const long long row = segment.q_start + static_cast<long long>(tile) * BQ;
        load_tile<D, BQ, THREADS>(to, q + row * stride + head * D, stride, there);
        load_tile<D, BQ, THREADS>(to + TILE, dout + row * out_stride + head * D, out_stride, there);
        if (threadIdx.x < 2 * BQ) {
            const float* from = threadIdx.x < BQ ? lse : delta;
            const int i = threadIdx.x % BQ;
            copy_4(to + 2 * TILE + threadIdx.x * 4,
                   from + (static_cast<long long>(head) * n_q + row + i), i < there);
        }
    };

    float key_grad[MA][COLS / 8][4], value_grad[MA][COLS / 8][4];
    clear(key_grad);
    clear(value_grad);
    if (steps > 0) {
        load_tile<D, BK, THREADS>(sk, k + key_row * stride + kv_head * D, stride, rows);
        load_tile<D, BK, THREADS>(sv, v + key_row * stride + kv_head * D, stride, rows);
        load_queries(head_begin, tile_begin, 0);
        copies_commit();
    }

    const int mine = first + warp * MA * 16;  // the warp's first key
    const uint32_t own = warp * MA * 16 * LD<D> * 2 + lane_a<D>();
    int head = head_begin, tile = tile_begin;
    for (int step = 0, stage = 0; step < steps; step++, stage ^= 1) {
        const int now = tile;
        const Score score(head, SCORE_ARGS);
        if (++tile == tile_begin + tiles) tile = tile_begin, head++;
        copies_wait();
        __syncthreads();
        if (step + 1 < steps) load_queries(head, tile, stage ^ 1);
        copies_commit();

        const uint32_t from = stages + stage * STAGE;
        const float* const row_lse =
            reinterpret_cast<const float*>(memory + (from - sk) + 2 * TILE);
        const float* const row_delta = row_lse + BQ;
#pragma unroll 1
        for (int c = 0; c < BQ; c += QC) {
            // The chunk's first query, and the key at which it stands.
            const int query = now * BQ + c, position = offset + query;
            if (query >= segment.q_len || position + QC - 1 < mine ||
                mine + MA * 16 - 1 + window <= position)
                continue;
            const uint32_t sq = from + c * LD<D> * 2, sdo = sq + TILE;
            // Transposed: keys are rows, queries columns.
            float p[MA][QC / 8][4], ds[MA][QC / 8][4];
            clear(p);
            clear(ds);
            products<D, MA, QC>(p, sk + own, sq + lane_b<D>(), ds, sv + own, sdo + lane_b<D>());

            const bool partly = mine + MA * 16 - 1 > position ||
                                mine + window <= position + QC - 1 ||
                                query + QC > segment.q_len;
            const auto seen = [&](int key, int column) {
                return sees(position + column, key, window) && query + column < segment.q_len;
            };
            if (!EXTRAS && partly) {
#pragma unroll
                for (int m = 0; m < MA; m++)
#pragma unroll
                    for (int n = 0; n < QC / 8; n++)
#pragma unroll
                        for (int e = 0; e < 4; e++)
                            if (!seen(mine + m * 16 + g + e / 2 * 8, n * 8 + 2 * t + e % 2))
                                p[m][n][e] = -INFINITY;
            }
#pragma unroll
            for (int n = 0; n < QC / 8; n++) {
                const int i = c + n * 8 + 2 * t;
                const float2 l = *reinterpret_cast<const float2*>(row_lse + i);
                const float2 d = *reinterpret_cast<const float2*>(row_delta + i);
#pragma unroll
                for (int m = 0; m < MA; m++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const int key = mine + m * 16 + g + e / 2 * 8;
                        const int column = n * 8 + 2 * t + e % 2;
                        const float row_l = e % 2 ? l.y : l.x, row_d = e % 2 ? d.y : d.x;
                        float x, derivative = 1.f;
                        if (EXTRAS) {
                            x = score.template of<false>(p[m][n][e], key, position + column,
                                                         derivative);
                            x = seen(key, column) ? (x - row_l) * LOG2_E : -INFINITY;
                        } else {
                            x = p[m][n][e] * to_log2 - row_l * LOG2_E;
                        }
                        x = power_of_two(x);
                        p[m][n][e] = x;
                        ds[m][n][e] = x * (ds[m][n][e] - row_d) * derivative;
                    }
            }
            const uint32_t columns = lane_b_transposed<D>() + part * COLS * 2;
            product_with<D, MA, QC, COLS>(value_grad, p, sdo + columns);
            product_with<D, MA, QC, COLS>(key_grad, ds, sq + columns);
        }
    }

    if (splits > 1) {
        // [split][key head][dK, dV][row][D]
        const long long panel = static_cast<long long>(n_k) * D;
        float* const to = partial + (static_cast<long long>(split) * kv_heads + kv_head) * 2 * panel +
                          key_row * D + part * COLS;
#pragma unroll
        for (int m = 0; m < MA; m++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int i = warp * MA * 16 + m * 16 + h * 8 + g;
                if (i >= rows) continue;
#pragma unroll
                for (int n = 0; n < COLS / 8; n++) {
                    float* const cell = to + i * D + n * 8 + 2 * t;
                    *reinterpret_cast<float2*>(cell) = make_float2(
                        key_grad[m][n][2 * h] * scale, key_grad[m][n][2 * h + 1] * scale);
                    *reinterpret_cast<float2*>(cell + panel) =
                        make_float2(value_grad[m][n][2 * h], value_grad[m][n][2 * h + 1]);
                }
            }
        return;
    }
    float of_keys[MA][2], of_values[MA][2];
#pragma unroll
    for (int m = 0; m < MA; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) of_keys[m][h] = scale, of_values[m][h] = 1.f;
    // The warp's own keys and values make room for their gradients; no copy is under way, as the
    // last was waited for.
    __syncwarp();
    bf16* const key_room = reinterpret_cast<bf16*>(memory) + warp * MA * 16 * LD<D>;
    bf16* const value_room = key_room + BK * LD<D>;
    put_rows<D, MA, COLS>(key_room, key_grad, of_keys);
    put_rows<D, MA, COLS>(value_room, value_grad, of_values);
    __syncwarp();
    const long long to = (key_row + warp * MA * 16) * stride + kv_head * D + part * COLS;
    const int left = rows - warp * MA * 16;
    store_rows<D, MA * 16, COLS>(dk + to, stride, key_room, left);
    store_rows<D, MA * 16, COLS>(dv + to, stride, value_room, left);
}

// Gradients of the queries. WARPS warps of MA times 16 queries, BN keys a tile, KC of them at a time.
template <int D, int MA, int WARPS, int BN, int KC, bool EXTRAS>
__device__ __forceinline__ void attention_queries(
    const bf16* q, const bf16* k, const bf16* v, const bf16* dout, const float* lse,
    const float* delta, bf16* dq, const int4* segments, const int2* items, long long stride,
    int n_q, int heads, int group, int per_chunk, SCORE_PARAMS) {
    constexpr int THREADS = WARPS * 32, BM = WARPS * MA * 16, TILE = BN * LD<D> * 2;
    extern __shared__ __align__(128) unsigned char memory[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;

    const int head = blockIdx.y * per_chunk + blockIdx.x % per_chunk;
    if (head >= heads) return;
    const int2 item = items[blockIdx.x / per_chunk];
    const Segment segment = load_segment(segments, item.x);
    const Score score(head, SCORE_ARGS);
    const float to_log2 = scale * LOG2_E;

    const int first = item.y * BM, rows = min(BM, segment.q_len - first);
    const int position = segment.offset() + first;
    const int tile_end = (position + rows + BN - 1) / BN;
    const int tile_begin = max(0, position + 1 - window) / BN;

    const long long row = segment.q_start + first, out_stride = static_cast<long long>(heads) * D;
    const int kv_head = head / group;
    k += segment.kv_start * stride + static_cast<long long>(kv_head) * D;
    v += segment.kv_start * stride + static_cast<long long>(kv_head) * D;

    // Queries | dO | keys and values of two stages.
    const uint32_t sq = shared_address(memory), sdo = sq + BM * LD<D> * 2;
    const uint32_t stages = sdo + BM * LD<D> * 2;
    const auto load_keys = [&](int tile, int stage, int there) {
        const uint32_t to = stages + stage * 2 * TILE;
        const long long from = static_cast<long long>(tile) * BN * stride;
        load_tile<D, BN, THREADS>(to, k + from, stride, there);
        load_tile<D, BN, THREADS>(to + TILE, v + from, stride, there);
    };
    load_tile<D, BM, THREADS>(sq, q + row * stride + head * D, stride, rows);
    load_tile<D, BM, THREADS>(sdo, dout + row * out_stride + head * D, out_stride, rows);
    // Only the last tile, which comes first, may end past the keys.
    load_keys(tile_end - 1, 0, segment.kv_len - (tile_end - 1) * BN);
    copies_commit();

    float grad[MA][D / 8][4], row_lse[MA][2], row_delta[MA][2];
    clear(grad);
#pragma unroll
    for (int m = 0; m < MA; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int i = warp * MA * 16 + m * 16 + h * 8 + g;
            const long long cell = static_cast<long long>(head) * n_q + row + i;
            // Rows past the end are 0 in q and dO and give nothing.
            row_lse[m][h] = i < rows ? lse[cell] : 0.f;
            row_delta[m][h] = i < rows ? delta[cell] : 0.f;
            if (!EXTRAS) row_lse[m][h] *= LOG2_E;
        }

    const int mine = position + warp * MA * 16;  // where the warp's first query stands
    const uint32_t own = warp * MA * 16 * LD<D> * 2 + lane_a<D>();
    int stage = 0;
    for (int tile = tile_end - 1; tile >= tile_begin; tile--, stage ^= 1) {
        copies_wait();
        __syncthreads();
        if (tile > tile_begin) load_keys(tile - 1, stage ^ 1, BN);
        copies_commit();
#pragma unroll 1
        for (int c = 0; c < BN; c += KC) {
            const int key = tile * BN + c;
            if (key > mine + MA * 16 - 1 || key + KC - 1 + window <= mine) continue;
            const uint32_t sk = stages + stage * 2 * TILE + c * LD<D> * 2, sv = sk + TILE;
            float p[MA][KC / 8][4], ds[MA][KC / 8][4];
            clear(p);
            clear(ds);
            products<D, MA, KC>(p, sq + own, sk + lane_b<D>(), ds, sdo + own, sv + lane_b<D>());

            if (!EXTRAS && (key + KC - 1 > mine || key + window <= mine + MA * 16 - 1)) {
#pragma unroll
                for (int m = 0; m < MA; m++)
#pragma unroll
                    for (int n = 0; n < KC / 8; n++)
#pragma unroll
                        for (int e = 0; e < 4; e++)
                            if (!sees(mine + m * 16 + g + e / 2 * 8, key + n * 8 + 2 * t + e % 2,
                                      window))
                                p[m][n][e] = -INFINITY;
            }
#pragma unroll
            for (int m = 0; m < MA; m++)
#pragma unroll
                for (int n = 0; n < KC / 8; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const int at = mine + m * 16 + g + e / 2 * 8;
                        const int column = key + n * 8 + 2 * t + e % 2;
                        float x, derivative = 1.f;
                        if (EXTRAS) {
                            x = score.template of<false>(p[m][n][e], column, at, derivative);
                            x = (x - row_lse[m][e / 2]) * LOG2_E;
                            if (!sees(at, column, window)) x = -INFINITY;
                        } else {
                            x = p[m][n][e] * to_log2 - row_lse[m][e / 2];
                        }
                        x = power_of_two(x);
                        ds[m][n][e] = x * (ds[m][n][e] - row_delta[m][e / 2]) * derivative;
                    }
            product_with<D, MA, KC, D>(grad, ds, sk + lane_b_transposed<D>());
        }
    }

    float scales[MA][2];
#pragma unroll
    for (int m = 0; m < MA; m++) scales[m][0] = scales[m][1] = scale;
    __syncwarp();
    bf16* const room = reinterpret_cast<bf16*>(memory) + warp * MA * 16 * LD<D>;
    put_rows<D, MA, D>(room, grad, scales);
    __syncwarp();
    store_rows<D, MA * 16, D>(dq + (row + warp * MA * 16) * stride + head * D, stride, room,
                              rows - warp * MA * 16);
}

// dK and dV of a tile of keys as the sum of what the splits of its group of heads gave.
extern "C" __global__ void attention_sum_splits(const float* partial, bf16* dk, bf16* dv,
                                                const int4* segments, const int2* items,
                                                long long stride, int n_k, int kv_heads,
                                                int head_dim, int splits, int tile) {
    const int2 item = items[blockIdx.x];
    const Segment segment = load_segment(segments, item.x);
    const int first = item.y * tile, rows = min(tile, segment.kv_len - first);
    const int kv_head = blockIdx.y;
    const long long panel = static_cast<long long>(n_k) * head_dim, row = segment.kv_start + first;
    const int pairs = rows * head_dim / 2;
    for (int at = threadIdx.x; at < 2 * pairs; at += blockDim.x) {
        const bool value = at >= pairs;
        const int i = (value ? at - pairs : at) * 2;
        const float* from = partial + (static_cast<long long>(kv_head) * 2 + value) * panel +
                            row * head_dim + i;
        float2 sum = make_float2(0.f, 0.f);
        for (int split = 0; split < splits; split++) {
            const float2 x = *reinterpret_cast<const float2*>(from);
            sum.x += x.x, sum.y += x.y;
            from += 2 * panel * kv_heads;
        }
        bf16* const to = (value ? dv : dk) + (row + i / head_dim) * stride +
                         kv_head * head_dim + i % head_dim;
        *reinterpret_cast<uint32_t*>(to) = pack(sum.x, sum.y);
    }
}

#define KEYS(NAME, D, MA, WARPS, BQ, QC, PARTS, BLOCKS, EXTRAS)                                   \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS) NAME(                       \
        const bf16* q, const bf16* k, const bf16* v, const bf16* dout, const float* lse,         \
        const float* delta, bf16* dk, bf16* dv, float* partial, const int4* segments,            \
        const int2* items, long long stride, int n_q, int n_k, int kv_heads, int group,          \
        int per_chunk, int splits, SCORE_PARAMS) {                                               \
        attention_keys<D, MA, WARPS, BQ, QC, PARTS, EXTRAS>(                                     \
            q, k, v, dout, lse, delta, dk, dv, partial, segments, items, stride, n_q, n_k,       \
            kv_heads, group, per_chunk, splits, SCORE_ARGS);                                     \
    }
#define QUERIES(NAME, D, MA, WARPS, BN, KC, BLOCKS, EXTRAS)                                       \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS) NAME(                       \
        const bf16* q, const bf16* k, const bf16* v, const bf16* dout, const float* lse,         \
        const float* delta, bf16* dq, const int4* segments, const int2* items, long long stride, \
        int n_q, int heads, int group, int per_chunk, SCORE_PARAMS) {                            \
        attention_queries<D, MA, WARPS, BN, KC, EXTRAS>(q, k, v, dout, lse, delta, dq, segments, \
                                                        items, stride, n_q, heads, group,        \
                                                        per_chunk, SCORE_ARGS);                  \
    }
#define KEYS_OF(D, ...)                                  \
    KEYS(attention_keys_##D, D, __VA_ARGS__, false)      \
    KEYS(attention_keys_##D##_extras, D, __VA_ARGS__, true)
#define QUERIES_OF(D, ...)                               \
    QUERIES(attention_queries_##D, D, __VA_ARGS__, false) \
    QUERIES(attention_queries_##D##_extras, D, __VA_ARGS__, true)

// The host knows the tiles' sizes too (`FAST` in src/cuda/attention).
KEYS_OF(64, 2, 4, 64, 32, 1, 2)
KEYS_OF(80, 1, 8, 64, 64, 1, 1)
KEYS_OF(96, 1, 8, 64, 64, 1, 1)
KEYS(attention_keys_128, 128, 1, 8, 64, 64, 1, 1, false)
KEYS(attention_keys_128_extras, 128, 1, 8, 64, 32, 1, 1, true)
KEYS_OF(256, 1, 8, 32, 32, 2, 1)
QUERIES_OF(64, 2, 4, 64, 32, 2)
QUERIES_OF(80, 2, 4, 32, 32, 2)
QUERIES_OF(96, 2, 4, 32, 32, 2)
QUERIES_OF(128, 2, 4, 32, 32, 2)
QUERIES_OF(256, 1, 8, 32, 32, 1)
