//! Cross-entropy of logits against token ids, and its gradient in place.

use super::math;
use multiversion::multiversion;
use rayon::prelude::*;

/// The target of a row that has none: its loss and its gradient are 0.
pub const IGNORE: u32 = u32::MAX;

/// Losses of the rows of `logits` (rows, V) against `targets` (rows). With a `scale`, the logits become
/// `scale · (softmax - one_hot)`.
pub fn rows(vocab: usize, targets: &[u32], logits: &mut [f32], losses: &mut [f32], scale: Option<f32>) {
    assert_eq!((logits.len(), losses.len()), (targets.len() * vocab, targets.len()), "cross_entropy: rows");
    let rows = logits.par_chunks_mut(vocab).zip(losses).zip(targets);
    rows.for_each(|((logits, loss), &target)| *loss = row(logits, target, scale));
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw", "x86_64+avx2+fma"))]
fn row(logits: &mut [f32], target: u32, scale: Option<f32>) -> f32 {
    if target == IGNORE {
        if scale.is_some() {
            logits.fill(0.0);
        }
        return 0.0;
    }
    let top = math::max(logits);
    let at_target = logits[target as usize] - top;
    let total = match scale {
        None => math::sum_by(logits, logits, |x, _| math::exp(x - top)),
        Some(_) => math::replace_by_exp(logits, top),
    };
    if let Some(scale) = scale {
        let factor = (f64::from(scale) / total) as f32;
        for x in logits.iter_mut() {
            *x *= factor;
        }
        logits[target as usize] -= scale;
    }
    (total.ln() - f64::from(at_target)) as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_close, gradient, noise, wide};

    #[test]
    fn losses_and_gradient_match_f64_and_its_differences() {
        let vocab = 1037;
        let targets = [5u32, 1036, IGNORE, 0];
        let logits: Vec<f32> = noise(1, 4 * vocab).iter().map(|x| 20.0 * x).collect();
        let losses64 = |x: &[f64]| -> Vec<f64> {
            let row = |(x, &t): (&[f64], &u32)| match t {
                IGNORE => 0.0,
                t => x.iter().map(|x| x.exp()).sum::<f64>().ln() - x[t as usize],
            };
            x.chunks(vocab).zip(&targets).map(row).collect()
        };
        let expected = losses64(&wide(&logits));
        let mut losses = vec![7.0; 4];
        let mut untouched = logits.clone();
        rows(vocab, &targets, &mut untouched, &mut losses, None);
        assert_close("losses", &losses, &expected, 1e-6);
        assert_eq!(untouched, logits);
        let mut d = logits.clone();
        losses.fill(7.0);
        rows(vocab, &targets, &mut d, &mut losses, Some(0.25));
        assert_close("losses", &losses, &expected, 1e-6);
        let want = gradient(&wide(&logits), |x| 0.25 * losses64(x).iter().sum::<f64>());
        assert_close("dlogits", &d, &want, 1e-6);
    }

    #[test]
    fn a_loss_that_is_not_a_number_is_not_hidden() {
        let mut logits = noise(1, 100);
        logits[40] = f32::NAN;
        let mut loss = [0.0];
        rows(100, &[3], &mut logits, &mut loss, None);
        assert!(loss[0].is_nan());
    }
}
