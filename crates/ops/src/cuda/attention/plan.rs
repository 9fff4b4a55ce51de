//! How attention is cut into blocks: segments, tiles, and which of them start first.

use std::cmp::Reverse;
use std::ops::Range;

use super::OP;
use crate::attention::Segment;
use crate::error::{Error, Result};

/// A segment whose keys lie in one run, as kernels read it: first query, queries, first key, keys.
pub(super) type Plain = [i32; 4];

/// A segment and the number of a tile of its queries or keys, as kernels read it.
pub(super) type Item = [i32; 2];

/// Whose tiles blocks own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Queries,
    Keys,
}

/// Rows are counted in 32 bits, and a row and a window are added.
const MOST_ROWS: usize = (1 << 30) - 1024;

/// Bytes of keys and values that blocks running at the same time shall walk, to stay in the cache.
const CACHED: usize = 24 << 20;

/// A window that shows everything.
const EVERYTHING: i32 = 1 << 30;

pub(super) fn window(window: Option<usize>) -> i32 {
    window.and_then(|window| i32::try_from(window).ok()).unwrap_or(EVERYTHING).min(EVERYTHING)
}

/// A number of rows as kernels count them.
pub(super) fn count(rows: usize) -> Result<i32> {
    if rows > MOST_ROWS {
        let what = format!("{rows} rows on a GPU, where {MOST_ROWS} are the most");
        return Err(Error::Unsupported { op: OP, what });
    }
    Ok(rows as i32)
}

/// A segment with its keys in one run at `kv_start`.
pub(super) fn plain(segment: &Segment, kv_start: usize, kv_len: usize) -> Result<Plain> {
    Ok([count(segment.q_start)?, count(segment.q_len)?, count(kv_start)?, count(kv_len)?])
}

/// Tiles of one kind and what they cost.
pub(super) struct Tiles {
    /// Those with the longest walks first, so that the last to start are short.
    pub(super) items: Vec<Item>,
    /// The rows that the longest walk passes.
    pub(super) longest: usize,
    /// The rows that all walks pass.
    pub(super) total: usize,
}

/// The tiles of `size` queries, or of keys.
pub(super) fn tiles(segments: &[Plain], side: Side, size: usize, window: i32) -> Tiles {
    let mut walks = Vec::new();
    for (number, segment) in segments.iter().enumerate() {
        let len = match side {
            Side::Queries => segment[1],
            Side::Keys => segment[3],
        };
        for (tile, first) in (0..len).step_by(size).enumerate() {
            let rows = len.min(first + size as i32) - first;
            let walk = walk(segment, side, first..first + rows, window);
            walks.push((walk, [number as i32, tile as i32]));
        }
    }
    walks.sort_by_key(|(walk, _)| Reverse(*walk));
    Tiles {
        longest: walks.first().map_or(0, |(walk, _)| *walk),
        total: walks.iter().map(|(walk, _)| *walk).sum(),
        items: walks.into_iter().map(|(_, item)| item).collect(),
    }
}

/// How many keys a tile of queries sees, or the other way round.
fn walk(&[_, q_len, _, kv_len]: &Plain, side: Side, rows: Range<i32>, window: i32) -> usize {
    let offset = kv_len - q_len;
    let (begin, end) = match side {
        Side::Queries => ((offset + rows.start + 1 - window).max(0), offset + rows.end),
        Side::Keys => ((rows.start - offset).max(0), (rows.end - 1 - offset + window).min(q_len)),
    };
    (end - begin).max(0) as usize
}

/// How many key heads run at the same time where all segments of one walk over `rows` rows of
/// `bytes` bytes.
pub(super) fn heads_at_a_time(kv_heads: usize, rows: usize, bytes: usize) -> usize {
    let fitting = (CACHED / (rows * bytes).max(1)).clamp(1, kv_heads);
    kv_heads.div_ceil(kv_heads.div_ceil(fitting))
}

/// Into how many parts the query heads of a group are cut, so that the tile with the longest walk
/// takes at most half of a slot's share.
pub(super) fn splits(tiles: &Tiles, group: usize, kv_heads: usize, slots: usize) -> usize {
    (2 * tiles.longest * slots).div_ceil((tiles.total * kv_heads).max(1)).clamp(1, group)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failure is the test's failure")]
mod tests {
    use super::*;

    #[test]
    fn long_walks_start_first() {
        let segments = [[0, 3, 0, 3], [3, 10, 5, 20]];
        let all = window(None);
        let found = tiles(&segments, Side::Queries, 4, all);
        assert_eq!(found.items, [[1, 2], [1, 1], [1, 0], [0, 0]]);
        assert_eq!((found.longest, found.total), (20, 20 + 18 + 14 + 3));
        let found = tiles(&segments, Side::Keys, 8, all);
        assert_eq!(found.items, [[1, 0], [1, 1], [1, 2], [0, 0]]);
        assert_eq!((found.longest, found.total), (10, 10 + 10 + 4 + 3));
        // A window of 2: queries at keys 10 and 11 see 9, 10 and 11.
        let found = tiles(&[[0, 2, 0, 12]], Side::Queries, 4, window(Some(2)));
        assert_eq!(found.total, 3);
        let found = tiles(&[[0, 2, 0, 12]], Side::Keys, 4, window(Some(2)));
        assert_eq!((found.longest, found.total), (2, 2));
    }

    #[test]
    fn groups_are_cut_where_tiles_are_few() {
        let documents: Vec<Plain> = (0..8).map(|i| [i * 2048, 2048, i * 2048, 2048]).collect();
        let tiles = tiles(&documents, Side::Keys, 128, window(None));
        assert_eq!(splits(&tiles, 71, 1, 264), 8);
        assert_eq!(splits(&tiles, 1, 16, 132), 1);
        assert_eq!(splits(&tiles, 4, 8, 132), 1);
        assert_eq!(heads_at_a_time(16, 16384, 512), 3);
        assert_eq!(heads_at_a_time(2, 100, 512), 2);
        assert_eq!(heads_at_a_time(4, 1 << 30, 512), 1);
    }
}
