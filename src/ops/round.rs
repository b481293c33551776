//! Rounding to bf16: the upper half of an f32, to the nearest (ties to even) or by chance.

use super::{
    elementwise::BLOCK,
    philox::{RUN, run_bits},
};
use multiversion::multiversion;
use rayon::prelude::*;

/// How a number between two bf16 numbers chooses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounding {
    /// The nearer one, the even one of two equally near.
    Nearest,
    /// Either, with a probability that makes the expectation exact. The same key chooses the same.
    Stochastic(u64),
}

pub fn to_bf16(rounding: Rounding, x: &mut [f32]) {
    x.par_chunks_mut(BLOCK).enumerate().for_each(|(i, x)| match rounding {
        Rounding::Nearest => nearest(x),
        Rounding::Stochastic(key) => stochastic(key, i * BLOCK, x),
    });
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw", "x86_64+avx2+fma"))]
fn nearest(x: &mut [f32]) {
    for x in x {
        let bits = x.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) & 0xffff_0000;
        *x = if x.is_finite() { f32::from_bits(rounded) } else { *x };
    }
}

/// Adds 16 random bits below the last one that stays.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw", "x86_64+avx2+fma"))]
fn stochastic(key: u64, first: usize, x: &mut [f32]) {
    for (run, x) in x.chunks_mut(RUN).enumerate() {
        let bits = run_bits(first / RUN + run, key);
        for (x, bits) in x.iter_mut().zip(bits.as_flattened()) {
            let rounded = x.to_bits().wrapping_add(bits >> 16) & 0xffff_0000;
            *x = if x.is_finite() { f32::from_bits(rounded) } else { *x };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::noise;

    #[test]
    fn nearest_is_that_of_the_half_crate() {
        let mut x = noise(1, 3 * BLOCK + 5);
        x[..6].copy_from_slice(&[0.0, -0.0, f32::NAN, f32::INFINITY, 1.003_906_2, 1.011_718_8]);
        let expected: Vec<u32> = x.iter().map(|x| half::bf16::from_f32(*x).to_f32().to_bits()).collect();
        to_bf16(Rounding::Nearest, &mut x);
        let found: Vec<u32> = x.iter().map(|x| x.to_bits()).collect();
        assert!(x[2].is_nan());
        assert_eq!(found[3..], expected[3..]);
        assert_eq!(found[..2], expected[..2]);
    }

    #[test]
    fn chance_is_right_on_average_and_repeats() {
        // A quarter of the way from 1 to the next bf16, 1 + 2^-7; and the same below 0.
        let value = 1.0 + 0.25 / 128.0;
        for sign in [1.0, -1.0] {
            let n = 100_000;
            let mut x = vec![sign * value; n];
            to_bf16(Rounding::Stochastic(3), &mut x);
            assert!(x.iter().all(|x| [1.0, 1.0 + 1.0 / 128.0].contains(&x.abs())));
            let up = x.iter().filter(|x| x.abs() > 1.0).count() as f64;
            // Binomial with standard deviation 137.
            assert!((up - 25_000.0).abs() < 700.0, "{up}");
            let mut again = vec![sign * value; n];
            to_bf16(Rounding::Stochastic(3), &mut again);
            assert_eq!(again, x);
        }
    }
}
