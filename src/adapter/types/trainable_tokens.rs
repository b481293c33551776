//! Trainable tokens: rows of an embedding take the place of the base's. `token_indices` names them, in the order of the rows.
//! They are stored parameters, not updates: the matcher puts them in their places.

use super::{About, AdapterType, Layer};
use crate::{adapter::Module, delta::forms::Boxed, error::Result};

/// The type.
pub struct TrainableTokens;

impl AdapterType for TrainableTokens {
    fn about(&self) -> About {
        About { id: "TRAINABLE_TOKENS", name: "trainable tokens", prefix: "trainable_tokens", slots: &[] }
    }

    fn fits(&self, _: &Module, _: &Layer) -> Result<bool> {
        Ok(false)
    }

    fn build(&self, module: &Module, _: &Layer, _: f64) -> Result<Boxed> {
        Err(module.damaged("it has no update"))
    }
}
