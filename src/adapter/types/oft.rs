//! OFT (arXiv:2306.07280) as PEFT has it since 0.16: `W' = W R^T`, R a block diagonal of rotations made of skew-symmetric matrices Q.
//!
//! Each Q is stored as its upper triangle. R is Cayley's `(I - Q)(I + Q)^-1`, or with `use_cayley_neumann` the polynomial
//! `I + 2Q + 2Q^2 + ... + Q^(terms - 1)`, which approximates `(I + Q)(I - Q)^-1`: it turns the other way. Training ran with one or the
//! other, and the merge follows it. Of an embedding the rows are turned, `E R`.

use super::square::{cayley, skew};
use super::{About, AdapterType, Layer, values};
use crate::{
    adapter::Module,
    delta::forms::{self, Boxed},
    error::Result,
};
use ndarray::{Array2, s};

/// The type.
pub struct Oft;

impl AdapterType for Oft {
    fn about(&self) -> About {
        About { id: "OFT", name: "OFT", prefix: "oft_", slots: &["oft_R", "oft_embedding_R"] }
    }

    fn is_embedding(&self, module: &Module) -> bool {
        module.get("oft_embedding_R").is_some()
    }

    fn no_sum(&self, _: &Module) -> Option<&'static str> {
        Some("rotates it")
    }

    fn fits(&self, module: &Module, layer: &Layer) -> Result<bool> {
        let (blocks, n) = blocks(module)?;
        Ok(layer.input.is_multiple_of(n) && (blocks == 1 || blocks * n == layer.input))
    }

    fn build(&self, module: &Module, layer: &Layer, _: f64) -> Result<Boxed> {
        let ((blocks, n), config) = (blocks(module)?, module.config());
        let stored = values::table(module, slot(module))?;
        let terms = config.integer("num_cayley_neumann_terms").unwrap_or(5);
        let mut rotations = Vec::with_capacity(blocks);
        for row in stored.outer_iter() {
            let mut q = skew(&row.to_vec(), n);
            if config.flag("coft") {
                let (limit, norm) =
                    (config.number("eps").unwrap_or(6e-5) / (blocks as f64).sqrt(), (&q * &q).sum().sqrt());
                if norm > limit {
                    q *= limit / norm;
                }
            }
            let r = if config.flag("use_cayley_neumann") { neumann(&q, terms) } else { cayley(module, &q)? };
            rotations.push(if self.is_embedding(module) { r } else { r.reversed_axes() });
        }
        Ok(forms::rewriting(layer.shape(), 8 * blocks * n * n, move |_, weight, mut out| {
            for (i, first) in (0..weight.ncols()).step_by(n).enumerate() {
                let block = weight.slice(s![.., first..first + n]);
                out.slice_mut(s![.., first..first + n]).assign(&block.dot(&rotations[i % rotations.len()]));
            }
        }))
    }
}

fn slot(module: &Module) -> &'static str {
    if module.get("oft_R").is_some() { "oft_R" } else { "oft_embedding_R" }
}

/// The number of blocks, and the side of each.
fn blocks(module: &Module) -> Result<(usize, usize)> {
    let (blocks, triangle) = values::extents(module, slot(module))?;
    let n = (1 + 8 * triangle).isqrt().div_ceil(2);
    match n * (n - 1) / 2 == triangle {
        true => Ok((blocks, n)),
        false => Err(module.damaged(&format!("{triangle} values are the upper triangle of no square matrix"))),
    }
}

/// `I + 2Q + 2Q^2 + ... + 2Q^(terms - 2) + Q^(terms - 1)`; with three terms the last power is Q^3, as with four.
fn neumann(q: &Array2<f64>, terms: usize) -> Array2<f64> {
    let mut r = Array2::eye(q.nrows());
    if terms > 1 {
        r = r + 2.0 * q;
    }
    if terms > 2 {
        let mut power = q.dot(q);
        r = r + 2.0 * &power;
        for _ in 3..terms.saturating_sub(1) {
            power = power.dot(q);
            r = r + 2.0 * &power;
        }
        r += &power.dot(q);
    }
    r
}
