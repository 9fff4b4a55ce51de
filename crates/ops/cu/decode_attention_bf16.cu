// Attention of one new token of each sequence over a bf16 cache of those before it.
//
// A block has a key head, up to G of the query heads that read it, and a share of the keys. Its
// warps take tiles of 16 keys in turn, each with the softmax of what it has seen so far, and join
// at the end, with the token's own key and value. Products are made by the tensor cores, queries in
// rows; columns are read as they lie in the cache, since the order of a sum's terms is free.
// Queries and weights are f32: they go in two parts of bf16, which together have 16 bits.

#include "decode_attention.cuh"

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int KEYS = 16;  // of a tile
constexpr float NEVER = -INFINITY;

// c += a b, for 16 rows, 16 terms and 8 columns. Of lane 4 g + t: `a` has terms 2 t, 2 t + 1 of
// rows g and g + 8, then terms 2 t + 8, 2 t + 9 of both; `b` those of column g; `c` has columns
// 2 t, 2 t + 1 of row g, then of row g + 8.
__device__ __forceinline__ void multiply(float (&c)[4], const uint4& a, unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

// Two numbers as the sum of two bf16 each: what is nearest, and what is left.
__device__ __forceinline__ void split(float x, float y, unsigned& high, unsigned& low) {
    const auto word = [](float x, float y) -> unsigned {
        return static_cast<unsigned>(__bfloat16_as_ushort(__float2bfloat16_rn(y))) << 16 |
               __bfloat16_as_ushort(__float2bfloat16_rn(x));
    };
    high = word(x, y);
    low = word(x - __uint_as_float(high << 16), y - __uint_as_float(high & 0xffff0000u));
}

// Both parts of two rows' terms as `multiply` takes them: `a` has terms 2 t, 2 t + 1 and `b` terms
// 2 t + 8, 2 t + 9, of row g and, where WIDE, of row g + 8. Else the lower parts are rows 8 to 15.
template <bool WIDE>
__device__ __forceinline__ void split_rows(const float (&a)[WIDE ? 2 : 1][2],
                                           const float (&b)[WIDE ? 2 : 1][2],
                                           uint4 (&to)[WIDE ? 2 : 1]) {
    if constexpr (WIDE) {
        split(a[0][0], a[0][1], to[0].x, to[1].x);
        split(a[1][0], a[1][1], to[0].y, to[1].y);
        split(b[0][0], b[0][1], to[0].z, to[1].z);
        split(b[1][0], b[1][1], to[0].w, to[1].w);
    } else {
        split(a[0][0], a[0][1], to[0].x, to[0].y);
        split(b[0][0], b[0][1], to[0].z, to[0].w);
    }
}

// Brings some bytes nearer, 16 or a multiple; `p` lies on 16 bytes.
__device__ __forceinline__ void prefetch_bytes(const void* p, unsigned n) {
#if __CUDA_ARCH__ >= 900
    if (n) asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(n) : "memory");
#endif
}

// D: columns of a head, filled up. WIDE: 16 query heads a block instead of 8.
template <int D, bool WIDE>
__device__ __forceinline__ void attend(const Attend& a) {
    constexpr int G = WIDE ? 16 : 8, ROWS = WIDE ? 2 : 1;
    constexpr int JOBS = (G + 2 + WARPS - 1) / WARPS;
    // Columns that join at a time.
    constexpr int COLUMNS = WIDE ? 64 : D < 128 ? D : 128;
    constexpr int ROW = COLUMNS + 16;  // so that the stores of two heads meet in no bank
    // Keys of the next tile on their way while this one is worked on, where registers hold both.
    constexpr bool AHEAD = D <= 128;
    // Bytes of keys, and of values, that are brought into L2 ahead of the wait: those of all blocks
    // that run at a time leave room there for what other kernels read.
    constexpr long long EARLY = D <= 64 ? 32 << 10 : 64 << 10;
    __shared__ __align__(16) union {
        struct {
            uint4 queries[ROWS][D / 16][32];
            float rows[G + 1][D];  // query heads, then the key
        } first;
        float joined[WARPS][G][ROW];
    } room;
    __shared__ float own_value[D], angles[D], gains[2][D];
    __shared__ float tops[G][WARPS + 1], sums[G][WARPS + 1];  // of each warp, then the token's own
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
    const int g = lane >> 2, t = lane & 3;
    const int kv_head = blockIdx.x / a.chunks, chunk = blockIdx.x % a.chunks;
    const int share = blockIdx.y, shares = gridDim.y, b = blockIdx.z;
    const int group = a.heads / a.kv_heads, dim = a.head_dim;
    const int first_head = kv_head * group + chunk * G;
    const int here = min(G, group - chunk * G);  // query heads of this block
    const unsigned limit = static_cast<unsigned>(min(a.context, a.max_pos));
    const long long head_at =
        (static_cast<long long>(b) * a.kv_heads + kv_head) * a.context * a.padded;
    bf16* const keys = static_cast<bf16*>(a.keys) + head_at;
    bf16* const values = static_cast<bf16*>(a.values) + head_at;

    release_next();
    // What nobody writes is read ahead of the wait. So is the position, but only as a guess: it may
    // be that of the token before.
    for (int n = 0; n < 2; n++)
        if (a.gains[n])
            for (int i = tid; i < dim; i += THREADS) gains[n][i] = __ldg(a.gains[n] + i);
    const auto load_angles = [&](unsigned position) {
        const float* from = a.angles + static_cast<long long>(position) * 2 * a.pairs;
        for (int i = tid; i < 2 * a.pairs; i += THREADS) angles[i] = __ldg(from + i);
    };
    const unsigned guess = load(a.positions + b);
    if (guess < limit) {
        load_angles(guess);
        const Share s = share_of(static_cast<int>(guess), a.window, share, shares);
        const long long bytes = static_cast<long long>(s.to - s.from) * a.padded * 2;
        if (tid < 2 && chunk == 0 && share < s.active)
            prefetch_bytes((tid ? values : keys) + static_cast<long long>(s.from) * a.padded,
                           static_cast<unsigned>(min(bytes, EARLY)));
    }
    wait_for_previous();
    const unsigned place = load(a.positions + b);
    // A warp's jobs are rows to bring: the query heads, the key, the value.
    const float* qkv = a.qkv + static_cast<long long>(b) * (a.heads + 2 * a.kv_heads) * dim;
    float job[JOBS][D / 32];
#pragma unroll
    for (int n = 0; n < JOBS; n++) {
        const int j = warp + n * WARPS;
        const int head = j < here ? first_head + j
                                  : a.heads + kv_head + (j == here ? 0 : a.kv_heads);
        if (j < here + 2) load_head<D>(job[n], qkv + head * dim, dim);
    }
    float* out = a.out + (static_cast<long long>(b) * a.heads + first_head) * dim;
    if (place >= limit) {
        if (share == 0)
            for (int i = tid; i < here * dim; i += THREADS) out[i] = nanf("");
        return;
    }
    const int position = static_cast<int>(place);
    const Share span = share_of(position, a.window, share, shares);
    if (share >= span.active) return;
    const bool last = share == span.active - 1;
    if (place != guess) load_angles(place);

    const int vectors = a.padded / 8;
    uint4 k[2][D / 32], v[4][D / 64];
    const auto load_keys = [&](int base) {
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const long long row = min(base + 8 * n + g, span.to - 1);
            const bf16* p = keys + row * a.padded;
#pragma unroll
            for (int i = 0; i < D / 32; i++) {
                const bool in = 4 * i + t < vectors;
                k[n][i] = load_cache(p + (in ? (4 * i + t) * 8 : 0), in);
            }
        }
    };
    const auto load_values = [&](int base) {
#pragma unroll
        for (int n = 0; n < 4; n++) {
            const long long row = min(base + 2 * t + n % 2 + n / 2 * 8, span.to - 1);
            const bf16* p = values + row * a.padded;
#pragma unroll
            for (int i = 0; i < D / 64; i++) {
                const bool in = 8 * i + g < vectors;
                v[n][i] = load_cache(p + (in ? (8 * i + g) * 8 : 0), in);
            }
        }
    };
    const int begin = span.from + warp * KEYS;
    if (AHEAD && begin < span.to) load_keys(begin);

    __syncthreads();
#pragma unroll
    for (int n = 0; n < JOBS; n++) {
        const int j = warp + n * WARPS;
        if (j < here)
            turn<D>(a, 0, job[n], a.gains[0] ? gains[0] : nullptr, angles, room.first.rows[j]);
        else if (j == here)
            turn<D>(a, 1, job[n], a.gains[1] ? gains[1] : nullptr, angles, room.first.rows[j]);
        else if (j == here + 1)
#pragma unroll
            for (int i = 0; i < D / 32; i++) own_value[lane + 32 * i] = job[n][i];
    }
    __syncthreads();
    // Terms of a product are in the order in which `load_keys` brings them: a lane has 8 columns in
    // a row, for two products.
    for (int i = tid; i < D / 16 * 32; i += THREADS) {
        const int step = i / 32, at = step / 2 * 32 + (i & 3) * 8 + step % 2 * 4;
        float x[ROWS][2], y[ROWS][2];
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const int head = (i & 31) / 4 + 8 * r;
            const float* row = room.first.rows[min(head, here - 1)] + at;
            x[r][0] = head < here ? row[0] : 0.f, x[r][1] = head < here ? row[1] : 0.f;
            y[r][0] = head < here ? row[2] : 0.f, y[r][1] = head < here ? row[3] : 0.f;
        }
        uint4 parts[ROWS];
        split_rows<WIDE>(x, y, parts);
#pragma unroll
        for (int r = 0; r < ROWS; r++) room.first.queries[r][step][i & 31] = parts[r];
    }
    const float* const own_key = room.first.rows[here];
    // The token attends to itself in f32.
    for (int h = warp; h < here; h += WARPS) {
        float product = 0.f;
#pragma unroll
        for (int i = 0; i < D / 32; i++)
            product += room.first.rows[h][lane + 32 * i] * own_key[lane + 32 * i];
        product = warp_sum(product);
        if (lane == 0) {
            const float slope = a.slopes ? __ldg(a.slopes + first_head + h) : 0.f;
            tops[h][WARPS] = last ? score(a, product, slope, position, position) : NEVER;
            sums[h][WARPS] = last ? 1.f : 0.f;
        }
    }
    // Nobody reads this row of the cache for this token.
    if (last && chunk == 0)
        for (int d = tid; d < a.padded; d += THREADS) {
            const long long at = static_cast<long long>(position) * a.padded + d;
            keys[at] = __float2bfloat16_rn(own_key[d]);
            values[at] = __float2bfloat16_rn(own_value[d]);
        }
    __syncthreads();

    float acc[D / 64][8][4], most[ROWS], sum[ROWS], slope[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        most[r] = NEVER;
        sum[r] = 0.f;
        slope[r] = a.slopes ? __ldg(a.slopes + first_head + min(g + 8 * r, here - 1)) : 0.f;
    }
#pragma unroll
    for (int i = 0; i < D / 64; i++)
#pragma unroll
        for (int c = 0; c < 8; c++)
#pragma unroll
            for (int e = 0; e < 4; e++) acc[i][c][e] = 0.f;

    for (int base = begin; base < span.to; base += WARPS * KEYS) {
        if (AHEAD)
            load_values(base);
        else
            load_keys(base);
        float s[2][4] = {};
#pragma unroll
        for (int i = 0; i < D / 32; i++)
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const uint4 one = room.first.queries[r][2 * i][lane];
                const uint4 two = room.first.queries[r][2 * i + 1][lane];
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    multiply(s[n], one, k[n][i].x, k[n][i].y);
                    multiply(s[n], two, k[n][i].z, k[n][i].w);
                }
            }
        if (AHEAD && base + WARPS * KEYS < span.to) load_keys(base + WARPS * KEYS);
        // Scores of keys 2 t and 2 t + 1, then of keys 2 t + 8 and 2 t + 9.
        float x[2][ROWS][2], keep[ROWS];
        bool grew = false;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float top = most[r];
#pragma unroll
            for (int n = 0; n < 2; n++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const float product = WIDE ? s[n][2 * r + e] : s[n][e] + s[n][2 + e];
                    const int key = base + 8 * n + 2 * t + e;
                    x[n][r][e] =
                        key < span.to ? score(a, product, slope[r], key, position) : NEVER;
                    top = fmaxf(top, x[n][r][e]);
                }
            top = fmaxf(top, __shfl_xor_sync(FULL, top, 1));
            top = fmaxf(top, __shfl_xor_sync(FULL, top, 2));
            keep[r] = expf(most[r] - top);
            grew |= top > most[r];
            most[r] = top;
            sum[r] *= keep[r];
#pragma unroll
            for (int n = 0; n < 2; n++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    x[n][r][e] = expf(x[n][r][e] - top);
                    sum[r] += x[n][r][e];
                }
        }
        uint4 weights[ROWS];
        split_rows<WIDE>(x[0], x[1], weights);
        if (__any_sync(FULL, grew))
#pragma unroll
            for (int i = 0; i < D / 64; i++)
#pragma unroll
                for (int c = 0; c < 8; c++)
#pragma unroll
                    for (int e = 0; e < 4; e++) acc[i][c][e] *= keep[WIDE ? e / 2 : 0];
        if (!AHEAD) load_values(base);
        // A product's column is one of a lane's 8; its terms are keys, so two keys go in a word.
#pragma unroll
        for (int i = 0; i < D / 64; i++)
#pragma unroll
            for (int c = 0; c < 8; c++) {
                const auto word = [&](const uint4& r) {
                    return c / 2 == 0 ? r.x : c / 2 == 1 ? r.y : c / 2 == 2 ? r.z : r.w;
                };
                const unsigned half = c % 2 ? 0x7632 : 0x5410;
                const unsigned b0 = __byte_perm(word(v[0][i]), word(v[1][i]), half);
                const unsigned b1 = __byte_perm(word(v[2][i]), word(v[3][i]), half);
#pragma unroll
                for (int r = 0; r < ROWS; r++) multiply(acc[i][c], weights[r], b0, b1);
            }
    }

    // The warps join: some may have seen nothing.
    __syncthreads();
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        sum[r] += __shfl_xor_sync(FULL, sum[r], 1);
        sum[r] += __shfl_xor_sync(FULL, sum[r], 2);
        if (t == 0) {
            tops[g + 8 * r][warp] = most[r];
            sums[g + 8 * r][warp] = sum[r];
        }
    }
    float* const partial =
        a.partial + (static_cast<long long>(b) * a.heads + first_head) * shares * (dim + 2);
#pragma unroll
    for (int pass = 0; pass < D / COLUMNS; pass++) {
        if (pass) __syncthreads();
        // Column g of a product lies 8 columns after column g - 1: a lane has 16 in a row, and
        // stores 4 beside the same 4 of the other lanes.
        const auto put = [&](float* to, int row, int i, int four) {
            float x[4];
#pragma unroll
            for (int n = 0; n < 4; n++) {
                const float(&from)[4] = acc[pass * (COLUMNS / 64) + i][four % 2 * 4 + n];
                const int e = four / 2;
                x[n] = WIDE ? from[2 * row + e] : from[e] + from[2 + e];
            }
            *reinterpret_cast<float4*>(to + 64 * i + 16 * four + 4 * t) =
                make_float4(x[0], x[1], x[2], x[3]);
        };
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            if (g + 8 * r < here)
#pragma unroll
                for (int i = 0; i < COLUMNS / 64; i++)
#pragma unroll
                    for (int four = 0; four < 4; four++)
                        put(room.joined[warp][g + 8 * r], r, i, four);
        __syncthreads();
        const int columns = min(COLUMNS, dim - pass * COLUMNS);
        for (int e = tid; e < here * columns; e += THREADS) {
            const int h = e / columns, c = e % columns, d = pass * COLUMNS + c;
            const int at = c / 64 * 64 + c % 16 / 4 * 16 + c % 64 / 16 * 4 + c % 4;
            float top = NEVER;
#pragma unroll
            for (int w = 0; w <= WARPS; w++) top = fmaxf(top, tops[h][w]);
            const float own = __expf(tops[h][WARPS] - top);
            float x = last ? own_value[d] * own : 0.f;
            float all = sums[h][WARPS] * own;
#pragma unroll
            for (int w = 0; w < WARPS; w++) {
                const float factor = __expf(tops[h][w] - top);
                all += sums[h][w] * factor;
                x += room.joined[w][h][at] * factor;
            }
            float* const to = partial + (static_cast<long long>(h) * shares + share) * (dim + 2);
            if (span.active == 1)
                out[h * dim + d] = x / all;
            else
                to[d] = x;
            if (span.active > 1 && d == 0) to[dim] = top, to[dim + 1] = all;
        }
    }
    if (span.active == 1) return;
    unsigned* const counter = a.counters + b * gridDim.x + blockIdx.x;
    join_shares<G, THREADS>(a, partial, out, counter, here, shares, span.active);
}

#define ENTRY(NAME, D, WIDE)                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS) attend_bf16_##NAME(       \
        const __grid_constant__ Attend a) {                                         \
        attend<D, WIDE>(a);                                                         \
    }
ENTRY(64_8, 64, false)
ENTRY(64_16, 64, true)
ENTRY(128_8, 128, false)
ENTRY(128_16, 128, true)
ENTRY(256_8, 256, false)
ENTRY(256_16, 256, true)
