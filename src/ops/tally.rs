//! What an update measures before it moves a weight: the loss, the norm of the gradient, and the factor that clips it. They
//! stay where the gradients are, so that the host need not wait before it asks for the update itself.

/// The numbers of one update.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Tally {
    /// Loss, of all passes.
    pub loss: f64,
    /// Sum of squares of the whole gradient.
    pub squares: f64,
    /// What the gradient is multiplied with; NaN where loss or gradient are not finite: nothing is to move then.
    pub factor: f64,
}

impl Tally {
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
    fn gradients_are_clipped_to_the_largest_norm_and_dropped_if_not_finite() {
        let factor = |loss, squares, max_norm| {
            let mut tally = Tally { loss, squares, factor: 0.0 };
            tally.clip(max_norm);
            tally.factor
        };
        assert_eq!(factor(1.0, 16.0, 2.0), 2.0 / (4.0 + 1e-6));
        assert_eq!([factor(1.0, 0.25, 2.0), factor(1.0, 16.0, 0.0)], [1.0; 2]);
        for (loss, squares) in [(f64::NAN, 1.0), (f64::INFINITY, 1.0), (1.0, f64::NAN), (1.0, f64::INFINITY)] {
            assert!(factor(loss, squares, 1.0).is_nan());
        }
    }
}
