//! C3A (arXiv:2407.19342): blocks that are circulant, `dW[m b + u, n b + s] = kernel[m, n, (s - u) mod b] / in`.

use super::{About, AdapterType, Layer, values};
use crate::{
    adapter::Module,
    delta::forms::{self, Boxed},
    error::Result,
};

/// The type.
pub struct C3a;

impl AdapterType for C3a {
    fn about(&self) -> About {
        About { id: "C3A", name: "C3A", prefix: "c3a_", slots: &["c3a_kernel"] }
    }

    fn shape(&self, module: &Module) -> Result<Option<(usize, usize)>> {
        let [m, n, b] = *module.need("c3a_kernel")?.shape() else { return Ok(None) };
        Ok(Some((m * b, n * b)))
    }

    fn fits(&self, module: &Module, layer: &Layer) -> Result<bool> {
        let [m, n, b] = *module.need("c3a_kernel")?.shape() else { return Ok(false) };
        Ok(b > 0 && (m * b, n * b) == layer.shape())
    }

    fn build(&self, module: &Module, layer: &Layer, weight: f64) -> Result<Boxed> {
        let tensor = module.need("c3a_kernel")?;
        let [m, n, b] = *tensor.shape() else { return Err(module.damaged("its kernel has no three axes")) };
        let kernel = values::matrix::<f64>(&tensor, (m * n, b))?;
        let scaling = weight / layer.input as f64;
        Ok(forms::adding(layer.shape(), 8 * kernel.len(), move |rows, mut out| {
            for (mut out, row) in out.outer_iter_mut().zip(rows) {
                for (j, out) in out.iter_mut().enumerate() {
                    *out = scaling * kernel[[row / b * n + j / b, (j % b + b - row % b) % b]];
                }
            }
        }))
    }
}
