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
    const int all = gridDim.x * THREADS, t = blockIdx.x * THREADS + threadIdx.x;
    for (int column = t; column < e.width; column += all) tell(e.x + column, embedded<T>(e, 0, column));
    for (int i = t; i < p.words; i += all) p.counts[i] = 0;
}

template <typename W>
__device__ __forceinline__ void attention(const Program& p, int step) {
    using T = typename Cache<W>::T;
    const Attend& a = fixed().steps[step].attend;
    const int group = a.heads / a.kv_heads;
    if (group == 1)
        attend<T, 1>(p, step);
    else if (group <= 4)
        attend<T, 4>(p, step);
    else
        attend<T, 8>(p, step);
}

// The open neurons of the block's, from the gate of thread t's: how many.
__device__ __forceinline__ int list_open(const Step& s, float gate, int neuron, bool there,
                                         float bias, float mask) {
    Fixed& f = fixed();
    const unsigned lists = f.lists;
    gate = inlined_curve(s.act, s.act_p, gate + bias);
    if (s.mask) gate = mask * (fabsf(gate) + FORCED);
    const bool open = there && gate != 0.f;
    if (there && !open) tell(s.out.y + neuron, 0.f);
    // The list before is done with.
    if (lists > 0) signal_wait(&f.taken, (lists - 1) & 1);
    unsigned count;
    const unsigned at = sum_before(open, count, 2);
    if (open) {
        f.open[at] = neuron;
        f.gates[at] = gate;
    }
    if (threadIdx.x == 0) {
        f.open_count = count;
        f.lists = lists + 1;
    }
    meet();
    if (threadIdx.x == 0) {
        signal_arrive(&f.listed, 1);
        if (s.counts)
            for (int k = 0; k < 2; k++) atomicAdd(s.counts + k, count);
    }
    return count;
}

// A step with a matrix or two: what enters; by input the sums of columns, then rows that come
// through the ring, all or those of open neurons; and what becomes of the sums.
template <typename W>
__device__ __forceinline__ void product(const Program& p, int step) {
    constexpr int N = Weights<W>::N;
    const Step& s = fixed().steps[step];
    const int t = threadIdx.x, outputs = s.out.outputs;
    const bool neurons = s.kind == NEURONS, add = s.kind == ADD, by_input = s.by_input;
    // Rows by input have units in int8. Where the values themselves are read as well, those times
    // units lie behind them.
    const int filled = (s.feed.width + 63) / 64 * 64;
    Entered in;
    in.values = at_byte<float>(fixed().steps_own);
    in.scaled = in.values + (neurons && by_input && s.scales[0] ? filled : 0);
    in.rows = reinterpret_cast<unsigned short*>(in.scaled + filled);
    const Entering entering(p, s);

    // Outputs of the block: columns by input, else rows; the first ones are thread t's as well.
    const int first = min(static_cast<int>(blockIdx.x) * s.columns.lanes * N, outputs);
    const int count = by_input ? min(s.columns.lanes * N, outputs - first) : count_of(s.own);
    const int mine = by_input ? first + t : own_row(t);
    // On their way meanwhile.
    float sum = 0.f, bias = 0.f, mask = 1.f;
    const float* const before = s.before;
    Coming residual(before && t < count ? before + mine : nullptr);
    if (neurons && s.out.bias && t < count) bias = __ldg(s.out.bias + mine);
    if (neurons && s.mask && t < count) mask = __ldg(s.mask + mine);
    wait_for_most(p);
    const int total = entering.enter(s, in);
    // A result of the block's, its i-th.
    const auto give = [&](int row, float v, int i) {
        if (before) v += i == t ? residual.value() : told(before + row);
        if (s.last)
            s.out.y[row] = v;
        else
            tell(s.out.y + row, v);
    };
    if (by_input) sum = columns<W>(s, in, total);
    if (add) {
        if (t < count) give(mine, finished(s.out, mine, sum), t);
        return;
    }
    float* const sums = fixed().sums;
    const int passes = neurons || s.pairs ? 2 : 1;
    int rows = count;
#pragma unroll 1
    for (int pass = by_input ? 1 : 0; pass < passes; pass++) {
        if (pass == 1 && neurons) {
            if (!by_input && t < count)
                sum = s.scales[0] ? sums[t] * __ldg(s.scales[0] + mine) : sums[t];
            rows = list_open(s, sum, mine, t < count, bias, mask);
        }
        dots<W>(p, s.teams, s.stride[pass] / N, in.values, rows, sums + (pass && s.pairs ? count : 0));
    }
    for (int i = t; i < rows; i += THREADS) {
        const int row = neurons ? fixed().open[i] : own_row(i);
        const auto scaled = [&](int which, float v) {
            return s.scales[which] ? v * __ldg(s.scales[which] + row) : v;
        };
        if (s.kind == ROWS && !s.pairs) {
            give(row, finished(s.out, row, scaled(0, sums[i])), i);
            continue;
        }
        float gate = neurons ? fixed().gates[i] : scaled(0, sums[i]);
        if (!neurons)
            gate = inlined_curve(s.act, s.act_p, gate + (s.out.bias ? __ldg(s.out.bias + row) : 0.f));
        float up = scaled(1, sums[i + (neurons ? 0 : count)]);
        if (s.up_bias) up += __ldg(s.up_bias + row);
        give(row, inlined_curve(s.then, s.then_p, gate * up), i);
    }
}

template <typename W>
__device__ __forceinline__ void walk(const Program& p) {
    const int t = threadIdx.x;
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
            attention<W>(p, step);
        else
            product<W>(p, step);
        asm volatile("cp.async.wait_all;" ::: "memory");
        if (n + 1 < p.step_count) arrive(p);
    }
}

template <typename W>
__device__ __forceinline__ void run(const Program& p) {
    const int t = threadIdx.x;
    Fixed& f = fixed();
    if (t < sizeof(Step) / 16)
        reinterpret_cast<uint4*>(f.steps)[t] = reinterpret_cast<const uint4*>(p.steps)[t];
    if (t == 0) {
        f.steps_own = FIXED + p.flight;
        f.ring = f.steps_own + p.scratch;
        f.position = static_cast<int>(min(load(p.positions), 0x7fffffffu));
        f.pieces = f.lists = 0;
        f.slot = 0;
        begin_meetings(p);
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
        if (t % 32 == 0) bring_rows(p, (t - THREADS) / 32);
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
