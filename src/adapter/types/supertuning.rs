//! Super tuning: the largest elements of a weight change, `W.flat[indices] += values`, and the rest by LoRA, `alpha / r * B @ A`.

use super::values::Sparse;
use super::{About, AdapterType, Layer, values};
use crate::delta::LowRank;
use crate::{
    adapter::{Adapter, Module},
    delta::forms::{self, Boxed},
    error::{Error, Result},
};

/// The type.
pub struct SuperTuning;

impl AdapterType for SuperTuning {
    fn about(&self) -> About {
        About {
            id: "SUPERTUNING",
            name: "super tuning",
            prefix: "supertuning_",
            slots: &["supertuning_indices", "supertuning_values", "supertuning_lora_A", "supertuning_lora_B"],
        }
    }

    fn check_mergeable(&self, adapter: &Adapter) -> Result<()> {
        let Some(module) = adapter.modules().find(|module| module.get("supertuning_indices").is_none()) else {
            return Ok(());
        };
        Err(Error::request(format!(
            "adapter '{}' cannot be merged: '{}' has no supertuning_indices, which PEFT recomputes from the base's largest values",
            adapter.path().display(),
            module.name()
        ))
        .help("save it with save_precomputed_indices=True"))
    }

    fn fits(&self, module: &Module, layer: &Layer) -> Result<bool> {
        let (places, values) = (module.need("supertuning_indices")?, module.need("supertuning_values")?);
        let inside = values::indices(module, &places)?.iter().all(|place| *place < layer.out * layer.input);
        let low_rank = match module.config().r {
            0 => true,
            _ => {
                let a = values::extents(module, "supertuning_lora_A")?;
                let b = values::extents(module, "supertuning_lora_B")?;
                a.0 == b.1 && (b.0, a.1) == layer.shape()
            }
        };
        Ok(places.elements() == values.elements() && inside && low_rank)
    }

    fn build(&self, module: &Module, layer: &Layer, weight: f64) -> Result<Boxed> {
        let places = values::indices(module, &module.need("supertuning_indices")?)?;
        let values = values::list(module, "supertuning_values")?;
        let at = places.iter().map(|place| (place / layer.input, place % layer.input));
        let sparse = Sparse::new(at.zip(values.iter().map(|v| weight * v)).collect());
        let (config, mut held) = (module.config(), sparse.bytes());
        let product = match config.r {
            0 => None,
            r => {
                let right = values::table(module, "supertuning_lora_A")?;
                let left = values::table(module, "supertuning_lora_B")?;
                held += 8 * (left.len() + right.len());
                Some(LowRank { left, right, scaling: weight * config.lora_alpha / r as f64 })
            }
        };
        Ok(forms::adding(layer.shape(), held, move |rows, mut out| {
            match &product {
                Some(product) => product.rows(rows.clone(), out.view_mut()),
                None => out.fill(0.0),
            }
            sparse.add(rows, out);
        }))
    }
}
