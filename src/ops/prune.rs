//! What a restart does to the moments of one tensor: zero them, or keep a share of them.

use super::{dropout::Dropout, elementwise};

/// How.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Pruning {
    /// All are zero.
    Zero,
    /// Each element is zero with this probability, in both moments. Another key, other elements.
    Random {
        /// Below 1.
        ratio: f64,
        /// Chooses the elements.
        key: u64,
    },
    /// This share of the elements, the smallest by size, are zero: `|x| > quantile(|x|, ratio)` is kept, strictly, so that a
    /// constant tensor is zeroed altogether.
    Magnitude {
        /// Below 1.
        ratio: f64,
        /// One mask, from the first moment, for both; or each moment by its own sizes, as the official code does it: then a
        /// first moment can outlive its second one.
        joint: bool,
    },
}

/// Where a quantile lies among n sorted values: at this place, and so far on the way to the next.
pub(super) fn position(ratio: f64, n: usize) -> (usize, f64) {
    let last = n.saturating_sub(1);
    let position = f64::from(ratio as f32) * last as f64;
    let below = (position.floor() as usize).min(last);
    (below, position - below as f64)
}

/// Chooses the elements of [`Pruning::Random`] as dropout does.
pub(super) fn chance(ratio: f64, key: u64) -> Dropout {
    Dropout { p: ratio as f32, key, first_run: 0 }
}

/// Treats the moments m and v (of one length).
pub fn prune(how: Pruning, m: &mut [f32], v: &mut [f32]) {
    assert_eq!(m.len(), v.len(), "prune: lengths");
    match how {
        Pruning::Zero => {
            elementwise::fill(m, 0.0);
            elementwise::fill(v, 0.0);
        }
        Pruning::Random { ratio, key } => {
            for x in [m, v] {
                chance(ratio, key).zero(x);
            }
        }
        Pruning::Magnitude { ratio, joint } => {
            let by_m = quantile(m, ratio);
            if joint {
                keep_above(v, m, by_m);
            } else {
                let (own, by_v) = (v.to_vec(), quantile(v, ratio));
                keep_above(v, &own, by_v);
            }
            let own = m.to_vec();
            keep_above(m, &own, by_m);
        }
    }
}

fn keep_above(x: &mut [f32], by: &[f32], threshold: f32) {
    x.iter_mut().zip(by).filter(|(_, by)| by.abs() <= threshold || by.is_nan()).for_each(|(x, _)| *x = 0.0);
}

/// `torch.quantile(x.abs(), ratio)`: linear interpolation between sorted neighbours, rounded to f32.
fn quantile(x: &[f32], ratio: f64) -> f32 {
    let mut sizes: Vec<f32> = x.iter().map(|x| x.abs()).collect();
    if sizes.is_empty() {
        return 0.0;
    }
    let (below, fraction) = position(ratio, sizes.len());
    let (_, &mut low, above) = sizes.select_nth_unstable_by(below, f32::total_cmp);
    let high = above.iter().copied().min_by(f32::total_cmp).unwrap_or(low);
    (f64::from(low) + fraction * (f64::from(high) - f64::from(low))) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_quantile_interpolates_as_torch_does() {
        // torch.quantile(torch.tensor([3., -1., 2., 4.]).abs(), 0.5) == 2.5; 0.9 -> 3.6999998
        assert_eq!(quantile(&[3.0, -1.0, 2.0, 4.0], 0.5), 2.5);
        assert_eq!(quantile(&[3.0, -1.0, 2.0, 4.0], 0.9), 3.699_999_8);
        assert_eq!(quantile(&[], 0.9), 0.0);
        let (mut m, mut v) = (vec![1.0; 5], vec![2.0; 5]);
        prune(Pruning::Magnitude { ratio: 0.5, joint: true }, &mut m, &mut v);
        assert_eq!((m, v), (vec![0.0; 5], vec![0.0; 5]));
    }

    #[test]
    fn random_pruning_keeps_its_share_of_both_moments_alike() {
        let (mut m, mut v) = (vec![1.0; 100_000], vec![2.0; 100_000]);
        prune(Pruning::Random { ratio: 0.9, key: 3 }, &mut m, &mut v);
        let kept = m.iter().filter(|m| **m == 1.0).count();
        // Binomial with standard deviation 95.
        assert!((9_500..10_500).contains(&kept), "{kept}");
        assert!(m.iter().zip(&v).all(|(m, v)| 2.0 * m == *v));
    }

    #[test]
    fn with_one_mask_no_first_moment_outlives_its_second() {
        let orphans = |joint| {
            let mut m: Vec<f32> = (0..100).map(|i| i as f32).collect();
            let mut v: Vec<f32> = (0..100).map(|i| 100.0 - i as f32).collect();
            prune(Pruning::Magnitude { ratio: 0.8, joint }, &mut m, &mut v);
            m.iter().zip(&v).filter(|(m, v)| **m != 0.0 && **v == 0.0).count()
        };
        assert_eq!((orphans(true), orphans(false)), (0, 20));
    }
}
