// Rows on their way through shared memory, and their products with a vector.
//
// Some threads of each block bring the rows of all steps into a ring, as far ahead as there is room:
// they wait only for that, and for a list where only listed rows are read. Teams of the working warps
// take the rows in turn.
#pragma once

#include "program_mail.cuh"

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

__device__ __forceinline__ bool signal_given(unsigned long long* signal, unsigned phase) {
    unsigned given;
    asm volatile(
        "{\n .reg .pred p;\n mbarrier.test_wait.parity.shared.b64 p, [%1], %2;\n"
        " selp.u32 %0, 1, 0, p;\n}"
        : "=r"(given)
        : "r"(address(signal)), "r"(phase)
        : "memory");
    return given;
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

// The same where other blocks copy the rest of 128 bytes at about the time: memory gives them at once.
__device__ __forceinline__ void copy_16_of_128(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(address(to)), "l"(from)
                 : "memory");
}

// Blocks read neighbours at the same time.
__device__ __forceinline__ int count_of(const Own& own) {
    return own.each + (static_cast<int>(blockIdx.x) < own.more);
}
__device__ __forceinline__ int own_row(int i) { return i * blocks() + blockIdx.x; }

// A quotient, of a number below THREADS, by the inverse of the divisor.
__device__ __forceinline__ int divided(int n, unsigned inverse) { return n * inverse >> 20; }

// Inputs of a row that a lane has, which it keeps for all rows: a team of warps has a row, which comes
// in pieces of a slot each.
constexpr int HELD = 32;

// A piece: how many were before, and where in the ring it lies.
//
// A signal is that of every SIGNALS-th piece, and tells apart no more than two rounds of its own. Each
// bringer has every BRINGERS-th piece, and the slots and signals of those alone, in order, and does not
// fill a slot again before it was read: it is one round ahead of the readers of a signal at most. A
// warp reads every n-th piece, n up to WARPS, and so at least one of each of its bringers in
// BRINGERS * WARPS pieces, which is no more than a round: it is not ahead of them. Nothing holds
// bringers together where n is a multiple of BRINGERS: signals that two of them share would break.
static_assert(SIGNALS % BRINGERS == 0 && SIGNALS >= BRINGERS * WARPS, "what was just said");

struct Place {
    unsigned entry;
    int slot;

    __device__ __forceinline__ void skip(int n, int slots) {
        entry += n;
        for (slot += n; slot >= slots; slot -= slots) {
        }
    }
    __device__ __forceinline__ static void wait(unsigned long long* signals, unsigned entry) {
        signal_wait(signals + entry % SIGNALS, entry / SIGNALS & 1);
    }
    __device__ __forceinline__ static bool given(unsigned long long* signals, unsigned entry) {
        return signal_given(signals + entry % SIGNALS, entry / SIGNALS & 1);
    }
};

// Brings a step's spare rows.
__device__ __forceinline__ void bring_spare(const Step& s) {
    const int rows = s.spare.rows, bytes = s.row_bytes, before = count_of(s.own) - rows;
    const unsigned char* const weights = static_cast<const unsigned char*>(s.weights[0]);
    unsigned long long* const full = &fixed().spare_full;
    // What threads wrote there, who have met since, is before what comes there.
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    signal_expect(full, rows * bytes);
#pragma unroll 1
    for (int n = 0; n < rows; n++)
        bring(shared + s.spare.byte + n * bytes,
              weights + static_cast<uint64_t>(own_row(before + n)) * bytes, bytes, full);
}

// What one of BRINGERS threads brings: every so-manieth piece, from its first on.
__device__ __forceinline__ void bring_rows(const Program& p, int first) {
    Fixed& f = fixed();
    unsigned char* const ring = shared + f.ring;
    const int slots = p.slots, slot_bytes = p.slot_bytes;
    Place place{0, 0};
    place.skip(first, slots);
    unsigned lists = 0;
    // Pieces of passes before, of all.
    unsigned before = 0;
    // The next pass is on its way meanwhile.
    Pass next = p.passes[0];
#pragma unroll 1
    for (int n = 0; n < p.pass_count; n++) {
        const Pass pass = next;
        next = p.passes[min(n + 1, p.pass_count - 1)];
        const unsigned char* weights = static_cast<const unsigned char*>(pass.weights);
        const int bytes = pass.row_bytes;
        const int pieces = pass.pieces;
        int count = count_of(pass.own);
        if (pass.listed) {
            signal_wait(&f.listed, lists & 1);
            lists++;
            count = f.open_count;
        }
        int i = (place.entry - before) / pieces, piece = (place.entry - before) - i * pieces;
#pragma unroll 1
        while (i < count) {
            const unsigned row = pass.listed ? f.open[i] : own_row(i);
            const int from = piece * slot_bytes, each = min(slot_bytes, bytes - from);
            // What lay there before has been read.
            if (place.entry >= slots) Place::wait(f.empty, place.entry - slots);
            // Of a step to come few pieces are on their way at a time: more would hold up what blocks tell
            // each other, and with that all of them. Others may bring those, and be rounds away: then it
            // is only the wrong time.
            constexpr unsigned FEW = 2;
            if (place.entry >= FEW)
                while (pass.step > static_cast<volatile int&>(f.step) &&
                       !Place::given(f.full, place.entry - FEW)) {
                }
            unsigned long long* const full = f.full + place.entry % SIGNALS;
            signal_expect(full, each);
            bring(ring + place.slot * slot_bytes,
                  weights + static_cast<uint64_t>(row) * bytes + from, each, full);
            place.skip(BRINGERS, slots);
            for (piece += BRINGERS; piece >= pieces; piece -= pieces) i++;
        }
        before += count * pieces;
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

// Inputs `at..at+N`, or zeros, of lanes side by side. Which four a lane takes first differs, so that
// those that read together read all banks.
template <int N>
__device__ __forceinline__ void load_inputs(float (&h)[N], const float* values, int at, bool there) {
    constexpr int FOURS = N / 4;
    const int turn = (threadIdx.x & 7) * FOURS / 8;
    float4 v[FOURS];
#pragma unroll
    for (int k = 0; k < FOURS; k++)
        v[k] = there ? *reinterpret_cast<const float4*>(values + at + (k + turn) % FOURS * 4)
                     : make_float4(0.f, 0.f, 0.f, 0.f);
    // v[k] has the four of k + turn: back by as many.
#pragma unroll
    for (int bit = 1; bit < FOURS; bit *= 2) {
        float4 w[FOURS];
#pragma unroll
        for (int k = 0; k < FOURS; k++) {
            const float4 &near = v[k], &far = v[(k + FOURS - bit) % FOURS];
            const bool far_one = turn & bit;
            w[k] = make_float4(far_one ? far.x : near.x, far_one ? far.y : near.y,
                               far_one ? far.z : near.z, far_one ? far.w : near.w);
        }
#pragma unroll
        for (int k = 0; k < FOURS; k++) v[k] = w[k];
    }
#pragma unroll
    for (int k = 0; k < FOURS; k++)
        h[4 * k] = v[k].x, h[4 * k + 1] = v[k].y, h[4 * k + 2] = v[k].z, h[4 * k + 3] = v[k].w;
}

// The products of the ring's next `count` rows with `values`, which are zeros behind the width, to
// `to`: row by row in turn to the threads, which see their own behind the call. Where `more` rows
// follow at once, or nothing else lets threads meet before they do, all have met behind it.
template <typename W>
__device__ __forceinline__ void dots(const Program& p, const Teams teams, const Spare spare,
                                     int vectors, const float* values, int count, float* to,
                                     bool more) {
    constexpr int N = Weights<W>::N, VECTORS = HELD / N;  // of a lane
    Fixed& f = fixed();
    float* const all_parts = parts_of_sums();
    const int t = threadIdx.x, lane = t & 31, warp = t >> 5, slots = p.slots;
    const int size = teams.size, team_count = teams.count, pieces = teams.pieces;
    const int team = divided(warp, teams.by_size), member = warp - team * size;
    // This lane's vectors, each 32 behind the one before; it reads one piece of a row.
    const int first = member * (32 * VECTORS) + lane;
    float h[VECTORS][N];
#pragma unroll
    for (int v = 0; v < VECTORS; v++)
        load_inputs<N>(h[v], values, (first + 32 * v) * N, first + 32 * v < vectors);
    const int piece = divided(member, teams.by_warps), reader = member - piece * teams.warps;
    // Behind a row's end it reads the row's last, times zeros.
    int offsets[VECTORS];
#pragma unroll
    for (int v = 0; v < VECTORS; v++)
        offsets[v] = min(first + 32 * v, vectors - 1) * 16 - piece * p.slot_bytes;
    const int readers = min(teams.warps, size - piece * teams.warps);
    const unsigned arrivals = reader == 0 ? WARPS - readers + 1 : 1;
    const unsigned char* const ring = shared + f.ring;
    Place at{f.pieces, f.slot};
    at.skip(team * pieces + piece, slots);
    const int room = min(count, teams.room);
#pragma unroll 1
    for (int begin = 0; begin < count; begin += room) {
        const int end = min(count, begin + room);
        const auto product = [&](const unsigned char* from) {
            float sums[VECTORS];
#pragma unroll
            for (int v = 0; v < VECTORS; v++)
                sums[v] = Weights<W>(from + offsets[v]).times(h[v], 0.f);
#pragma unroll
            for (int v = 1; v < VECTORS; v++) sums[0] += sums[v];
            return sums[0];
        };
        const auto put = [&](int i, float sum) {
            sum = warp_sum(sum);
            if (lane == 0) all_parts[member * room + i - begin] = sum;
        };
        if (team < team_count) {
            int i = begin + team;
#pragma unroll 1
            for (; i < end - spare.rows; i += team_count) {
                Place::wait(f.full, at.entry);
                const float sum = product(ring + at.slot * p.slot_bytes);
                __syncwarp();
                if (lane == 0) signal_arrive(f.empty + at.entry % SIGNALS, arrivals);
                at.skip(team_count * pieces, slots);
                put(i, sum);
            }
            if (i < end) signal_wait(&f.spare_full, f.spares & 1);
#pragma unroll 1
            for (; i < end; i += team_count)
                put(i, product(shared + spare.byte + (i - end + spare.rows) * (vectors * 16) +
                               piece * p.slot_bytes));
        }
        meet();
        for (int row = t; row < end - begin; row += THREADS) {
            float sum = 0.f;
#pragma unroll 4
            for (int k = 0; k < size; k++) sum += all_parts[k * room + row];
            to[begin + row] = sum;
        }
        // By a thread that has nothing else to do.
        if (t == THREADS - 1 && end == count) {
            Place behind{f.pieces, f.slot};
            behind.skip((count - spare.rows) * pieces, slots);
            f.spares += spare.rows > 0;
            f.pieces = behind.entry;
            f.slot = behind.slot;
        }
        if (more || room < count) meet();
    }
}
