//! What rounding alone can put into the spectrum of a stored difference.
//!
//! Storing a weight rounds it to the nearest number of its dtype, an error that behaves like a variable of mean 0 and
//! variance `u^2 / 12`, `u` the unit in the last place there. A matrix of independent centred entries with standard
//! deviations `s_ij` has a spectral norm of about `max_i sqrt(sum_j s_ij^2) + max_j sqrt(sum_i s_ij^2)` (Bandeira and
//! van Handel, Ann. Probab. 44 (2016), 2479-2506; for equal entries it is the Bai-Yin edge `s (sqrt m + sqrt n)`).
//! K independent roundings add variances, hence `sqrt(K)`.

use crate::checkpoint::Dtype;

/// Sums of squared units in the last place, by row and by column of a stored matrix.
#[derive(Clone, Debug)]
pub struct UlpSums {
    /// `sum_j u_ij^2`
    pub rows: Vec<f64>,
    /// `sum_i u_ij^2`
    pub columns: Vec<f64>,
}

impl UlpSums {
    /// All zero, for a `rows x columns` matrix.
    pub fn new(rows: usize, columns: usize) -> Self {
        UlpSums { rows: vec![0.0; rows], columns: vec![0.0; columns] }
    }

    /// Adds a piece of one row: `values` are entries `(row, first_column ..)`, as stored in `dtype`, finite.
    pub fn add(&mut self, dtype: Dtype, row: usize, first_column: usize, values: &[f64]) {
        let Some(squared) = SquaredUlp::of(dtype) else { return };
        let columns = &mut self.columns[first_column..first_column + values.len()];
        let mut sum = 0.0;
        for (column, &x) in columns.iter_mut().zip(values) {
            let u2 = squared.at(x);
            *column += u2;
            sum += u2;
        }
        self.rows[row] += sum;
    }

    /// `sqrt(roundings) * (max_i sqrt(sum_j u_ij^2 / 12) + max_j sqrt(sum_i u_ij^2 / 12))`
    pub fn noise_edge(&self, roundings: u64) -> f64 {
        let largest = |sums: &[f64]| sums.iter().copied().fold(0.0, f64::max);
        (roundings as f64).sqrt() * ((largest(&self.rows) / 12.0).sqrt() + (largest(&self.columns) / 12.0).sqrt())
    }
}

/// `u(x)^2` by exponent arithmetic on the bits of `x`, without branches: [`crate::checkpoint::dtype::ulp`] squared.
#[derive(Clone, Copy)]
struct SquaredUlp {
    min_exponent: i64,
    fraction_bits: i64,
}

impl SquaredUlp {
    fn of(dtype: Dtype) -> Option<Self> {
        let (min_exponent, fraction_bits) = match dtype {
            Dtype::F64 => (-1022, 52),
            Dtype::F32 => (-126, 23),
            Dtype::F16 => (-14, 10),
            Dtype::BF16 => (-126, 7),
            _ => return None,
        };
        Some(SquaredUlp { min_exponent, fraction_bits })
    }

    fn at(self, x: f64) -> f64 {
        let exponent = ((x.to_bits() >> 52) & 0x7ff) as i64 - 1023;
        let squared = 2 * (exponent.max(self.min_exponent) - self.fraction_bits);
        // Squares below the smallest normal f64 (F64 weights below 1e-138) count as zero.
        f64::from_bits(((squared + 1023).clamp(0, 2046) as u64) << 52)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::dtype::ulp;

    #[test]
    fn squared_ulps_agree_with_the_definition() {
        for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
            let squared = SquaredUlp::of(dtype).unwrap();
            for x in [0.0, 1.0, -1.5, 1.9999, 2.0, 0.02, -3e-5, 6e-8, 1e-30, 1e-40, 65504.0] {
                assert_eq!(squared.at(x), ulp(dtype, x).powi(2), "{dtype:?} {x}");
            }
        }
        assert_eq!(SquaredUlp::of(Dtype::F64).unwrap().at(1.0), f64::EPSILON.powi(2));
        assert_eq!(SquaredUlp::of(Dtype::F64).unwrap().at(1e-300), 0.0);
    }

    #[test]
    fn the_edge_of_a_constant_matrix_is_the_bai_yin_edge() {
        let (m, n) = (30, 50);
        let mut sums = UlpSums::new(m, n);
        for row in 0..m {
            // Two pieces per row, as the panels of a wide matrix come.
            sums.add(Dtype::BF16, row, 0, &[1.0; 20]);
            sums.add(Dtype::BF16, row, 20, &[1.0; 30]);
        }
        let s = 2f64.powi(-7) / 12f64.sqrt();
        let expected = 2.0 * s * ((m as f64).sqrt() + (n as f64).sqrt());
        assert!((sums.noise_edge(4) - expected).abs() < 1e-12);
    }
}
