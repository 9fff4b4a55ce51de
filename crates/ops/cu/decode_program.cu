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
    const int all = blocks() * THREADS, t = blockIdx.x * THREADS + thread();
    for (int column = t; column < e.width; column += all) tell(e.x + column, embedded<T>(e, 0, column));
    for (int i = t; i < p.words; i += all) p.counts[i] = 0;
}

// Step n is on its way to shared memory.
__device__ __forceinline__ void bring_step(const Program& p, int n) {
    const int t = thread();
    if (n < p.step_count && t < sizeof(Step) / 16)
        copy_16(reinterpret_cast<uint4*>(fixed().steps + n % 2) + t,
                reinterpret_cast<const uint4*>(p.steps + n) + t);
}

template <typename W>
__device__ __forceinline__ void attention(const Program& p) {
    using T = typename Cache<W>::T;
    const Step& s = this_step();
    bring_step(p, s.number + 1);
    const int group = s.attend.heads / s.attend.kv_heads;
    if (group == 1)
        attend<T, 1>(p);
    else if (group <= 4)
        attend<T, 4>(p);
    else
        attend<T, 8>(p);
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

// The output of thread t, if it has one: the block's i-th of `count`. By input that is column t, or the
// neuron of columns in both halves of 16 bytes; else row t.
struct Mine {
    int i, count, row;

    template <int N>
    __device__ __forceinline__ static Mine of(const Step& s) {
        const int t = thread();
        if (!s.by_input) return {t, count_of(s.own), own_row(t)};
        const bool halves = s.kind == ADD && s.pairs;
        const int each = halves ? N / 2 : N, outputs = s.out.outputs;
        const int first = min(static_cast<int>(blockIdx.x) * s.columns.lanes * each, outputs);
        const int count = min(s.columns.lanes * each, outputs - first);
        const int i = t % N < each ? t / N * each + t % N : count;
        return {i, count, first + i};
    }
    __device__ __forceinline__ bool there() const { return i < count; }
};

__device__ __forceinline__ void look_at_up(const Step& s, int i, int row) {
    look_at(UP_BIAS, s.up_bias, i, row);
    look_at(UP_SCALE, s.scales[1], i, row);
}
// Of a thread's own output. What it is added to was told before the step before this one could end, or
// is looked at again.
template <int N>
__device__ __forceinline__ void look_at_outputs(const Step& s) {
    const Mine mine = Mine::of<N>(s);
    if (!mine.there()) return;
    look_at(RESIDUAL, s.before, mine.i, mine.row);
    look_at(BIAS, s.out.bias, mine.i, mine.row);
    look_at(MASK, s.mask, mine.i, mine.row);
    if (!s.by_input) look_at(SCALE, s.scales[0], mine.i, mine.row);
    if (s.pairs) look_at_up(s, mine.i, mine.row);
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

// A neuron's gate, the i-th of the block's, from its sum.
__device__ __forceinline__ float opened(const Step& s, float sum, int i, int neuron) {
    const float gate =
        inlined_curve(s.act, s.act_p, sum + known(BIAS, s.out.bias, i, neuron, 0.f));
    return s.mask ? known(MASK, s.mask, i, neuron, 1.f) * (fabsf(gate) + FORCED) : gate;
}

// What becomes of gate and `up`, where columns of both are side by side: thread t has the sum of column t.
template <int N>
__device__ __forceinline__ void give_products(const Step& s, float sum, const Mine& mine) {
    const float up = __shfl_down_sync(FULL, sum, N / 2);
    const float gate = mine.there() ? opened(s, sum, mine.i, mine.row) : 0.f;
    const unsigned open = __popc(__ballot_sync(FULL, gate != 0.f));
    if (s.counts && open && thread() % 32 == 0)
        for (int k = 0; k < 2; k++) atomicAdd(s.counts + k, open);
    if (!mine.there()) return;
    float product = 0.f;
    if (gate != 0.f)
        product = inlined_curve(s.then, s.then_p,
                                gate * (up + known(UP_BIAS, s.up_bias, mine.i, mine.row, 0.f)));
    give(s, mine.i, mine.row, product);
}

// The open neurons of the block's, from the gate of thread t's: how many.
__device__ __forceinline__ int list_open(const Step& s, float gate, int neuron, bool there) {
    Fixed& f = fixed();
    const unsigned lists = f.lists;
    const int t = thread();
    asm volatile("cp.async.wait_all;" ::: "memory");
    if (there) {
        if (!s.by_input) gate *= known(SCALE, s.scales[0], t, neuron, 1.f);
        gate = opened(s, gate, t, neuron);
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

// The products with rows that come through the ring, all or those of open neurons, and what becomes of
// them. By input `gate` is the sum of thread t's gate.
template <typename W>
__device__ __forceinline__ void rows(const Program& p, float gate) {
    constexpr int N = Weights<W>::N;
    const Step& s = this_step();
    const auto neurons = [&] { return s.kind == NEURONS; };
    const int own = s.by_input ? Mine::of<N>(s).count : count_of(s.own);
    int count = own;
#pragma unroll 1
    for (int pass = s.by_input ? 1 : 0; pass < (neurons() || s.pairs ? 2 : 1); pass++) {
        if (pass == 1 && neurons()) {
            const int t = thread();
            const float sum = s.by_input || t >= own ? gate : fixed().sums[t];
            count = list_open(s, sum, Mine::of<N>(s).row, t < own);
            if (t < count) look_at_up(s, t, fixed().open[t]);
        }
        dots<W>(p, s.teams, s.spare, s.stride[pass] / N, at_byte<float>(fixed().steps_own), count,
                fixed().sums + (pass && s.pairs ? own : 0), s.pairs && pass == 0);
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
#pragma unroll 1
    for (int i = thread(); i < count; i += THREADS) {
        const int row = neurons() ? fixed().open[i] : own_row(i);
        float v;
        if (!neurons())
            v = fixed().sums[i] * known(SCALE, s.scales[0], i, row, 1.f) +
                known(BIAS, s.out.bias, i, row, 0.f);
        if (s.kind == ROWS && !s.pairs) {
            give(s, i, row, finished(s.out, v));
            continue;
        }
        const float open = neurons() ? fixed().gates[i] : inlined_curve(s.act, s.act_p, v);
        const float up = fixed().factor * fixed().sums[i + (neurons() ? 0 : own)] *
                             known(UP_SCALE, s.scales[1], i, row, 1.f) +
                         known(UP_BIAS, s.up_bias, i, row, 0.f);
        give(s, i, row, inlined_curve(s.then, s.then_p, open * up));
    }
}

// A step with a matrix or two: what enters, and then sums of columns by input, rows, or the first for the
// gate and the other for `up`.
template <typename W>
__device__ __forceinline__ void product(const Program& p) {
    constexpr int N = Weights<W>::N;
    const Step& s = this_step();
    // A block that comes late finds everything told, and looks at it before it does anything else.
    Inputs inputs;
    const bool late = most_are_done(s.number);
    if (late) inputs.look(s.feed, 4 * thread());
    // Before those come: what will be needed with them, and after them.
    const Entering entering(s);
    bring_step(p, s.number + 1);
    look_at_outputs<N>(s);
    asm volatile("cp.async.commit_group;" ::: "memory");
    if (!late) {
        wait_for_most(p, s.number);
        inputs.look(s.feed, 4 * thread());
    }
    const Entered in = Entered::of(s);
    const int total = entering.at_once(s) ? entering.enter_at_once(s, in, inputs)
                                          : entering.enter(s, in, inputs);
    float sum = 0.f;
    if (s.by_input) sum = columns<W>(s, in, total) * fixed().factor;
    if (s.kind != ADD) {
        rows<W>(p, sum);
        return;
    }
    const Mine mine = Mine::of<N>(s);
    if (s.pairs)
        give_products<N>(s, sum, mine);
    else if (mine.there())
        give(s, mine.i, mine.row,
             finished(s.out, sum + known(BIAS, s.out.bias, mine.i, mine.row, 0.f)));
}

template <typename W>
__device__ __forceinline__ void walk(const Program& p) {
    bring_step(p, 1);
    begin<W>(p, fixed().steps[0].embed);
    asm volatile("cp.async.wait_all;" ::: "memory");
    arrive(p, true);
#pragma unroll 1
    while (step_number() < p.step_count) {
        if (this_step().kind == ATTEND)
            attention<W>(p);
        else
            product<W>(p);
        asm volatile("cp.async.wait_all;" ::: "memory");
        const int after = thread() ? 0 : this_step().spare.after;
        arrive(p, false);
        if (after) static_cast<volatile int&>(fixed().freed) = after;
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
        f.pieces = f.lists = f.spares = f.freed = 0;
        f.slot = 0;
        begin_token(p);
        for (int i = 0; i < SIGNALS; i++) {
            signal_init(f.full + i, 1);
            signal_init(f.empty + i, WARPS);
        }
        signal_init(&f.listed, 1);
        signal_init(&f.taken, BRINGERS);
        signal_init(&f.spare_full, 1);
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
                watch(p, [&](int step) { bring_spare(p.steps[step]); });
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
