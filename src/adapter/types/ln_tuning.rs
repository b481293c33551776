//! LN tuning (arXiv:2312.11420): the weights and biases of norms, trained in full, take the place of the base's.
//! They are stored parameters, not updates: the matcher puts them in their places.

use super::{About, AdapterType, Layer};
use crate::{adapter::Module, delta::forms::Boxed, error::Result};

/// The type.
pub struct LnTuning;

impl AdapterType for LnTuning {
    fn about(&self) -> About {
        About { id: "LN_TUNING", name: "LN tuning", prefix: "ln_tuning_layers", slots: &[] }
    }

    fn replaces(&self) -> Option<&'static str> {
        Some(".ln_tuning_layers.")
    }

    fn fits(&self, _: &Module, _: &Layer) -> Result<bool> {
        Ok(false)
    }

    fn build(&self, module: &Module, _: &Layer, _: f64) -> Result<Boxed> {
        Err(module.damaged("it has no update"))
    }
}
