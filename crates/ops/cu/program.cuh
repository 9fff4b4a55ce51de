// A token's whole way through a decoder as one kernel that stays on the GPU.
//
// One block on each multiprocessor goes through the steps of a program, and tells the others its
// results. What a step costs beside its weights is that and not the start of a kernel; and weights
// that are read in any case are on their way to shared memory long before their step.
//
// A block has WARPS warps that work, and a few more of which a thread each brings those weights or
// watches the others.
#pragma once

#include "decode_attention.cuh"
#include "embed.cuh"

constexpr int WARPS = 16, THREADS = 32 * WARPS;
constexpr int BRINGERS = 3;
// With the one that watches: registers move between groups of four warps.
constexpr int ALL = THREADS + 32 * (BRINGERS + 1);

enum Kind { EMBED, ADD, ROWS, NEURONS, ATTEND };

// What follows is as in src/cuda/decode/program/parts.rs. Each warp does all that a step does beside its
// weights, and a division takes long: quotients come with the step.

// Rows of a block's own, every so-manieth of all.
struct Own {
    int each, more;  // of `more` blocks one more
};

// A block's last rows behind attention, which do not come through the ring: while attention leaves the
// GPU's memory idle, they come to memory of the block that neither step needs.
struct Spare {
    int rows;
    int byte;   // where
    int after;  // of the step in front of attention: the one that has them
};

// Rows that come through the ring.
struct Pass {
    const void* weights;
    Own own;
    int row_bytes;
    int pieces;  // of a row
    int listed;  // only those that the block's list names
    int step;    // that reads them
};

// How warps share rows.
struct Teams {
    int size, count;         // warps of a team, and teams
    int pieces, warps;       // of a row, and warps that read one
    int room;                // rows whose parts there is room for, as many of each team
    unsigned by_size, by_warps;
};

// How threads share columns of all rows.
struct Columns {
    int lanes;   // vectors of a row that a block has
    int groups;  // of threads that have them
    int parts;   // of threads that add a column's sums
    unsigned by_lanes, by_width, by_fours;
};

struct __align__(16) Step {
    int kind;
    int by_input;  // of NEURONS: how the gate lies
    int pairs;     // gate and up: of ROWS a row of each, of ADD half of each 16 bytes
    int join;      // of attention's result, whether shares of its keys are still to be joined
    int number;    // of those before
    int last;      // its results are the program's
    int row_bytes;  // of its rows
    int lists;     // byte where there is room for its lists,
    int room;      // and so many bytes
    Feed feed;
    Out out;
    Own own;  // outputs, of rows
    Teams teams;
    Spare spare;
    Columns columns;
    const void* weights[2];
    const float* scales[2];
    long long stride[2];
    const float* up_bias;
    const float* mask;
    unsigned* counts;  // open gates, added up
    const float* before;  // what the result is added to, or null
    int act;
    float act_p;
    int then;
    float then_p;
    int shares;  // of each head's keys
    Attend attend;
    Embed embed;
};

struct Program {
    const Step* steps;
    const Pass* passes;  // that come through the ring, in the order of the steps
    unsigned long long* arrived;
    const unsigned* positions;
    unsigned* counts;
    int step_count, pass_count, words;
    int flight, ring, slot_bytes;  // bytes: of pieces on their way, before the ring, of its slots
    int slots;
};

// The group that brings weights needs few registers, and the others take what it leaves.
__device__ __forceinline__ void take_registers() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    asm volatile("setmaxnreg.inc.sync.aligned.u32 112;");
#endif
}
__device__ __forceinline__ void leave_registers() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
#endif
}

// The thread's number, read each time: kept, it would have a place in local memory, which is far.
__device__ __forceinline__ int thread() {
    int t;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(t));
    return t;
}

// Blocks in all, read each time as well.
__device__ __forceinline__ int blocks() {
    int n;
    asm volatile("mov.u32 %0, %%nctaid.x;" : "=r"(n));
    return n;
}

// The working threads of a block meet.
__device__ __forceinline__ void meet() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); }

// A block's shared memory.
constexpr int PIECE = 16 * THREADS;  // bytes that the threads copy at once
constexpr int OWN = 2048;            // outputs of a block
constexpr int OPEN = 512;            // neurons of a block
constexpr int SIGNALS = 48;          // of pieces in the ring, in turn
constexpr int KNOWN = 128;           // outputs of a block

// What is known of an output before it is summed.
enum What { RESIDUAL, BIAS, MASK, UP_BIAS, SCALE, UP_SCALE, WHATS };

struct Fixed {
    Step steps[2];
    unsigned long long full[SIGNALS], empty[SIGNALS], listed, taken, spare_full;
    unsigned arrived, seen;  // before this token, and in it
    unsigned phase;          // of this token's words
    int step;                // that has begun
    int number;              // of the step that threads are at
    float factor;  // of sums by input: the norm's, where it waits for them
    float sums[OWN];
    float gates[OPEN];
    float known[WHATS][KNOWN];
    unsigned short open[OPEN];
    unsigned marks[3][WARPS];
    float scratch[2][WARPS];
    int open_count;
    unsigned pieces, lists;  // that came through the ring; that were made
    unsigned spares;         // times that spare rows were read
    int freed;               // the last step whose spare rows may come
    int slot;                // of the next piece
    int position;
    int steps_own, ring;  // where they begin
};

// Threads share all of it, and nothing is left to be kept in local memory, which would lie in L2:
// behind FIXED bytes there are pieces on their way, what the step needs, and the ring.
extern __shared__ __align__(128) unsigned char shared[];
constexpr int FIXED = 17 << 10;
static_assert(sizeof(Fixed) <= FIXED, "has room");

__device__ __forceinline__ Fixed& fixed() { return *reinterpret_cast<Fixed*>(shared); }

template <typename T>
__device__ __forceinline__ T* at_byte(int byte) {
    return reinterpret_cast<T*>(shared + byte);
}

// Pieces of rows by input that a thread has on their way: they have a place each, because those that
// come into registers take lines of L1, of which all this shared memory leaves too few.
constexpr int AHEAD = 6;
constexpr int FLIGHT = AHEAD * PIECE;
constexpr int PARTS = 16 * THREADS;  // floats: parts of sums, when nothing is on its way
static_assert(4 * PARTS <= FLIGHT, "in the same place");

__device__ __forceinline__ float* parts_of_sums() { return at_byte<float>(FIXED); }

// An activation by its number, as `curve_value`, without a call: around one, registers would go to
// local memory.
__device__ __forceinline__ float inlined_curve(int kind, float p, float x) {
    return is_smooth(kind) ? AnyCurve{kind, p}.value(x) : plain_value(kind, p, x);
}

// Sums over the working threads, in each. Another place until all have met again.
__device__ __forceinline__ float sum_of_block(float v, int place) {
    float* scratch = fixed().scratch[place];
    const int lane = thread() & 31, warp = thread() >> 5;
    v = warp_sum(v);
    if (lane == 0) scratch[warp] = v;
    meet();
    return warp_sum(lane < WARPS ? scratch[lane] : 0.f);
}

// The same in two halves: threads meet in between.
__device__ __forceinline__ void part_of_sum(float v) {
    v = warp_sum(v);
    if (thread() % 32 == 0) fixed().scratch[0][thread() / 32] = v;
}
__device__ __forceinline__ float all_parts_of_sum() {
    const int lane = thread() & 31;
    return warp_sum(lane < WARPS ? fixed().scratch[0][lane] : 0.f);
}

// The sum of `n` over the threads in front of this one, and over all. Another place until all have met
// again.
__device__ __forceinline__ unsigned sum_before(unsigned n, unsigned& total, int place) {
    unsigned* scratch = fixed().marks[place];
    const int lane = thread() & 31, warp = thread() >> 5;
    unsigned up_to = n;
#pragma unroll
    for (int d = 1; d < 32; d <<= 1) {
        const unsigned below = __shfl_up_sync(FULL, up_to, d);
        if (lane >= d) up_to += below;
    }
    if (lane == 31) scratch[warp] = up_to;
    meet();
    const unsigned of_warp = lane < WARPS ? scratch[lane] : 0;
    const unsigned before = __reduce_add_sync(FULL, lane < warp ? of_warp : 0);
    total = __reduce_add_sync(FULL, of_warp);
    return before + up_to - n;
}
