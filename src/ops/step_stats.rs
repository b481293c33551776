//! What an update measures before it moves a weight: the loss, the norm of the gradient, and the factor that clips it. They
//! stay where the gradients are, so that the host need not wait before it asks for the update itself.

/// The numbers of one update.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepStats {
    /// Loss, of all passes.
    pub loss: f64,
    /// Sum of squares of the whole gradient.
    pub squares: f64,
    /// What the gradient is multiplied with; NaN where loss or gradient are not finite: nothing is to move then.
    pub factor: f64,
    /// Sum of what the processes of a job signalled to each other with this update.
    pub signals: f64,
}

/// Elements of one process's share of an update's numbers, see [`super::Device::pack_step_stats`].
pub const PACKED_STATS: usize = 4;

impl StepStats {
    /// The loss in three numbers that add up to it, and a signal.
    pub fn share(&self, signal: f32) -> [f32; PACKED_STATS] {
        let mut rest = self.loss;
        let mut part = || {
            let part = rest as f32;
            rest -= f64::from(part);
            part
        };
        [part(), part(), part(), signal]
    }

    /// Replaces loss and signals by the sums of these shares, in their order.
    pub fn join(&mut self, shares: &[f32]) {
        (self.loss, self.signals) = (0.0, 0.0);
        for share in shares.chunks_exact(PACKED_STATS) {
            self.loss += share[..3].iter().map(|part| f64::from(*part)).sum::<f64>();
            self.signals += f64::from(share[3]);
        }
    }

    /// Sets the factor: `min(1, max_norm / (norm + 1e-6))`, as `torch.nn.utils.clip_grad_norm_`; 1 for a `max_norm` of 0.
    pub fn clip(&mut self, max_norm: f64) {
        let norm = self.squares.sqrt();
        self.factor = match (self.loss + norm).is_finite() {
            false => f64::NAN,
            true if max_norm > 0.0 => (max_norm / (norm + 1e-6)).min(1.0),
            true => 1.0,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_add_up_to_the_last_bit() {
        let losses = [std::f64::consts::PI, 1e-9 / 3.0, 12.5];
        let share = |loss: &f64| StepStats { loss: *loss, ..StepStats::default() }.share(0.5);
        let mut stats = StepStats { factor: 1.0, ..StepStats::default() };
        stats.join(losses.each_ref().map(share).as_flattened());
        assert_eq!((stats.loss, stats.signals, stats.factor), (losses.iter().sum(), 1.5, 1.0));
        for loss in [f64::NAN, f64::INFINITY] {
            stats.join(&[share(&1.0), share(&loss)].concat());
            assert!(!stats.loss.is_finite());
        }
    }

    #[test]
    fn gradients_are_clipped_to_the_largest_norm_and_dropped_if_not_finite() {
        let factor = |loss, squares, max_norm| {
            let mut stats = StepStats { loss, squares, ..StepStats::default() };
            stats.clip(max_norm);
            stats.factor
        };
        assert_eq!(factor(1.0, 16.0, 2.0), 2.0 / (4.0 + 1e-6));
        assert_eq!([factor(1.0, 0.25, 2.0), factor(1.0, 16.0, 0.0)], [1.0; 2]);
        for (loss, squares) in [(f64::NAN, 1.0), (f64::INFINITY, 1.0), (1.0, f64::NAN), (1.0, f64::INFINITY)] {
            assert!(factor(loss, squares, 1.0).is_nan());
        }
    }
}
