//! FourierFT (arXiv:2405.03003): `dW = scaling * real(ifft2(S))`, S zero but for the trained spectrum at places that are not in the
//! file: the first of PyTorch's `randperm(out * in)`, seeded by `random_loc_seed`.
//!
//! The cosine of a sum of angles is a sum of products: frequencies that share a column make one pair of columns and rows, so that
//! the sum is a low-rank product.

use super::torch_random::{LARGEST_PERMUTATION, Mt19937};
use super::{About, AdapterType, Layer, values};
use crate::{
    adapter::Module,
    delta::forms::{self, Boxed},
    error::Result,
};
use ndarray::Array2;
use std::{collections::BTreeMap, f64::consts::TAU};

/// The type.
pub struct FourierFt;

impl AdapterType for FourierFt {
    fn about(&self) -> About {
        About { id: "FOURIERFT", name: "FourierFT", prefix: "fourierft_", slots: &["fourierft_spectrum"] }
    }

    fn fits(&self, module: &Module, layer: &Layer) -> Result<bool> {
        let total = layer.out * layer.input;
        if total >= LARGEST_PERMUTATION {
            return Err(
                module.damaged(&format!("a layer of {total} elements has places that PyTorch draws in another way"))
            );
        }
        Ok(layer.kernel.is_empty() && module.need("fourierft_spectrum")?.elements() <= total)
    }

    fn build(&self, module: &Module, layer: &Layer, weight: f64) -> Result<Boxed> {
        let (config, (out, input)) = (module.config(), layer.shape());
        let spectrum = values::list(module, "fourierft_spectrum")?;
        let seed = config.integer("random_loc_seed").ok_or_else(|| module.damaged("it has no random_loc_seed"))?;
        let scaling = config.number("scaling").ok_or_else(|| module.damaged("it has no scaling"))?;
        let places = Mt19937::new(seed as u32).permutation(out * input, spectrum.len());
        let mut by_column: BTreeMap<usize, Vec<(usize, f64)>> = BTreeMap::new();
        for (place, value) in places.iter().zip(&spectrum) {
            by_column.entry(place % input).or_default().push((place / input, *value));
        }
        let angle = |k: usize, i: usize, n: usize| TAU * (k * i % n) as f64 / n as f64;
        let (mut left, mut right) =
            (Array2::zeros((out, 2 * by_column.len())), Array2::zeros((2 * by_column.len(), input)));
        for (pair, (column, rows)) in by_column.iter().enumerate() {
            for p in 0..out {
                for (row, value) in rows {
                    let (sin, cos) = angle(*row, p, out).sin_cos();
                    left[[p, 2 * pair]] += value * cos;
                    left[[p, 2 * pair + 1]] -= value * sin;
                }
            }
            for q in 0..input {
                let (sin, cos) = angle(*column, q, input).sin_cos();
                right[[2 * pair, q]] = cos;
                right[[2 * pair + 1, q]] = sin;
            }
        }
        Ok(forms::low_rank(left, right, weight * scaling / (out * input) as f64))
    }
}
