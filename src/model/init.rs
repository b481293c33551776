//! Random initial values. Every tensor has a ChaCha stream of its own, keyed by the seed and its name, so that values
//! depend neither on the order of tensors nor on the number of threads.

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore, SeedableRng},
};
use rand_distr::{Distribution, StandardNormal};
use sha2::{Digest, Sha256};

fn generator(seed: u64, name: &str) -> ChaCha8Rng {
    let key = Sha256::new().chain_update(seed.to_le_bytes()).chain_update(name).finalize();
    ChaCha8Rng::from_seed(key.into())
}

/// Normal with mean 0 and standard deviation `std`.
pub fn normal(seed: u64, name: &str, std: f64, len: usize) -> Vec<f32> {
    let mut rng = generator(seed, name);
    (0..len).map(|_| (std * Distribution::<f64>::sample(&StandardNormal, &mut rng)) as f32).collect()
}

/// Uniform in [-bound, bound).
pub fn uniform(seed: u64, name: &str, bound: f64, len: usize) -> Vec<f32> {
    let mut rng = generator(seed, name);
    let unit = |bits: u32| f64::from(bits) / f64::from(1u32 << 31) - 1.0;
    (0..len).map(|_| (bound * unit(rng.next_u32())) as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_those_of_the_distributions() {
        let n = 200_000;
        let moments = |x: &[f32]| {
            let mean = x.iter().map(|&x| f64::from(x)).sum::<f64>() / n as f64;
            let square = x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / n as f64;
            (mean, square.sqrt())
        };
        let (mean, std) = moments(&normal(1, "w", 0.02, n));
        assert!(mean.abs() < 2e-4 && (std / 0.02 - 1.0).abs() < 0.01, "{mean} {std}");
        let x = uniform(1, "w", 0.125, n);
        let (mean, std) = moments(&x);
        assert!(mean.abs() < 1e-3 && (std / (0.125 / 3f64.sqrt()) - 1.0).abs() < 0.01, "{mean} {std}");
        assert!(x.iter().all(|x| x.abs() <= 0.125));
    }

    #[test]
    fn names_and_seeds_give_different_streams_that_repeat() {
        let draw = |seed, name| uniform(seed, name, 1.0, 8);
        assert_eq!(draw(1, "a"), draw(1, "a"));
        assert_ne!(draw(1, "a"), draw(1, "b"));
        assert_ne!(draw(1, "a"), draw(2, "a"));
    }
}
