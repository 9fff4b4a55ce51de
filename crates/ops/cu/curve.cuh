// The activation functions one element at a time: the twin of src/curve.rs and src/math.rs.
//
// A curve has `value(x)`, which is f(x), and `pull(x, dy, y)`, which gives f'(x) dy and sets y to
// f(x). Derivatives are 0 at a kink. `p` is the one parameter that some curves have.
#pragma once

#include "common.cuh"

// 1 / (1 + e^-x). The quotient's error is two units in the last place, and it has no slow path.
__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.f, 1.f + expf(-x)); }

// The normal distribution up to x, and its density at x. The upper tail is t P(t) e^(-x^2/2) with
// t = 1 / (1 + 0.3 |x|), as on the CPU.
__device__ __forceinline__ float normal(float x, float& density) {
    const float a = fabsf(x);
    // The square in two parts: rounding it would cost a large argument its last digits.
    const float square = a * a;
    const float low = fmaf(a, a, -square);
    // An infinite square has no rounding error.
    const float e = expf(-0.5f * square) * (square < 1e30f ? 1.f - 0.5f * low : 1.f);
    const float t = __fdividef(1.f, fmaf(0.3f, a, 1.f));
    const float s = 2.f * t - 1.f;
    float q = 6.441181e-6f;
    q = fmaf(q, s, 2.7576035e-4f);
    q = fmaf(q, s, -5.138064e-4f);
    q = fmaf(q, s, -2.434076e-3f);
    q = fmaf(q, s, 1.8015136e-3f);
    q = fmaf(q, s, 2.7763265e-2f);
    q = fmaf(q, s, 8.6551e-2f);
    q = fmaf(q, s, 1.6457933e-1f);
    q = fmaf(q, s, 2.219706e-1f);
    const float tail = t * q * e;
    density = 0.3989423f * e;
    // Not fused with the product, so that it is the same wherever this is inlined.
    return x > 0.f ? __fsub_rn(1.f, tail) : tail;
}

// `share`, or 0 up to 2^-26, where GELU's textbook forms x/2 (1 + erf) and x/2 (1 + tanh) are
// exactly 0 in f32: part of a dense model's density.
__device__ __forceinline__ float as_rounded(float share) {
    return share <= 1.4901161e-8f ? 0.f : share;
}

struct Identity {
    float p;
    __device__ __forceinline__ float value(float x) const { return x; }
    __device__ __forceinline__ float pull(float x, float dy, float& y) const {
        y = x;
        return dy;
    }
};

// x sigmoid(x); f' = s (1 + x (1 - s)).
struct Silu {
    float p;
    __device__ __forceinline__ float value(float x) const { return x * sigmoid(x); }
    __device__ __forceinline__ float pull(float x, float dy, float& y) const {
        const float s = sigmoid(x);
        y = x * s;
        return dy * (s + y * (1.f - s));
    }
};

// x sigmoid(p x).
struct Swish {
    float p;
    __device__ __forceinline__ float value(float x) const { return x * sigmoid(p * x); }
    __device__ __forceinline__ float pull(float x, float dy, float& y) const {
        const float s = sigmoid(p * x);
        y = x * s;
        return dy * (s + p * y * (1.f - s));
    }
};

// x Phi(x); f' = Phi(x) + x phi(x).
struct Gelu {
    float p;
    __device__ __forceinline__ float value(float x) const {
        float density;
        return x * as_rounded(normal(x, density));
    }
    __device__ __forceinline__ float pull(float x, float dy, float& y) const {
        float density;
        const float up_to = normal(x, density);
        y = x * as_rounded(up_to);
        return dy * fmaf(x, density, up_to);
    }
};

// x/2 (1 + tanh u), u = sqrt(2/pi) (x + 0.044715 x^3), written as x sigmoid(2u).
struct GeluTanh {
    float p;
    static constexpr float TWO_U = 1.595769f, TWO_U_CUBIC = 0.07135482f;
    // Written out, so that both round alike.
    __device__ __forceinline__ static float share(float x) {
        return sigmoid(x * fmaf(TWO_U_CUBIC * x, x, TWO_U));
    }
    __device__ __forceinline__ float value(float x) const { return x * as_rounded(share(x)); }
    __device__ __forceinline__ float pull(float x, float dy, float& y) const {
        const float s = share(x);
        y = x * as_rounded(s);
        return dy * (s + x * s * (1.f - s) * fmaf(3.f * TWO_U_CUBIC * x, x, TWO_U));
    }
};

// max(x, 0); a NaN stays one.
struct Relu {
    float p;
    __device__ __forceinline__ float value(float x) const { return x <= 0.f ? 0.f : x; }
    __device__ __forceinline__ float pull(float x, float dy, float& y) const {
        y = value(x);
        return x <= 0.f ? 0.f : dy;
    }
};

// max(x - p, 0).
struct ShiftedRelu {
    float p;
    __device__ __forceinline__ float value(float x) const { return x - p <= 0.f ? 0.f : x - p; }
    __device__ __forceinline__ float pull(float x, float dy, float& y) const {
        y = value(x);
        return x - p <= 0.f ? 0.f : dy;
    }
};

// x where x >= p, else 0.
struct FatRelu {
    float p;
    __device__ __forceinline__ float value(float x) const { return x < p ? 0.f : x; }
    __device__ __forceinline__ float pull(float x, float dy, float& y) const {
        y = value(x);
        return x <= p ? 0.f : dy;
    }
};

// Calls ENTRY(name, Curve) for each curve: entry points are named after `name`, which
// `cuda::pointwise::curve_name` gives.
#define FOR_EACH_CURVE(ENTRY)       \
    ENTRY(identity, Identity)       \
    ENTRY(silu, Silu)               \
    ENTRY(gelu, Gelu)               \
    ENTRY(gelu_tanh, GeluTanh)      \
    ENTRY(swish, Swish)             \
    ENTRY(relu, Relu)               \
    ENTRY(shifted_relu, ShiftedRelu) \
    ENTRY(fat_relu, FatRelu)

// A curve chosen at run time, for kernels in which it is a detail; `kind` is what
// `cuda::pointwise::curve_code` gives. All threads branch alike.
struct AnyCurve {
    int kind;
    float p;
    template <typename F>
    __device__ __forceinline__ auto with(F f) const -> decltype(f(Identity{0.f})) {
        switch (kind) {
            case 1: return f(Silu{p});
            case 2: return f(Gelu{p});
            case 3: return f(GeluTanh{p});
            case 4: return f(Swish{p});
            case 5: return f(Relu{p});
            case 6: return f(ShiftedRelu{p});
            case 7: return f(FatRelu{p});
            default: return f(Identity{p});
        }
    }
    __device__ __forceinline__ float value(float x) const {
        return with([=](auto curve) { return curve.value(x); });
    }
    __device__ __forceinline__ float pull(float x, float dy, float& y) const {
        return with([=, &y](auto curve) { return curve.pull(x, dy, y); });
    }
};
