//! Launch-bound detection: training is launch-bound where the device finishes its kernels before the host has enqueued more. The
//! sign is a host that hardly ever waits for the device (host idle time near 0).

use std::time::Duration;

/// Updates that are measured, and the warm-up updates before them that are not.
const MEASURED: u32 = 10;
const WARM_UP: u32 = 3;

/// Training is launch-bound where the host waits for the device in less than this share of the time.
const MOST_IDLE: f64 = 0.1;

/// The host idle time of a process's first updates, and the verdict drawn from it.
pub(super) struct LaunchBound {
    chosen: Option<bool>,
    updates: u32,
    waited: Duration,
    passed: Duration,
}

impl LaunchBound {
    /// `chosen` is the verdict, if the configuration gives one; `None` measures.
    pub fn new(chosen: Option<bool>) -> LaunchBound {
        LaunchBound { chosen, updates: 0, waited: Duration::ZERO, passed: Duration::ZERO }
    }

    /// Whether training is launch-bound. It answers no until enough updates were measured; the verdict is final.
    pub fn is_launch_bound(&self) -> bool {
        self.chosen.unwrap_or(false)
    }

    /// Counts one update: how long it took, and for how much of that time the host waited for the device.
    pub fn count(&mut self, waited: Duration, passed: Duration) {
        self.updates += 1;
        if self.chosen.is_some() || self.updates <= WARM_UP {
            return;
        }
        self.waited += waited;
        self.passed += passed;
        if self.updates == WARM_UP + MEASURED {
            self.chosen = Some(self.waited.as_secs_f64() < MOST_IDLE * self.passed.as_secs_f64());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_verdict_comes_after_ten_measured_updates_and_is_final() {
        let ms = Duration::from_millis;
        for (waited, slow) in [(0, true), (9, true), (11, false), (100, false)] {
            let mut launch_bound = LaunchBound::new(None);
            for update in 0..40 {
                assert_eq!(launch_bound.is_launch_bound(), slow && update >= 13, "{waited} ms, {update} updates");
                // The first ones and the late ones say the opposite.
                let waited = if (3..13).contains(&update) { waited } else { 100 - waited };
                launch_bound.count(ms(waited), ms(100));
            }
        }
        for chosen in [true, false] {
            let mut launch_bound = LaunchBound::new(Some(chosen));
            (0..20).for_each(|_| launch_bound.count(ms(if chosen { 100 } else { 0 }), ms(100)));
            assert_eq!(launch_bound.is_launch_bound(), chosen);
        }
    }
}
