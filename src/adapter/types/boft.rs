//! BOFT (arXiv:2311.06243): `W' = s[:, None] * (W M^T)`, M a product of butterfly levels `P B P^T`, each a permuted block diagonal of
//! Cayley's `(I - Q)(I + Q)^-1`, `Q = (R - R^T) / 2`.

use super::square::cayley;
use super::{About, AdapterType, Layer, values};
use crate::{
    adapter::Module,
    delta::forms::{self, Boxed},
    error::Result,
};
use ndarray::{Array2, Axis, s};

/// The type.
pub struct Boft;

impl AdapterType for Boft {
    fn about(&self) -> About {
        About { id: "BOFT", name: "BOFT", prefix: "boft_", slots: &["boft_R", "boft_s"] }
    }

    fn no_sum(&self, _: &Module) -> Option<&'static str> {
        Some("rotates it")
    }

    fn fits(&self, module: &Module, layer: &Layer) -> Result<bool> {
        let [levels, blocks, b, square] = *module.need("boft_R")?.shape() else { return Ok(false) };
        let mixes = levels == 1 || b % 2 == 0 && blocks >> (levels - 1) << (levels - 1) == blocks;
        let rotates = levels > 0 && levels < 32 && b == square && blocks * b == layer.input;
        Ok(rotates && mixes && module.need("boft_s")?.elements() == layer.out)
    }

    fn build(&self, module: &Module, layer: &Layer, _: f64) -> Result<Boxed> {
        let (stored, scales) = (module.need("boft_R")?, values::list(module, "boft_s")?);
        let (levels, blocks, b) = (stored.shape()[0], stored.shape()[1], stored.shape()[2]);
        let stored = values::matrix::<f64>(&stored, (levels * blocks * b, b))?;
        let mut chain = Vec::with_capacity(levels);
        for level in 0..levels {
            let of = |i: usize| {
                let first = (level * blocks + i) * b;
                let r = stored.slice(s![first..first + b, ..]);
                Ok(cayley(module, &(0.5 * (&r - &r.t())))?.reversed_axes())
            };
            let turned = (0..blocks).map(of).collect::<Result<Vec<Array2<f64>>>>()?;
            let order =
                if levels == 1 { (0..layer.input).collect() } else { butterfly(layer.input, blocks >> level, b / 2) };
            chain.push((order, turned));
        }
        let held = 8 * (stored.len() + scales.len() + levels * layer.input);
        Ok(forms::rewriting(layer.shape(), held, move |rows, weight, mut out| {
            out.assign(&weight);
            let mut mixed = Array2::zeros(out.dim());
            for (order, turned) in &chain {
                order.iter().enumerate().for_each(|(i, &to)| mixed.column_mut(to).assign(&out.column(i)));
                for (i, turned) in turned.iter().enumerate() {
                    let mut block = mixed.slice_mut(s![.., i * b..(i + 1) * b]);
                    let product = block.dot(turned);
                    block.assign(&product);
                }
                order.iter().enumerate().for_each(|(i, &from)| out.column_mut(i).assign(&mixed.column(from)));
            }
            out.axis_iter_mut(Axis(0)).zip(rows).for_each(|(mut out, row)| out *= scales[row]);
        }))
    }
}

/// Where each of n columns goes: within each of `blocks` parts, pieces of `half` with an even number come first.
fn butterfly(n: usize, blocks: usize, half: usize) -> Vec<usize> {
    let size = n / blocks.max(1);
    let pieces = size / half.max(1);
    let order = (0..pieces).step_by(2).chain((1..pieces).step_by(2));
    let within: Vec<usize> = order.flat_map(|piece| piece * half..(piece + 1) * half).collect();
    (0..n).map(|i| i / size * size + within[i % size]).collect()
}
