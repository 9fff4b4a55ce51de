//! Which queries see which keys, and where those keys lie.

use std::sync::Arc;

/// Rows `start..start+len` of the keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The first row.
    pub start: usize,
    /// Their number.
    pub len: usize,
}

impl Run {
    /// The row after the last; `None` where no row can have that number.
    pub(super) fn end(self) -> Option<usize> {
        self.start.checked_add(self.len)
    }
}

/// Queries `q_start..q_start+q_len` attend to the keys of `prefix`, run after run, and then to
/// `kv_start..kv_start+kv_len`.
///
/// The last query sits at the last key. Keys count from 0 through all runs; with `n` of them in all,
/// query `i` sees key `j` iff `j <= n-q_len+i` and, with a window, `j > n-q_len+i-window`. `q_len`
/// may be 0 and is at most `kv_len`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// First row of the queries.
    pub q_start: usize,
    /// Number of queries.
    pub q_len: usize,
    /// First row of the keys and values that are the queries' own.
    pub kv_start: usize,
    /// Number of those keys.
    pub kv_len: usize,
    /// The keys before them: what a branch shares with others.
    pub prefix: Arc<[Run]>,
}

impl Segment {
    /// A document that attends to itself: rows `start..start+len` are its queries and its keys.
    pub fn document(start: usize, len: usize) -> Self {
        Self::continued((start, len), (start, len))
    }

    /// Queries and keys, each (first row, number), without a prefix.
    pub fn continued((q_start, q_len): (usize, usize), (kv_start, kv_len): (usize, usize)) -> Self {
        Self { q_start, q_len, kv_start, kv_len, prefix: Arc::default() }
    }

    /// The same queries with these keys before the own ones. Runs that lie one behind the other
    /// become one, so that they cost one product.
    #[must_use]
    pub fn after(mut self, runs: impl IntoIterator<Item = Run>) -> Self {
        let mut prefix: Vec<Run> = Vec::new();
        for run in runs.into_iter().filter(|run| run.len > 0) {
            match prefix.last_mut() {
                Some(last) if last.end() == Some(run.start) => last.len += run.len,
                _ => prefix.push(run),
            }
        }
        if let Some(last) = prefix.pop_if(|last| last.end() == Some(self.kv_start)) {
            self.kv_start = last.start;
            self.kv_len += last.len;
        }
        self.prefix = prefix.into();
        self
    }

    /// All keys' runs in their order, the own one last.
    pub(crate) fn runs(&self) -> impl Iterator<Item = Run> {
        let own = Run { start: self.kv_start, len: self.kv_len };
        self.prefix.iter().copied().chain([own])
    }

    /// How many keys there are; `None` if that is no number.
    pub(crate) fn keys(&self) -> Option<usize> {
        self.runs().try_fold(0usize, |sum, run| sum.checked_add(run.len))
    }

    /// How many keys come before the own ones; the sum was checked on the way in.
    pub(super) fn before(&self) -> usize {
        self.prefix.iter().map(|run| run.len).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_one_behind_the_other_become_one() {
        let run = |start, len| Run { start, len };
        let own = Segment::continued((3, 2), (20, 4));
        let merged = own.clone().after([run(0, 3), run(3, 0), run(3, 2), run(9, 1), run(18, 2)]);
        assert_eq!(*merged.prefix, [run(0, 5), run(9, 1)]);
        assert_eq!((merged.kv_start, merged.kv_len), (18, 6));
        assert_eq!((merged.q_start, merged.q_len, merged.keys()), (3, 2, Some(12)));
        assert_eq!(own.clone().after([]), own);
        assert_eq!(own.clone().after([run(0, 20)]), Segment::continued((3, 2), (0, 24)));
        assert_eq!(*own.after([run(5, 1), run(0, 5)]).prefix, [run(5, 1), run(0, 5)]);
    }
}
