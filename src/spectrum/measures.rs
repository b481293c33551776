//! What the singular values `s1 >= s2 >= ...` of an `m x n` matrix say about its rank.

use serde::{Deserialize, Serialize};

/// All measures of one matrix. Ratios of a zero or empty matrix are undefined: `None`, `null` in JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measures {
    /// `s1`
    pub spectral_norm: f64,
    /// `sqrt(sum s^2)`
    pub frobenius_norm: f64,
    /// `sum s`
    pub nuclear_norm: f64,
    /// Count of `s > tolerance`, by default `max(m, n) * eps(f32) * s1` (the rule of `numpy.linalg.matrix_rank`).
    pub numerical_rank: usize,
    /// What rounding alone can produce (see [`super::noise`]); 0 for factors, which are not rounded into weights.
    pub noise_edge: f64,
    /// Count of `s > max(noise_edge, tolerance)`: the honest rank of a delta read from rounded checkpoints.
    pub rank_above_noise: usize,
    /// `exp(-sum p ln p)`, `p = s / sum s` (Roy and Vetterli, "The effective rank", EUSIPCO 2007).
    pub effective_rank: Option<f64>,
    /// `effective_rank / min(m, n)`
    pub proportional_effective_rank: Option<f64>,
    /// `sum s^2 / s1^2` (Rudelson and Vershynin, "Sampling from large matrices", J. ACM 54 (2007)).
    pub stable_rank: Option<f64>,
    /// `(sum s^2)^2 / sum s^4`
    pub participation_ratio: Option<f64>,
    /// Smallest k whose first k values hold 90% of `sum s^2`.
    pub energy_rank_90: usize,
    /// Smallest k whose first k values hold 99% of `sum s^2`.
    pub energy_rank_99: usize,
    /// `s1 / s_min`; `None` where `s_min = 0`.
    pub condition_number: Option<f64>,
    /// Count of `s < 0.1`, the figure the ReLoRA paper reports (arXiv:2307.05695).
    pub below_0_1: usize,
}

/// The size that `below_0_1` counts below.
pub const BELOW: f64 = 0.1;

/// `max(m, n) * eps(f32)`: the numerical tolerance relative to `s1`.
pub fn default_tolerance(shape: (usize, usize)) -> f64 {
    shape.0.max(shape.1) as f64 * f64::from(f32::EPSILON)
}

impl Measures {
    /// Measures of an `m x n` matrix with singular values `sigma`, largest first, `min(m, n)` of them.
    /// `tolerance` is relative to `s1`.
    pub fn new(sigma: &[f64], shape: (usize, usize), tolerance: f64, noise_edge: f64) -> Measures {
        let s1 = sigma.first().copied().unwrap_or(0.0);
        let cut = tolerance * s1;
        let above = |limit: f64| sigma.partition_point(|&s| s > limit);
        let mut measures = Measures {
            spectral_norm: s1,
            frobenius_norm: 0.0,
            nuclear_norm: sigma.iter().sum(),
            numerical_rank: above(cut),
            noise_edge,
            rank_above_noise: above(cut.max(noise_edge)),
            effective_rank: None,
            proportional_effective_rank: None,
            stable_rank: None,
            participation_ratio: None,
            energy_rank_90: 0,
            energy_rank_99: 0,
            condition_number: None,
            below_0_1: sigma.iter().filter(|&&s| s < BELOW).count(),
        };
        if s1 > 0.0 {
            measures.add_ratios(sigma, shape);
        }
        measures
    }

    fn add_ratios(&mut self, sigma: &[f64], shape: (usize, usize)) {
        // Relative to s1, so that squares and fourth powers neither overflow nor vanish.
        let s1 = self.spectral_norm;
        let relative: Vec<f64> = sigma.iter().map(|s| s / s1).collect();
        let sum: f64 = relative.iter().sum();
        let squares: f64 = relative.iter().map(|s| s * s).sum();
        let fourths: f64 = relative.iter().map(|s| s.powi(4)).sum();
        let entropy: f64 = relative.iter().filter(|&&s| s > 0.0).map(|s| s / sum).map(|p| -p * p.ln()).sum();
        let effective_rank = entropy.exp();
        let smallest = sigma.last().copied().unwrap_or(0.0);
        self.frobenius_norm = s1 * squares.sqrt();
        self.effective_rank = Some(effective_rank);
        self.proportional_effective_rank = Some(effective_rank / shape.0.min(shape.1) as f64);
        self.stable_rank = Some(squares);
        self.participation_ratio = Some(squares * squares / fourths);
        self.energy_rank_90 = energy_rank(&relative, squares, 0.90);
        self.energy_rank_99 = energy_rank(&relative, squares, 0.99);
        self.condition_number = Some(s1 / smallest).filter(|c| c.is_finite());
    }

    /// The value of a metric by its JSON key; `None` where it is undefined for this matrix.
    pub fn get(&self, metric: &Metric) -> Option<f64> {
        (metric.of)(self)
    }
}

fn energy_rank(sigma: &[f64], total: f64, share: f64) -> usize {
    let mut sum = 0.0;
    for (i, s) in sigma.iter().enumerate() {
        sum += s * s;
        if sum / total >= share {
            return i + 1;
        }
    }
    sigma.len()
}

/// A measure that gates and comparisons can name.
#[derive(Debug)]
pub struct Metric {
    /// The JSON key.
    pub name: &'static str,
    of: fn(&Measures) -> Option<f64>,
}

impl Metric {
    /// The metric with this JSON key.
    pub fn find(name: &str) -> Option<&'static Metric> {
        METRICS.iter().find(|m| m.name == name)
    }
}

/// Every metric of the contract, in the order of the JSON keys.
pub static METRICS: &[Metric] = &[
    Metric { name: "spectral_norm", of: |m| Some(m.spectral_norm) },
    Metric { name: "frobenius_norm", of: |m| Some(m.frobenius_norm) },
    Metric { name: "nuclear_norm", of: |m| Some(m.nuclear_norm) },
    Metric { name: "numerical_rank", of: |m| Some(m.numerical_rank as f64) },
    Metric { name: "noise_edge", of: |m| Some(m.noise_edge) },
    Metric { name: "rank_above_noise", of: |m| Some(m.rank_above_noise as f64) },
    Metric { name: "effective_rank", of: |m| m.effective_rank },
    Metric { name: "proportional_effective_rank", of: |m| m.proportional_effective_rank },
    Metric { name: "stable_rank", of: |m| m.stable_rank },
    Metric { name: "participation_ratio", of: |m| m.participation_ratio },
    Metric { name: "energy_rank_90", of: |m| Some(m.energy_rank_90 as f64) },
    Metric { name: "energy_rank_99", of: |m| Some(m.energy_rank_99 as f64) },
    Metric { name: "condition_number", of: |m| m.condition_number },
    Metric { name: "below_0_1", of: |m| Some(m.below_0_1 as f64) },
];

#[cfg(test)]
mod tests {
    use super::*;

    fn close(a: Option<f64>, b: f64) -> bool {
        a.is_some_and(|a| (a - b).abs() <= 1e-12 * b)
    }

    #[test]
    fn equal_values_give_full_rank_by_every_measure() {
        let m = Measures::new(&[0.25; 48], (48, 64), default_tolerance((48, 64)), 0.0);
        assert!(close(m.effective_rank, 48.0) && close(m.stable_rank, 48.0) && close(m.participation_ratio, 48.0));
        assert!(close(m.proportional_effective_rank, 1.0) && close(m.condition_number, 1.0));
        assert_eq!((m.numerical_rank, m.rank_above_noise, m.energy_rank_90, m.energy_rank_99), (48, 48, 44, 48));
        assert!(close(Some(m.frobenius_norm), 3f64.sqrt()) && m.nuclear_norm == 12.0 && m.below_0_1 == 0);
    }

    #[test]
    fn hand_computed_values() {
        let m = Measures::new(&[3.0, 1.0, 0.01, 0.0], (4, 9), 1e-3, 0.5);
        assert_eq!((m.numerical_rank, m.rank_above_noise, m.below_0_1), (3, 2, 2));
        assert_eq!(m.condition_number, None);
        assert!(close(m.stable_rank, 10.0001 / 9.0));
        assert_eq!((m.energy_rank_90, m.energy_rank_99), (2, 2));
        let p = [3.0 / 4.01, 1.0 / 4.01, 0.01 / 4.01];
        assert!(close(m.effective_rank, (-p.iter().map(|p: &f64| p * p.ln()).sum::<f64>()).exp()));
    }

    #[test]
    fn a_zero_matrix_has_rank_zero_and_no_ratios() {
        let m = Measures::new(&[0.0; 3], (3, 4), 1e-6, 0.0);
        assert_eq!((m.numerical_rank, m.rank_above_noise, m.energy_rank_90, m.below_0_1), (0, 0, 0, 3));
        assert!(m.effective_rank.is_none() && m.stable_rank.is_none() && m.condition_number.is_none());
    }

    #[test]
    fn extreme_magnitudes_do_not_overflow() {
        for scale in [1e-200, 1e200] {
            let m = Measures::new(&[2.0 * scale, scale], (2, 2), 1e-6, 0.0);
            assert!(close(m.participation_ratio, 25.0 / 17.0) && close(Some(m.frobenius_norm), 5f64.sqrt() * scale));
        }
    }

    #[test]
    fn every_serialised_measure_can_be_named() {
        let m = Measures::new(&[2.0, 1.0], (2, 2), 1e-6, 0.0);
        let json = serde_json::to_value(&m).unwrap();
        let keys: Vec<_> = json.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(keys, METRICS.iter().map(|m| m.name).collect::<Vec<_>>());
        for metric in METRICS {
            assert_eq!(json[metric.name].as_f64(), m.get(metric), "{}", metric.name);
        }
    }
}
