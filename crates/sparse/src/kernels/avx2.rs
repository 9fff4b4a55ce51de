//! AVX2 with FMA and F16C: 8 numbers a register.

use std::arch::x86_64::*;

use super::lanes::{Bf16, F16, Lanes, Load};

#[derive(Clone, Copy)]
pub(super) struct Avx2;

// SAFETY: intrinsics of AVX2, FMA and SSE only.
unsafe impl Lanes for Avx2 {
    const N: usize = 8;
    type V = __m256;

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m256 {
        // SAFETY: the caller's.
        unsafe { _mm256_set1_ps(x) }
    }

    #[inline(always)]
    unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: the caller's.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn add(a: __m256, b: __m256) -> __m256 {
        // SAFETY: the caller's.
        unsafe { _mm256_add_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn sum(v: __m256) -> f32 {
        // SAFETY: the caller's.
        unsafe {
            let four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, v: __m256) {
        // SAFETY: the caller's.
        unsafe { _mm256_storeu_ps(to, v) }
    }

    #[inline(always)]
    unsafe fn prefetch(at: *const u8) {
        // SAFETY: the caller's.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
}

// SAFETY: reads 32 bytes.
unsafe impl Load<f32> for Avx2 {
    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m256 {
        // SAFETY: the caller's.
        unsafe { _mm256_loadu_ps(from) }
    }
}

// SAFETY: reads 16 bytes.
unsafe impl Load<F16> for Avx2 {
    #[inline(always)]
    unsafe fn load(from: *const F16) -> __m256 {
        // SAFETY: the caller's.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
    }
}

// SAFETY: reads 16 bytes.
unsafe impl Load<Bf16> for Avx2 {
    #[inline(always)]
    unsafe fn load(from: *const Bf16) -> __m256 {
        // SAFETY: the caller's.
        unsafe {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
        }
    }
}

// SAFETY: reads 8 bytes.
unsafe impl Load<i8> for Avx2 {
    #[inline(always)]
    unsafe fn load(from: *const i8) -> __m256 {
        // SAFETY: the caller's.
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast()))) }
    }
}
