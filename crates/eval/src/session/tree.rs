//! Token sequences as a tree of runs, so that what they share is computed once: the
//! context of a question's choices, the examples before every question of a subject.

use std::ops::Range;

/// Shorter shared beginnings are computed again for each sequence: a run of a few tokens
/// costs more in bookkeeping and narrow products than it saves.
const MIN_SHARED: usize = 16;

/// A run of tokens that continues its parent's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Node {
    /// The run in front of it; none at the start of a sequence.
    pub(super) parent: Option<usize>,
    /// A sequence that the run belongs to.
    sequence: usize,
    /// Where in that sequence it stands.
    pub(super) at: Range<usize>,
}

/// Sequences as a tree. Parents come before their children, and what lies between a node
/// and its last descendant is all below it (depth first).
#[derive(Clone, Debug, Default)]
pub(super) struct Tree {
    pub(super) nodes: Vec<Node>,
    /// The node that each sequence ends with.
    pub(super) leaves: Vec<usize>,
}

impl Tree {
    /// The tree of some sequences, none of them empty.
    pub(super) fn new(sequences: &[&[u32]]) -> Tree {
        let mut order: Vec<usize> = (0..sequences.len()).collect();
        order.sort_by_key(|&index| sequences[index]);
        let mut tree = Tree { nodes: Vec::new(), leaves: vec![0; sequences.len()] };
        tree.grow(sequences, &order, None, 0, 0);
        tree
    }

    /// The tokens of a node.
    pub(super) fn ids<'a>(&self, node: usize, sequences: &[&'a [u32]]) -> &'a [u32] {
        let Node { sequence, at, .. } = &self.nodes[node];
        &sequences[*sequence][at.clone()]
    }

    /// A node and all in front of it, the last first.
    pub(super) fn path(&self, leaf: usize) -> impl Iterator<Item = usize> + '_ {
        std::iter::successors(Some(leaf), |node| self.nodes[*node].parent)
    }

    /// Ranges of nodes that are computed together: at most `budget` tokens, or one node.
    pub(super) fn passes(&self, budget: usize) -> Vec<Range<usize>> {
        let (mut passes, mut start, mut tokens) = (Vec::new(), 0, 0);
        for (index, node) in self.nodes.iter().enumerate() {
            if index > start && tokens + node.at.len() > budget {
                passes.push(start..index);
                (start, tokens) = (index, 0);
            }
            tokens += node.at.len();
        }
        if start < self.nodes.len() {
            passes.push(start..self.nodes.len());
        }
        passes
    }

    /// How many tokens' keys and values are held at once at most, in passes of `budget`:
    /// those of a pass and all in front of its first node.
    pub(super) fn rows(&self, budget: usize) -> usize {
        let tokens = |pass: Range<usize>| {
            let before = self.nodes[pass.start].at.start;
            before + self.nodes[pass].iter().map(|node| node.at.len()).sum::<usize>()
        };
        self.passes(budget).into_iter().map(tokens).max().unwrap_or(0)
    }

    /// Adds sorted sequences whose first `depth` tokens stand in `parent`'s path, and of
    /// which the first `same` are known to be the same.
    fn grow(
        &mut self,
        sequences: &[&[u32]],
        sorted: &[usize],
        parent: Option<usize>,
        depth: usize,
        same: usize,
    ) {
        let (Some(&first), Some(&last)) = (sorted.first(), sorted.last()) else { return };
        let (shortest, longest) = (sequences[first], sequences[last]);
        let same = same + shared(&shortest[same..], &longest[same..]);
        // The first ends where all are the same: it is the shortest. If all are equal, there
        // is one run whatever its length.
        let equal = same == longest.len();
        if same - depth >= MIN_SHARED || (equal && same > depth) {
            let node = self.nodes.len();
            self.nodes.push(Node { parent, sequence: first, at: depth..same });
            let ended = sorted.iter().take_while(|&&index| sequences[index].len() == same).count();
            sorted[..ended].iter().for_each(|&index| self.leaves[index] = node);
            return self.branch(sequences, &sorted[ended..], Some(node), same, same);
        }
        // Sequences that end in the parent's path.
        let ended = sorted.iter().take_while(|&&index| sequences[index].len() == depth).count();
        if let Some(parent) = parent {
            sorted[..ended].iter().for_each(|&index| self.leaves[index] = parent);
        }
        self.branch(sequences, &sorted[ended..], parent, depth, same);
    }

    /// Adds sorted sequences, all of the same first `same` tokens, by what follows.
    fn branch(
        &mut self,
        sequences: &[&[u32]],
        sorted: &[usize],
        parent: Option<usize>,
        depth: usize,
        same: usize,
    ) {
        for group in sorted.chunk_by(|&a, &b| sequences[a].get(same) == sequences[b].get(same)) {
            self.grow(sequences, group, parent, depth, same);
        }
    }
}

/// How many tokens two sequences start with in common.
fn shared(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn check(sequences: &[Vec<u32>]) -> Tree {
        let sequences: Vec<&[u32]> = sequences.iter().map(Vec::as_slice).collect();
        let tree = Tree::new(&sequences);
        for (index, sequence) in sequences.iter().enumerate() {
            let mut path: Vec<usize> = tree.path(tree.leaves[index]).collect();
            path.reverse();
            let ids: Vec<u32> =
                path.iter().flat_map(|&node| tree.ids(node, &sequences).to_vec()).collect();
            assert_eq!(ids, *sequence, "{tree:?}");
            assert!(path.is_sorted(), "parents come first");
        }
        for (index, node) in tree.nodes.iter().enumerate() {
            assert!(!node.at.is_empty());
            // Depth first: a node's ancestors are among those of the node before it.
            if let (Some(parent), Some(before)) = (node.parent, index.checked_sub(1)) {
                assert!(tree.path(before).any(|ancestor| ancestor == parent), "{tree:?}");
            }
        }
        tree
    }

    #[test]
    fn a_shared_context_is_one_run() {
        let context: Vec<u32> = (0..20).collect();
        let with = |end: &[u32]| [context.as_slice(), end].concat();
        let tree = check(&[with(&[50, 51]), with(&[]), with(&[50, 60]), with(&[]), vec![7]]);
        let lengths: Vec<usize> = tree.nodes.iter().map(|node| node.at.len()).collect();
        // The second blank between 50 and 51 is too short to share.
        assert_eq!(lengths, [20, 2, 2, 1]);
        assert_eq!(tree.leaves, [1, 0, 2, 0, 3]);
    }

    #[test]
    fn examples_before_questions_before_choices() {
        let sequence = |question: u32, choice: u32| {
            let mut ids = vec![1; 100];
            ids.extend(vec![question; 30]);
            ids.extend(vec![choice; 3]);
            ids
        };
        let all =
            [(2, 8), (2, 9), (3, 8), (3, 9)].map(|(question, choice)| sequence(question, choice));
        assert_eq!(check(&all).nodes.len(), 1 + 2 + 4);
    }

    #[test]
    fn passes_hold_the_budget_or_one_node() {
        let tree = check(&[vec![1; 3], vec![2; 9], vec![3], vec![4; 4], vec![5; 4]]);
        assert_eq!(tree.passes(8), [0..1, 1..2, 2..4, 4..5]);
        assert_eq!(tree.rows(8), 9);
        let nothing = Tree::new(&[]);
        assert_eq!((nothing.passes(8).len(), nothing.rows(8)), (0, 0));
    }

    proptest! {
        #[test]
        fn every_sequence_is_its_path(
            heads in prop::collection::vec(prop::collection::vec(0u32..2, 1..40), 1..4),
            tails in prop::collection::vec((0usize..4, prop::collection::vec(0u32..2, 0..20)), 1..30),
        ) {
            let sequences: Vec<Vec<u32>> = tails
                .iter()
                .map(|(head, tail)| [heads[head % heads.len()].as_slice(), tail].concat())
                .collect();
            check(&sequences);
        }
    }
}
