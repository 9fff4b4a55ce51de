//! What the table says: what the swap broke, how much of it fine-tuning brought back, and what
//! the zeros save. Where too little came back it says so, and why.

use relufy_eval::{Metric, RunResult};
use relufy_spec::flops::SiteDensities;

use super::CONVENTION;
use super::evaluation::{HELD_OUT, MODELS, QUESTIONS, key};
use super::folder::Folder;
use crate::error::{Error, Result};

/// Four choices a question, the right one at each place equally often.
const CHANCE: f64 = 0.25;
/// What fine-tuning should close of the gap to the control.
const WANTED: f64 = 0.8;

/// What the table says.
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict {
    /// The share of questions that the donor answers rightly.
    pub donor_accuracy: f64,
    /// Held-out perplexity of the donor.
    pub donor_perplexity: f64,
    /// How often the swap to stage 1 alone multiplies perplexity.
    pub swap_ratio: f64,
    /// Stages 1 and 2.
    pub stages: Vec<Recovery>,
    /// The factor on all steps; below 1 the numbers are no result.
    pub steps_scale: f64,
}

/// How a stage came back to its dense control.
#[derive(Clone, Debug, PartialEq)]
pub struct Recovery {
    /// 1 or 2.
    pub stage: u8,
    /// Tokens of fine-tuning, the earlier stage's included.
    pub tokens: u64,
    /// Held-out perplexity after the swap alone, after fine-tuning, and of the control.
    pub perplexity: [f64; 3],
    /// The share of questions answered rightly, likewise.
    pub accuracy: [f64; 3],
    /// The standard error of the difference in accuracy between swap and control.
    pub accuracy_noise: f64,
    /// Non-zero inputs of the fine-tuned model's matrices.
    pub density: SiteDensities,
    /// The share of FLOPs that its zeros save.
    pub saved: f64,
}

impl Recovery {
    /// The share of the gap in log perplexity (the loss) that fine-tuning closed; `None`
    /// where the swap opened none. The logarithm, because a swap can multiply perplexity by
    /// thousands, after which any share of the plain difference is 100 %.
    pub fn closed_loss(&self) -> Option<f64> {
        closed(self.perplexity.map(|perplexity| -perplexity.ln()), 0.0)
    }

    /// The same in accuracy; `None` too where the gap is within twice its standard error.
    pub fn closed_accuracy(&self) -> Option<f64> {
        closed(self.accuracy, 2.0 * self.accuracy_noise)
    }
}

/// The share of the way from the first to the last value that the middle one went; values
/// are better when larger.
fn closed([swapped, tuned, control]: [f64; 3], noise: f64) -> Option<f64> {
    let gap = control - swapped;
    (gap > noise).then(|| (tuned - swapped) / gap)
}

impl Verdict {
    /// Judges the results of all models, in the table's order.
    pub(super) fn of(folder: &Folder, results: &[RunResult]) -> Result<Verdict> {
        let find = |key: &'static str| {
            let found = MODELS.iter().zip(results).find(|(model, _)| model.key == key);
            found.map(|(_, result)| result).ok_or(Error::NoResult { model: key, what: "anything" })
        };
        let perplexity = |key| measure(find(key)?, key, HELD_OUT, Metric::Perplexity);
        let accuracy = |key| measure(find(key)?, key, QUESTIONS, Metric::Acc);
        let recovery = |stage, [swapped, tuned, control]: [&'static str; 3]| -> Result<Recovery> {
            let result = find(tuned)?;
            let noise = |key| -> Result<f64> {
                let found = find(key)?.metric(QUESTIONS, Metric::Acc);
                Ok(found.and_then(|estimate| estimate.stderr).unwrap_or_default())
            };
            Ok(Recovery {
                stage,
                tokens: result.model.tokens_trained,
                perplexity: [perplexity(swapped)?, perplexity(tuned)?, perplexity(control)?],
                accuracy: [accuracy(swapped)?, accuracy(tuned)?, accuracy(control)?],
                accuracy_noise: noise(swapped)?.hypot(noise(control)?),
                density: result.densities.mean,
                saved: 1.0 - result.flops.get(CONVENTION) / result.flops_dense.get(CONVENTION),
            })
        };
        let donor_perplexity = perplexity(key::DONOR)?;
        Ok(Verdict {
            donor_accuracy: accuracy(key::DONOR)?,
            donor_perplexity,
            swap_ratio: perplexity(key::SWAP_S1)? / donor_perplexity,
            stages: vec![
                recovery(1, [key::SWAP_S1, key::S1, key::CONTROL_N1])?,
                recovery(2, [key::SWAP_S2, key::S2, key::CONTROL_N2])?,
            ],
            steps_scale: folder.settings.steps_scale,
        })
    }

    /// In words, a line each.
    pub fn lines(&self) -> Vec<String> {
        let mut lines = vec![
            format!(
                "The donor answers {} of the questions, in phrasings it never saw (chance {}).",
                percent(self.donor_accuracy),
                percent(CHANCE)
            ),
            format!(
                "Swapping SiLU for ReLU alone multiplies its perplexity on held-out text by {:.2}.",
                self.swap_ratio
            ),
        ];
        for recovery in &self.stages {
            lines.push(recovery.perplexity_line());
            lines.push(recovery.accuracy_line());
            lines.push(recovery.sparsity_line());
            lines.extend(recovery.reservation(self.steps_scale));
        }
        if self.steps_scale != 1.0 {
            lines.push(format!(
                "All trainings took {} times their steps: this shows the chain, and its numbers \
                 are no result.",
                self.steps_scale
            ));
        }
        lines
    }
}

impl Recovery {
    fn perplexity_line(&self) -> String {
        let [swapped, tuned, control] = self.perplexity.map(number);
        let told = match self.closed_loss() {
            Some(share) => format!("{} of the gap in log perplexity is closed", percent(share)),
            None => "the swap alone opened no gap".to_owned(),
        };
        format!(
            "s{}: {} tokens of fine-tuning bring perplexity from {swapped} to {tuned} (dense \
             control {control}): {told}.",
            self.stage,
            count(self.tokens)
        )
    }

    fn accuracy_line(&self) -> String {
        let [swapped, tuned, control] = self.accuracy.map(percent);
        let told = match self.closed_accuracy() {
            Some(share) => format!("{} of the gap is closed", percent(share)),
            None => "the gap is too small to say what was closed of it".to_owned(),
        };
        format!(
            "s{}: right answers go from {swapped} to {tuned} (dense control {control}): {told}.",
            self.stage
        )
    }

    fn sparsity_line(&self) -> String {
        let zeros = |density: f64| percent(1.0 - density);
        format!(
            "s{}: zeros at the inputs of QKV {}, up {}, down {}; skipping them saves {} of the \
             FLOPs ({}).",
            self.stage,
            zeros(self.density.qkv),
            zeros(self.density.up),
            zeros(self.density.down),
            percent(self.saved),
            CONVENTION.name()
        )
    }

    /// What has to be said where less came back than it should.
    fn reservation(&self, steps_scale: f64) -> Option<String> {
        let short = |share: Option<f64>| share.is_some_and(|share| share < WANTED);
        let what = match (short(self.closed_loss()), short(self.closed_accuracy())) {
            (false, false) => return None,
            (true, false) => "in log perplexity",
            (false, true) => "in accuracy",
            (true, true) => "in both",
        };
        let why = if steps_scale < 1.0 {
            format!("the trainings were cut to {steps_scale} times their steps")
        } else {
            let [swapped, _, control] = self.perplexity;
            format!(
                "{} tokens are too few after a swap that multiplied perplexity by {}",
                count(self.tokens),
                number(swapped / control)
            )
        };
        let wanted = percent(WANTED);
        Some(format!("s{}: not recovered: below {wanted} {what}, because {why}.", self.stage))
    }
}

/// A metric that a model must have.
fn measure(result: &RunResult, model: &'static str, task: &'static str, m: Metric) -> Result<f64> {
    let found = result.metric(task, m).map(|estimate| estimate.value);
    found.ok_or(Error::NoResult { model, what: task })
}

fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

/// Tokens, to three digits.
pub(super) fn count(tokens: u64) -> String {
    match tokens as f64 {
        many if many >= 1e6 => format!("{:.2} M", many / 1e6),
        some => format!("{:.0} k", some / 1e3),
    }
}

/// A perplexity or a ratio.
fn number(value: f64) -> String {
    if value < 100.0 { format!("{value:.2}") } else { format!("{value:.0}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recovery(perplexity: [f64; 3], accuracy: [f64; 3]) -> Recovery {
        Recovery {
            stage: 1,
            tokens: 409_600,
            perplexity,
            accuracy,
            accuracy_noise: 0.02,
            density: SiteDensities { qkv: 1.0, o: 1.0, up: 1.0, down: 0.5 },
            saved: 0.25,
        }
    }

    fn verdict(recovery: Recovery, steps_scale: f64) -> Verdict {
        Verdict {
            donor_accuracy: 0.9,
            donor_perplexity: 2.0,
            swap_ratio: 4.0,
            stages: vec![recovery],
            steps_scale,
        }
    }

    #[test]
    fn shares_are_of_the_loss_and_of_the_accuracy() {
        let half = recovery([8.0, 4.0, 2.0], [0.5, 0.8, 0.9]);
        assert!((half.closed_loss().unwrap() - 0.5).abs() < 1e-12);
        assert!((half.closed_accuracy().unwrap() - 0.75).abs() < 1e-12);
        let none = recovery([2.0, 2.0, 2.0], [0.88, 0.9, 0.9]);
        assert_eq!((none.closed_loss(), none.closed_accuracy()), (None, None));
    }

    #[test]
    fn too_little_recovery_is_said_with_its_reason() {
        let told = |recovery, scale| verdict(recovery, scale).lines().join("\n");
        let good = told(recovery([8.0, 2.1, 2.0], [0.5, 0.89, 0.9]), 1.0);
        assert!(!good.contains("not recovered"), "{good}");
        let bad = told(recovery([8.0, 4.0, 2.0], [0.5, 0.89, 0.9]), 1.0);
        assert!(bad.contains("below 80.0 % in log perplexity, because 410 k tokens are too few"));
        let both = told(recovery([8.0, 4.0, 2.0], [0.5, 0.6, 0.9]), 0.1);
        assert!(both.contains("in both, because the trainings were cut to 0.1 times"), "{both}");
        assert!(both.contains("no result"));
    }
}
