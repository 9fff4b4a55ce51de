//! Rows of 8-bit integers with integer products (AVX-512 VNNI).
//!
//! Turning each weight into an f32 takes longer than reading it. Here the other factor becomes an
//! integer of 16 bits instead, relative to the largest of its vector (or of eight coefficients), and
//! is multiplied as two bytes: `q = 256 high + low`. Sums of these products are exact; what is lost is
//! half a unit of `q`, some hundred times less than what the weights lost when they were stored.
//!
//! The instruction multiplies unsigned with signed bytes, so weights are read as `w + 128`, and
//! `128 q` is subtracted in the end.

use std::arch::x86_64::*;
use std::cell::RefCell;

use super::avx512::Avx512;
use super::lanes::{Lanes, Load};
use super::loops::{self, Joint, Listed, look_ahead};

/// The largest magnitude of a 16-bit factor; its high byte is then one of -125 to 125.
const MOST: f32 = 32_000.0;

/// Bytes that a loop takes of a row at a time.
const LINE: usize = 64;

/// Rows that are added at a time.
const GROUP: usize = 8;

thread_local! {
    static ROOM: RefCell<Room> = RefCell::default();
}

/// A thread's own room.
#[derive(Default)]
struct Room {
    high: Vec<i8>,
    low: Vec<i8>,
    /// A sum of rows, in the order of columns that interleaving gives.
    sum: Vec<f32>,
}

/// Sixteen bits as two signed bytes, `q = 256 high + low`.
#[inline(always)]
fn halves(q: i32) -> (i8, i8) {
    let low = q as i8;
    (((q - i32::from(low)) >> 8) as i8, low)
}

/// The value of one unit if the largest magnitude is to be [`MOST`]; `None` where numbers are not
/// finite, or too small to divide by.
#[inline(always)]
fn unit(values: &[f32]) -> Option<f32> {
    // Zero times what is not finite is not a number, and stays that in a sum.
    let finite = values.iter().fold(0.0f32, |sum, v| sum + v * 0.0) == 0.0;
    let most = values.iter().fold(0.0f32, |most, v| most.max(v.abs()));
    (finite && most > 1e-30).then_some(most / MOST)
}

/// `x` in two bytes, its unit, and the sum of what it became.
#[inline(always)]
fn quantise(x: &[f32], room: &mut Room) -> Option<(f32, i64)> {
    let unit = unit(x)?;
    let inverse = 1.0 / unit;
    room.high.resize(x.len(), 0);
    room.low.resize(x.len(), 0);
    let mut sum = 0i64;
    let bytes = room.high.chunks_mut(LINE).zip(room.low.chunks_mut(LINE));
    for (x, (high, low)) in x.chunks(LINE).zip(bytes) {
        let mut part = 0i32;
        for ((x, high), low) in x.iter().zip(high).zip(low) {
            let q = (x * inverse).round_ties_even() as i32;
            (*high, *low) = halves(q);
            part += q;
        }
        sum += i64::from(part);
    }
    Some((unit, sum))
}

/// The sums of `x . row` of a few rows, in units.
#[inline(always)]
unsafe fn dot_block<const R: usize>(
    rows: [*const i8; R],
    next: [*const i8; R],
    n: usize,
    (high, low): (*const i8, *const i8),
    sum: i64,
) -> [f32; R] {
    // SAFETY: `n` elements of each row and of both bytes are there, in whole lines.
    unsafe {
        let flip = _mm512_set1_epi8(-128);
        let mut highs = [_mm512_setzero_si512(); R];
        let mut lows = [_mm512_setzero_si512(); R];
        let mut i = 0;
        while i < n {
            look_ahead::<Avx512, i8, R>(&rows, &next, i, n);
            let high = _mm512_loadu_si512(high.add(i).cast());
            let low = _mm512_loadu_si512(low.add(i).cast());
            for r in 0..R {
                let w = _mm512_xor_si512(_mm512_loadu_si512(rows[r].add(i).cast()), flip);
                highs[r] = _mm512_dpbusd_epi32(highs[r], w, high);
                lows[r] = _mm512_dpbusd_epi32(lows[r], w, low);
            }
            i += LINE;
        }
        std::array::from_fn(|r| {
            let high = i64::from(_mm512_reduce_add_epi32(highs[r]));
            let low = i64::from(_mm512_reduce_add_epi32(lows[r]));
            (256 * high + low - 128 * sum) as f32
        })
    }
}

/// Four rows' bytes side by side: of line columns `16 l + 4 k + e` (`e` below 4) the `k`-th register
/// holds those in its `l`-th quarter.
#[inline(always)]
unsafe fn interleave(rows: &[*const i8], i: usize) -> [__m512i; 4] {
    // SAFETY: the caller has four rows, with a line at `i`.
    unsafe {
        let flip = _mm512_set1_epi8(-128);
        let load = |r: usize| {
            _mm512_xor_si512(_mm512_loadu_si512(rows.get_unchecked(r).add(i).cast()), flip)
        };
        let (a, b, c, d) = (load(0), load(1), load(2), load(3));
        let (ab, cd) = (_mm512_unpacklo_epi8(a, b), _mm512_unpacklo_epi8(c, d));
        let (ab_, cd_) = (_mm512_unpackhi_epi8(a, b), _mm512_unpackhi_epi8(c, d));
        [
            _mm512_unpacklo_epi16(ab, cd),
            _mm512_unpackhi_epi16(ab, cd),
            _mm512_unpacklo_epi16(ab_, cd_),
            _mm512_unpackhi_epi16(ab_, cd_),
        ]
    }
}

/// Adds eight rows to a sum of interleaved order; false, and nothing added, where the coefficients
/// have no unit.
#[inline(always)]
unsafe fn add_block(
    rows: [*const i8; GROUP],
    next: [*const i8; GROUP],
    coefficients: &[f32; GROUP],
    n: usize,
    sum: *mut f32,
) -> bool {
    let Some(unit) = unit(coefficients) else { return false };
    let inverse = 1.0 / unit;
    let q = coefficients.map(|c| (c * inverse).round_ties_even() as i32);
    let bytes = q.map(halves);
    let four = |from: usize, byte: fn((i8, i8)) -> i8| {
        i32::from_ne_bytes(std::array::from_fn(|r| byte(bytes[from + r]) as u8))
    };
    // SAFETY: `n` elements of each row and of the sum are there, in whole lines.
    unsafe {
        let high = [0, 4].map(|from| _mm512_set1_epi32(four(from, |bytes| bytes.0)));
        let low = [0, 4].map(|from| _mm512_set1_epi32(four(from, |bytes| bytes.1)));
        let offset = _mm512_set1_epi32(-128 * q.iter().sum::<i32>());
        let unit = _mm512_set1_ps(unit);
        let mut i = 0;
        while i < n {
            look_ahead::<Avx512, i8, GROUP>(&rows, &next, i, n);
            let first = interleave(&rows[..4], i);
            let second = interleave(&rows[4..], i);
            for k in 0..4 {
                let highs = _mm512_dpbusd_epi32(_mm512_setzero_si512(), first[k], high[0]);
                let highs = _mm512_dpbusd_epi32(highs, second[k], high[1]);
                let lows = _mm512_dpbusd_epi32(offset, first[k], low[0]);
                let lows = _mm512_dpbusd_epi32(lows, second[k], low[1]);
                let units = _mm512_add_epi32(_mm512_slli_epi32::<8>(highs), lows);
                let at = sum.add(i + 16 * k);
                let y = <Avx512 as Load<f32>>::load(at);
                Avx512::store(at, Avx512::fma(_mm512_cvtepi32_ps(units), unit, y));
            }
            i += LINE;
        }
    }
    true
}

/// Adds a sum of interleaved order to `y`.
#[inline(always)]
fn gather(sum: &[f32], y: &mut [f32]) {
    for (sum, y) in sum.as_chunks::<LINE>().0.iter().zip(y.as_chunks_mut::<LINE>().0) {
        for l in 0..4 {
            for k in 0..4 {
                for e in 0..4 {
                    y[16 * l + 4 * k + e] += sum[16 * k + 4 * l + e];
                }
            }
        }
    }
}

/// As [`loops::dot_rows`].
///
/// # Safety
/// As there.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn dot_rows(listed: Listed<'_, i8>, x: *const f32, out: &mut [f32]) {
    ROOM.with_borrow_mut(|room| {
        // SAFETY: `n` elements of `x` are there, as the caller says.
        let values = unsafe { std::slice::from_raw_parts(x, listed.n) };
        let whole = out.len() / 4 * 4;
        let mut done = 0;
        if let (Some((unit, sum)), true) = (quantise(values, room), whole > 0) {
            let bytes = (room.high.as_ptr(), room.low.as_ptr());
            while done < whole {
                // SAFETY: four rows from `done` on are in the list; the rest is the caller's promise.
                unsafe {
                    let (rows, next) = (listed.at::<4>(done), listed.at::<4>(done + 4));
                    let dots = dot_block(rows, next, listed.n, bytes, sum);
                    out[done..done + 4].copy_from_slice(&dots.map(|dot| dot * unit));
                }
                done += 4;
            }
        }
        let rest = listed.part(done..listed.list.len());
        // SAFETY: the caller's promise.
        unsafe { loops::dot_rows::<Avx512, i8>(rest, x, &mut out[done..]) };
    });
}

/// [`loops::decode_rows`], where nothing is multiplied but a scale.
///
/// # Safety
/// As there.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn decode_rows(listed: Listed<'_, i8>, scales: &[f32], out: *mut f32) {
    // SAFETY: the caller's promise.
    unsafe { loops::decode_rows::<Avx512, i8>(listed, scales, out) }
}

/// As [`loops::add_rows`].
///
/// # Safety
/// As there.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn add_rows(listed: Listed<'_, i8>, coefficients: &[f32], y: *mut f32) {
    let groups = coefficients.as_chunks::<GROUP>().0;
    // SAFETY: `n` elements of `y` are there and nobody else uses them, as the caller says.
    let values = unsafe { std::slice::from_raw_parts_mut(y, listed.n) };
    ROOM.with_borrow_mut(|room| {
        if groups.is_empty() {
            return;
        }
        room.sum.clear();
        room.sum.resize(listed.n, 0.0);
        for (group, coefficients) in groups.iter().enumerate() {
            let k = GROUP * group;
            // SAFETY: eight rows from `k` on are in the list; the rest is the caller's promise.
            unsafe {
                let (rows, next) = (listed.at::<GROUP>(k), listed.at::<GROUP>(k + GROUP));
                if !add_block(rows, next, coefficients, listed.n, room.sum.as_mut_ptr()) {
                    let these = listed.part(k..k + GROUP);
                    loops::add_rows::<Avx512, i8>(these, coefficients, values.as_mut_ptr());
                }
            }
        }
        gather(&room.sum, values);
    });
    let done = GROUP * groups.len();
    let rest = listed.part(done..listed.list.len());
    // SAFETY: the caller's promise.
    unsafe { loops::add_rows::<Avx512, i8>(rest, &coefficients[done..], values.as_mut_ptr()) };
}

/// As [`loops::bundles`], eight neurons at a time.
///
/// # Safety
/// As there.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn bundles(
    up: Listed<'_, i8>,
    down: Listed<'_, i8>,
    joint: &Joint<'_>,
    x: *const f32,
    products: &mut [f32],
    y: *mut f32,
) {
    // SAFETY: `n` elements of `x` and `y` are there, as the caller says.
    let (inputs, values) =
        unsafe { (std::slice::from_raw_parts(x, up.n), std::slice::from_raw_parts_mut(y, down.n)) };
    let done = ROOM.with_borrow_mut(|room| {
        let whole = products.len() / GROUP * GROUP;
        let Some((unit, sum)) = quantise(inputs, room).filter(|_| whole > 0) else { return 0 };
        room.sum.clear();
        room.sum.resize(down.n, 0.0);
        let bytes = (room.high.as_ptr(), room.low.as_ptr());
        for k in (0..whole).step_by(GROUP) {
            // SAFETY: eight neurons from `k` on are in the list; the rest is the caller's promise.
            unsafe {
                let rows = down.at::<GROUP>(k);
                let mut factors = [0.0; GROUP];
                for from in [0, 4] {
                    let next = if from == 0 { up.at::<4>(k + 4) } else { down.at::<4>(k) };
                    let dots = dot_block(up.at::<4>(k + from), next, up.n, bytes, sum);
                    for (r, dot) in dots.into_iter().enumerate() {
                        let at = k + from + r;
                        let neuron = *up.list.get_unchecked(at) as usize;
                        let gate = *joint.gate.get_unchecked(at);
                        (products[at], factors[from + r]) = joint.product(neuron, gate, dot * unit);
                    }
                }
                let next = up.at::<GROUP>(k + GROUP);
                if !add_block(rows, next, &factors, down.n, room.sum.as_mut_ptr()) {
                    let these = down.part(k..k + GROUP);
                    loops::add_rows::<Avx512, i8>(these, &factors, values.as_mut_ptr());
                }
            }
        }
        gather(&room.sum, values);
        whole
    });
    let (up, down) = (up.part(done..up.list.len()), down.part(done..down.list.len()));
    let joint = Joint { gate: &joint.gate[done..], ..*joint };
    let products = &mut products[done..];
    // SAFETY: the caller's promise.
    unsafe { loops::bundles::<Avx512, i8>(up, down, &joint, x, products, values.as_mut_ptr()) };
}
