// What enters a step's matrix: every block makes all of it, in shared memory.
#pragma once

#include "program_ring.cuh"

// The part of each share of every head's keys in attention's result, `[heads, active]`: from their largest
// scores and sums of weights. Null where there is one share.
__device__ __forceinline__ const float* shares_of(const Step& s, float* factors, int& active) {
    const Attend& a = s.attend;
    const int position = fixed().position;
    if (position >= min(a.context, a.max_pos)) return nullptr;
    active = share_of(position, a.window, 0, s.shares).active;
    if (active == 1) return nullptr;
    // Half a warp has the shares of one head.
#pragma unroll 1
    for (int i = thread(); i < (a.heads + 1) / 2 * 32; i += THREADS) {
        const int head = i / MOST_SHARES, share = i % MOST_SHARES;
        const float2 seen = told_pair(
            a.partial + 2 * (min(head, a.heads - 1) * s.shares + min(share, active - 1)));
        float most = seen.x;
#pragma unroll
        for (int d = MOST_SHARES / 2; d > 0; d /= 2)
            most = fmaxf(most, __shfl_xor_sync(FULL, most, d));
        const float part = share < active ? expf(seen.x - most) : 0.f;
        float all = part * seen.y;
#pragma unroll
        for (int d = MOST_SHARES / 2; d > 0; d /= 2) all += __shfl_xor_sync(FULL, all, d);
        if (head < a.heads && share < active) factors[head * active + share] = part / all;
    }
    meet();
    return factors;
}

// Inputs of a thread: fours beside those of its neighbours, two at a time. What a step does beside its
// weights takes as long as its instructions and the reads of shared memory in all warps.
constexpr int HALF = 4 * THREADS, BOTH = 2 * HALF;

struct Eight {
    float v[8];

    // From input i on, or zeros behind the last; the second four are HALF behind the first.
    __device__ __forceinline__ static Eight at(const float* list, int i, int width) {
        const float4 none = make_float4(0.f, 0.f, 0.f, 0.f);
        const float4 a = *reinterpret_cast<const float4*>(list + i);
        const float4 b =
            i + HALF < width ? *reinterpret_cast<const float4*>(list + i + HALF) : none;
        return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
    }
    __device__ __forceinline__ void put(float* list, int i, int width) const {
        *reinterpret_cast<float4*>(list + i) = make_float4(v[0], v[1], v[2], v[3]);
        if (i + HALF < width)
            *reinterpret_cast<float4*>(list + i + HALF) = make_float4(v[4], v[5], v[6], v[7]);
    }
    // Where the k-th of those from i on is.
    __device__ __forceinline__ static int place(int i, int k) { return i + k + (k < 4 ? 0 : HALF - 4); }
    // How many are not zero, without predicates, which would wait for each other.
    __device__ __forceinline__ unsigned not_zero(int i, int width) const {
        unsigned n[2] = {0, 0};
#pragma unroll
        for (int k = 0; k < 8; k++) n[k / 4] += min(__float_as_uint(v[k]) << 1, 1u);
        return n[0] + (i + HALF < width ? n[1] : 0);
    }
};

// A list of a step's, which nobody writes: at hand, in shared memory, if there is room.
struct List {
    const float* far;  // or null
    int near;          // its byte, or 0

    // Each thread copies what it reads itself.
    __device__ __forceinline__ List(const float* list, int width, const Step& s, int& used) {
        far = list;
        near = 0;
        const int bytes = (4 * width + 15) / 16 * 16;
        if (!list || used + bytes > s.room) return;
        near = s.lists + used;
        used += bytes;
        float* const to = at_byte<float>(near);
#pragma unroll 1
        for (int i = thread() * 4; i < width; i += HALF) copy_16(to + i, list + i);
    }
    __device__ __forceinline__ bool at_hand() const { return !far || near; }
    // From input i on, at hand.
    __device__ __forceinline__ Eight at(int i, int width) const {
        return Eight::at(at_byte<float>(near), i, width);
    }
};

// The activations of `plain_value` with a number below 7, in two instructions: what is below the bound
// becomes it. NaN stays.
struct Plain {
    float shift, bound;

    __device__ __forceinline__ static bool has(int kind) { return kind == 0 || kind == 5 || kind == 6; }
    __device__ __forceinline__ Plain(int kind, float p) {
        shift = kind == 6 ? p : 0.f;
        bound = kind == 0 ? -INFINITY : 0.f;
    }
    __device__ __forceinline__ float value(float x) const {
        float y;
        asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x - shift), "f"(bound));
        return y;
    }
};

// What enters, in shared memory.
struct Entered {
    float* values;         // each input's
    float* scaled;         // the same times the units of their rows
    unsigned short* rows;  // those that are not zero

    // Rows by input have units in int8. Where the values themselves are read as well, those times units
    // lie behind them.
    __device__ __forceinline__ static Entered of(const Step& s) {
        const int filled = (s.feed.width + 63) / 64 * 64;
        float* const values = at_byte<float>(fixed().steps_own);
        float* const scaled =
            values + (s.kind == NEURONS && s.by_input && s.scales[0] ? filled : 0);
        return {values, scaled, reinterpret_cast<unsigned short*>(scaled + filled)};
    }
};

// Inputs on their way, before all else that a step needs.
struct Inputs {
    static constexpr int FEW = 3, MANY = 6;
    Fours<FEW> first;
    Fours<MANY - FEW> rest;

    __device__ __forceinline__ static int count(const Feed& f, int i) {
        return (f.width - i + HALF - 1) / HALF;
    }
    __device__ __forceinline__ void look(const Feed& f, int i) {
        const int n = count(f, i);
        first.look(f.x + i, HALF, n);
        if (f.width > FEW * HALF) rest.look(f.x + i + FEW * HALF, HALF, n - FEW);
    }
};

// A step's feed, with its lists.
struct Entering {
    Feed f;
    int used;
    List gain, bias, mask, unit;  // units are those of rows by input
    bool listed;

    // Where shares of attention's keys are joined, their parts have the place of lists.
    __device__ __forceinline__ explicit Entering(const Step& s)
        : f(s.feed), used(s.join ? s.room : 0), gain(f.gain, f.width, s, used),
          bias(f.bias, f.width, s, used), mask(f.mask, f.width, s, used),
          unit(s.by_input ? s.scales[0] : nullptr, f.width, s, used), listed(s.by_input) {
        asm volatile("cp.async.commit_group;" ::: "memory");
    }

    // What a thread copies behind its lists is for later.
    __device__ __forceinline__ static void lists_are_here() {
        asm volatile("cp.async.wait_group 1;" ::: "memory");
    }

    // What is summed of inputs while they are read: for a norm themselves, where it takes off their mean,
    // or squares; else how many are not zero.
    __device__ __forceinline__ float part(const float4& v) const {
        const auto one = [](float x) { return __float_as_uint(x) << 1 ? 1.f : 0.f; };
        if (!f.normed) return (one(v.x) + one(v.y)) + (one(v.z) + one(v.w));
        if (f.centred) return (v.x + v.y) + (v.z + v.w);
        return fmaf(v.x, v.x, v.y * v.y) + fmaf(v.z, v.z, v.w * v.w);
    }

    // The mean, where it is taken off, and what the rest is multiplied by; from the sum of this thread's
    // parts.
    __device__ __forceinline__ void norm(const float* values, float parts, float& mean,
                                         float& factor) const {
        const float each = 1.f / f.width;
        float sum = sum_of_block(parts, 0) * each;
        if (f.centred) {
            mean = sum;
            float squares = 0.f;
#pragma unroll 1
            for (int i = thread() * 4; i < f.width; i += BOTH) {
                const Eight x = Eight::at(values, i, f.width);
                float sums[2] = {0.f, 0.f};
#pragma unroll
                for (int k = 0; k < 8; k++) {
                    const float d = k < 4 || i + HALF < f.width ? x.v[k] - mean : 0.f;
                    sums[k % 2] += d * d;
                }
                squares += sums[0] + sums[1];
            }
            sum = sum_of_block(squares, 1) * each;
        }
        factor = rsqrtf(sum + f.eps);
    }

    // What is told, of which the first is being looked at: the sum of parts.
    __device__ __forceinline__ float read(float* values, Inputs& inputs) const {
        float parts = 0.f;
#pragma unroll 1
        for (int i = thread() * 4; i < f.width; i += Inputs::MANY * HALF) {
            if (i >= Inputs::MANY * HALF) inputs.look(f, i);
            parts += take(values, inputs.first, i);
            if (f.width > Inputs::FEW * HALF)
                parts += take(values, inputs.rest, i + Inputs::FEW * HALF);
        }
        return parts;
    }
    template <int N>
    __device__ __forceinline__ float take(float* values, Fours<N>& x, int i) const {
        const int count = Inputs::count(f, i);
        while (x.old()) x.look(f.x + i, HALF, count);
        float parts = 0.f;
#pragma unroll
        for (int k = 0; k < N; k++)
            if (k < count) {
                const float4 v = x.at(k);
                *reinterpret_cast<float4*>(values + i + k * HALF) = v;
                parts += part(v);
            }
        return parts;
    }
    // Attention's result, of the shares' sums one behind the other, each times its part.
    __device__ __forceinline__ float read_shares(float* values, const float* factors, int dim,
                                                 int shares) const {
        constexpr int N = 4;  // on their way
        float all = 0.f;
#pragma unroll 1
        for (int i = thread() * 4; i < f.width; i += HALF) {
            const float* const parts = factors + i / dim * shares;
            float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 1
            for (int from = 0; from < shares; from += N) {
                Fours<N> x;
                do x.look(f.x + from * f.width + i, f.width, shares - from);
                while (x.old());
#pragma unroll
                for (int k = 0; k < N; k++) {
                    if (from + k >= shares) break;
                    const float part = parts[from + k];
                    const float4 v = x.at(k);
                    sum.x = fmaf(part, v.x, sum.x), sum.y = fmaf(part, v.y, sum.y);
                    sum.z = fmaf(part, v.z, sum.z), sum.w = fmaf(part, v.w, sum.w);
                }
            }
            *reinterpret_cast<float4*>(values + i) = sum;
            all += part(sum);
        }
        return all;
    }

    // Any of it, one value after the other: activations with an exponential take long in any case.
    __device__ __forceinline__ void apply_any(float* values, float mean, float factor) const {
#pragma unroll 1
        for (int i = thread() * 4; i < f.width; i += HALF)
#pragma unroll 1
            for (int k = 0; k < 4; k++) {
                float x = values[i + k];
                if (f.normed)
                    x = (x - mean) * factor * (f.gain ? __ldg(f.gain + i + k) : 1.f) +
                        (f.bias ? __ldg(f.bias + i + k) : 0.f);
#pragma unroll 1
                for (int n = 0; n < 2; n++) {
                    x = inlined_curve(n ? f.then : f.op, n ? f.then_p : f.op_p, x);
                    if (!n && f.mask) x = __ldg(f.mask + i + k) * (fabsf(x) + FORCED);
                }
                values[i + k] = x;
            }
    }

    // Whether inputs go at once from the registers in which they came to their places and to the list: as
    // they are, or behind a norm whose factor may wait, as what is not zero and all sums are the same but
    // for that.
    __device__ __forceinline__ bool at_once(const Step& s) const {
        const auto straight = [](int kind) { return kind == 0 || kind == 5; };
        if (!listed || s.join || (unit.far && !unit.near)) return false;
        if (!f.normed)
            return !f.op && !f.mask && !f.then && f.width <= Inputs::MANY * HALF;
        return !f.centred && !f.bias && gain.near && mask.at_hand() && straight(f.op) && !f.then &&
               f.width <= Inputs::FEW * HALF;
    }

    // Those from input i on, times their units.
    __device__ __forceinline__ void put(const Entered& to, int i, const float4& v) const {
        if (!unit.far || to.scaled != to.values) *reinterpret_cast<float4*>(to.values + i) = v;
        if (unit.far) *reinterpret_cast<float4*>(to.scaled + i) = times(v, unit, i);
    }
    __device__ __forceinline__ static float4 times(const float4& v, const List& list, int i) {
        const float4 by = *reinterpret_cast<const float4*>(at_byte<float>(list.near) + i);
        return make_float4(v.x * by.x, v.y * by.y, v.z * by.z, v.w * by.w);
    }
    // Inputs from i on: how many are not zero.
    template <int N>
    __device__ __forceinline__ unsigned put_as_is(const Entered& to, Fours<N>& x, int i) const {
        const int count = Inputs::count(f, i);
        while (x.old()) x.look(f.x + i, HALF, count);
        unsigned n = 0;
#pragma unroll
        for (int k = 0; k < N; k++) {
            if (k >= count) break;
            const float4 v = x.at(k);
            n += not_zero(v);
            put(to, i + k * HALF, v);
        }
        return n;
    }
    __device__ __forceinline__ static unsigned not_zero(const float4& v) {
        const auto one = [](float x) { return min(__float_as_uint(x) << 1, 1u); };
        return (one(v.x) + one(v.y)) + (one(v.z) + one(v.w));
    }
    // The same behind a norm without its factor; adds their squares.
    template <int N>
    __device__ __forceinline__ unsigned put_normed(const Entered& to, Fours<N>& x, int i,
                                                   float& squares) const {
        const int count = Inputs::count(f, i);
        while (x.old()) x.look(f.x + i, HALF, count);
        const Plain op(f.op, 0.f);
        unsigned n = 0;
#pragma unroll
        for (int k = 0; k < N; k++) {
            if (k >= count) break;
            const int at = i + k * HALF;
            float4 v = x.at(k);
            squares += fmaf(v.x, v.x, v.y * v.y) + fmaf(v.z, v.z, v.w * v.w);
            v = times(v, gain, at);
            v = make_float4(op.value(v.x), op.value(v.y), op.value(v.z), op.value(v.w));
            if (mask.far) {
                v = make_float4(fabsf(v.x) + FORCED, fabsf(v.y) + FORCED, fabsf(v.z) + FORCED,
                                fabsf(v.w) + FORCED);
                v = times(v, mask, at);
            }
            put(to, at, v);
            // Counted as it will be listed: without its last bit.
            x.put(k, v);
            n += not_zero(x.at(k));
        }
        return n;
    }
    template <int N>
    __device__ __forceinline__ void list(const Entered& to, const Fours<N>& x, int i,
                                         unsigned& at) const {
        const int count = Inputs::count(f, i);
#pragma unroll
        for (int k = 0; k < N; k++) {
            if (k >= count) break;
            const float4 four = x.at(k);
            const float v[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const bool there = v[e] != 0.f;
                if (there) to.rows[at] = i + k * HALF + e;
                at += there;
            }
        }
    }

    // As `enter`, at once: threads meet two times.
    __device__ __forceinline__ int enter_at_once(const Step& s, const Entered& to,
                                                 Inputs& inputs) const {
        const int first = thread() * 4, rest = first + Inputs::FEW * HALF;
        lists_are_here();
        unsigned mine;
        if (f.normed) {
            float squares = 0.f;
            mine = put_normed(to, inputs.first, first, squares);
            part_of_sum(squares);
        } else {
            mine = put_as_is(to, inputs.first, first);
            if (f.width > Inputs::FEW * HALF) mine += put_as_is(to, inputs.rest, rest);
        }
        begin_step(s.number);
        unsigned total, at = sum_before(mine, total, 0);
        list(to, inputs.first, first, at);
        if (f.width > Inputs::FEW * HALF) list(to, inputs.rest, rest, at);
        if (f.counts && blockIdx.x == 0 && thread() < 2) f.counts[thread()] = total;
        if (thread() < (64 - f.width % 64) % 64) to.values[f.width + thread()] = 0.f;
        meet();
        // Who sums meets before it asks for this.
        if (thread() < 32) {
            const float factor = f.normed ? rsqrtf(all_parts_of_sum() / f.width + f.eps) : 1.f;
            if (thread() == 0) fixed().factor = factor;
        }
        return total;
    }

    // The step before is done: makes what enters, and the list where there is one. Returns how many
    // are on it. All threads see the result behind the call.
    __device__ __forceinline__ int enter(const Step& s, const Entered& to, Inputs& inputs) const {
        // Shared memory is read again behind every store to it: what loops need is in registers.
        const int width = f.width, first = thread() * 4;
        const bool counted = f.counts && blockIdx.x == 0;
        float* const values = to.values;
        int shares = 1;
        const float* const factors = s.join ? shares_of(s, parts_of_sums(), shares) : nullptr;
        // Each thread waits for its own inputs only, and for the lists that it copied.
        lists_are_here();
        const float parts = factors ? read_shares(values, factors, s.attend.head_dim, shares)
                                    : read(values, inputs);
        begin_step(s.number);
        float mean = 0.f, factor = 1.f;
        if (f.normed) norm(values, parts, mean, factor);
        const bool as_is = !f.normed && !f.op && !f.mask && !f.then;
        bool normed = f.normed, applied = as_is;
        if (!Plain::has(f.op) || !Plain::has(f.then) || !gain.at_hand() || !bias.at_hand() ||
            !mask.at_hand()) {
            apply_any(values, mean, factor);
            normed = false;
            applied = true;
        }
        unsigned mine = 0, seen = 0;  // on the list, and not zero
        if (as_is && !unit.far) {
            seen = static_cast<unsigned>(parts);
        } else if (listed || counted || !applied) {
            const Plain op(f.op, f.op_p), then(f.then, f.then_p);
#pragma unroll 1
            for (int i = first; i < width; i += BOTH) {
                Eight x = Eight::at(values, i, width);
                if (normed) {
#pragma unroll
                    for (int k = 0; k < 8; k++) x.v[k] = (x.v[k] - mean) * factor;
                    if (gain.far) {
                        const Eight gains = gain.at(i, width);
#pragma unroll
                        for (int k = 0; k < 8; k++) x.v[k] *= gains.v[k];
                    }
                    if (bias.far) {
                        const Eight biases = bias.at(i, width);
#pragma unroll
                        for (int k = 0; k < 8; k++) x.v[k] += biases.v[k];
                    }
                }
                if (!applied) {
#pragma unroll
                    for (int k = 0; k < 8; k++) x.v[k] = op.value(x.v[k]);
                    if (mask.far) {
                        const Eight open = mask.at(i, width);
#pragma unroll
                        for (int k = 0; k < 8; k++)
                            x.v[k] = open.v[k] * (fabsf(x.v[k]) + FORCED);
                    }
#pragma unroll
                    for (int k = 0; k < 8; k++) x.v[k] = then.value(x.v[k]);
                    x.put(values, i, width);
                }
                seen += x.not_zero(i, width);
                if (unit.far) {
                    const Eight units = unit.near ? unit.at(i, width) : Eight::at(unit.far, i, width);
#pragma unroll
                    for (int k = 0; k < 8; k++) x.v[k] *= units.v[k];
                    x.put(to.scaled, i, width);
                    mine += x.not_zero(i, width);
                }
            }
        }
        if (!unit.far) mine = seen;
        unsigned total = 0;
        if (listed) {
            // Each thread's inputs, thread by thread: always in the same order.
            unsigned at = sum_before(mine, total, 0);
#pragma unroll 1
            for (int i = first; i < width; i += BOTH) {
                const Eight x = Eight::at(to.scaled, i, width);
#pragma unroll
                for (int k = 0; k < 8; k++) {
                    const bool there = x.v[k] != 0.f;
                    if (there) to.rows[at] = Eight::place(i, k);
                    at += there;
                }
            }
        }
        if (counted) {
            unsigned all = total;
            if (!listed || unit.far) sum_before(seen, all, 1);
            if (thread() < 2) f.counts[thread()] = all;
        }
        // Rows of weights are filled up, and so is what they are multiplied by.
        if (thread() < (64 - width % 64) % 64) values[width + thread()] = 0.f;
        if (thread() == 0) fixed().factor = 1.f;
        meet();
        return total;
    }
};
