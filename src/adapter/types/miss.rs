//! MiSS (arXiv:2409.15371), until PEFT 0.18 called Bone: `dW[o, i] = block[i mod r, o]`; with `mini` the few columns of the block repeat
//! along the outputs. With `bat` the weight takes part: each r x r block of it becomes `W_IJ + W_IJ b_I + b_I`, I the block of outputs.

use super::{About, AdapterType, Layer, values};
use crate::{
    adapter::Module,
    delta::forms::{self, Boxed},
    error::Result,
};
use ndarray::s;

/// MiSS.
pub static MISS: Miss =
    Miss { about: About { id: "MISS", name: "MiSS", prefix: "miss_", slots: &["miss_block"] }, slot: "miss_block" };

/// The same under its older name.
pub static BONE: Miss =
    Miss { about: About { id: "BONE", name: "Bone", prefix: "bone_", slots: &["bone_block"] }, slot: "bone_block" };

/// The type.
pub struct Miss {
    about: About,
    slot: &'static str,
}

impl AdapterType for Miss {
    fn about(&self) -> About {
        self.about
    }

    fn fits(&self, module: &Module, layer: &Layer) -> Result<bool> {
        let kind = module.config().text("init_weights").unwrap_or("");
        Ok(match *module.need(self.slot)?.shape() {
            [blocks, r, square] if kind == "bat" => {
                r > 0 && r == square && blocks * r == layer.out && layer.input.is_multiple_of(r)
            }
            [r, columns] if kind == "mini" => r > 0 && columns > 0 && layer.out.is_multiple_of(columns),
            [r, columns] if kind != "bat" => r > 0 && columns == layer.out,
            _ => false,
        })
    }

    fn no_sum(&self, module: &Module) -> Option<&'static str> {
        (module.config().text("init_weights") == Some("bat")).then_some("changes it by products with itself (bat)")
    }

    fn build(&self, module: &Module, layer: &Layer, weight: f64) -> Result<Boxed> {
        let tensor = module.need(self.slot)?;
        let held = 8 * tensor.elements();
        if let [blocks, r, _] = *tensor.shape() {
            let block = values::matrix::<f64>(&tensor, (blocks * r, r))?;
            return Ok(forms::rewriting(layer.shape(), held, move |rows, weight, mut out| {
                for ((mut out, weight), row) in out.outer_iter_mut().zip(weight.outer_iter()).zip(rows) {
                    let own = block.slice(s![row / r * r..(row / r + 1) * r, ..]);
                    for first in (0..weight.len()).step_by(r) {
                        let part = weight.slice(s![first..first + r]);
                        let new = part.dot(&own) + part + own.row(row % r);
                        out.slice_mut(s![first..first + r]).assign(&new);
                    }
                }
            }));
        }
        let block = values::table(module, self.slot)?;
        Ok(forms::adding(layer.shape(), held, move |rows, mut out| {
            let (r, columns) = block.dim();
            for (mut out, row) in out.outer_iter_mut().zip(rows) {
                out.iter_mut().enumerate().for_each(|(i, out)| *out = weight * block[[i % r, row % columns]]);
            }
        }))
    }
}
