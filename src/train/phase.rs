//! The parts of a run: an optional full-rank warm start, then the mode's own training.

use super::{
    config::{Config, Mode, RestartTiming},
    schedule::Schedule,
};

/// A stretch of updates with one schedule.
#[derive(Clone, Debug)]
pub struct Phase {
    /// Updates made before it.
    pub first_step: u64,
    /// Updates in it.
    pub steps: u64,
    /// Highest learning rate.
    pub lr: f64,
    /// Counts updates from the start of the phase.
    pub schedule: Schedule,
    /// Whether A and B are trained, or every weight.
    pub low_rank: bool,
    /// Updates between two restarts, and when they come.
    restarts: Option<(u64, RestartTiming)>,
}

impl Phase {
    /// Learning rate of the update that follows `step` updates of the run.
    pub fn lr_after(&self, step: u64) -> f64 {
        self.lr * self.schedule.multiplier(step - self.first_step)
    }

    /// Whether a restart follows the update that made `step` updates of the run. The end of the training is none.
    pub fn restarts_after(&self, step: u64) -> bool {
        let n = step - self.first_step;
        match self.restarts {
            _ if n == 0 || n >= self.steps => false,
            None => false,
            Some((relora, RestartTiming::Boundary)) => n.is_multiple_of(relora),
            Some((relora, RestartTiming::Official)) => n >= relora && n % relora == 1 % relora,
        }
    }
}

impl Config {
    /// The parts of the run, in order: an optional warm start, then the mode's own training.
    pub fn phases(&self) -> Vec<Phase> {
        let t = &self.train;
        let warm = self.first_step();
        let main_steps = t.num_training_steps - warm;
        let mut phases = Vec::new();
        if let Some(w) = &self.warm_start {
            let schedule = Schedule {
                scheduler: w.scheduler,
                num_training_steps: t.num_training_steps,
                warmup_steps: w.warmup_steps,
                restart_warmup_steps: 0,
                cycle_length: t.num_training_steps,
                adjust_step: 0,
                min_lr_ratio: t.min_lr_ratio,
            };
            phases.push(Phase {
                first_step: 0,
                steps: warm,
                lr: w.lr.unwrap_or(t.lr),
                schedule,
                low_rank: false,
                restarts: None,
            });
        }
        let schedule = Schedule {
            scheduler: t.scheduler,
            num_training_steps: main_steps,
            warmup_steps: t.warmup_steps,
            restart_warmup_steps: t.restart_warmup_steps,
            cycle_length: t.cycle_length.or(self.relora.as_ref().and_then(|r| r.relora)).unwrap_or(main_steps),
            adjust_step: t.adjust_step,
            min_lr_ratio: t.min_lr_ratio,
        };
        let restarts = self.relora.as_ref().and_then(|r| r.relora.map(|every| (every, r.restart_timing)));
        let low_rank = t.mode != Mode::Full;
        phases.push(Phase { first_step: warm, steps: main_steps, lr: t.lr, schedule, low_rank, restarts });
        phases
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::schedule::Scheduler;

    #[test]
    fn restarts_come_after_whole_cycles_or_one_update_later() {
        let schedule = Schedule {
            scheduler: Scheduler::Constant,
            num_training_steps: 60,
            warmup_steps: 0,
            restart_warmup_steps: 0,
            cycle_length: 20,
            adjust_step: 0,
            min_lr_ratio: 0.1,
        };
        let with = |timing| Phase {
            first_step: 100,
            steps: 60,
            lr: 1.0,
            schedule,
            low_rank: true,
            restarts: Some((20, timing)),
        };
        let restarts = |p: Phase| (100..=160).filter(|&s| p.restarts_after(s)).collect::<Vec<_>>();
        assert_eq!(restarts(with(RestartTiming::Boundary)), [120, 140]);
        assert_eq!(restarts(with(RestartTiming::Official)), [121, 141]);
    }
}
