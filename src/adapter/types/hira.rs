//! HiRA (ICLR 2025): `W' = W + W * (B @ A)`, elementwise.

use super::{About, AdapterType, Layer, values};
use crate::delta::LowRank;
use crate::{
    adapter::Module,
    delta::forms::{self, Boxed},
    error::Result,
};

/// The type.
pub struct Hira;

impl AdapterType for Hira {
    fn about(&self) -> About {
        About { id: "HIRA", name: "HiRA", prefix: "hira_", slots: &["hira_A", "hira_B"] }
    }

    fn no_sum(&self, _: &Module) -> Option<&'static str> {
        Some("scales its elements")
    }

    fn fits(&self, module: &Module, layer: &Layer) -> Result<bool> {
        let (a, b) = (values::extents(module, "hira_A")?, values::extents(module, "hira_B")?);
        Ok(a.0 == b.1 && (b.0, a.1) == layer.shape())
    }

    fn build(&self, module: &Module, layer: &Layer, _: f64) -> Result<Boxed> {
        let (right, left) = (values::table(module, "hira_A")?, values::table(module, "hira_B")?);
        let (held, product) = (8 * (left.len() + right.len()), LowRank { left, right, scaling: 1.0 });
        Ok(forms::rewriting(layer.shape(), held, move |rows, weight, mut out| {
            product.rows(rows, out.view_mut());
            out.zip_mut_with(&weight, |out, w| *out = w + w * *out);
        }))
    }
}
