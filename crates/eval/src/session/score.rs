//! Log-likelihoods of continuations: the tree of all inputs, packed into forward passes.
//!
//! Nothing is padded, and no shared beginning is computed twice: branches attend to their
//! ancestors' keys and values. Only the rows that predict a continuation token pass the
//! head, each once even where several continuations are asked of it.

use relufy_model::{KvTree, RunId};

use super::tree::Tree;
use super::{Scored, Session};
use crate::activity::{Activity, RowTap};
use crate::request::Scorable;
use crate::{Error, Result};

/// Something to score for a request.
pub(super) struct Job {
    pub(super) request: usize,
    pub(super) scorable: Scorable,
}

impl Session<'_> {
    /// Scores jobs, in any order; `each` hears of each as it is done, with the activity of
    /// its input.
    pub(super) fn score(
        &self,
        jobs: &[Job],
        each: &mut dyn FnMut(&Job, Scored, &Activity) -> Result<()>,
    ) -> Result<()> {
        let inputs: Vec<&[u32]> = jobs.iter().map(|job| job.scorable.input()).collect();
        let tree = Tree::new(&inputs);
        let plan = Plan::new(&tree, jobs);
        let mut scores: Vec<Scored> = jobs.iter().map(|job| unscored(&job.scorable)).collect();
        let mut runs: Vec<Option<RunId>> = vec![None; tree.nodes.len()];
        let mut tap = RowTap::new(self.decoder.spec().layers.len(), tree.nodes.len());
        let mut kv = KvTree::new(self.decoder, tree.rows(self.tokens_per_batch))?;
        for pass in tree.passes(self.tokens_per_batch) {
            kv.retain(tree.nodes[pass.start].parent.and_then(|parent| runs[parent]))?;
            for node in pass.clone() {
                let parent = tree.nodes[node].parent.and_then(|parent| runs[parent]);
                runs[node] = Some(kv.branch(parent, tree.ids(node, &inputs))?);
            }
            tap.begin(pass.clone().map(|node| (node, tree.nodes[node].at.len())));
            let tokens = kv.announced();
            let hidden = self.decoder.hidden_cached(&tokens, &mut kv, &mut tap)?;

            let mut first = 0;
            let mut wanted: Vec<(u32, &Target)> = Vec::new();
            for node in pass.clone() {
                let row = |target: &Target| (first + target.row) as u32;
                wanted.extend(plan.targets[node].iter().map(|target| (row(target), target)));
                first += tree.nodes[node].at.len();
            }
            let pairs: Vec<(u32, u32)> = wanted.iter().map(|(row, t)| (*row, t.token)).collect();
            for (token, (_, target)) in self.decoder.score(&hidden, &pairs)?.iter().zip(&wanted) {
                let score = &mut scores[target.job];
                if !token.logprob.is_finite() {
                    let (found, token) = (token.logprob, target.token);
                    let request = jobs[target.job].request;
                    return Err(Error::NotFinite { found, token, request });
                }
                score.logprob += f64::from(token.logprob);
                score.is_greedy &= token.greedy;
            }
            for node in pass {
                for &job in &plan.ends[node] {
                    let mut activity = self.no_activity();
                    tree.path(node).for_each(|run| activity.add(tap.of(run)));
                    each(&jobs[job], scores[job], &activity)?;
                }
            }
        }
        Ok(())
    }
}

fn unscored(scorable: &Scorable) -> Scored {
    Scored {
        logprob: 0.0,
        is_greedy: true,
        context_tokens: scorable.context,
        continuation_tokens: scorable.continuation,
        truncated: scorable.truncated,
    }
}

/// A token that is scored.
struct Target {
    /// The row of its node that predicts it.
    row: usize,
    token: u32,
    job: usize,
}

/// What is scored where.
struct Plan {
    /// Of each node.
    targets: Vec<Vec<Target>>,
    /// The jobs whose input ends with each node.
    ends: Vec<Vec<usize>>,
}

impl Plan {
    fn new(tree: &Tree, jobs: &[Job]) -> Plan {
        let mut targets: Vec<Vec<Target>> = tree.nodes.iter().map(|_| Vec::new()).collect();
        let mut ends: Vec<Vec<usize>> = vec![Vec::new(); tree.nodes.len()];
        for (job, &leaf) in tree.leaves.iter().enumerate() {
            let scorable = &jobs[job].scorable;
            ends[leaf].push(job);
            let first = scorable.input().len() - scorable.continuation;
            for node in tree.path(leaf) {
                let at = &tree.nodes[node].at;
                if at.end <= first {
                    break;
                }
                for place in at.start.max(first)..at.end {
                    let token = scorable.targets()[place - first];
                    targets[node].push(Target { row: place - at.start, token, job });
                }
            }
        }
        Plan { targets, ends }
    }
}
