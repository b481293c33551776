//! Uni-LoRA (arXiv:2506.00799): `dW = B @ A`, whose elements are those of one vector that all modules share, at stored places and scaled.

use super::{About, AdapterType, Layer, values};
use crate::{
    adapter::{Adapter, Module},
    delta::forms::{self, Boxed},
    error::{Error, Result},
};
use ndarray::Array2;

/// The type.
pub struct UniLora;

impl AdapterType for UniLora {
    fn about(&self) -> About {
        About {
            id: "UNILORA",
            name: "Uni-LoRA",
            prefix: "unilora_",
            slots: &[
                "unilora_indices_A",
                "unilora_indices_B",
                "unilora_scales_A",
                "unilora_scales_B",
                "unilora_theta_d",
            ],
        }
    }

    fn check_mergeable(&self, adapter: &Adapter) -> Result<()> {
        let refuse = |what: &str, help: &str| {
            let path = adapter.path().display();
            Err(Error::request(format!("adapter '{path}' cannot be merged: {what}")).help(help))
        };
        if adapter.shared("unilora_theta_d").is_none() {
            return refuse("it has no unilora_theta_d", "save the adapter again");
        }
        match adapter.modules().next() {
            None => refuse(
                "it has no indices, which PEFT draws from NumPy's generator when it loads the adapter",
                "save it with save_indices=True",
            ),
            Some(_) => Ok(()),
        }
    }

    fn shape(&self, module: &Module) -> Result<Option<(usize, usize)>> {
        Ok(Some((values::extents(module, "unilora_indices_B")?.0, values::extents(module, "unilora_indices_A")?.1)))
    }

    fn fits(&self, module: &Module, layer: &Layer) -> Result<bool> {
        let [a, b, of_a, of_b] = ["indices_A", "indices_B", "scales_A", "scales_B"]
            .map(|slot| values::extents(module, &format!("unilora_{slot}")));
        let (a, b) = (a?, b?);
        Ok(a == of_a? && b == of_b? && a.0 == b.1 && (b.0, a.1) == layer.shape())
    }

    fn rank(&self, module: &Module) -> usize {
        module.config().r
    }

    fn build(&self, module: &Module, _: &Layer, weight: f64) -> Result<Boxed> {
        Ok(forms::low_rank(factor(module, "B")?, factor(module, "A")?, weight))
    }
}

fn factor(module: &Module, which: &str) -> Result<Array2<f64>> {
    let theta =
        module.adapter().shared("unilora_theta_d").ok_or_else(|| module.damaged("there is no unilora_theta_d"))?;
    let theta = values::vector::<f64>(&theta)?;
    let slot = format!("unilora_indices_{which}");
    let places = values::indices(module, &module.need(&slot)?)?;
    let mut factor = values::table(module, &format!("unilora_scales_{which}"))?;
    for (x, place) in factor.iter_mut().zip(places) {
        *x *= theta
            .get(place)
            .ok_or_else(|| module.damaged(&format!("'{slot}' names element {place} of {}", theta.len())))?;
    }
    Ok(factor)
}
