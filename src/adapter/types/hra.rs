//! HRA (arXiv:2405.17484): `W' = W H_1 H_2 ...`, Householder reflections `H_i = I - 2 u_i u_i^T / ||u_i||^2`, or with `apply_GS` of the
//! vectors that Gram and Schmidt's method makes orthonormal.

use super::{About, AdapterType, Layer, values};
use crate::{
    adapter::Module,
    delta::forms::{self, Boxed},
    error::Result,
};

/// The type.
pub struct Hra;

impl AdapterType for Hra {
    fn about(&self) -> About {
        About { id: "HRA", name: "HRA", prefix: "hra_", slots: &["hra_u"] }
    }

    fn no_sum(&self, _: &Module) -> Option<&'static str> {
        Some("reflects it")
    }

    fn fits(&self, module: &Module, layer: &Layer) -> Result<bool> {
        Ok(values::extents(module, "hra_u")?.0 == layer.input)
    }

    fn build(&self, module: &Module, layer: &Layer, _: f64) -> Result<Boxed> {
        let stored = values::table(module, "hra_u")?;
        let orthogonal = module.config().flag("apply_GS");
        let mut vectors: Vec<ndarray::Array1<f64>> = Vec::with_capacity(stored.ncols());
        for u in stored.columns() {
            let mut u = u.to_owned();
            if orthogonal {
                for v in &vectors {
                    let along = v.dot(&u);
                    u.scaled_add(-along, v);
                }
            }
            let norm = u.dot(&u).sqrt();
            if norm == 0.0 {
                return Err(module.damaged("a reflection has no direction: its vector is zero"));
            }
            vectors.push(u / norm);
        }
        Ok(forms::rewriting(layer.shape(), 8 * stored.len(), move |_, weight, mut out| {
            out.assign(&weight);
            for mut row in out.outer_iter_mut() {
                for v in &vectors {
                    let along = v.dot(&row);
                    row.scaled_add(-2.0 * along, v);
                }
            }
        }))
    }
}
