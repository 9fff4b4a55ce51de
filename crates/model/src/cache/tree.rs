//! Sequences that share beginnings: each shared run of tokens is computed and kept once.
//!
//! Runs lie one behind the other in the order in which they were announced. A run's queries
//! attend to its ancestors' rows where these lie, so that branching copies nothing. Room is
//! made by forgetting all but one path ([`KvTree::retain`]), which moves to the front: a
//! capacity of the longest path and the tokens of a pass always suffices.

use std::collections::HashMap;

use relufy_ops::attention::{Run, Segment};

use super::KvRows;
use crate::{Decoder, Error, Result, Tokens};

/// A run of tokens in a [`KvTree`]; valid until the tree forgets it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RunId(u64);

/// The keys and values of sequences that branch.
pub struct KvTree {
    rows: KvRows,
    capacity: usize,
    max_positions: usize,
    used: usize,
    nodes: HashMap<RunId, Node>,
    next: u64,
    /// Runs that did not go through a pass yet, in their order, with their tokens.
    waiting: Vec<(RunId, Vec<u32>)>,
    /// How many of them the last [`KvTree::announced`] gave out.
    given: usize,
}

/// A run: whom it continues, where it lies, and how many tokens stand before it.
struct Node {
    parent: Option<RunId>,
    run: Run,
    before: usize,
}

impl KvTree {
    /// Room for `rows` tokens in all.
    ///
    /// # Errors
    /// More than the device has room for.
    pub fn new(decoder: &Decoder, rows: usize) -> Result<KvTree> {
        Ok(KvTree {
            rows: KvRows::new(decoder, rows)?,
            capacity: rows,
            max_positions: decoder.spec().max_positions,
            used: 0,
            nodes: HashMap::new(),
            next: 0,
            waiting: Vec::new(),
            given: 0,
        })
    }

    /// How many more tokens there is room for.
    pub fn free(&self) -> usize {
        self.capacity - self.used
    }

    /// How many tokens a run's sequence has, to the run's end; 0 if the tree does not know it.
    pub fn len(&self, run: RunId) -> usize {
        self.nodes.get(&run).map_or(0, |node| node.before + node.run.len)
    }

    /// Whether there are no runs.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// Announces tokens that continue `parent`, or begin a sequence. The parent may itself wait
    /// for the next pass.
    ///
    /// # Errors
    /// No tokens, an unknown parent, more tokens than there is room for
    /// ([`Error::CacheFull`]) or than the model has positions. The tree stays as it was.
    pub fn branch(&mut self, parent: Option<RunId>, ids: &[u32]) -> Result<RunId> {
        self.settle();
        let before = match parent {
            Some(parent) => {
                let node = self.node(parent)?;
                node.before + node.run.len
            }
            None => 0,
        };
        let len = ids.len();
        if len == 0 {
            return Err(Error::Invalid("a run of no tokens".to_owned()));
        }
        if before + len > self.max_positions {
            return Err(Error::SequenceTooLong { len: before + len, max: self.max_positions });
        }
        if len > self.free() {
            let (used, rows) = (self.used, self.capacity);
            return Err(Error::CacheFull { wanted: len, used, rows });
        }
        let id = RunId(self.next);
        self.next += 1;
        let run = Run { start: self.used, len };
        self.nodes.insert(id, Node { parent, run, before });
        self.used += len;
        self.waiting.push((id, ids.to_vec()));
        Ok(id)
    }

    /// The runs that wait, as the next pass takes them ([`Decoder::hidden_cached`]): one behind
    /// the other in the order of their announcement, a segment each. Until they went through
    /// it they wait on, and are given again.
    pub fn announced(&mut self) -> Tokens {
        self.settle();
        let mut tokens = Tokens::default();
        let mut rows = Vec::new();
        for (id, ids) in &self.waiting {
            let Some(node) = self.nodes.get(id) else { continue };
            let (queries, own) = ((tokens.ids.len(), ids.len()), (node.run.start, node.run.len));
            let ancestors = node.parent.map(|parent| self.path(parent)).unwrap_or_default();
            let ancestors = ancestors.iter().filter_map(|id| Some(self.nodes.get(id)?.run));
            tokens.segments.push(Segment::continued(queries, own).after(ancestors));
            tokens.ids.extend(ids);
            tokens.positions.extend((node.before..node.before + ids.len()).map(|at| at as u32));
            rows.extend(node.run.start..node.run.start + node.run.len);
        }
        self.given = self.waiting.len();
        self.rows.announce(rows);
        tokens
    }

    /// Forgets all runs but `run` and those that it continues, or all. What was given out and
    /// did not go through a pass must be asked for again.
    ///
    /// # Errors
    /// An unknown run; the tree stays as it was.
    pub fn retain(&mut self, run: Option<RunId>) -> Result<()> {
        self.settle();
        let path = match run {
            Some(run) => {
                self.node(run)?;
                self.path(run)
            }
            None => Vec::new(),
        };
        // Ancestors lie before their descendants, so each moves to rows that no later one needs.
        let (mut moves, mut end) = (Vec::new(), 0);
        for Run { start, len } in path.iter().filter_map(|id| Some(self.nodes.get(id)?.run)) {
            moves.push((start, end, len));
            end += len;
        }
        moves.retain(|(from, to, _)| from != to);
        self.rows.relocate(&moves)?;
        self.nodes.retain(|id, _| path.contains(id));
        for node in self.nodes.values_mut() {
            node.run.start = node.before;
        }
        self.waiting.retain(|(id, _)| path.contains(id));
        self.given = 0;
        self.rows.announce(Vec::new());
        self.used = end;
        Ok(())
    }

    /// Strikes off what went through a pass.
    fn settle(&mut self) {
        if self.given > 0 && self.rows.pending() == 0 {
            self.waiting.drain(..self.given);
            self.given = 0;
        }
    }

    fn node(&self, run: RunId) -> Result<&Node> {
        let unknown = || Error::Invalid(format!("run {} is not in the tree", run.0));
        self.nodes.get(&run).ok_or_else(unknown)
    }

    /// A run and those before it, the first of the sequence first.
    fn path(&self, run: RunId) -> Vec<RunId> {
        let parent = |run: &RunId| self.nodes.get(run)?.parent;
        let mut path: Vec<RunId> = std::iter::successors(Some(run), parent).collect();
        path.reverse();
        path
    }
}

impl AsMut<KvRows> for KvTree {
    fn as_mut(&mut self) -> &mut KvRows {
        &mut self.rows
    }
}
