//! The numbers of quantised weights: a few levels times a scale that neighbours share.

use super::StepSums;
use crate::{checkpoint::Tensor, error::Result, ops::NF4};

/// How weights are quantised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blocks {
    /// 16 levels times the largest size of 64 consecutive values.
    Nf4,
    /// 255 levels, 1/127 of the largest size of the row apart.
    Int8,
}

/// Values that share a scale of NF4.
const NF4_BLOCK: usize = 64;

impl Blocks {
    /// Adds the squared steps of a weight that was stored as the values that quantising left.
    ///
    /// The largest value of a block defines its scale and is not rounded. A level whose neighbours lie `a` below and `b`
    /// above takes the values up to half the way to them. Over these the mean squared error is `(a^3 + b^3) / (12 (a + b))`,
    /// that of rounding to numbers `u` apart where `u^2 = (a^3 + b^3) / (a + b)`.
    pub(super) fn add(self, weight: &Tensor, sums: &mut StepSums) -> Result<()> {
        let (m, n) = weight.matrix_shape()?;
        let len = if self == Blocks::Int8 { n } else { NF4_BLOCK };
        // Blocks of NF4 do not end with the rows: whole rows and whole blocks at once.
        let rows = if n.is_multiple_of(len) { 1 } else { len };
        let mut values = Vec::new();
        for first in (0..m).step_by(rows) {
            values.resize(rows.min(m - first) * n, 0.0);
            weight.read_f64(first * n, &mut values)?;
            for (b, block) in values.chunks(len.max(1)).enumerate() {
                self.add_block(block, first * n + b * len, n, sums);
            }
        }
        Ok(())
    }

    /// Adds one block, whose first value has the flat index `first` in a matrix with `n` columns.
    pub(super) fn add_block(self, block: &[f64], first: usize, n: usize, sums: &mut StepSums) {
        let largest = block.iter().enumerate().max_by(|a, b| a.1.abs().total_cmp(&b.1.abs()));
        let Some((exact, scale)) = largest.map(|(i, x)| (i, x.abs())).filter(|(_, scale)| *scale > 0.0) else { return };
        for (i, x) in block.iter().enumerate().filter(|(i, _)| *i != exact) {
            let u2 = scale * scale * if self == Blocks::Int8 { INT8_STEP } else { nf4_step(x / scale) };
            sums.rows[(first + i) / n] += u2;
            sums.columns[(first + i) % n] += u2;
        }
    }
}

/// Squared, relative to the scale.
const INT8_STEP: f64 = 1.0 / (127.0 * 127.0);

/// `u^2` at the level of NF4 that is nearest to `x`, relative to the scale.
fn nf4_step(x: f64) -> f64 {
    let above = NF4.partition_point(|level| f64::from(*level) < x).min(NF4.len() - 1);
    let below = above.saturating_sub(1);
    let near = if x - f64::from(NF4[below]) < f64::from(NF4[above]) - x { below } else { above };
    let gap = |i: usize| f64::from(NF4[i + 1]) - f64::from(NF4[i]);
    match near {
        0 => gap(0).powi(2),
        15 => gap(14).powi(2),
        i => (gap(i - 1).powi(3) + gap(i).powi(3)) / (gap(i - 1) + gap(i)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_of_nf4_follow_from_its_levels() {
        assert!((nf4_step(-1.0) - 0.303_807_2f64.powi(2)).abs() < 1e-6);
        assert!((nf4_step(0.9) - 0.277_043_16f64.powi(2)).abs() < 1e-6, "the last level goes down to the middle");
        let (a, b) = (0.091_050_036f64, 0.079_580_3f64);
        for x in [0.0, 0.03, -0.04] {
            assert!((nf4_step(x) - (a.powi(3) + b.powi(3)) / (a + b)).abs() < 1e-8, "{x}");
        }
    }

    #[test]
    fn the_largest_value_of_a_block_is_exact() {
        let mut sums = StepSums::new(2, 3);
        Blocks::Int8.add_block(&[0.1, -2.54, 0.3], 3, 3, &mut sums);
        assert!(sums.rows[0] == 0.0 && (sums.rows[1] - 8e-4).abs() < 1e-12, "{sums:?}");
        assert!(sums.columns[1] == 0.0 && (sums.columns[0] - 4e-4).abs() < 1e-12, "{sums:?}");
    }
}
