//! Who waits for whom: where the device is done before the host has asked for more, asking is what takes the time.

use std::time::Duration;

/// Updates that are watched, and those before them, in which the device warms up.
const WATCHED: u32 = 10;
const FIRST: u32 = 3;

/// The host is slow where it waits for the device in less than this share of the time.
const LITTLE: f64 = 0.1;

/// What the first updates of a process have shown.
pub(super) struct Pace {
    chosen: Option<bool>,
    updates: u32,
    waited: Duration,
    passed: Duration,
}

impl Pace {
    /// `chosen`: whether to take the host for slow, if it is not to be measured.
    pub fn new(chosen: Option<bool>) -> Pace {
        Pace { chosen, updates: 0, waited: Duration::ZERO, passed: Duration::ZERO }
    }

    /// Whether the device waits for the host. No, as long as it is not known. Once it is, nothing changes any more.
    pub fn host_is_slow(&self) -> bool {
        self.chosen.unwrap_or(false)
    }

    /// An update that took so long, and what of it the host waited for.
    pub fn count(&mut self, waited: Duration, passed: Duration) {
        self.updates += 1;
        if self.chosen.is_some() || self.updates <= FIRST {
            return;
        }
        self.waited += waited;
        self.passed += passed;
        if self.updates == FIRST + WATCHED {
            self.chosen = Some(self.waited.as_secs_f64() < LITTLE * self.passed.as_secs_f64());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_slow_is_known_after_some_updates_and_stays() {
        let ms = Duration::from_millis;
        for (waited, slow) in [(0, true), (9, true), (11, false), (100, false)] {
            let mut pace = Pace::new(None);
            for update in 0..40 {
                assert_eq!(pace.host_is_slow(), slow && update >= 13, "{waited} ms, {update} updates");
                // The first ones and the late ones say the opposite.
                let waited = if (3..13).contains(&update) { waited } else { 100 - waited };
                pace.count(ms(waited), ms(100));
            }
        }
        for chosen in [true, false] {
            let mut pace = Pace::new(Some(chosen));
            (0..20).for_each(|_| pace.count(ms(if chosen { 100 } else { 0 }), ms(100)));
            assert_eq!(pace.host_is_slow(), chosen);
        }
    }
}
