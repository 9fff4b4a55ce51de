// Norms, backward: rows that can be cut into vectors. The parameters' gradients are summed in
// registers over the rows of a block, then by a second kernel over the blocks.
#include "norm.cuh"

// What a row's gradient is computed from.
template <typename T, int V>
struct Inputs {
    Bits x[V], dy[V], old[V];
    float mean, r;

    // x lies one row after the other; `old` is what dx holds if the gradient is added to it.
    __device__ __forceinline__ void load(const T* all_x, const T* all_dy, const T* all_dx,
                                         bool add, const float* means, const float* rstds,
                                         const Place& place, int lane, int lanes) {
        load_row(x, all_x + place.dense, lane, lanes, place.vectors);
        load_row(dy, all_dy + place.at, lane, lanes, place.vectors);
        if (add) load_row(old, all_dx + place.at, lane, lanes, place.vectors);
        mean = means && place.vectors ? means[place.row] : 0.f;
        r = place.vectors ? rstds[place.row] : 0.f;
    }
};

// dy and dx as `rows` says, and dx may be dy; `means` is null where the norm has none. `partial`
// receives [1 + !PLAIN][blocks][width] sums: each block takes the same rows each time, and adds in a
// fixed order. Shared memory: [1 + !PLAIN][width] floats where a block has several rows at a time.
template <typename T, typename C, int V, bool PLAIN>
__device__ __forceinline__ void backward(C post, const T* x, const T* dy, T* dx, bool add,
                                         Affine<T> affine, const float* means,
                                         const float* rstds, float* partial, Rows rows,
                                         int lanes) {
    constexpr int N = Vec<T>::N, SETS = PLAIN ? 1 : 2;
    constexpr bool AHEAD = V == 1;
    __shared__ alignas(16) float places[RowSums<SETS>::PLACES];
    extern __shared__ float4 shared[];
    RowSums<SETS> sums(places, lanes);
    const int lane = threadIdx.x % lanes, vectors = rows.width / N;
    Gains<T, V, PLAIN, AHEAD> gains(affine, lane, lanes, vectors);
    const float share = 1.f / rows.width;
    if (PLAIN) means = nullptr;
    float dgain[V][N] = {}, dshift[PLAIN ? 1 : V][N] = {};

    unsigned turn = threadIdx.x / lanes * gridDim.x + blockIdx.x;
    const unsigned step = blockDim.x / lanes * gridDim.x;
    // Zeros in `old` stay if nothing is to be added to.
    Inputs<T, V> next = {}, now = {};
    const auto fetch = [&](Inputs<T, V>& to, const Place& place) {
        to.load(x, dy, dx, add, means, rstds, place, lane, lanes);
    };
    if (AHEAD) fetch(next, rows.place(turn, lane, N));

    // The trips are the same for all threads, as sums need whole warps; those without a row or a
    // vector take part with zeros.
#pragma unroll 1
    for (unsigned first = 0; first < rows.count; first += step) {
        const Place here = rows.place(turn, lane, N);
        turn += step;
        if (AHEAD) {
            now = next;
            fetch(next, rows.place(turn, lane, N));
        } else {
            fetch(now, here);
        }
        float both[SETS] = {};
#pragma unroll
        for (int k = 0; k < V; ++k) {
            if (lane + k * lanes >= here.vectors) continue;
            float gain[N], shift[N];
            gains.of(k, gain, shift);
#pragma unroll
            for (int j = 0; j < N; ++j) {
                const float xhat = normalised<PLAIN>(element<T>(now.x[k], j), now.mean, now.r);
                float y;
                const float dz =
                    post.pull(__fmaf_rn(xhat, gain[j], shift[j]), element<T>(now.dy[k], j), y);
                dgain[k][j] = fmaf(dz, xhat, dgain[k][j]);
                both[0] = fmaf(dz * gain[j], xhat, both[0]);
                if constexpr (!PLAIN) {
                    dshift[k][j] += dz;
                    both[1] = fmaf(dz, gain[j], both[1]);
                }
            }
        }
        sums(both);
        const float along = both[0] * share;
        float level = 0.f;
        if constexpr (!PLAIN) level = means ? both[1] * share : 0.f;
        // Computed again: registers are dearer.
        keep_packed(now.x);
        keep_packed(now.dy);
#pragma unroll
        for (int k = 0; k < V; ++k) {
            if (lane + k * lanes >= here.vectors) continue;
            float gain[N], shift[N];
            gains.of(k, gain, shift);
            Vec<T> out;
#pragma unroll
            for (int j = 0; j < N; ++j) {
                const float xhat = normalised<PLAIN>(element<T>(now.x[k], j), now.mean, now.r);
                float y;
                const float dz =
                    post.pull(__fmaf_rn(xhat, gain[j], shift[j]), element<T>(now.dy[k], j), y);
                const float c = fmaf(-xhat, along, PLAIN ? dz * gain[j] : fmaf(dz, gain[j], -level));
                out.v[j] = from_f32<T>(fmaf(now.r, c, element<T>(now.old[k], j)));
            }
            store_vec(dx + here.at + k * lanes * N, out);
        }
    }

    // Rows that share a warp first, then one warp, or row, after the other.
    for (int d = lanes; d < 32; d <<= 1) {
#pragma unroll
        for (int k = 0; k < V; ++k) {
#pragma unroll
            for (int j = 0; j < N; ++j) {
                dgain[k][j] += __shfl_xor_sync(0xffffffffu, dgain[k][j], d);
                if (!PLAIN) dshift[k][j] += __shfl_xor_sync(0xffffffffu, dshift[k][j], d);
            }
        }
    }
    const int apart = max(lanes, 32), turns = blockDim.x / apart, mine = threadIdx.x / apart;
    const bool writes = threadIdx.x % apart < lanes;
    float* kept = reinterpret_cast<float*>(shared);
    float* out = partial + (long long)blockIdx.x * rows.width;
    const long long set = (long long)gridDim.x * rows.width;
    for (int now = 0; now < turns; ++now) {
        if (mine == now && writes) {
            const bool first = now == 0, last = now == turns - 1;
#pragma unroll
            for (int k = 0; k < V; ++k) {
                const int i = lane + k * lanes;
                if (i >= vectors) continue;
#pragma unroll
                for (int j = 0; j < N; j += 4) {
#pragma unroll
                    for (int s = 0; s < SETS; ++s) {
                        const float* own = s == 0 ? &dgain[k][j] : &dshift[PLAIN ? 0 : k][j];
                        const int column = i * N + j;
                        float4* here = reinterpret_cast<float4*>(kept + s * rows.width + column);
                        float4 sum = first ? make_float4(0.f, 0.f, 0.f, 0.f) : *here;
                        sum.x += own[0], sum.y += own[1], sum.z += own[2], sum.w += own[3];
                        if (last) here = reinterpret_cast<float4*>(out + s * set + column);
                        *here = sum;
                    }
                }
            }
        }
        __syncthreads();
    }
}

__device__ __forceinline__ void deposit(void* out, int how, int at, float sum) {
    constexpr int BF16 = 1, ADD = 2;
    if (how & BF16) {
        bf16* to = reinterpret_cast<bf16*>(out) + at;
        *to = from_f32<bf16>(how & ADD ? to_f32(*to) + sum : sum);
    } else {
        float* to = reinterpret_cast<float*>(out) + at;
        *to = how & ADD ? *to + sum : sum;
    }
}

// Adds up `partial` [2][blocks][width] into a weight's and a bias's gradient, either of which may
// be null. A block of 32 x 32 threads has 32 columns; blockIdx.y chooses the gradient. The bits of
// `how` are 1 for bf16 and 2 for adding to what is there.
extern "C" __global__ void __launch_bounds__(1024)
add_partials(const float* partial, int blocks, int width, void* dweight, int weight_how,
             void* dbias, int bias_how) {
    __shared__ float strands[32][33];
    const int lane = threadIdx.x & 31, strand = threadIdx.x >> 5;
    void* out = blockIdx.y == 0 ? dweight : dbias;
    if (!out) return;
    partial += (long long)blockIdx.y * blocks * width;
    const int column = blockIdx.x * 32 + lane;
    float sum = 0.f;
    if (column < width) {
#pragma unroll 8
        for (int i = strand; i < blocks; i += 32) sum += partial[(long long)i * width + column];
    }
    strands[strand][lane] = sum;
    __syncthreads();
    sum = warp_sum(strands[lane][strand]);
    const int mine = blockIdx.x * 32 + strand;
    if (lane == 0 && mine < width) {
        deposit(out, blockIdx.y == 0 ? weight_how : bias_how, mine, sum);
    }
}

// 64 registers for rows of one vector a thread, so that a multiprocessor has 1024 threads, and 128
// for wider rows: `cuda::norm` knows.
#define ENTRY(NAME, C, V, KIND, PLAIN, ELEM, T)                                                 \
    extern "C" __global__ void __launch_bounds__(V == 1 ? 1024 : 512, 1)                        \
        NAME##_##V##_##KIND##_##ELEM(                                                           \
            int kind, float p, const T* x, const T* dy, T* dx, int add, const T* weight,        \
            const T* bias, float offset, const float* means, const float* rstds,                \
            float* partial, unsigned count, unsigned heads, long long stride, int width,        \
            int lanes) {                                                                        \
        backward<T, C, V, PLAIN>(curve<C>(kind, p), x, dy, dx, add,                             \
                                 Affine<T>{weight, bias, offset}, means, rstds, partial,        \
                                 Rows{count, heads, stride, width}, lanes);                     \
    }
#define KINDS(NAME, C, V, ELEM, T)          \
    ENTRY(NAME, C, V, plain, true, ELEM, T) \
    ENTRY(NAME, C, V, full, false, ELEM, T)
#define CURVES(ELEM, T)                   \
    KINDS(identity, Identity, 1, ELEM, T) \
    KINDS(identity, Identity, 4, ELEM, T) \
    KINDS(relu, Relu, 1, ELEM, T)         \
    KINDS(relu, Relu, 4, ELEM, T)         \
    KINDS(any, AnyCurve, 1, ELEM, T)

CURVES(bf16, bf16)
CURVES(f32, float)
