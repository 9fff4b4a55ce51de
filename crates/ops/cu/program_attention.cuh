// Attention of the program's token: a block has a key head, up to G of the query heads that read
// it, and a share of the keys.
//
// Some lanes read one key together, 16 bytes each; every such group goes through keys of its own
// with the softmax of what it has seen so far, and the groups' sums are joined at the end. Where a
// sequence is shared out over blocks, what reads the result joins the shares.
#pragma once

#include "program_ring.cuh"

constexpr int HEAD = 256;  // columns of a head

template <int G>
struct Attending {
    float rows[G + 2][HEAD];  // queries, then the token's key and value
    float joined[WARPS][HEAD];
    float tops[WARPS], weights[WARPS];
    float angles[HEAD], gains[2][HEAD];
};

template <typename T, int G>
__device__ __noinline__ void attend(const Program& p) {
    const Step& s = this_step();
    constexpr int N = 16 / sizeof(T), NV = HEAD / 32 / N;
    constexpr int COLUMNS = NV * N;  // that a lane has of a head
    constexpr int KEYS = 2 / NV;     // on their way, in places of the thread's own
    static_assert(KEYS * 2 * NV * PIECE <= 4 * PARTS, "in the same place");
    Attending<G>& room = *at_byte<Attending<G>>(FIXED + 4 * PARTS);
    const Attend& a = s.attend;
    const int position = fixed().position;
    const int t = threadIdx.x, lane = t & 31, warp = t >> 5;
    const int shares = s.shares, share = blockIdx.x % shares, unit = blockIdx.x / shares;
    const int kv_head = unit / a.chunks, chunk = unit % a.chunks;
    const bool valid = position < min(a.context, a.max_pos);
    const Share span = share_of(valid ? position : 0, a.window, share, shares);
    if (kv_head >= a.kv_heads) {
        wait_for_most(p, s.number);
        begin_step(s.number);
        meet();
        return;
    }
    const bool last = share == span.active - 1;
    const int group = a.heads / a.kv_heads, dim = a.head_dim;
    const int first_head = kv_head * group + chunk * G;
    const int here = min(G, group - chunk * G);  // query heads of this block
    // Of each share its sums over values, and their largest scores and sums of weights.
    float* const out = a.out + (share * a.heads + first_head) * dim;
    float* const seen = a.partial + 2 * (first_head * shares + share);
    if (!valid || share >= span.active) {
        wait_for_most(p, s.number);
        begin_step(s.number);
        for (int i = t; i < here * dim; i += THREADS) tell(out + i, valid || share > 0 ? 0.f : nanf(""));
        if (t < 2 * here) tell(seen + 2 * shares * (t / 2) + t % 2, 0.f);
        meet();
        return;
    }
    // Lanes of a key: a power of two, so that sums over them stay within a warp.
    const int vectors = a.padded / N;
    int bits = 0;
    while ((1 << bits) < min(vectors, 32)) bits++;
    const int lanes = 1 << bits, groups = THREADS >> bits, mine = t >> bits, part = t & (lanes - 1);
    const long long head_at = static_cast<long long>(kv_head) * a.context * a.padded;
    T* const keys = static_cast<T*>(a.keys) + head_at;
    T* const values = static_cast<T*>(a.values) + head_at;

    // Keys and values of the tokens before are there already: the n-th of the group.
    const auto place = [&](int n, int part_of, int i) {
        return shared + FIXED + ((n % KEYS * 2 + part_of) * NV + i) * PIECE + t * 16;
    };
    // Each group has a key a round; the token's own is behind the last ones.
    const int rounds = (span.to - span.from + last + groups - 1) >> (9 - bits);
    static_assert(THREADS == 1 << 9, "groups of threads");
    const auto bring = [&](int n) {
        const int key = span.from + n * groups + mine;
        if (n < rounds && key < span.to)
#pragma unroll
            for (int i = 0; i < NV; i++) {
                const int vector = part + i * lanes;
                if (vector >= vectors) continue;
                const long long at = static_cast<long long>(key) * a.padded + vector * N;
                copy_16(place(n, 0, i), keys + at);
                copy_16(place(n, 1, i), values + at);
            }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
#pragma unroll 1
    for (int n = 0; n < KEYS; n++) bring(n);
    const auto copy = [&](float* to, const float* from, int n) {
        if (t < n)
            asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address(to + t)),
                         "l"(from + t)
                         : "memory");
    };
    copy(room.angles, a.angles + static_cast<long long>(position) * 2 * a.pairs, 2 * a.pairs);
    for (int n = 0; n < 2; n++)
        if (a.gains[n]) copy(room.gains[n], a.gains[n], dim);

    // The queries, the key and the value, zeros behind them; norms of the first, and their turns.
    const auto row_of = [&](int r) { return room.rows[r < here ? r : G + r - here]; };
#pragma unroll 1
    for (int i = t; i < (here + 2) * (lanes * COLUMNS); i += THREADS) {
        const int d = i & (lanes * COLUMNS - 1), r = i / COLUMNS >> bits;
        const int head = r < here ? first_head + r : a.heads + kv_head + (r - here) * a.kv_heads;
        row_of(r)[d] = d < dim ? told(a.qkv + head * dim + d) : 0.f;
    }
    begin_step(s.number);
    asm volatile("cp.async.wait_all;" ::: "memory");
    meet();
    if (a.gains[0] || a.gains[1]) {
#pragma unroll 1
        for (int r = warp; r < here + 1; r += WARPS) {
            const int which = r == here;
            if (!a.gains[which]) continue;
            float* const row = row_of(r);
            float mean = 0.f, sum = 0.f;
#pragma unroll 1
            for (int pass = a.centred[which] ? 0 : 1; pass < 2; pass++) {
                sum = 0.f;
                for (int d = lane; d < dim; d += 32)
                    sum += pass ? (row[d] - mean) * (row[d] - mean) : row[d];
                sum = warp_sum(sum) / dim;
                if (!pass) mean = sum;
            }
            const float factor = 1.f / sqrtf(sum + a.eps[which]);
            for (int d = lane; d < dim; d += 32)
                row[d] = (row[d] - mean) * factor * room.gains[which][d];
        }
        meet();
    }
#pragma unroll 1
    for (int i = t; i < (here + 1) * (HEAD / 2); i += THREADS) {
        const int r = i / (HEAD / 2), j = i % (HEAD / 2);
        if (j >= a.pairs) continue;
        const int x_at = a.interleaved ? 2 * j : j, y_at = a.interleaved ? 2 * j + 1 : j + a.pairs;
        float* const row = row_of(r);
        const float cos = room.angles[j], sin = room.angles[a.pairs + j];
        const float x = row[x_at], y = row[y_at];
        row[x_at] = x * cos - y * sin;
        row[y_at] = y * cos + x * sin;
    }
    meet();
    // Nobody reads this row of the cache for this token.
    if (last && chunk == 0)
        for (int d = t; d < a.padded; d += THREADS) {
            const long long at = static_cast<long long>(position) * a.padded + d;
            keys[at] = from_f32<T>(room.rows[G][d]);
            values[at] = from_f32<T>(room.rows[G + 1][d]);
        }

    float acc[G][COLUMNS], most[G], sum[G], slope[G];
#pragma unroll
    for (int g = 0; g < G; g++) {
        most[g] = -INFINITY;
        sum[g] = 0.f;
        slope[g] = a.slopes ? __ldg(a.slopes + first_head + min(g, here - 1)) : 0.f;
#pragma unroll
        for (int e = 0; e < COLUMNS; e++) acc[g][e] = 0.f;
    }
    // A key's scores and its value join what was seen. Columns behind a head's are zeros.
#pragma unroll 1
    for (int n = 0; n < rounds; n++) {
        const int at = span.from + n * groups + mine;
        const bool cached = at < span.to, there = at < span.to + last;
        if (!__any_sync(FULL, there)) break;
        float key[COLUMNS], value[COLUMNS];
        asm volatile("cp.async.wait_group %0;" ::"n"(KEYS - 1) : "memory");
#pragma unroll
        for (int i = 0; i < NV; i++) {
            const int vector = part + i * lanes;
            if (cached) {
                const bool in = vector < vectors;
                const uint4 none{0, 0, 0, 0};
                const uint4 k = in ? *reinterpret_cast<uint4*>(place(n, 0, i)) : none;
                const uint4 v = in ? *reinterpret_cast<uint4*>(place(n, 1, i)) : none;
#pragma unroll
                for (int e = 0; e < N; e++) {
                    key[i * N + e] = element<T>(k, e);
                    value[i * N + e] = element<T>(v, e);
                }
            } else {
#pragma unroll
                for (int e = 0; e < N; e++) {
                    key[i * N + e] = room.rows[G][vector * N + e];
                    value[i * N + e] = room.rows[G + 1][vector * N + e];
                }
            }
        }
#pragma unroll
        for (int g = 0; g < G; g++) {
            if (g >= here) break;
            float x = 0.f;
#pragma unroll
            for (int e = 0; e < COLUMNS; e += 4) {
                const float4 q = *reinterpret_cast<const float4*>(
                    &room.rows[g][(part + e / N * lanes) * N + e % N]);
                x = fmaf(q.x, key[e], x);
                x = fmaf(q.y, key[e + 1], x);
                x = fmaf(q.z, key[e + 2], x);
                x = fmaf(q.w, key[e + 3], x);
            }
            for (int d = lanes / 2; d > 0; d /= 2) x += __shfl_xor_sync(FULL, x, d);
            if (!there) continue;
            x = score(a, x, slope[g], at, position);
            const float top = fmaxf(most[g], x);
            const float keep = expf(most[g] - top), weight = expf(x - top);
            most[g] = top;
            sum[g] = sum[g] * keep + weight;
#pragma unroll
            for (int e = 0; e < COLUMNS; e++)
                acc[g][e] = fmaf(weight, value[e], acc[g][e] * keep);
        }
        bring(n + KEYS);
    }
    asm volatile("cp.async.wait_all;" ::: "memory");

    // Groups of a warp join, then warps; some may have seen nothing.
#pragma unroll
    for (int g = 0; g < G; g++) {
        for (int d = lanes; d < 32; d *= 2) {
            const float other = __shfl_xor_sync(FULL, most[g], d);
            const float top = fmaxf(most[g], other);
            const float keep = most[g] == top ? 1.f : expf(most[g] - top);
            const float theirs = other == top ? 1.f : expf(other - top);
            sum[g] = sum[g] * keep + __shfl_xor_sync(FULL, sum[g], d) * theirs;
#pragma unroll
            for (int e = 0; e < COLUMNS; e++)
                acc[g][e] = acc[g][e] * keep + __shfl_xor_sync(FULL, acc[g][e], d) * theirs;
            most[g] = top;
        }
        if (g >= here) continue;
        if (lane == 0) room.tops[warp] = most[g], room.weights[warp] = sum[g];
        if (lane < lanes)
#pragma unroll
            for (int e = 0; e < COLUMNS; e++)
                room.joined[warp][(part + e / N * lanes) * N + e % N] = acc[g][e];
        meet();
        // A lane has a warp's part, of sixteen.
        const float own_top = room.tops[lane % WARPS];
        const float top = warp_max(own_top);
        const float own_part = expf(own_top - top);
        const float all = warp_sum(lane < WARPS ? own_part * room.weights[lane % WARPS] : 0.f);
        for (int d = t; d < (dim + 31) / 32 * 32; d += THREADS) {
            float x = 0.f;
#pragma unroll
            for (int w = 0; w < WARPS; w++)
                x = fmaf(__shfl_sync(FULL, own_part, w), room.joined[w][d], x);
            if (d >= dim) break;
            tell(out + g * dim + d, span.active == 1 ? x / all : x);
        }
        if (t < 2) tell(seen + 2 * shares * g + t, t ? all : top);
        meet();
    }
}
