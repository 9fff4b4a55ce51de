// A token's whole way through a decoder as one kernel: the steps of a program, one after the other.

#include "program_add.cuh"
#include "program_attention.cuh"
#include "program_ring.cuh"

#if __CUDA_ARCH__ >= 900 || !defined(__CUDA_ARCH__)

// How a format's keys and values are stored, and its embeddings.
template <typename W>
struct Cache {
    using T = bf16;
    using Table = bf16;
};
template <>
struct Cache<float> {
    using T = float;
    using Table = float;
};

// The first step, which no other is before.
template <typename W>
__device__ __forceinline__ void begin(const Program& p, const Embed& e) {
    using T = typename Cache<W>::Table;
    const int all = gridDim.x * THREADS, t = blockIdx.x * THREADS + thread();
    for (int column = t; column < e.width; column += all) tell(e.x + column, embedded<T>(e, 0, column));
    for (int i = t; i < p.words; i += all) p.counts[i] = 0;
}

template <typename W>
__device__ __forceinline__ void attention(const Program& p, const Step& s) {
    using T = typename Cache<W>::T;
    const Attend& a = s.attend;
    const int group = a.heads / a.kv_heads;
    if (group == 1)
        attend<T, 1>(p, s);
    else if (group <= 4)
        attend<T, 4>(p, s);
    else
        attend<T, 8>(p, s);
}

// What is known of the block's i-th output, from a list that has it at `row`: on its way to shared memory
// while the output is summed. A register would have to wait for it.
__device__ __forceinline__ void look_at(What what, const float* list, int i, int row) {
    if (!list || i >= KNOWN) return;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address(fixed().known[what] + i)),
                 "l"(list + row)
                 : "memory");
}
// The same thread's, behind all it copied; `none` where there is no list.
__device__ __forceinline__ float known(What what, const float* list, int i, int row, float none) {
    if (!list) return none;
    return i < KNOWN ? fixed().known[what][i] : __ldg(list + row);
}

__device__ __forceinline__ void look_at_output(const Step& s, int i, int row) {
    look_at(RESIDUAL, s.before, i, row);
    look_at(BIAS, s.out.bias, i, row);
    look_at(MASK, s.mask, i, row);
    if (!s.by_input) look_at(SCALE, s.scales[0], i, row);
}
__device__ __forceinline__ void look_at_up(const Step& s, int i, int row) {
    look_at(UP_BIAS, s.up_bias, i, row);
    look_at(UP_SCALE, s.scales[1], i, row);
}

// A result of the block's, its i-th.
__device__ __forceinline__ void give(const Step& s, int i, int row, float v) {
    if (s.before) {
        const float* const from = s.before + row;
        Coming residual =
            i < KNOWN ? Coming(from, fixed().known[RESIDUAL][i]) : Coming(from);
        v += residual.value();
    }
    if (s.last)
        s.out.y[row] = v;
    else
        tell(s.out.y + row, v);
}

// The open neurons of the block's, from the gate of thread t's: how many.
__device__ __forceinline__ int list_open(const Step& s, float gate, int neuron, bool there) {
    Fixed& f = fixed();
    const unsigned lists = f.lists;
    const int t = thread();
    asm volatile("cp.async.wait_all;" ::: "memory");
    if (there) {
        if (!s.by_input) gate *= known(SCALE, s.scales[0], t, neuron, 1.f);
        gate = inlined_curve(s.act, s.act_p, gate + known(BIAS, s.out.bias, t, neuron, 0.f));
        if (s.mask) gate = known(MASK, s.mask, t, neuron, 1.f) * (fabsf(gate) + FORCED);
    }
    const bool open = there && gate != 0.f;
    // The list before is done with.
    if (lists > 0) signal_wait(&f.taken, (lists - 1) & 1);
    unsigned count;
    const unsigned at = sum_before(open, count, 2);
    if (open) {
        f.open[at] = neuron;
        f.gates[at] = gate;
    }
    if (thread() == 0) {
        f.open_count = count;
        f.lists = lists + 1;
    }
    meet();
    if (thread() == 0) {
        signal_arrive(&f.listed, 1);
        if (s.counts)
            for (int k = 0; k < 2; k++) atomicAdd(s.counts + k, count);
    }
    if (there && !open) tell(s.out.y + neuron, 0.f);
    return count;
}

// A step with a matrix or two: what enters; by input the sums of columns, then rows that come
// through the ring, all or those of open neurons; and what becomes of the sums.
template <typename W>
__device__ __forceinline__ void product(const Program& p, const Step& s) {
    constexpr int N = Weights<W>::N;
    const int t = thread(), outputs = s.out.outputs;
    // A block that comes late finds everything told, and looks at it before it does anything else.
    Inputs inputs;
    const bool late = most_are_done(s.number);
    if (late) inputs.look(s.feed, 4 * t);
    const bool neurons = s.kind == NEURONS, add = s.kind == ADD, by_input = s.by_input;
    // Rows by input have units in int8. Where the values themselves are read as well, those times
    // units lie behind them.
    const int filled = (s.feed.width + 63) / 64 * 64;
    Entered in;
    in.values = at_byte<float>(fixed().steps_own);
    in.scaled = in.values + (neurons && by_input && s.scales[0] ? filled : 0);
    in.rows = reinterpret_cast<unsigned short*>(in.scaled + filled);
    const Entering entering(s);

    // Outputs of the block: columns by input, else rows; the first ones are thread t's as well.
    const int first = min(static_cast<int>(blockIdx.x) * s.columns.lanes * N, outputs);
    const int count = by_input ? min(s.columns.lanes * N, outputs - first) : count_of(s.own);
    const int mine = by_input ? first + t : own_row(t);
    if (!late) {
        wait_for_most(p, s.number);
        inputs.look(s.feed, 4 * t);
    }
    const int total = entering.enter(s, in, inputs);
    if (t < count) look_at_output(s, t, mine);
    if (s.pairs && t < count) look_at_up(s, t, mine);
    float sum = 0.f;
    if (by_input) sum = columns<W>(s, in, total);
    if (add) {
        if (t < count)
            give(s, t, mine, finished(s.out, sum + known(BIAS, s.out.bias, t, mine, 0.f)));
        return;
    }
    float* const sums = fixed().sums;
    const int passes = neurons || s.pairs ? 2 : 1;
    int rows = count;
#pragma unroll 1
    for (int pass = by_input ? 1 : 0; pass < passes; pass++) {
        if (pass == 1 && neurons) {
            rows = list_open(s, by_input || t >= count ? sum : sums[t], mine, t < count);
            if (t < rows) look_at_up(s, t, fixed().open[t]);
        }
        dots<W>(p, s.teams, s.stride[pass] / N, in.values, rows, sums + (pass && s.pairs ? count : 0),
                s.pairs && pass == 0);
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
#pragma unroll 1
    for (int i = t; i < rows; i += THREADS) {
        const int row = neurons ? fixed().open[i] : own_row(i);
        float v;
        if (!neurons)
            v = sums[i] * known(SCALE, s.scales[0], i, row, 1.f) + known(BIAS, s.out.bias, i, row, 0.f);
        if (s.kind == ROWS && !s.pairs) {
            give(s, i, row, finished(s.out, v));
            continue;
        }
        const float gate = neurons ? fixed().gates[i] : inlined_curve(s.act, s.act_p, v);
        const float up = sums[i + (neurons ? 0 : count)] * known(UP_SCALE, s.scales[1], i, row, 1.f) +
                         known(UP_BIAS, s.up_bias, i, row, 0.f);
        give(s, i, row, inlined_curve(s.then, s.then_p, gate * up));
    }
}

template <typename W>
__device__ __forceinline__ void walk(const Program& p) {
    const int t = thread();
#pragma unroll 1
    for (int n = 0; n < p.step_count; n++) {
        Fixed& f = fixed();
        const int step = n & 1;
        // The next one is on its way meanwhile.
        if (n + 1 < p.step_count && t < sizeof(Step) / 16)
            copy_16(reinterpret_cast<uint4*>(f.steps + (step ^ 1)) + t,
                    reinterpret_cast<const uint4*>(p.steps + n + 1) + t);
        const int kind = f.steps[step].kind;
        if (kind == EMBED)
            begin<W>(p, f.steps[step].embed);
        else if (kind == ATTEND)
            attention<W>(p, f.steps[step]);
        else
            product<W>(p, f.steps[step]);
        asm volatile("cp.async.wait_all;" ::: "memory");
        if (n + 1 < p.step_count) arrive(p, n);
    }
}

template <typename W>
__device__ __forceinline__ void run(const Program& p) {
    const int t = thread();
    Fixed& f = fixed();
    if (t < sizeof(Step) / 16)
        reinterpret_cast<uint4*>(f.steps)[t] = reinterpret_cast<const uint4*>(p.steps)[t];
    if (t == 0) {
        f.steps_own = FIXED + p.flight;
        f.ring = p.ring;
        f.position = static_cast<int>(min(load(p.positions), 0x7fffffffu));
        f.pieces = f.lists = 0;
        f.slot = 0;
        begin_token(p);
        for (int i = 0; i < SIGNALS; i++) {
            signal_init(f.full + i, 1);
            signal_init(f.empty + i, WARPS);
        }
        signal_init(&f.listed, 1);
        signal_init(&f.taken, BRINGERS);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (t < THREADS) {
        take_registers();
        walk<W>(p);
    } else {
        leave_registers();
        const int which = (t - THREADS) / 32;
        if (t % 32 == 0) {
            if (which < BRINGERS)
                bring_rows(p, which);
            else
                watch(p);
        }
    }
}

#else
template <typename W>
__device__ __forceinline__ void run(const Program&) {}
#endif

#define ENTRY(SUFFIX, W)                                                    \
    extern "C" __global__ void __launch_bounds__(ALL, 1)           \
        program_##SUFFIX(const __grid_constant__ Program p) {               \
        run<W>(p);                                                          \
    }
ENTRY(f32, float)
ENTRY(bf16, bf16)
ENTRY(int8, int8_t)
