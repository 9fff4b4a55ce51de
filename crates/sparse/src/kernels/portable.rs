//! Arrays that the compiler turns into whatever the target always has (SSE2 on x86-64).

use half::f16;

use super::lanes::{Bf16, F16, Lanes, Load};

const N: usize = 8;

#[derive(Clone, Copy)]
pub(super) struct Portable;

// SAFETY: plain Rust, on every processor.
unsafe impl Lanes for Portable {
    const N: usize = N;
    type V = [f32; N];

    #[inline(always)]
    unsafe fn splat(x: f32) -> [f32; N] {
        [x; N]
    }

    #[inline(always)]
    unsafe fn fma(a: [f32; N], b: [f32; N], mut c: [f32; N]) -> [f32; N] {
        // Two roundings: without the instruction a fused one would be a library call.
        for i in 0..N {
            c[i] += a[i] * b[i];
        }
        c
    }

    #[inline(always)]
    unsafe fn add(mut a: [f32; N], b: [f32; N]) -> [f32; N] {
        for i in 0..N {
            a[i] += b[i];
        }
        a
    }

    #[inline(always)]
    unsafe fn sum(v: [f32; N]) -> f32 {
        let [a, b, c, d, e, f, g, h] = v;
        ((a + e) + (c + g)) + ((b + f) + (d + h))
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, v: [f32; N]) {
        // SAFETY: the caller's.
        unsafe { to.cast::<[f32; N]>().write_unaligned(v) }
    }

    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}
}

// SAFETY: reads as many as there are lanes.
unsafe impl Load<f32> for Portable {
    #[inline(always)]
    unsafe fn load(from: *const f32) -> [f32; N] {
        // SAFETY: the caller's.
        unsafe { from.cast::<[f32; N]>().read_unaligned() }
    }
}

// SAFETY: as above.
unsafe impl Load<F16> for Portable {
    #[inline(always)]
    unsafe fn load(from: *const F16) -> [f32; N] {
        // SAFETY: the caller's.
        let bits = unsafe { from.cast::<[u16; N]>().read_unaligned() };
        bits.map(|bits| f16::from_bits(bits).to_f32())
    }
}

// SAFETY: as above.
unsafe impl Load<Bf16> for Portable {
    #[inline(always)]
    unsafe fn load(from: *const Bf16) -> [f32; N] {
        // SAFETY: the caller's.
        let bits = unsafe { from.cast::<[u16; N]>().read_unaligned() };
        bits.map(|bits| f32::from_bits(u32::from(bits) << 16))
    }
}

// SAFETY: as above.
unsafe impl Load<i8> for Portable {
    #[inline(always)]
    unsafe fn load(from: *const i8) -> [f32; N] {
        // SAFETY: the caller's.
        let units = unsafe { from.cast::<[i8; N]>().read_unaligned() };
        units.map(f32::from)
    }
}
