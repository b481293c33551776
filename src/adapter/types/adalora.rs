//! AdaLoRA (arXiv:2303.10512): `dW = alpha / (init_r + 1e-5) * B @ (A * E)`, A `[r, in]`, E `[r, 1]`, B `[out, r]`.
//!
//! The divisor is the rank that training began with; rows that it dropped are not in the file.

use super::{About, AdapterType, Layer, values};
use crate::{
    adapter::Module,
    delta::forms::{self, Boxed},
    error::Result,
};
use ndarray::Axis;

/// The type.
pub struct AdaLora;

impl AdapterType for AdaLora {
    fn about(&self) -> About {
        About { id: "ADALORA", name: "AdaLoRA", prefix: "lora_", slots: &["lora_A", "lora_B", "lora_E", "ranknum"] }
    }

    fn shape(&self, module: &Module) -> Result<Option<(usize, usize)>> {
        Ok(Some((values::extents(module, "lora_B")?.0, values::extents(module, "lora_A")?.1)))
    }

    fn fits(&self, module: &Module, layer: &Layer) -> Result<bool> {
        let (a, b, e) =
            (values::extents(module, "lora_A")?, values::extents(module, "lora_B")?, module.need("lora_E")?);
        Ok(a.1 == layer.input && b.0 == layer.out && a.0 == b.1 && e.elements() == a.0)
    }

    fn rank(&self, module: &Module) -> usize {
        module.get("lora_A").map_or(0, |a| a.shape()[0])
    }

    fn build(&self, module: &Module, _: &Layer, weight: f64) -> Result<Boxed> {
        let config = module.config();
        let first = config.number("init_r").ok_or_else(|| module.damaged("adapter_config.json has no init_r"))?;
        let alpha = config.number("lora_alpha").filter(|alpha| *alpha > 0.0).unwrap_or(first);
        let (mut a, e) = (values::table(module, "lora_A")?, values::list(module, "lora_E")?);
        a.axis_iter_mut(Axis(0)).zip(e).for_each(|(mut row, e)| row *= e);
        Ok(forms::low_rank(values::table(module, "lora_B")?, a, weight * alpha / (first + 1e-5)))
    }
}
