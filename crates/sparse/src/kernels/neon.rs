//! NEON, which every 64-bit ARM has: 8 numbers in two registers.

use std::arch::aarch64::*;
use std::arch::asm;

use super::lanes::{Bf16, F16, Lanes, Load};

#[derive(Clone, Copy)]
pub(super) struct Neon;

// SAFETY: intrinsics and instructions of NEON only.
unsafe impl Lanes for Neon {
    const N: usize = 8;
    type V = float32x4x2_t;

    #[inline(always)]
    unsafe fn splat(x: f32) -> float32x4x2_t {
        // SAFETY: the caller's.
        let four = unsafe { vdupq_n_f32(x) };
        float32x4x2_t(four, four)
    }

    #[inline(always)]
    unsafe fn fma(a: float32x4x2_t, b: float32x4x2_t, c: float32x4x2_t) -> float32x4x2_t {
        // SAFETY: the caller's.
        unsafe { float32x4x2_t(vfmaq_f32(c.0, a.0, b.0), vfmaq_f32(c.1, a.1, b.1)) }
    }

    #[inline(always)]
    unsafe fn add(a: float32x4x2_t, b: float32x4x2_t) -> float32x4x2_t {
        // SAFETY: the caller's.
        unsafe { float32x4x2_t(vaddq_f32(a.0, b.0), vaddq_f32(a.1, b.1)) }
    }

    #[inline(always)]
    unsafe fn sum(v: float32x4x2_t) -> f32 {
        // SAFETY: the caller's.
        unsafe { vaddvq_f32(vaddq_f32(v.0, v.1)) }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, v: float32x4x2_t) {
        // SAFETY: the caller's. Not `vst1q_f32_x2`, which asks for neighbouring registers.
        unsafe {
            vst1q_f32(to, v.0);
            vst1q_f32(to.add(4), v.1);
        }
    }

    #[inline(always)]
    unsafe fn prefetch(at: *const u8) {
        // SAFETY: a hint, which no address can make fail.
        unsafe {
            asm!("prfm pldl1keep, [{}]", in(reg) at, options(nostack, readonly, preserves_flags))
        }
    }
}

// SAFETY: reads 32 bytes.
unsafe impl Load<f32> for Neon {
    #[inline(always)]
    unsafe fn load(from: *const f32) -> float32x4x2_t {
        // SAFETY: the caller's.
        unsafe { float32x4x2_t(vld1q_f32(from), vld1q_f32(from.add(4))) }
    }
}

// SAFETY: reads 16 bytes.
unsafe impl Load<F16> for Neon {
    #[inline(always)]
    unsafe fn load(from: *const F16) -> float32x4x2_t {
        // SAFETY: the caller's. The intrinsics for halves are not stable in the oldest Rust that
        // builds this, the instructions are as old as the processors.
        unsafe {
            let halves = vld1q_u16(from.cast());
            let (low, high): (float32x4_t, float32x4_t);
            asm!(
                "fcvtl {low:v}.4s, {halves:v}.4h",
                "fcvtl2 {high:v}.4s, {halves:v}.8h",
                low = out(vreg) low,
                high = lateout(vreg) high,
                halves = in(vreg) halves,
                options(pure, nomem, nostack, preserves_flags)
            );
            float32x4x2_t(low, high)
        }
    }
}

// SAFETY: reads 16 bytes.
unsafe impl Load<Bf16> for Neon {
    #[inline(always)]
    unsafe fn load(from: *const Bf16) -> float32x4x2_t {
        // SAFETY: the caller's.
        unsafe {
            let halves = vld1q_u16(from.cast());
            let low = vshll_n_u16::<16>(vget_low_u16(halves));
            let high = vshll_high_n_u16::<16>(halves);
            float32x4x2_t(vreinterpretq_f32_u32(low), vreinterpretq_f32_u32(high))
        }
    }
}

// SAFETY: reads 8 bytes.
unsafe impl Load<i8> for Neon {
    #[inline(always)]
    unsafe fn load(from: *const i8) -> float32x4x2_t {
        // SAFETY: the caller's.
        unsafe {
            let wide = vmovl_s8(vld1_s8(from));
            let low = vmovl_s16(vget_low_s16(wide));
            let high = vmovl_high_s16(wide);
            float32x4x2_t(vcvtq_f32_s32(low), vcvtq_f32_s32(high))
        }
    }
}
