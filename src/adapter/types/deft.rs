//! DEFT: a part of the weight is projected away and another put in its place. `W' = W + Q (alpha / r * R - Q^T W)`, Q from the QR
//! decomposition of P; `relu`: `W' = W + P (R - relu(P)^T W)` with the same factor of R; `para`: without R.
//!
//! `Q R` depends on the signs of Q: Householder's, as in LAPACK, where each diagonal element of the triangle has the opposite sign of
//! its pivot.

use super::{About, AdapterType, Layer, values};
use crate::{
    adapter::Module,
    delta::forms::{self, Boxed},
    error::Result,
};
use ndarray::{Array1, Array2, s};

/// The type.
pub struct Deft;

impl AdapterType for Deft {
    fn about(&self) -> About {
        About { id: "DEFT", name: "DEFT", prefix: "deft_", slots: &["deft_P", "deft_R"] }
    }

    fn no_sum(&self, _: &Module) -> Option<&'static str> {
        Some("projects it")
    }

    fn fits(&self, module: &Module, layer: &Layer) -> Result<bool> {
        let p = values::extents(module, "deft_P")?;
        let added = module.config().flag("para") || values::extents(module, "deft_R")? == (p.1, layer.input);
        Ok(p.0 == layer.out && p.1 <= p.0 && added)
    }

    fn build(&self, module: &Module, layer: &Layer, _: f64) -> Result<Boxed> {
        let (config, p) = (module.config(), values::table(module, "deft_P")?);
        let (left, seen) = match config.text("decomposition_method") {
            Some("relu") => (p.clone(), p.mapv(|x| x.max(0.0))),
            _ => {
                let q = orthonormal(&p);
                (q.clone(), q)
            }
        };
        let added = match config.flag("para") {
            true => Array2::zeros((left.ncols(), layer.input)),
            false => {
                let alpha = config.number("alpha").filter(|alpha| *alpha != 0.0);
                values::table(module, "deft_R")? * alpha.map_or(1.0, |alpha| alpha / left.ncols() as f64)
            }
        };
        let held = 8 * (2 * left.len() + added.len());
        Ok(forms::low_rank_of_weight(layer.shape(), held, move |weight| {
            let mut right = added.clone();
            weight.blocks(&mut |rows, block| {
                right -= &seen.slice(s![rows, ..]).t().dot(&block);
                Ok(())
            })?;
            Ok((left.clone(), right))
        }))
    }
}

/// Q of the QR decomposition of `a`, `[rows, columns]`, by Householder reflections.
fn orthonormal(a: &Array2<f64>) -> Array2<f64> {
    let (m, n) = a.dim();
    let (mut a, mut reflections) = (a.clone(), Vec::<Array1<f64>>::with_capacity(n));
    for k in 0..n {
        let mut v = a.slice(s![k.., k]).to_owned();
        let norm = v.dot(&v).sqrt();
        // A column that is nothing but its pivot is left alone.
        if v.iter().skip(1).all(|x| *x == 0.0) {
            v.fill(0.0);
        } else {
            v[0] += norm.copysign(v[0]);
            v /= v.dot(&v).sqrt();
        }
        reflect(&v, k, &mut a);
        reflections.push(v);
    }
    let mut q = Array2::eye(m).slice(s![.., ..n]).to_owned();
    for (k, v) in reflections.iter().enumerate().rev() {
        reflect(v, k, &mut q);
    }
    q
}

/// `(I - 2 v v^T) a`, v from row k on.
fn reflect(v: &Array1<f64>, k: usize, a: &mut Array2<f64>) {
    let mut rest = a.slice_mut(s![k.., ..]);
    for mut column in rest.columns_mut() {
        let along = v.dot(&column);
        column.scaled_add(-2.0 * along, v);
    }
}
