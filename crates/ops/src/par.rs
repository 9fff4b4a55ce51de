//! Work cut into chunks of fixed size: the cuts depend on the data's size alone, so that results do
//! not depend on how many threads share the chunks.

use std::ops::Range;

/// About how many elements a chunk should hold: enough to be worth a thread, and in its cache.
pub(crate) const CHUNK: usize = 1 << 14;

/// Rows to a chunk for rows of `width` elements.
pub(crate) fn grain(width: usize) -> usize {
    (CHUNK / width.max(1)).max(1)
}

/// Something that divides at an item.
pub(crate) trait Split: Sized + Send {
    /// The items before `at`, and the rest.
    fn split(self, at: usize) -> (Self, Self);
}

/// A slice and how many elements an item has; the last item may be shorter.
impl<T: Sync> Split for (&[T], usize) {
    fn split(self, at: usize) -> (Self, Self) {
        let (a, b) = self.0.split_at(at.saturating_mul(self.1).min(self.0.len()));
        ((a, self.1), (b, self.1))
    }
}

impl<T: Send> Split for (&mut [T], usize) {
    fn split(self, at: usize) -> (Self, Self) {
        let mid = at.saturating_mul(self.1).min(self.0.len());
        let (a, b) = self.0.split_at_mut(mid);
        ((a, self.1), (b, self.1))
    }
}

/// The items' numbers, for work that must know where it is.
impl Split for Range<usize> {
    fn split(self, at: usize) -> (Self, Self) {
        let mid = self.start + at.min(self.len());
        (self.start..mid, mid..self.end)
    }
}

macro_rules! split_arrays {
    ($($name:ident $a:ident $b:ident),+) => {
        /// Several slices, divided alike.
        impl<$($name: Split),+> Split for ($($name,)+) {
            fn split(self, at: usize) -> (Self, Self) {
                #[allow(non_snake_case, reason = "the type's name serves as the value's")]
                let ($($name,)+) = self;
                $(let ($a, $b) = $name.split(at);)+
                (($($a,)+), ($($b,)+))
            }
        }
    };
}
split_arrays!(A a0 a1, B b0 b1);
split_arrays!(A a0 a1, B b0 b1, C c0 c1);
split_arrays!(A a0 a1, B b0 b1, C c0 c1, D d0 d1);
split_arrays!(A a0 a1, B b0 b1, C c0 c1, D d0 d1, E e0 e1);
split_arrays!(A a0 a1, B b0 b1, C c0 c1, D d0 d1, E e0 e1, F f0 f1);

/// Calls `f` on chunks of `grain` items out of `n` (never on an empty one), on whichever threads the pool has.
pub(crate) fn for_chunks<S: Split>(items: S, n: usize, grain: usize, f: &(impl Fn(S) + Sync)) {
    if n == 0 {
        return;
    }
    if n <= grain {
        return f(items);
    }
    let left = (n / 2).div_ceil(grain) * grain;
    let (a, b) = items.split(left);
    rayon::join(|| for_chunks(a, left, grain, f), || for_chunks(b, n - left, grain, f));
}
