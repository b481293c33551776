//! GraLoRA (arXiv:2505.20355): k x k blocks, each a product of rank r / k: block (j, n) of dW is
//! `alpha / r * (A[n][:, j s .. (j + 1) s] @ B[j][n s .. (n + 1) s])^T`, `s = r / k`; with `hybrid_r` a product over the whole matrix
//! is added, and the divisor is `r + hybrid_r`.
//!
//! The blocks of one row of blocks are one product of rank r.

use super::{About, AdapterType, Layer, values};
use crate::{
    adapter::Module,
    delta::{LowRank, Stacked, forms::Boxed},
    error::Result,
};
use ndarray::{Array2, s};

/// The type.
pub struct GraLora;

const GENERAL: [&str; 2] = ["gralora_A_general", "gralora_B_general"];

impl AdapterType for GraLora {
    fn about(&self) -> About {
        About {
            id: "GRALORA",
            name: "GraLoRA",
            prefix: "gralora_",
            slots: &["gralora_A_general", "gralora_B_general", "gralora_A", "gralora_B"],
        }
    }

    fn fits(&self, module: &Module, layer: &Layer) -> Result<bool> {
        let (k, r, hybrid) = sizes(module)?;
        let shape = |slot| Ok(module.need(slot)?.shape());
        let general = match hybrid {
            0 => true,
            _ => *shape(GENERAL[0])? == [hybrid, layer.input] && *shape(GENERAL[1])? == [layer.out, hybrid],
        };
        let divides = k > 0 && [r, layer.out, layer.input].iter().all(|n| n.is_multiple_of(k));
        Ok(divides
            && *shape("gralora_A")? == [k, layer.input / k, r]
            && *shape("gralora_B")? == [k, r, layer.out / k]
            && general)
    }

    fn build(&self, module: &Module, layer: &Layer, weight: f64) -> Result<Boxed> {
        let (k, r, hybrid) = sizes(module)?;
        let (rows, columns, sub) = (layer.out / k, layer.input / k, r / k);
        let a = values::matrix::<f64>(&module.need("gralora_A")?, (layer.input, r))?;
        let b = values::matrix::<f64>(&module.need("gralora_B")?, (k * r, rows))?;
        let general = match hybrid {
            0 => None,
            _ => Some((values::table(module, GENERAL[0])?, values::table(module, GENERAL[1])?)),
        };
        let alpha =
            module.config().number("alpha").ok_or_else(|| module.damaged("adapter_config.json has no alpha"))?;
        let scaling = weight * alpha / (r + hybrid) as f64;
        let part = |j: usize| {
            let mut left = Array2::zeros((rows, r + hybrid));
            left.slice_mut(s![.., ..r]).assign(&b.slice(s![j * r..(j + 1) * r, ..]).t());
            let mut right = Array2::zeros((r + hybrid, layer.input));
            for n in 0..k {
                let inputs = n * columns..(n + 1) * columns;
                let block = a.slice(s![inputs.clone(), j * sub..(j + 1) * sub]);
                right.slice_mut(s![n * sub..(n + 1) * sub, inputs]).assign(&block.t());
            }
            if let Some((a, b)) = &general {
                left.slice_mut(s![.., r..]).assign(&b.slice(s![j * rows..(j + 1) * rows, ..]));
                right.slice_mut(s![r.., ..]).assign(a);
            }
            (j * rows, LowRank { left, right, scaling })
        };
        Ok(Box::new(Stacked::new((0..k).map(part).collect())))
    }
}

/// k, r and hybrid_r.
fn sizes(module: &Module) -> Result<(usize, usize, usize)> {
    let config = module.config();
    let k = config.integer("gralora_k").ok_or_else(|| module.damaged("adapter_config.json has no gralora_k"))?;
    Ok((k, config.r, config.integer("hybrid_r").unwrap_or(0)))
}
