//! Several sequences at one matrix: its rows are taken block by block, and each sequence adds its own rows
//! of a block while they are in a cache. So a row comes from memory once, if any sequence needs it, and
//! nobody multiplies what is zero for him.

use std::ops::Range;

/// Bytes of a block, which a core's own cache should hold beside sums. Smaller ones cost more than they
/// gain where a kernel prepares its other factor for each (integer products).
const BLOCK: u64 = 512 << 10;

/// Where each sequence's list is cut: the sequence and the part of its list, in the order in which they
/// should be taken. Lists are ascending; all parts of one but the last are multiples of `group`, so that
/// kernels that take so many rows at a time round as they do with the whole list. `row_bytes` are
/// what is read of a row.
pub(crate) fn parts<'a, L>(lists: L, group: usize, row_bytes: u64) -> Vec<(usize, Range<usize>)>
where
    L: ExactSizeIterator<Item = &'a [u32]> + Clone,
{
    let whole = || lists.clone().enumerate().filter(|(_, list)| !list.is_empty());
    if lists.len() == 1 {
        return whole().map(|(n, list)| (n, 0..list.len())).collect();
    }
    let first = whole().map(|(_, list)| list[0] as usize).min().unwrap_or(0);
    let end = whole().map(|(_, list)| list[list.len() - 1] as usize + 1).max().unwrap_or(0);
    // As many places as hold a block's rows, on average.
    let rows = (BLOCK / row_bytes.max(1)).max(1) as usize;
    let span = ((end - first) * rows).div_ceil(union(lists.clone()).max(1)).max(1);
    let mut taken = vec![0; lists.len()];
    let mut parts = Vec::new();
    let mut until = first;
    while until < end {
        until = end.min(until + span);
        for (n, list) in whole() {
            let from = taken[n];
            let rest = &list[from..];
            let mut count = rest.partition_point(|row| (*row as usize) < until);
            if count < rest.len() {
                count -= count % group;
            }
            if count > 0 {
                taken[n] += count;
                parts.push((n, from..from + count));
            }
        }
    }
    parts
}

/// The same for rows that all sequences read, in blocks of neighbours.
pub(crate) fn blocks(rows: Range<usize>, row_bytes: u64, sequences: usize) -> Vec<Range<usize>> {
    if sequences == 1 {
        return vec![rows];
    }
    let block = (BLOCK / row_bytes.max(1)).max(1) as usize;
    rows.clone().step_by(block).map(|start| start..rows.end.min(start + block)).collect()
}

/// How many rows are in any of the lists.
pub(crate) fn union<'a>(mut lists: impl ExactSizeIterator<Item = &'a [u32]> + Clone) -> usize {
    if lists.len() == 1 {
        return lists.next().map_or(0, <[u32]>::len);
    }
    let end = lists.clone().filter_map(<[u32]>::last).max().map_or(0, |last| *last as usize + 1);
    let mut marks = vec![0u64; end.div_ceil(64)];
    for row in lists.flatten() {
        marks[*row as usize / 64] |= 1 << (row % 64);
    }
    marks.into_iter().map(|marks| marks.count_ones() as usize).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_list_is_taken_once_in_groups() {
        let list =
            |step: u32, rest: u32| (0..4000).filter(|i| i % step == rest).collect::<Vec<_>>();
        let lists = [list(1, 0), list(3, 1), Vec::new(), list(700, 5), vec![3999]];
        for sequences in 1..=lists.len() {
            for group in [1, 4, 8] {
                let of = || lists[..sequences].iter().map(Vec::as_slice);
                let mut taken = vec![0; sequences];
                for (n, part) in parts(of(), group, 8000) {
                    assert_eq!(part.start, taken[n]);
                    assert!(part.end == lists[n].len() || part.len().is_multiple_of(group));
                    taken[n] = part.end;
                }
                assert_eq!(taken, of().map(<[u32]>::len).collect::<Vec<_>>());
            }
        }
        assert!(parts(lists.iter().map(Vec::as_slice), 8, 8000).len() > 50);
    }

    #[test]
    fn a_row_of_several_lists_counts_once() {
        let lists: [&[u32]; 4] = [&[0, 3, 64, 200], &[3, 65], &[], &[200]];
        assert_eq!(union(lists.into_iter()), 5);
        assert_eq!(union(lists.into_iter().take(1)), 4);
        assert_eq!(union([&[][..], &[][..]].into_iter()), 0);
    }

    #[test]
    fn blocks_cover_all_rows() {
        assert_eq!(blocks(64..1000, 4096, 1).as_slice(), std::slice::from_ref(&(64..1000)));
        let blocks = blocks(64..1000, 4096, 2);
        assert_eq!((blocks[0].clone(), blocks[1].start, blocks.len()), (64..192, 192, 8));
        assert_eq!(blocks[7].end, 1000);
    }
}
