//! How a computed value becomes one of the stored type's: the nearest, or by chance one of the two beside it.
//!
//! Stochastic rounding goes up with the probability that the value lies above its lower neighbour, in units of their
//! distance: the expected result is the value itself, so that a delta far below the spacing of bf16 survives on average,
//! at the price of a larger error of each element. The chance of an element is a hash of the seed, the tensor's name and
//! the element's index: it depends on neither threads nor shards.

use crate::{
    checkpoint::{Dtype, dtype},
    delta::Real,
    error::Result,
};
use half::f16;
use serde::Serialize;
use sha2::{Digest, Sha256};

/// How values are rounded to bf16 and f16. Wider types are always rounded to nearest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(tag = "rounding", rename_all = "lowercase")]
pub enum Rounding {
    /// To nearest, ties to even: the smallest error of each element.
    #[default]
    Nearest,
    /// Up or down by chance, exact on average.
    Stochastic {
        /// Another seed, other chances.
        seed: u64,
    },
}

/// Rounds the elements of one tensor.
#[derive(Clone, Copy)]
pub(super) struct Rounder {
    /// The keys of the tensor's chances; none when rounding to nearest.
    keys: Option<[u32; 2]>,
}

/// Values that are rounded together.
const CHUNK: usize = 2048;

impl Rounder {
    pub(super) fn new(rounding: Rounding, name: &str) -> Rounder {
        let Rounding::Stochastic { seed } = rounding else { return Rounder { keys: None } };
        let hash = Sha256::new().chain_update(seed.to_le_bytes()).chain_update(name).finalize();
        let word = |i: usize| u32::from_le_bytes([hash[i], hash[i + 1], hash[i + 2], hash[i + 3]]);
        Rounder { keys: Some([word(0), word(4)]) }
    }

    pub(super) fn is_nearest(self) -> bool {
        self.keys.is_none()
    }

    /// Stored bytes of `values`, the first of which has the flat index `first`.
    pub(super) fn encode<T: Real>(&self, to: Dtype, first: usize, values: &[T], out: &mut [u8]) -> Result<()> {
        let Some(keys) = self.keys.filter(|_| matches!(to, Dtype::BF16 | Dtype::F16)) else {
            return T::encode(to, values, out);
        };
        let mut buffer = [0f32; CHUNK];
        for (i, (values, out)) in values.chunks(CHUNK).zip(out.chunks_mut(2 * CHUNK)).enumerate() {
            let (first, buffer) = ((first + i * CHUNK) as u64, &mut buffer[..values.len()]);
            buffer.iter_mut().zip(values).for_each(|(b, v)| *b = v.to_f32());
            match to {
                Dtype::BF16 => round_to_bf16(keys, first, buffer),
                _ => round_to_f16(keys, first, buffer),
            }
            // Exact now, but for what lies beyond the largest number.
            dtype::encode_f32_into(to, buffer, out)?;
        }
        Ok(())
    }
}

/// 32 uniform bits for the element `first + i`. A hash of the index, keyed at its start and in its middle; the multipliers and shifts
/// are those of `triple32` (C. Wellons, "Hash Prospector", 2018), whose output bits are nearly independent of each other.
#[inline(always)]
fn chance(keys: [u32; 2], first: u64, i: usize) -> u32 {
    // Both halves of the index in 32 bits, so that vectors hold as many as they can.
    let low = (first as u32).wrapping_add(i as u32);
    let high = ((first >> 32) as u32).wrapping_add(u32::from(low < first as u32));
    let mut x = low ^ keys[0];
    x = (x ^ (x >> 17)).wrapping_mul(0xed5a_d4bb);
    x = (x ^ (x >> 11)).wrapping_add(keys[1] ^ high);
    x = x.wrapping_mul(0xac4c_1b51);
    x = (x ^ (x >> 15)).wrapping_mul(0x3184_8bab);
    x ^ (x >> 14)
}

/// Replaces each value by one of the two bf16 numbers beside it. bf16 is the upper half of f32: a uniform number below one
/// unit of the last kept place is added, and the rest cut off. From the largest bf16 on a value is left alone.
#[multiversion::multiversion(targets("x86_64+avx2", "x86_64+sse4.1", "aarch64+neon"))]
fn round_to_bf16(keys: [u32; 2], first: u64, values: &mut [f32]) {
    const LARGEST: u32 = 0x7f7f_0000;
    for (i, value) in values.iter_mut().enumerate() {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(chance(keys, first, i) >> 16) & 0xffff_0000;
        *value = f32::from_bits(if bits & 0x7fff_ffff < LARGEST { rounded } else { bits });
    }
}

/// Replaces each value by one of the two f16 numbers beside it; from the largest f16 on it is left alone.
#[multiversion::multiversion(targets("x86_64+avx2", "x86_64+sse4.1", "aarch64+neon"))]
fn round_to_f16(keys: [u32; 2], first: u64, values: &mut [f32]) {
    const SIGNIFICAND_STEPS: f32 = 1.0 / 1024.0;
    const SMALLEST: f32 = 1.0 / (1 << 24) as f32;
    let largest = f16::MAX.to_f32();
    for (i, value) in values.iter_mut().enumerate() {
        let x = value.abs();
        let power_of_two = f32::from_bits(x.to_bits() & 0x7f80_0000);
        let unit = (power_of_two * SIGNIFICAND_STEPS).max(SMALLEST);
        // 1 / unit, exact for a power of two.
        let per_unit = f32::from_bits((254u32 << 23).wrapping_sub(unit.to_bits()));
        let units = x * per_unit;
        let below = units.floor();
        let uniform = (chance(keys, first, i) >> 8) as f32 * SMALLEST;
        let up = if units - below > uniform { 1.0 } else { 0.0 };
        let rounded = ((below + up) * unit).copysign(*value);
        *value = if x < largest { rounded } else { *value };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rounded(dtype: Dtype, seed: u64, name: &str, first: usize, values: &[f32]) -> Vec<f32> {
        let mut bytes = vec![0; 2 * values.len()];
        Rounder::new(Rounding::Stochastic { seed }, name).encode(dtype, first, values, &mut bytes).unwrap();
        let mut back = vec![0.0; values.len()];
        dtype::decode_f32(dtype, &bytes, &mut back).unwrap();
        back
    }

    #[test]
    fn the_mean_over_seeds_is_the_value_itself() {
        let values = [1.001, -0.3333, 1e-3, -7e-6, 3e-7, 2e-8, 1234.567, 65000.1, 0.0, -1.5];
        let seeds = 20_000;
        for dtype in [Dtype::BF16, Dtype::F16] {
            let mut sums = [0f64; 10];
            for seed in 0..seeds {
                let results = rounded(dtype, seed, "w", 0, &values);
                sums.iter_mut().zip(results).for_each(|(s, x)| *s += f64::from(x));
            }
            for (&x, sum) in values.iter().zip(sums) {
                let unit = dtype::ulp(dtype, f64::from(x));
                // Five standard deviations of a mean of Bernoulli variables, at most half a unit each.
                let limit = 5.0 * 0.5 * unit / f64::from(seeds as u32).sqrt();
                let error = sum / seeds as f64 - f64::from(x);
                assert!(error.abs() <= limit, "{dtype:?}: the mean of {x} is off by {error:e}, limit {limit:e}");
            }
        }
    }

    #[test]
    fn every_result_is_one_of_the_two_neighbours_and_exact_values_stay() {
        let values: Vec<f32> = (0..40_000u32).map(|i| f32::from_bits(i.wrapping_mul(107_374)) / 7.0).collect();
        for (dtype, largest) in [(Dtype::BF16, 3.389e38), (Dtype::F16, 65504.0)] {
            let results = rounded(dtype, 3, "w", 17, &values);
            let mut up = 0;
            for (&x, &q) in values.iter().zip(&results).filter(|(x, _)| x.abs() < largest) {
                let unit = dtype::ulp(dtype, f64::from(x));
                assert!((f64::from(q) - f64::from(x)).abs() < unit, "{dtype:?}: {x:e} became {q:e}");
                up += usize::from(q > x);
            }
            assert!(up > 1000, "{dtype:?}: only {up} went up");
            let finite: Vec<f32> = results.iter().copied().filter(|q| q.is_finite()).collect();
            assert_eq!(rounded(dtype, 4, "w", 0, &finite), finite);
        }
    }

    #[test]
    fn the_ends_of_the_range_are_as_to_nearest() {
        let below_half = f32::from_bits(0x7f7f_7fff);
        let values = [f32::INFINITY, f32::NEG_INFINITY, f32::MAX, below_half, 65519.0, -65520.0, f32::NAN];
        for dtype in [Dtype::BF16, Dtype::F16] {
            let mut nearest = vec![0; 14];
            dtype::encode_f32_into(dtype, &values, &mut nearest).unwrap();
            for seed in 0..50 {
                let mut bytes = vec![0; 14];
                let rounder = Rounder::new(Rounding::Stochastic { seed }, "w");
                rounder.encode(dtype, 0, &values, &mut bytes).unwrap();
                // 65519 has a bf16 neighbour on either side, as every number in the middle.
                let same = if dtype == Dtype::BF16 { 8 } else { 14 };
                assert_eq!(bytes[..same], nearest[..same], "{dtype:?}");
                let back = rounded(dtype, seed, "w", 0, &values);
                assert!(back[6].is_nan());
            }
        }
    }

    #[test]
    fn an_element_has_the_same_chance_wherever_its_chunk_begins() {
        let values: Vec<f32> = (0..10_000).map(|i| 1.0 + i as f32 * 1e-6).collect();
        let whole = rounded(Dtype::BF16, 1, "w", 0, &values);
        // The second start crosses the half of the index that changes last.
        for first in [0, (1 << 32) - 2500] {
            let whole = rounded(Dtype::BF16, 1, "w", first, &values);
            for split in [1, 2048, 3000] {
                let mut parts = rounded(Dtype::BF16, 1, "w", first, &values[..split]);
                parts.extend(rounded(Dtype::BF16, 1, "w", first + split, &values[split..]));
                assert_eq!(parts, whole);
            }
        }
        assert_ne!(rounded(Dtype::BF16, 2, "w", 0, &values), whole, "another seed");
        assert_ne!(rounded(Dtype::BF16, 1, "v", 0, &values), whole, "another tensor");
        assert_ne!(rounded(Dtype::BF16, 1, "w", 1 << 32, &values), whole, "another index in its upper half");
    }

    #[test]
    fn chances_are_uniform_and_neighbours_independent() {
        let n = 1 << 20;
        let Rounder { keys: Some(keys) } = Rounder::new(Rounding::Stochastic { seed: 5 }, "w") else { panic!() };
        let mut counts = [0f64; 256];
        let mut pairs = [0f64; 256];
        for i in 0..n {
            let (x, next) = (chance(keys, i, 0), chance(keys, i, 1));
            counts[(x >> 24) as usize] += 1.0;
            pairs[((x >> 28) << 4 | next >> 28) as usize] += 1.0;
        }
        for (what, counts) in [("values", counts), ("pairs", pairs)] {
            let expected = n as f64 / 256.0;
            let chi_square: f64 = counts.iter().map(|c| (c - expected).powi(2) / expected).sum();
            // 255 degrees of freedom: mean 255, standard deviation 22.6.
            assert!((140.0..370.0).contains(&chi_square), "{what}: chi-square {chi_square}");
        }
    }

    #[test]
    fn wider_types_and_nearest_ignore_chance() {
        let values = [1.0f32 + f32::EPSILON, 0.1];
        let mut bytes = [0; 8];
        Rounder::new(Rounding::Stochastic { seed: 1 }, "w").encode(Dtype::F32, 0, &values, &mut bytes).unwrap();
        assert_eq!(bytemuck::cast_slice::<f32, u8>(&values), bytes);
        let (mut ours, mut nearest) = ([0; 4], [0; 4]);
        Rounder::new(Rounding::Nearest, "w").encode(Dtype::BF16, 0, &values, &mut ours).unwrap();
        dtype::encode_f32_into(Dtype::BF16, &values, &mut nearest).unwrap();
        assert_eq!(ours, nearest);
    }
}
