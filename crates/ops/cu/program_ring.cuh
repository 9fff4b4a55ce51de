// Rows on their way through shared memory, and their products with a vector.
//
// A thread of each block brings the rows of all steps into a ring, as far ahead as there is room: it
// waits only for that, and for a list where only listed rows are read. Teams of the working warps
// take the rows in turn.
#pragma once

#include "program.cuh"

__device__ __forceinline__ unsigned address(const void* p) {
    return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void signal_init(unsigned long long* signal, unsigned arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(address(signal)), "r"(arrivals)
                 : "memory");
}

__device__ __forceinline__ void signal_arrive(unsigned long long* signal, unsigned times) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0], %1;" ::"r"(address(signal)), "r"(times)
                 : "memory");
}

__device__ __forceinline__ void signal_wait(unsigned long long* signal, unsigned phase) {
    asm volatile(
        "{\n .reg .pred p;\n"
        "AGAIN:\n mbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n"
        " @p bra DONE;\n bra AGAIN;\nDONE:\n}" ::"r"(address(signal)),
        "r"(phase)
        : "memory");
}

// So many bytes are to come before the signal is given.
__device__ __forceinline__ void signal_expect(unsigned long long* signal, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(address(signal)),
                 "r"(bytes)
                 : "memory");
}

// Bytes of weights, a multiple of 16.
__device__ __forceinline__ void bring(void* to, const void* from, unsigned bytes,
                                      unsigned long long* signal) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(address(to)),
        "l"(from), "r"(bytes), "r"(address(signal))
        : "memory");
}

// 16 bytes to a place of the thread's own, some time later.
__device__ __forceinline__ void copy_16(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address(to)), "l"(from)
                 : "memory");
}

// How the warps share rows of so many vectors: a team of them has a row, each lane up to HELD
// inputs, which it keeps for all rows.
constexpr int HELD = 32;

template <typename W>
struct Teams {
    static constexpr int N = 16 / sizeof(W);    // weights of a vector
    static constexpr int VECTORS = HELD / N;    // of a lane
    int size, count;

    __device__ __forceinline__ explicit Teams(int vectors) {
        size = (vectors + 32 * VECTORS - 1) / (32 * VECTORS);
        count = WARPS / size;
    }
};

// Of all rows a block has every so-manieth: blocks read neighbours at the same time.
__device__ __forceinline__ int own_rows(int rows) {
    const int blocks = gridDim.x, block = blockIdx.x;
    return block < rows ? (rows - block - 1) / blocks + 1 : 0;
}
__device__ __forceinline__ int own_row(int i) { return i * gridDim.x + blockIdx.x; }

// Rows lie in the ring one after the other, each as long as it is, with a signal when it is there
// and one when it is free. `lengths` and `places` have those of the last ENTRIES rows, of which
// fewer are under way: a team of warps may be WARPS rows ahead, and a signal tells apart no more
// than two rounds.
__device__ __forceinline__ void bring_rows(const Program& p) {
    Fixed& f = fixed();
    unsigned char* const ring = shared + f.ring;
    const int size = p.ring;
    unsigned entry = 0, oldest = 0, lists = 0;
    int at = 0, used = 0;
    // The next one is on its way meanwhile.
    Pass next = p.passes[0];
#pragma unroll 1
    for (int n = 0; n < p.pass_count; n++) {
        const Pass pass = next;
        next = p.passes[min(n + 1, p.pass_count - 1)];
        const unsigned char* weights = static_cast<const unsigned char*>(pass.weights);
        const int bytes = static_cast<int>(pass.row_bytes);
        int count = own_rows(pass.rows);
        if (pass.listed) {
            signal_wait(&f.listed, lists & 1);
            lists++;
            count = f.open_count;
        }
#pragma unroll 1
        for (int i = 0; i < count; i++, entry++) {
            // What does not fit behind the last row lies at the beginning, and takes what is left.
            const bool wraps = at + bytes > size;
            int takes = wraps ? bytes + size - at : bytes;
            while (used + takes > size || entry - oldest == ENTRIES - WARPS) {
                if (oldest == entry) {
                    takes = bytes;
                    break;
                }
                signal_wait(f.empty + oldest % ENTRIES, oldest / ENTRIES & 1);
                used -= f.lengths[oldest % ENTRIES];
                oldest++;
            }
            if (wraps) at = 0;
            const int slot = entry % ENTRIES;
            f.lengths[slot] = takes;
            f.places[slot] = at;
            used += takes;
            signal_expect(f.full + slot, bytes);
            const long long row = pass.listed ? f.open[i] : own_row(i);
            bring(ring + at, weights + row * pass.row_bytes, bytes, f.full + slot);
            at += bytes;
        }
        if (pass.listed) signal_arrive(&f.taken, 1);
    }
}

template <typename W>
struct Weights {
    static constexpr int N = 16 / sizeof(W);
    Packed<W, N> w;

    __device__ __forceinline__ Weights() {}
    __device__ __forceinline__ explicit Weights(const unsigned char* p) {
        const uint4 v = *reinterpret_cast<const uint4*>(p);
        w.r[0] = v.x, w.r[1] = v.y, w.r[2] = v.z, w.r[3] = v.w;
    }
    __device__ __forceinline__ float times(const float (&h)[N], float sum) const {
#pragma unroll
        for (int k = 0; k < N; k++) sum = fmaf(h[k], weight_of(w, k), sum);
        return sum;
    }
};

// Inputs `at..at+N`, or zeros.
template <int N>
__device__ __forceinline__ void load_inputs(float (&h)[N], const float* values, int at, bool there) {
#pragma unroll
    for (int k = 0; k < N; k += 4) {
        const float4 v = there ? *reinterpret_cast<const float4*>(values + at + k)
                               : make_float4(0.f, 0.f, 0.f, 0.f);
        h[k] = v.x, h[k + 1] = v.y, h[k + 2] = v.z, h[k + 3] = v.w;
    }
}

// The products of the ring's next `count` rows with `values`, which are zeros behind the width, to
// `to`. All threads see them behind the call.
template <typename W>
__device__ __forceinline__ void dots(unsigned& entries, int vectors, const float* values, int count,
                                     float* to) {
    constexpr int N = Weights<W>::N, VECTORS = Teams<W>::VECTORS;
    Fixed& f = fixed();
    float* const all_parts = parts_of_sums();
    const Teams<W> teams(vectors);
    const int t = threadIdx.x, lane = t & 31, warp = t >> 5;
    const int team = warp / teams.size, member = warp - team * teams.size;
    // This lane's vectors, each 32 behind the one before.
    const int first = member * (32 * VECTORS) + lane;
    float h[VECTORS][N];
#pragma unroll
    for (int v = 0; v < VECTORS; v++)
        load_inputs<N>(h[v], values, (first + 32 * v) * N, first + 32 * v < vectors);
    // Behind a row's end it reads the row's last, times zeros.
    int offsets[VECTORS];
#pragma unroll
    for (int v = 0; v < VECTORS; v++) offsets[v] = min(first + 32 * v, vectors - 1) * 16;
    const unsigned char* const ring = shared + f.ring;
    // Rows whose parts there is room for.
    const int room = min(count, PARTS / teams.size / WARPS * WARPS);
    const unsigned arrivals = member == 0 ? WARPS - teams.size + 1 : 1;
#pragma unroll 1
    for (int begin = 0; begin < count; begin += room) {
        const int end = min(count, begin + room);
        if (team < teams.count)
#pragma unroll 1
            for (int i = begin + team; i < end; i += teams.count) {
                const unsigned entry = entries + i, slot = entry % ENTRIES;
                signal_wait(f.full + slot, entry / ENTRIES & 1);
                const unsigned char* const from = ring + f.places[slot];
                float sums[VECTORS];
#pragma unroll
                for (int v = 0; v < VECTORS; v++)
                    sums[v] = Weights<W>(from + offsets[v]).times(h[v], 0.f);
                __syncwarp();
                if (lane == 0) signal_arrive(f.empty + slot, arrivals);
#pragma unroll
                for (int v = 1; v < VECTORS; v++) sums[0] += sums[v];
                const float sum = warp_sum(sums[0]);
                if (lane == 0) all_parts[member * room + i - begin] = sum;
            }
        meet();
        for (int row = t; row < end - begin; row += THREADS) {
            float sum = 0.f;
#pragma unroll 1
            for (int k = 0; k < teams.size; k++) sum += all_parts[k * room + row];
            to[begin + row] = sum;
        }
        meet();
    }
    entries += count;
}
