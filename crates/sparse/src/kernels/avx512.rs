//! AVX-512: 16 numbers a register.

use std::arch::x86_64::*;

use super::lanes::{Bf16, F16, Lanes, Load};

#[derive(Clone, Copy)]
pub(super) struct Avx512;

// SAFETY: intrinsics of AVX-512F only.
unsafe impl Lanes for Avx512 {
    const N: usize = 16;
    type V = __m512;

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m512 {
        // SAFETY: the caller's.
        unsafe { _mm512_set1_ps(x) }
    }

    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: the caller's.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        // SAFETY: the caller's.
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn sum(v: __m512) -> f32 {
        // SAFETY: the caller's.
        unsafe { _mm512_reduce_add_ps(v) }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, v: __m512) {
        // SAFETY: the caller's.
        unsafe { _mm512_storeu_ps(to, v) }
    }

    #[inline(always)]
    unsafe fn prefetch(at: *const u8) {
        // SAFETY: the caller's.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
}

// SAFETY: reads 64 bytes.
unsafe impl Load<f32> for Avx512 {
    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m512 {
        // SAFETY: the caller's.
        unsafe { _mm512_loadu_ps(from) }
    }
}

// SAFETY: reads 32 bytes.
unsafe impl Load<F16> for Avx512 {
    #[inline(always)]
    unsafe fn load(from: *const F16) -> __m512 {
        // SAFETY: the caller's.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }
}

// SAFETY: reads 32 bytes.
unsafe impl Load<Bf16> for Avx512 {
    #[inline(always)]
    unsafe fn load(from: *const Bf16) -> __m512 {
        // SAFETY: the caller's.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }
}

// SAFETY: reads 16 bytes.
unsafe impl Load<i8> for Avx512 {
    #[inline(always)]
    unsafe fn load(from: *const i8) -> __m512 {
        // SAFETY: the caller's.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()))) }
    }
}
