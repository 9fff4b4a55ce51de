//! Several decoders in turns, and what their times say.

use relufy_spec::flops::SiteDensities;
use serde::Serialize;

use super::Timed;
use crate::{Counts, Result};

/// How long everybody is measured.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Tokens that each decodes first, because nothing is warm before.
    pub warmup: usize,
    /// Tokens that each decodes in all.
    pub tokens: usize,
    /// At least so many seconds of a turn belong to each: with small models a turn of one token would
    /// measure how threads wake.
    pub turn: f64,
}

impl Pace {
    /// Two tokens to warm up, turns of 20 ms.
    pub fn new(tokens: usize) -> Pace {
        Pace { warmup: 2, tokens, turn: 0.02 }
    }
}

/// One token.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// How long it took.
    pub seconds: f64,
    /// What was done.
    pub counts: Counts,
    /// [`Timed::surprise`].
    pub surprise: Option<f64>,
    /// [`Timed::densities`].
    pub densities: Option<SiteDensities>,
}

/// What was measured.
#[derive(Clone, Debug)]
pub struct Turns {
    /// Bytes a second of a plain read, before each turn.
    pub reads: Vec<f64>,
    /// Tokens of a turn.
    pub run: usize,
    /// Everybody's tokens, as many each.
    pub rows: Vec<Vec<Step>>,
    batches: Vec<usize>,
}

/// How fast somebody decodes.
#[derive(Clone, Debug, Serialize)]
pub struct Speed {
    /// Of all sequences, by the median step.
    pub tokens_per_second: f64,
    /// The median step.
    pub median_ms: f64,
    /// A tenth of the steps are faster.
    pub p10_ms: f64,
    /// A tenth of the steps are slower.
    pub p90_ms: f64,
    /// Weights and scales that a step reads, on average.
    pub bytes: f64,
    /// Multiply-adds that a step needs, on average.
    pub macs_needed: f64,
    /// Multiply-adds that a step does, on average.
    pub macs_done: f64,
    /// Bytes a second of a plain read that the step's bytes a second are; median.
    pub share_of_read: f64,
    /// Beside another, where one was named.
    pub faster: Option<Faster>,
    /// Of the text that was read.
    pub perplexity: Option<f64>,
    /// Shares that were not zero at each site, on average.
    pub densities: Option<SiteDensities>,
}

/// One decoder beside another.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Faster {
    /// Times as fast; the median of the steps' ratios.
    pub times: f64,
    /// What the bytes allow.
    pub allowed: f64,
    /// The first over the second.
    pub share: f64,
}

/// Lets all decode in turns; each turn begins with another of them, and with a plain read.
///
/// # Errors
/// Whatever one of them cannot do.
pub fn take_turns(
    timed: &mut [Box<dyn Timed + '_>],
    read: &mut dyn FnMut() -> Result<f64>,
    pace: &Pace,
) -> Result<Turns> {
    let mut fastest = f64::INFINITY;
    for timed in timed.iter_mut() {
        for _ in 0..pace.warmup {
            fastest = fastest.min(timed.step()?);
        }
    }
    read()?;
    let run = ((pace.turn / fastest).ceil() as usize).clamp(1, pace.tokens.max(1));
    let mut turns = Turns {
        reads: Vec::new(),
        run,
        rows: vec![Vec::with_capacity(pace.tokens); timed.len()],
        batches: timed.iter().map(|timed| timed.batch()).collect(),
    };
    for turn in 0..pace.tokens.div_ceil(run) {
        turns.reads.push(read()?);
        let steps = run.min(pace.tokens - turn * run);
        for n in 0..timed.len() {
            let row = (turn + n) % timed.len();
            for _ in 0..steps {
                let seconds = timed[row].step()?;
                let (counts, timed) = (timed[row].counts()?, &timed[row]);
                let (surprise, densities) = (timed.surprise(), timed.densities());
                turns.rows[row].push(Step { seconds, counts, surprise, densities });
            }
        }
    }
    Ok(turns)
}

impl Turns {
    /// The median of the plain reads, in bytes a second.
    pub fn read(&self) -> f64 {
        median(&self.reads)
    }

    /// What a row's steps say, beside those of another row.
    pub fn speed(&self, row: usize, beside: Option<usize>) -> Speed {
        let steps = &self.rows[row];
        let seconds: Vec<f64> = steps.iter().map(|step| step.seconds).collect();
        let mean =
            |of: &dyn Fn(&Step) -> f64| steps.iter().map(of).sum::<f64>() / steps.len() as f64;
        let bytes = mean(&|step| step.counts.total().bytes as f64);
        let shares: Vec<f64> = (steps.iter().enumerate())
            .map(|(n, step)| {
                step.counts.total().bytes as f64 / step.seconds / self.reads[n / self.run]
            })
            .collect();
        let faster = beside.map(|beside| {
            let others = &self.rows[beside];
            let ratios: Vec<f64> = others
                .iter()
                .zip(steps)
                .map(|(other, step)| other.seconds / step.seconds)
                .collect();
            let all = |steps: &[Step]| {
                steps.iter().map(|step| step.counts.total().bytes as f64).sum::<f64>()
            };
            let (times, allowed) = (median(&ratios), all(others) / all(steps));
            Faster { times, allowed, share: times / allowed }
        });
        let surprises: Option<Vec<f64>> = steps.iter().map(|step| step.surprise).collect();
        let perplexity = surprises.filter(|all| !all.is_empty()).map(|all| {
            let sum: f64 = all.iter().sum();
            (sum / all.len() as f64).exp()
        });
        Speed {
            tokens_per_second: self.batches[row] as f64 / median(&seconds),
            median_ms: 1e3 * median(&seconds),
            p10_ms: 1e3 * quantile(&seconds, 0.1),
            p90_ms: 1e3 * quantile(&seconds, 0.9),
            bytes,
            macs_needed: mean(&|step| step.counts.total().needed as f64),
            macs_done: mean(&|step| step.counts.total().done as f64),
            share_of_read: median(&shares),
            faster,
            perplexity,
            densities: mean_densities(steps),
        }
    }
}

/// The mean of each site's; `None` where a step has none, or where there is no step.
fn mean_densities(steps: &[Step]) -> Option<SiteDensities> {
    let all: Vec<SiteDensities> = steps.iter().map(|step| step.densities).collect::<Option<_>>()?;
    let mean = |site: fn(&SiteDensities) -> f64| {
        (!all.is_empty()).then(|| all.iter().map(site).sum::<f64>() / all.len() as f64)
    };
    Some(SiteDensities {
        qkv: mean(|each| each.qkv)?,
        o: mean(|each| each.o)?,
        up: mean(|each| each.up)?,
        down: mean(|each| each.down)?,
    })
}

/// The median; NaN of nothing.
pub fn median(values: &[f64]) -> f64 {
    quantile(values, 0.5)
}

/// The value below which a share of the values lies, between two of them by proportion.
fn quantile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
    let at = share * last as f64;
    let (low, high) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    low + (high - low) * at.fract()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Work;

    /// Takes as long as it is told, and reads as much.
    struct Told {
        seconds: f64,
        bytes: u64,
        surprise: Option<f64>,
    }

    impl Timed for Told {
        fn step(&mut self) -> Result<f64> {
            Ok(self.seconds)
        }

        fn counts(&mut self) -> Result<Counts> {
            let head = Work { needed: 1, done: 2, bytes: self.bytes };
            Ok(Counts { head, ..Counts::default() })
        }

        fn surprise(&self) -> Option<f64> {
            self.surprise
        }
    }

    #[test]
    fn shares_and_ratios_are_those_of_the_times() {
        let told = |seconds, bytes, surprise| Box::new(Told { seconds, bytes, surprise });
        let mut timed: Vec<Box<dyn Timed>> =
            vec![told(0.004, 1000, None), told(0.002, 400, Some(8f64.ln()))];
        let mut reads = 0;
        let mut read = || {
            reads += 1;
            Ok(500_000.0)
        };
        let turns = take_turns(&mut timed, &mut read, &Pace::new(25)).unwrap();
        assert_eq!((turns.run, turns.reads.len(), reads), (10, 3, 4));
        assert!(turns.rows.iter().all(|steps| steps.len() == 25));
        let (dense, sparse) = (turns.speed(0, None), turns.speed(1, Some(0)));
        assert_eq!((dense.tokens_per_second, dense.bytes), (250.0, 1000.0));
        assert!(dense.faster.is_none() && dense.perplexity.is_none());
        assert!(dense.densities.is_none());
        assert!((dense.share_of_read - 0.5).abs() < 1e-12);
        let faster = sparse.faster.unwrap();
        assert_eq!((faster.times, faster.allowed, faster.share), (2.0, 2.5, 0.8));
        assert!((sparse.perplexity.unwrap() - 8.0).abs() < 1e-12);
        assert_eq!((sparse.macs_needed, sparse.macs_done), (1.0, 2.0));
    }

    #[test]
    fn quantiles_lie_between_values() {
        assert_eq!((median(&[3.0, 1.0, 2.0]), median(&[1.0, 2.0])), (2.0, 1.5));
        assert_eq!(quantile(&[0.0, 10.0], 0.1), 1.0);
        assert!(median(&[]).is_nan());
    }
}
