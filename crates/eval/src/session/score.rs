//! Log-likelihoods of continuations: the tree of all inputs, packed into forward passes.
//!
//! Nothing is padded, and no shared beginning is computed twice: branches attend to their
//! ancestors' keys and values. Only the rows that predict a continuation token pass the
//! head, each once even where several continuations are asked of it.

use relufy_model::{Point, Side, Tap, Tokens, Want};

use super::{Scored, Session};
use crate::activity::Activity;
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
        for job in jobs {
            let input = job.scorable.input();
            let mut tap = RowTap { activity: self.no_activity() };
            tap.activity.tokens = input.len() as u64;
            let tokens = Tokens::packed(input.to_vec(), [input.len()]);
            let hidden = self.decoder.hidden(&tokens, &mut tap)?;
            let n = job.scorable.continuation;
            let first = (input.len() - n) as u32;
            let wanted: Vec<(u32, u32)> = (first..).zip(job.scorable.targets().iter().copied()).collect();
            let mut scored = Scored {
                logprob: 0.0,
                is_greedy: true,
                context_tokens: job.scorable.context,
                continuation_tokens: n,
                truncated: job.scorable.truncated,
            };
            for (token, &(_, target)) in self.decoder.score(&hidden, &wanted)?.iter().zip(&wanted) {
                if !token.logprob.is_finite() {
                    let found = token.logprob;
                    return Err(Error::NotFinite { found, token: target, request: job.request });
                }
                scored.logprob += f64::from(token.logprob);
                scored.is_greedy &= token.greedy;
            }
            each(job, scored, &tap.activity)?;
        }
        Ok(())
    }
}

struct RowTap {
    activity: Activity,
}

impl Tap for RowTap {
    fn want(&self, point: Point) -> Want {
        if point.side == Side::At { Want::Nonzero } else { Want::Nothing }
    }

    fn nonzero(&mut self, point: Point, nonzero: u64, _total: u64) {
        self.activity.count(point.layer, point.site, nonzero);
    }
}
