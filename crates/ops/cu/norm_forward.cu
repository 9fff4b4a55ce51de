// Norms, forward: rows that can be cut into vectors.
#include "norm.cuh"

// `known` takes the statistics from `means` and `rstds` instead of writing them there. `kept`
// receives a copy of x, one row after the other; y may be x.
template <typename T, typename C, int V, bool PLAIN>
__device__ __forceinline__ void forward(C post, const T* x, T* y, T* kept, Affine<T> affine,
                                        float eps, bool centred, float* means, float* rstds,
                                        bool known, Rows rows, int lanes) {
    constexpr int N = Vec<T>::N;
    constexpr bool AHEAD = V <= 2;
    __shared__ alignas(16) float places[RowSums<1>::PLACES];
    RowSums<1> sums(places, lanes);
    const int lane = threadIdx.x % lanes;
    const Gains<T, V, PLAIN, AHEAD> gains(affine, lane, lanes, rows.width / N);
    const float share = 1.f / rows.width;
    if (PLAIN) centred = false;

    unsigned turn = threadIdx.x / lanes * gridDim.x + blockIdx.x;
    const unsigned step = blockDim.x / lanes * gridDim.x;
    Bits next[V] = {}, v[V];
    const auto fetch = [&](Bits(&to)[V], const Place& place) {
        load_row(to, x + place.at, lane, lanes, place.vectors);
    };
    if (AHEAD) fetch(next, rows.place(turn, lane, N));

    // The trips are the same for all threads, as sums need whole warps; those without a row or a
    // vector take part with zeros.
#pragma unroll 1
    for (unsigned first = 0; first < rows.count; first += step) {
        const Place here = rows.place(turn, lane, N);
        turn += step;
        if (AHEAD) {
#pragma unroll
            for (int k = 0; k < V; ++k) v[k] = next[k];
            fetch(next, rows.place(turn, lane, N));
        } else {
            fetch(v, here);
        }
        if (kept) {
#pragma unroll
            for (int k = 0; k < V; ++k) {
                if (lane + k * lanes < here.vectors)
                    *reinterpret_cast<Bits*>(kept + here.dense + k * lanes * N) = v[k];
            }
        }
        float mean = 0.f, r = 0.f;
        if (known) {
            if (here.vectors) {
                mean = centred ? means[here.row] : 0.f;
                r = rstds[here.row];
            }
        } else {
            if (centred) {
                float sum[1] = {0.f};
#pragma unroll
                for (int k = 0; k < V; ++k) {
                    if (lane + k * lanes >= here.vectors) continue;
#pragma unroll
                    for (int j = 0; j < N; ++j) sum[0] += element<T>(v[k], j);
                }
                sums(sum);
                mean = sum[0] * share;
                keep_packed(v);
            }
            float squares[1] = {0.f};
#pragma unroll
            for (int k = 0; k < V; ++k) {
                if (lane + k * lanes >= here.vectors) continue;
#pragma unroll
                for (int j = 0; j < N; ++j) {
                    const float d = PLAIN ? element<T>(v[k], j) : element<T>(v[k], j) - mean;
                    squares[0] = fmaf(d, d, squares[0]);
                }
            }
            sums(squares);
            r = rsqrtf(fmaf(squares[0], share, eps));
            if (here.vectors && lane == 0) {
                if (centred) means[here.row] = mean;
                rstds[here.row] = r;
            }
            keep_packed(v);
        }
#pragma unroll
        for (int k = 0; k < V; ++k) {
            if (lane + k * lanes >= here.vectors) continue;
            float gain[N], shift[N];
            gains.of(k, gain, shift);
            Vec<T> out;
#pragma unroll
            for (int j = 0; j < N; ++j) {
                const float xhat = normalised<PLAIN>(element<T>(v[k], j), mean, r);
                out.v[j] = from_f32<T>(post.value(__fmaf_rn(xhat, gain[j], shift[j])));
            }
            store_vec(y + here.at + k * lanes * N, out);
        }
    }
}

// A multiprocessor has three blocks of 512 threads at a time or two, as `cuda::norm` knows.
#define ENTRY(NAME, C, V, KIND, PLAIN, ELEM, T)                                                \
    extern "C" __global__ void __launch_bounds__(512, V == 1 && PLAIN ? 3 : 2)                 \
        NAME##_##V##_##KIND##_##ELEM(                                                          \
            int kind, float p, const T* x, T* y, T* kept, const T* weight, const T* bias,      \
            float offset, float eps, int centred, float* means, float* rstds, int known,       \
            unsigned count, unsigned heads, long long stride, int width, int lanes) {          \
        forward<T, C, V, PLAIN>(curve<C>(kind, p), x, y, kept, Affine<T>{weight, bias, offset}, \
                                eps, centred, means, rstds, known,                             \
                                Rows{count, heads, stride, width}, lanes);                     \
    }
#define KINDS(NAME, C, V, ELEM, T)          \
    ENTRY(NAME, C, V, plain, true, ELEM, T) \
    ENTRY(NAME, C, V, full, false, ELEM, T)
#define CURVES(ELEM, T)                \
    KINDS(identity, Identity, 1, ELEM, T) \
    KINDS(identity, Identity, 2, ELEM, T) \
    KINDS(identity, Identity, 4, ELEM, T) \
    KINDS(relu, Relu, 1, ELEM, T)      \
    KINDS(relu, Relu, 2, ELEM, T)      \
    KINDS(relu, Relu, 4, ELEM, T)      \
    KINDS(any, AnyCurve, 1, ELEM, T)   \
    KINDS(any, AnyCurve, 2, ELEM, T)

CURVES(bf16, bf16)
CURVES(f32, float)
