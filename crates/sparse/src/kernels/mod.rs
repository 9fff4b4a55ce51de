//! Products with listed rows of a packed matrix, for the instruction set that is there.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod lanes;
mod loops;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod vnni;

use std::ops::Range;

use lanes::{Bf16, F16};
use loops::{Joint, Listed};
use portable::Portable;

use crate::Format;
use crate::matrix::{PAD, Rows, padded};

/// Rows that [`add_rows`] takes at a time: a list that is cut at multiples of it gives the same bits,
/// but with integer products.
pub(crate) const ADDED: usize = 8;

/// Neurons that [`bundles`] takes at a time: as [`ADDED`].
pub(crate) const BUNDLED: usize = 4;

/// An instruction set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Isa {
    /// AVX-512, and integer products for [`Format::Int8`].
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "aarch64")]
    Neon,
    Portable,
}

impl Isa {
    /// The best that this processor has.
    pub fn detect() -> Isa {
        Isa::available()[0]
    }

    /// All that this processor has, the best first.
    pub fn available() -> Vec<Isa> {
        let mut sets = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            let avx512 = avx2 && is_x86_feature_detected!("avx512f");
            let integer =
                is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vnni");
            if avx512 && integer {
                sets.push(Isa::Avx512Vnni);
            }
            if avx512 {
                sets.push(Isa::Avx512);
            }
            if avx2 {
                sets.push(Isa::Avx2);
            }
        }
        #[cfg(target_arch = "aarch64")]
        sets.push(Isa::Neon);
        sets.push(Isa::Portable);
        sets
    }
}

/// Calls `$f` (a function of `loops` with arguments) for the format and instruction set.
macro_rules! dispatch {
    ($isa:expr, $format:expr, $f:ident, $W:ident => ($($arg:expr),*)) => {
        match $format {
            Format::F32 => { type $W = f32; dispatch!(@isa $isa, $f, $W, ($($arg),*)) }
            Format::F16 => { type $W = F16; dispatch!(@isa $isa, $f, $W, ($($arg),*)) }
            Format::Bf16 => { type $W = Bf16; dispatch!(@isa $isa, $f, $W, ($($arg),*)) }
            #[cfg(target_arch = "x86_64")]
            Format::Int8 if $isa == Isa::Avx512Vnni => { type $W = i8; vnni::$f($($arg),*) }
            Format::Int8 => { type $W = i8; dispatch!(@isa $isa, $f, $W, ($($arg),*)) }
        }
    };
    (@isa $isa:expr, $f:ident, $W:ident, ($($arg:expr),*)) => {
        match $isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni | Isa::Avx512 => compiled::avx512::$f::<$W>($($arg),*),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => compiled::avx2::$f::<$W>($($arg),*),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => loops::$f::<neon::Neon, $W>($($arg),*),
            Isa::Portable => loops::$f::<Portable, $W>($($arg),*),
        }
    };
}

/// The loops, compiled for each instruction set of which it is not known beforehand that it is there.
#[cfg(target_arch = "x86_64")]
mod compiled {
    macro_rules! compile {
        ($name:ident, $lanes:ty, $features:literal) => {
            pub(in crate::kernels) mod $name {
                use crate::kernels::lanes::Load;
                use crate::kernels::loops::{self, Joint, Listed};

                #[target_feature(enable = $features)]
                pub unsafe fn dot_rows<W>(listed: Listed<'_, W>, x: *const f32, out: &mut [f32])
                where
                    $lanes: Load<W>,
                {
                    // SAFETY: the caller's promise.
                    unsafe { loops::dot_rows::<$lanes, W>(listed, x, out) }
                }

                #[target_feature(enable = $features)]
                pub unsafe fn add_rows<W>(listed: Listed<'_, W>, c: &[f32], y: *mut f32)
                where
                    $lanes: Load<W>,
                {
                    // SAFETY: the caller's promise.
                    unsafe { loops::add_rows::<$lanes, W>(listed, c, y) }
                }

                #[target_feature(enable = $features)]
                pub unsafe fn decode_rows<W>(listed: Listed<'_, W>, scales: &[f32], out: *mut f32)
                where
                    $lanes: Load<W>,
                {
                    // SAFETY: the caller's promise.
                    unsafe { loops::decode_rows::<$lanes, W>(listed, scales, out) }
                }

                #[target_feature(enable = $features)]
                pub unsafe fn bundles<W>(
                    up: Listed<'_, W>,
                    down: Listed<'_, W>,
                    joint: &Joint<'_>,
                    x: *const f32,
                    products: &mut [f32],
                    y: *mut f32,
                ) where
                    $lanes: Load<W>,
                {
                    // SAFETY: the caller's promise.
                    unsafe { loops::bundles::<$lanes, W>(up, down, joint, x, products, y) }
                }
            }
        };
    }
    compile!(avx512, crate::kernels::avx512::Avx512, "avx512f,avx2,fma,f16c");
    compile!(avx2, crate::kernels::avx2::Avx2, "avx2,fma,f16c");
}

/// The rows of a list, checked: afterwards the loops may trust them.
fn listed<'a, W>(rows: &Rows<'_>, list: &'a [u32], cols: &Range<usize>) -> Listed<'a, W> {
    let n = padded(cols.len());
    let last = list.iter().copied().max().unwrap_or(0) as usize;
    let end = (last * rows.stride + cols.start + n) * rows.format.bytes();
    assert!(list.is_empty() || (last < rows.rows && end <= rows.data.len()), "rows out of range");
    let base = rows.data.as_ptr().cast::<W>().wrapping_add(cols.start);
    Listed { base, stride: rows.stride, list, n }
}

/// `out[k] = row[list[k]] . x`, scaled; `x` is padded with zeros.
pub(crate) fn dot_rows(isa: Isa, rows: &Rows<'_>, list: &[u32], x: &[f32], out: &mut [f32]) {
    let out = &mut out[..list.len()];
    let x = &x[..padded(rows.cols)];
    // SAFETY: `listed` has checked the rows, the slices are as long as the loops take them, and an
    // `Isa` other than the portable one exists only where it was detected.
    unsafe {
        dispatch!(isa, rows.format, dot_rows, W => (listed::<W>(rows, list, &(0..rows.cols)), x.as_ptr(), out));
    }
    if !rows.scales.is_empty() {
        list.iter().zip(out).for_each(|(&row, out)| *out *= rows.scales[row as usize]);
    }
}

/// `y += coefficients[k] row[list[k]][cols]`. Scales are no part of it: [`fold_scales`] brings them
/// into the coefficients. `cols` starts at a multiple of [`PAD`], `y` is padded.
pub(crate) fn add_rows(
    isa: Isa,
    rows: &Rows<'_>,
    list: &[u32],
    coefficients: &[f32],
    cols: Range<usize>,
    y: &mut [f32],
) {
    debug_assert!(cols.start.is_multiple_of(PAD));
    let coefficients = &coefficients[..list.len()];
    let y = &mut y[..padded(cols.len())];
    // SAFETY: as in `dot_rows`.
    unsafe {
        dispatch!(isa, rows.format, add_rows, W => (listed::<W>(rows, list, &cols), coefficients, y.as_mut_ptr()));
    }
}

/// Columns of some rows as f32, one row after the other, each padded to whole lines. `cols` starts at a
/// multiple of [`PAD`].
pub(crate) fn decode_rows(
    isa: Isa,
    rows: &Rows<'_>,
    list: &[u32],
    cols: Range<usize>,
    out: &mut [f32],
) {
    debug_assert!(cols.start.is_multiple_of(PAD));
    let out = &mut out[..list.len() * padded(cols.len())];
    let scales = list.iter().filter_map(|row| rows.scales.get(*row as usize).copied());
    let scales: Vec<f32> = scales.collect();
    // SAFETY: as in `dot_rows`.
    unsafe {
        dispatch!(isa, rows.format, decode_rows, W => (listed::<W>(rows, list, &cols), &scales, out.as_mut_ptr()));
    }
}

/// The coefficients times the scales of their rows, where rows have scales; `scaled` is room.
pub(crate) fn fold_scales<'a>(
    rows: &Rows<'_>,
    list: &[u32],
    coefficients: &'a [f32],
    scaled: &'a mut Vec<f32>,
) -> &'a [f32] {
    if rows.scales.is_empty() {
        return coefficients;
    }
    scaled.clear();
    let both = list.iter().zip(coefficients);
    scaled.extend(both.map(|(&row, c)| c * rows.scales[row as usize]));
    scaled
}

/// The two rows of each listed neuron in one pass: `products[k] = gate[k] (up . x + bias)`, and
/// `y += products[k] down`.
#[allow(clippy::too_many_arguments, reason = "one call says all about a pass")]
pub(crate) fn bundles(
    isa: Isa,
    (up, down): (&Rows<'_>, &Rows<'_>),
    list: &[u32],
    gate: &[f32],
    bias: &[f32],
    x: &[f32],
    products: &mut [f32],
    y: &mut [f32],
) {
    let joint =
        Joint { gate: &gate[..list.len()], bias, up_scales: up.scales, down_scales: down.scales };
    let (x, products) = (&x[..padded(up.cols)], &mut products[..list.len()]);
    let y = &mut y[..padded(down.cols)];
    let (ups, downs) = (0..up.cols, 0..down.cols);
    // SAFETY: as in `dot_rows`.
    unsafe {
        dispatch!(isa, up.format, bundles, W => (
            listed::<W>(up, list, &ups),
            listed::<W>(down, list, &downs),
            &joint,
            x.as_ptr(),
            products,
            y.as_mut_ptr()
        ));
    }
}
