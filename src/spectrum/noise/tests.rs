//! Rounding of every kind, on weights of every kind: it stays below the edge, and the edge is not far above it.

use super::*;
use crate::{
    checkpoint::dtype,
    ops::{Quantisation, quantise},
    spectrum::{Measures, svd},
};

/// SplitMix64.
struct Random(u64);

impl Random {
    /// Uniform in 0..1.
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

/// How a weight is rounded, and which numbers its edge counts.
#[derive(Clone, Copy, Debug)]
enum Storage {
    Nearest(Dtype),
    Stochastic(Dtype),
    /// FP8 times a power of two, in an F32 file: `bits` after the leading one.
    Fp8(u32),
    Quantised(Quantisation),
}

const EVERY_KIND: [Storage; 9] = [
    Storage::Nearest(Dtype::BF16),
    Storage::Nearest(Dtype::F16),
    Storage::Stochastic(Dtype::BF16),
    Storage::Stochastic(Dtype::F16),
    Storage::Fp8(3),
    Storage::Fp8(2),
    Storage::Quantised(Quantisation::Nf4 { double: true }),
    Storage::Quantised(Quantisation::Nf4 { double: false }),
    Storage::Quantised(Quantisation::Int8),
];

impl Storage {
    /// What becomes of each value.
    fn round(self, random: &mut Random, weight: &[f32], (m, n): (usize, usize)) -> Vec<f32> {
        let to_steps = |x: f32, u: f64, add: f64| ((f64::from(x) / u + add).floor() * u) as f32;
        match self {
            Storage::Nearest(to) => {
                let mut stored = vec![0.0; m * n];
                dtype::decode_f32(to, &dtype::encode_f32(to, weight).unwrap(), &mut stored).unwrap();
                stored
            }
            Storage::Stochastic(to) => {
                weight.iter().map(|&x| to_steps(x, dtype::ulp(to, f64::from(x)), random.uniform())).collect()
            }
            Storage::Fp8(bits) => {
                let step = |x: f32| 2f64.powi(f64::from(x.abs().max(1e-6)).log2().floor() as i32 - bits as i32);
                weight.iter().map(|&x| to_steps(x, step(x), 0.5)).collect()
            }
            Storage::Quantised(how) => {
                let mut stored = vec![0.0; m * n];
                quantise::dequantise(&quantise::quantise(how, m, n, weight), &mut stored);
                stored
            }
        }
    }

    /// What one rounding adds to the edge.
    fn sums(self, stored: &[f64], (m, n): (usize, usize)) -> (StepSums, f64) {
        let mut sums = StepSums::new(m, n);
        if let Storage::Quantised(how) = self {
            let (blocks, len) = if how == Quantisation::Int8 { (Blocks::Int8, n) } else { (Blocks::Nf4, 64) };
            stored.chunks(len).enumerate().for_each(|(b, block)| blocks.add_block(block, b * len, n, &mut sums));
            return (sums, 1.0);
        }
        let (file, roundings) = match self {
            Storage::Nearest(dtype) => (dtype, 1.0),
            Storage::Stochastic(dtype) => (dtype, 2.0),
            // Found by the low bits.
            _ => (Dtype::F32, 1.0),
        };
        for (i, row) in stored.chunks(n).enumerate() {
            sums.add(Grid::of(file).unwrap().shown_by(row), i, 0, row);
        }
        (sums, roundings)
    }

    /// The largest singular value of the noise of `merges` merges of random deltas, and the edge.
    fn noise_and_edge(self, random: &mut Random, weights: usize, shape: (usize, usize), merges: u32) -> (f64, f64) {
        let (m, n) = shape;
        let mut weight = model_like(random, weights, m, n);
        let mut noise = vec![0.0; m * n];
        for merge in 0..merges {
            if merge > 0 {
                weight
                    .iter_mut()
                    .for_each(|w| *w += 0.1 * *w * random.normal() as f32 + 0.004 * random.normal() as f32);
            }
            let stored = self.round(random, &weight, shape);
            noise
                .iter_mut()
                .zip(stored.iter().zip(&weight))
                .for_each(|(e, (s, w))| *e += f64::from(*s) - f64::from(*w));
            weight = stored;
        }
        let stored: Vec<f64> = weight.iter().map(|x| f64::from(*x)).collect();
        let edge = edge(&[self.sums(&stored, shape)], f64::from(merges));
        (svd::singular_values(&mut noise, m, n).unwrap()[0], edge)
    }
}

/// 1,000 seeded trials of each kind of rounding, over all kinds of weights, some of them of several merges.
#[test]
fn pure_rounding_stays_below_the_edge_in_99_percent_of_1000_trials() {
    for storage in EVERY_KIND {
        let mut above = 0;
        for trial in 0..1000 {
            let mut random = Random(trial as u64);
            let shape = (random.between(24, 56), random.between(24, 112));
            let merges = if trial % 3 == 2 { 3 } else { 1 };
            let (noise, edge) = storage.noise_and_edge(&mut random, trial, shape, merges);
            above += usize::from(noise > edge);
        }
        assert!(above <= 10, "{storage:?}: rounding passed for rank in {above} of 1000 trials");
    }
}

#[test]
fn the_edge_is_at_most_twice_the_noise() {
    for storage in EVERY_KIND {
        let quantised = matches!(storage, Storage::Quantised(_));
        for (weights, shape) in [0, 1, 2, 3, 4].map(|kind| (kind, [(64, 64), (48, 130), (96, 96)][kind % 3])) {
            for merges in [1, 4] {
                // Beside an outlier, the others of a block hardly ever leave the level 0: rounding them anew adds nothing.
                if quantised && weights == 4 && merges > 1 {
                    continue;
                }
                let mut noises = Vec::new();
                let mut edges = Vec::new();
                for trial in 0..15 {
                    let (noise, edge) = storage.noise_and_edge(&mut Random(1000 + trial), weights, shape, merges);
                    noises.push(noise);
                    edges.push(edge);
                }
                noises.sort_by(f64::total_cmp);
                edges.sort_by(f64::total_cmp);
                let ratio = edges[7] / noises[7];
                assert!(
                    ratio < 2.0,
                    "{storage:?}, weights {weights}, {merges} merges: the edge is {ratio:.2} of the noise"
                );
            }
        }
    }
}

#[test]
fn the_edge_of_a_constant_matrix_is_the_bai_yin_edge() {
    let (m, n) = (30, 50);
    let mut sums = StepSums::new(m, n);
    let grid = Grid::of(Dtype::BF16).unwrap();
    for row in 0..m {
        // Two pieces per row, as the panels of a wide matrix come.
        sums.add(grid, row, 0, &[1.0; 20]);
        sums.add(grid, row, 20, &[1.0; 30]);
    }
    let s = 2f64.powi(-7) / 12f64.sqrt();
    let expected = 2.0 * s * ((m as f64).sqrt() + (n as f64).sqrt());
    assert!((sums.noise_edge(4.0) - expected).abs() < 1e-12);
    // Roundings of two kinds add their variances.
    let both = edge(&[(sums.clone(), 1.0), (sums.clone(), 2.0)], 2.0);
    assert!((both - sums.noise_edge(6.0)).abs() < 1e-12);
    assert_eq!(edge(&[], 3.0), 0.0);
}

#[test]
fn a_rank_8_delta_in_bf16_looks_full_but_counts_8_above_the_noise() {
    let (m, n, r) = (256, 256, 8);
    let mut random = Random(11);
    let storage = Storage::Nearest(Dtype::BF16);
    let weight = model_like(&mut random, 0, m, n);
    let weight = storage.round(&mut random, &weight, (m, n));
    let (b, a): (Vec<f64>, Vec<f64>) =
        ((0..m * r).map(|_| random.normal()).collect(), (0..r * n).map(|_| random.normal()).collect());
    // A tenth of the weight's size, in 8 directions.
    let delta = |i: usize| (0..r).map(|k| b[i / n * r + k] * a[k * n + i % n]).sum::<f64>() * 0.002 / (r as f64).sqrt();
    let changed: Vec<f32> = weight.iter().enumerate().map(|(i, w)| w + delta(i) as f32).collect();
    let stored: Vec<f64> = storage.round(&mut random, &changed, (m, n)).iter().map(|x| f64::from(*x)).collect();
    let edge = edge(&[storage.sums(&stored, (m, n))], 1.0);
    let mut difference: Vec<f64> = stored.iter().zip(&weight).map(|(s, w)| s - f64::from(*w)).collect();
    let sigma = svd::singular_values(&mut difference, m, n).unwrap();
    let measures = Measures::new(&sigma, (m, n), n as f64 * f64::from(f32::EPSILON), edge);
    assert!(measures.numerical_rank > 240, "numerical rank {}", measures.numerical_rank);
    assert_eq!(measures.rank_above_noise, 8);
}
