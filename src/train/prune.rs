//! What a restart does to the optimiser state of A and B: zero it, or keep a share of it.

use super::{
    config::{PruningMask, ReloraConfig},
    tokens::mix,
};

/// Treats the moments `m` and `v` (same length) of one tensor as `config` says; `seed` is the tensor's own.
pub fn prune_moments(config: &ReloraConfig, m: &mut [f32], v: &mut [f32], seed: u64) {
    if config.optimizer_magnitude_pruning > 0.0 {
        let ratio = config.optimizer_magnitude_pruning;
        match config.pruning_mask {
            PruningMask::Separate => {
                keep_where(m, magnitude_mask(m, ratio));
                keep_where(v, magnitude_mask(v, ratio));
            }
            PruningMask::Joint => {
                let mask = magnitude_mask(m, ratio);
                keep_where(m, mask.clone());
                keep_where(v, mask);
            }
        }
    } else if config.optimizer_random_pruning > 0.0 {
        let mask = random_mask(m.len(), config.optimizer_random_pruning, seed);
        keep_where(m, mask.clone());
        keep_where(v, mask);
    } else if config.reset_optimizer_on_relora {
        m.fill(0.0);
        v.fill(0.0);
    }
}

fn keep_where(x: &mut [f32], mask: Vec<bool>) {
    x.iter_mut().zip(mask).filter(|(_, keep)| !keep).for_each(|(x, _)| *x = 0.0);
}

/// Keeps `|x| > quantile(|x|, ratio)`, as the official code: strict, so a constant tensor is zeroed altogether.
fn magnitude_mask(x: &[f32], ratio: f64) -> Vec<bool> {
    let threshold = magnitude_quantile(x, ratio);
    x.iter().map(|x| x.abs() > threshold).collect()
}

/// `torch.quantile(x.abs(), ratio)`: linear interpolation between sorted neighbours, rounded to f32.
fn magnitude_quantile(x: &[f32], ratio: f64) -> f32 {
    let mut magnitudes: Vec<f32> = x.iter().map(|x| x.abs()).collect();
    let Some(last) = magnitudes.len().checked_sub(1) else { return 0.0 };
    let position = f64::from(ratio as f32) * last as f64;
    let below = (position.floor() as usize).min(last);
    let (_, &mut low, above) = magnitudes.select_nth_unstable_by(below, f32::total_cmp);
    let high = above.iter().copied().min_by(f32::total_cmp).unwrap_or(low);
    (f64::from(low) + (position - below as f64) * (f64::from(high) - f64::from(low))) as f32
}

/// Keeps every entry with probability `1 - ratio`.
fn random_mask(len: usize, ratio: f64, seed: u64) -> Vec<bool> {
    (0..len as u64).map(|i| (mix(seed ^ mix(i)) >> 11) as f64 / (1u64 << 53) as f64 > ratio).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_quantile_interpolates_as_torch_does() {
        // torch.quantile(torch.tensor([3., -1., 2., 4.]).abs(), 0.5) == 2.5; 0.9 -> 3.6999998
        assert_eq!(magnitude_quantile(&[3.0, -1.0, 2.0, 4.0], 0.5), 2.5);
        assert_eq!(magnitude_quantile(&[3.0, -1.0, 2.0, 4.0], 0.9), 3.699_999_8);
        assert_eq!(magnitude_quantile(&[], 0.9), 0.0);
        assert!(magnitude_mask(&[1.0; 5], 0.5).iter().all(|keep| !keep));
    }

    #[test]
    fn random_pruning_keeps_its_share() {
        let kept = random_mask(100_000, 0.9, 3).iter().filter(|&&k| k).count();
        // Binomial with standard deviation 95.
        assert!((9_500..10_500).contains(&kept), "{kept}");
    }

    #[test]
    fn with_one_mask_no_first_moment_outlives_its_second() {
        let config = |mask| ReloraConfig {
            lora_r: 1,
            lora_alpha: 1.0,
            lora_dropout: 0.0,
            train_scaling: false,
            zero_restart_scaling: false,
            lora_only: false,
            product: Default::default(),
            relora: Some(1),
            reset_optimizer_on_relora: true,
            optimizer_random_pruning: 0.0,
            optimizer_magnitude_pruning: 0.8,
            pruning_mask: mask,
            reset_adam_step: true,
            restart_timing: Default::default(),
            zero_initial_a: false,
        };
        let orphans = |mask| {
            let mut m: Vec<f32> = (0..100).map(|i| i as f32).collect();
            let mut v: Vec<f32> = (0..100).map(|i| 100.0 - i as f32).collect();
            prune_moments(&config(mask), &mut m, &mut v, 0);
            m.iter().zip(&v).filter(|(m, v)| **m != 0.0 && **v == 0.0).count()
        };
        assert_eq!((orphans(PruningMask::Joint), orphans(PruningMask::Separate)), (0, 20));
    }
}
