//! SHiRA (arXiv:2406.13175): single elements change, `W[i, j] += weight` at the places `shira_indices`, `[2, n]`.

use super::{About, AdapterType, Layer, values};
use crate::{
    adapter::Module,
    delta::forms::{self, Boxed},
    error::Result,
};

/// The type.
pub struct Shira;

impl AdapterType for Shira {
    fn about(&self) -> About {
        About { id: "SHIRA", name: "SHiRA", prefix: "shira_", slots: &["shira_indices", "shira_weight"] }
    }

    fn fits(&self, module: &Module, layer: &Layer) -> Result<bool> {
        let (places, values) = (module.need("shira_indices")?, module.need("shira_weight")?);
        if *places.shape() != [2, values.elements()] {
            return Ok(false);
        }
        let places = values::indices(module, &places)?;
        let (rows, columns) = places.split_at(values.elements());
        Ok(rows.iter().all(|row| *row < layer.out) && columns.iter().all(|column| *column < layer.input))
    }

    fn build(&self, module: &Module, layer: &Layer, weight: f64) -> Result<Boxed> {
        let values = values::list(module, "shira_weight")?;
        let places = values::indices(module, &module.need("shira_indices")?)?;
        let (rows, columns) = places.split_at(values.len());
        let places = rows.iter().zip(columns).map(|(row, column)| (*row, *column));
        let sparse = values::Sparse::new(places.zip(values.iter().map(|v| weight * v)).collect());
        Ok(forms::adding(layer.shape(), sparse.bytes(), move |rows, mut out| {
            out.fill(0.0);
            sparse.add(rows, out);
        }))
    }
}
