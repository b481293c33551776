//! Learning rate as a pure function of the update number.
//!
//! Formulas of the official ReLoRA code (`peft_pretraining/training_utils.py`, arXiv 2307.05695) and, for `linear`, of
//! `transformers.get_linear_schedule_with_warmup`. `s` counts updates from 0: the first update uses `multiplier(0)`.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::f64::consts::PI;

/// The shape of the learning rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scheduler {
    /// Always the full rate, after the warmup.
    Constant,
    /// Linear warmup, then a straight line to zero at the last update.
    Linear,
    /// Linear warmup and cosine decay to `min_lr_ratio`, repeated every `cycle_length` updates.
    Cosine,
    /// One cosine over the whole training with a dip to zero and a short re-warmup every `cycle_length` updates
    /// (the paper's jagged schedule).
    CosineRestarts,
}

/// A schedule and its parameters, all in updates.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// The shape.
    pub scheduler: Scheduler,
    /// Updates the schedule spans (`N`).
    pub num_training_steps: u64,
    /// Updates of the first warmup (`w`).
    pub warmup_steps: u64,
    /// Updates of every later warmup (`r`).
    pub restart_warmup_steps: u64,
    /// Updates between two dips (`E`), or of one cosine cycle.
    pub cycle_length: u64,
    /// Shifts the dips of `cosine_restarts`: they come `adjust_step` updates earlier.
    pub adjust_step: u64,
    /// The lowest rate the cosine reaches, as a share of the highest (`lo`).
    pub min_lr_ratio: f64,
}

impl Schedule {
    /// Refuses what the official code refuses, and what would divide by zero.
    pub fn check(&self) -> Result<()> {
        let refuse = |message: String, help: &str| Err(Error::request(message).help(help));
        let n = self.num_training_steps;
        if !(0.0..=1.0).contains(&self.min_lr_ratio) {
            return refuse(
                format!("min_lr_ratio is {}, expected 0 to 1", self.min_lr_ratio),
                "0.1 is the usual choice",
            );
        }
        if self.adjust_step > 0 && self.scheduler != Scheduler::CosineRestarts {
            return refuse(
                "adjust_step is only supported with scheduler = \"cosine_restarts\"".into(),
                "remove adjust_step",
            );
        }
        if matches!(self.scheduler, Scheduler::Cosine | Scheduler::CosineRestarts) {
            if self.cycle_length == 0 || !n.is_multiple_of(self.cycle_length) {
                return refuse(
                    format!(
                        "the schedule spans {n} updates, which is not a multiple of cycle_length {}",
                        self.cycle_length
                    ),
                    "change num_training_steps or cycle_length so that whole cycles fit",
                );
            }
            let first = self.cycle_length.saturating_sub(self.adjust_step);
            if self.warmup_steps > first {
                return refuse(
                    format!(
                        "warmup_steps {} does not end before the first restart at update {first}",
                        self.warmup_steps
                    ),
                    "shorten warmup_steps or lengthen cycle_length",
                );
            }
            if self.scheduler == Scheduler::CosineRestarts && self.restart_warmup_steps > self.cycle_length {
                return refuse(
                    format!(
                        "restart_warmup_steps {} exceeds cycle_length {}: warmup never ends before the next restart",
                        self.restart_warmup_steps, self.cycle_length
                    ),
                    "shorten restart_warmup_steps",
                );
            }
        }
        Ok(())
    }

    /// The factor on the highest learning rate for update `s`, from 0.
    pub fn multiplier(&self, s: u64) -> f64 {
        let warmup = |s: u64, over: u64| s as f64 / over.max(1) as f64;
        match self.scheduler {
            _ if s < self.warmup_steps && self.scheduler != Scheduler::Cosine => warmup(s, self.warmup_steps),
            Scheduler::Constant => 1.0,
            Scheduler::Linear => {
                let left = self.num_training_steps.saturating_sub(s) as f64;
                left / self.num_training_steps.saturating_sub(self.warmup_steps).max(1) as f64
            }
            Scheduler::Cosine => self.cyclical_cosine(s),
            Scheduler::CosineRestarts => {
                let (cycle, r) = (self.cycle_length, self.restart_warmup_steps);
                let shifted = s + self.adjust_step;
                let in_cycle = shifted % cycle;
                // As in the official code, this tests the unshifted step: a first dip at E - adjust_step has no re-warmup.
                if in_cycle < r && s >= cycle {
                    let target = self.cosine((shifted / cycle * cycle + r) as f64);
                    return warmup(in_cycle, r) * target;
                }
                self.cosine(shifted as f64)
            }
        }
    }

    /// `lo + (1 - lo) (1 + cos(pi (x - w) / max(1, N - w))) / 2`
    fn cosine(&self, x: f64) -> f64 {
        let w = self.warmup_steps as f64;
        let progress = (x - w) / (self.num_training_steps as f64 - w).max(1.0);
        self.min_lr_ratio + (1.0 - self.min_lr_ratio) * (0.5 * (1.0 + (PI * progress).cos()))
    }

    /// Warmup and cosine inside every cycle. The official code starts later cycles at 1e-7 instead of 0 for two updates.
    fn cyclical_cosine(&self, s: u64) -> f64 {
        let (cycle, w) = (self.cycle_length, self.warmup_steps);
        let c = s % cycle;
        if c < w {
            return if s != c && c < 2 { 1e-7 } else { c as f64 / w.max(1) as f64 };
        }
        let progress = (c - w) as f64 / (cycle - w).max(1) as f64;
        self.min_lr_ratio + (1.0 - self.min_lr_ratio) * (0.5 * (1.0 + (PI * progress).cos()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const JAGGED: Schedule = Schedule {
        scheduler: Scheduler::CosineRestarts,
        num_training_steps: 60,
        warmup_steps: 5,
        restart_warmup_steps: 3,
        cycle_length: 20,
        adjust_step: 0,
        min_lr_ratio: 0.1,
    };

    #[test]
    fn the_jagged_cosine_dips_to_zero_at_each_restart_and_climbs_back_onto_the_cosine() {
        assert_eq!(JAGGED.multiplier(0), 0.0);
        assert_eq!(JAGGED.multiplier(5), 1.0);
        assert_eq!(JAGGED.multiplier(20), 0.0);
        assert_eq!(JAGGED.multiplier(40), 0.0);
        let plain = Schedule { restart_warmup_steps: 0, ..JAGGED };
        assert_eq!(JAGGED.multiplier(23), plain.multiplier(23));
        assert!(JAGGED.multiplier(22) < JAGGED.multiplier(23));
    }

    #[test]
    fn linear_ends_at_zero_and_constant_stays() {
        let linear = Schedule { scheduler: Scheduler::Linear, ..JAGGED };
        assert_eq!((linear.multiplier(5), linear.multiplier(60)), (1.0, 0.0));
        let constant = Schedule { scheduler: Scheduler::Constant, warmup_steps: 0, ..JAGGED };
        assert_eq!((constant.multiplier(0), constant.multiplier(59)), (1.0, 1.0));
    }

    #[test]
    fn settings_that_the_official_code_rejects_are_refused() {
        for (bad, expected) in [
            (Schedule { num_training_steps: 61, ..JAGGED }, "not a multiple of cycle_length 20"),
            (Schedule { scheduler: Scheduler::Cosine, adjust_step: 3, ..JAGGED }, "adjust_step is only supported"),
            (
                Schedule { scheduler: Scheduler::Cosine, cycle_length: 30, num_training_steps: 100, ..JAGGED },
                "not a multiple",
            ),
            (Schedule { warmup_steps: 25, ..JAGGED }, "does not end before the first restart"),
            (Schedule { adjust_step: 16, ..JAGGED }, "does not end before the first restart"),
            (Schedule { restart_warmup_steps: 21, ..JAGGED }, "warmup never ends"),
            (Schedule { cycle_length: 0, ..JAGGED }, "not a multiple"),
        ] {
            let message = bad.check().unwrap_err().message;
            assert!(message.contains(expected), "{message}");
        }
        JAGGED.check().unwrap();
    }
}
