//! The learning rate, and ProSparse's factor, as pure functions of the step.

use crate::config::{LrScheduler, Optim, ProSparse, Regularise};

/// The learning rate of each step of a run.
#[derive(Clone, Debug)]
pub struct Schedule {
    peak: f64,
    floor: f64,
    kind: LrScheduler,
    warmup: u64,
    decay: u64,
    steps: u64,
}

impl Schedule {
    /// The schedule of a run of `steps` optimiser steps. Shares of the run are rounded up.
    pub fn new(optim: &Optim, steps: u64) -> Schedule {
        let share = |ratio: f64| (ratio * steps as f64).ceil() as u64;
        let warmup = optim.warmup_steps.unwrap_or_else(|| share(optim.warmup_ratio.unwrap_or(0.0)));
        Schedule {
            peak: optim.learning_rate,
            floor: optim.min_lr_ratio,
            kind: optim.lr_scheduler_type,
            warmup,
            decay: share(optim.decay_ratio),
            steps,
        }
    }

    /// The rate of step `step`, counted from 0.
    ///
    /// While warming up it is `peak * (step + 1) / warmup`, so that the first step already
    /// learns (Hugging Face's has a rate of 0); afterwards it falls as there, over
    /// `progress = (step - warmup) / (steps - warmup)`: `cosine` by
    /// `(1 + cos(pi * progress)) / 2`, `linear` by `1 - progress`.
    pub fn rate(&self, step: u64) -> f64 {
        if step < self.warmup {
            return self.peak * (step + 1) as f64 / self.warmup as f64;
        }
        let progress = |from: u64| {
            (step.saturating_sub(from) as f64 / self.steps.saturating_sub(from).max(1) as f64)
                .min(1.0)
        };
        let height = match self.kind {
            LrScheduler::Constant => return self.peak,
            LrScheduler::Cosine => {
                0.5 * (1.0 + (std::f64::consts::PI * progress(self.warmup)).cos())
            }
            LrScheduler::Linear => 1.0 - progress(self.warmup),
            LrScheduler::Wsd => {
                1.0 - progress(self.steps.saturating_sub(self.decay).max(self.warmup))
            }
        };
        self.peak * (self.floor + (1.0 - self.floor) * height)
    }
}

/// The factor of the activation regularisation at step `step`, counted from 0.
pub fn l1_factor(regularise: &Regularise, step: u64) -> f64 {
    match (&regularise.prosparse, regularise.l1) {
        (Some(stages), _) => prosparse(stages, step),
        (None, fixed) => fixed.unwrap_or(0.0),
    }
}

/// ProSparse's factor: the first value until its stage ends at `T_0`; then, within stage
/// `i`, `l_{i-1} + (sin(-pi/2 + pi (t - T_{i-1}) / (T_i - T_{i-1})) + 1) / 2 * (l_i - l_{i-1})`;
/// the last value ever after.
pub fn prosparse(stages: &ProSparse, step: u64) -> f64 {
    let stage = stages.until_step.partition_point(|end| *end <= step);
    let at = |index: usize| stages.lambda.get(index).copied();
    let Some(before) = stage.checked_sub(1) else { return at(0).unwrap_or(0.0) };
    let (Some(to), Some(from)) = (at(stage), at(before)) else {
        return stages.lambda.last().copied().unwrap_or(0.0);
    };
    let (start, end) = (stages.until_step[before] as f64, stages.until_step[stage] as f64);
    let turn = std::f64::consts::PI * (step as f64 - start) / (end - start);
    from + 0.5 * ((turn - std::f64::consts::FRAC_PI_2).sin() + 1.0) * (to - from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn optim(kind: LrScheduler) -> Optim {
        Optim {
            learning_rate: 2.0,
            lr_scheduler_type: kind,
            warmup_steps: Some(4),
            ..Optim::default()
        }
    }

    fn close(a: f64, b: f64) {
        assert!((a - b).abs() < 1e-12, "{a} is not {b}");
    }

    #[test]
    fn warm_up_rises_to_the_peak() {
        let schedule = Schedule::new(&optim(LrScheduler::Constant), 20);
        for (step, rate) in [(0, 0.5), (1, 1.0), (2, 1.5), (3, 2.0), (4, 2.0), (19, 2.0)] {
            close(schedule.rate(step), rate);
        }
    }

    #[test]
    fn cosine_and_linear_fall_as_in_transformers() {
        let cosine = Schedule::new(&optim(LrScheduler::Cosine), 20);
        let linear = Schedule::new(&optim(LrScheduler::Linear), 20);
        close(cosine.rate(4), 2.0);
        close(cosine.rate(8), 1.0 + (std::f64::consts::PI / 4.0).cos());
        close(cosine.rate(12), 1.0);
        close(cosine.rate(20), 0.0);
        close(linear.rate(8), 1.5);
        close(linear.rate(12), 1.0);
        close(linear.rate(19), 2.0 / 16.0);
    }

    #[test]
    fn wsd_is_flat_until_the_last_share() {
        let mut optim = optim(LrScheduler::Wsd);
        optim.decay_ratio = 0.25;
        optim.min_lr_ratio = 0.1;
        let schedule = Schedule::new(&optim, 40);
        close(schedule.rate(4), 2.0);
        close(schedule.rate(30), 2.0);
        close(schedule.rate(35), 2.0 * (0.1 + 0.9 * 0.5));
        close(schedule.rate(40), 0.2);
    }

    #[test]
    fn warm_up_ratio_rounds_up() {
        let optim = Optim {
            warmup_ratio: Some(0.03),
            lr_scheduler_type: LrScheduler::Constant,
            learning_rate: 1.0,
            ..Optim::default()
        };
        let schedule = Schedule::new(&optim, 50);
        close(schedule.rate(0), 0.5);
        close(schedule.rate(1), 1.0);
    }

    #[test]
    fn prosparse_follows_the_sine_between_the_published_stages() {
        // The 7B stages of ProSparse.
        let stages = ProSparse {
            lambda: vec![0.0, 5e-3, 5e-2, 5e-2, 2e-1, 2e-1],
            until_step: vec![5000, 6000, 10000, 12000, 16000, 16500],
        };
        for (step, lambda) in [
            (0, 0.0),
            (5000, 0.0),
            (5500, 2.5e-3),
            (6000, 5e-3),
            (8000, 0.5 * (5e-3 + 5e-2)),
            (10000, 5e-2),
            (11000, 5e-2),
            (12000, 5e-2),
            (13000, 5e-2 + 0.5 * (1.0 - std::f64::consts::FRAC_1_SQRT_2) * 0.15),
            (16000, 2e-1),
            (16500, 2e-1),
            (99999, 2e-1),
        ] {
            close(prosparse(&stages, step), lambda);
        }
    }

    #[test]
    fn a_fixed_factor_stays() {
        let fixed = Regularise { l1: Some(0.3), prosparse: None };
        close(l1_factor(&fixed, 0), 0.3);
        close(l1_factor(&fixed, 1_000_000), 0.3);
    }
}
