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

    /// Uniform in 0..1 (SplitMix64).
    struct Random(u64);

    impl Random {
        fn uniform(&mut self) -> f64 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = self.0;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
        }

        fn normal(&mut self) -> f64 {
            (-2.0 * (1.0 - self.uniform()).ln()).sqrt() * (std::f64::consts::TAU * self.uniform()).cos()
        }

        fn between(&mut self, low: usize, high: usize) -> usize {
            low + (self.uniform() * (high - low) as f64) as usize
        }
    }

    /// Weights as models have them: Gaussian of various sizes, heavy tails, rows of different size, outlier columns.
    fn model_like(random: &mut Random, kind: usize, m: usize, n: usize) -> Vec<f32> {
        let std = [0.02, 0.006, 0.1, 0.02, 0.02][kind % 5];
        let rows: Vec<f64> = (0..m).map(|_| if kind % 5 == 3 { (0.7 * random.normal()).exp() } else { 1.0 }).collect();
        let outlier: Vec<bool> = (0..n).map(|_| kind % 5 == 4 && random.uniform() < 0.02).collect();
        let tail = |random: &mut Random| if kind % 5 == 2 { (random.uniform() + 0.05).recip().sqrt() } else { 1.0 };
        let mut entry = |i: usize| {
            let scale = std * rows[i / n] * if outlier[i % n] { 20.0 } else { 1.0 } * tail(random);
            (scale * random.normal()) as f32
        };
        (0..m * n).map(&mut entry).collect()
    }

    /// Singular values of `stored(changed) - weight`, and the edge of that storage.
    fn rounding_spectrum(dtype: Dtype, weight: &[f32], changed: &[f32], m: usize, n: usize) -> (Vec<f64>, f64) {
        let bytes = crate::checkpoint::dtype::encode_f32(dtype, changed).unwrap();
        let mut stored = vec![0.0; m * n];
        crate::checkpoint::dtype::decode_f64(dtype, &bytes, &mut stored).unwrap();
        let mut sums = UlpSums::new(m, n);
        (0..m).for_each(|row| sums.add(dtype, row, 0, &stored[row * n..(row + 1) * n]));
        let mut delta: Vec<f64> = stored.iter().zip(weight).map(|(s, w)| s - f64::from(*w)).collect();
        (super::super::svd::singular_values(&mut delta, m, n).unwrap(), sums.noise_edge(1))
    }

    #[test]
    fn pure_rounding_stays_below_the_edge_in_99_percent_of_1000_trials() {
        let mut above = 0;
        for trial in 0..1000 {
            let mut random = Random(trial as u64);
            let (m, n) = (random.between(24, 72), random.between(24, 160));
            let dtype = [Dtype::BF16, Dtype::F16][trial / 5 % 2];
            let weight = model_like(&mut random, trial, m, n);
            let (sigma, edge) = rounding_spectrum(dtype, &weight, &weight, m, n);
            above += usize::from(sigma[0] > edge);
        }
        assert!(above <= 10, "rounding passed for rank in {above} of 1000 trials");
    }

    #[test]
    fn the_edge_is_not_slack_on_gaussian_weights() {
        for (m, n) in [(64, 64), (128, 340), (256, 256)] {
            let mut random = Random(7);
            let weight = model_like(&mut random, 0, m, n);
            let (sigma, edge) = rounding_spectrum(Dtype::BF16, &weight, &weight, m, n);
            assert!(edge < 1.5 * sigma[0], "{m}x{n}: the edge is {:.2} of the noise", edge / sigma[0]);
        }
    }

    #[test]
    fn a_rank_8_delta_in_bf16_looks_full_but_counts_8_above_the_noise() {
        let (m, n, r) = (256, 256, 8);
        let mut random = Random(11);
        let weight: Vec<f32> =
            model_like(&mut random, 0, m, n).iter().map(|&w| half::bf16::from_f32(w).to_f32()).collect();
        let (b, a): (Vec<f64>, Vec<f64>) =
            ((0..m * r).map(|_| random.normal()).collect(), (0..r * n).map(|_| random.normal()).collect());
        // A tenth of the weight's size, spread over 8 directions.
        let delta =
            |i: usize| (0..r).map(|k| b[i / n * r + k] * a[k * n + i % n]).sum::<f64>() * 0.002 / (r as f64).sqrt();
        let changed: Vec<f32> = weight.iter().enumerate().map(|(i, w)| w + delta(i) as f32).collect();
        let (sigma, edge) = rounding_spectrum(Dtype::BF16, &weight, &changed, m, n);
        let measures = super::super::Measures::new(&sigma, (m, n), n as f64 * f64::from(f32::EPSILON), edge);
        assert!(measures.numerical_rank > 240, "numerical rank {}", measures.numerical_rank);
        assert_eq!(measures.rank_above_noise, 8);
    }
}
