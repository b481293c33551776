//! BEFT: a trained vector is added to a bias, `b' = b + beft_bias`.

use super::{About, AdapterType, Layer, values};
use super::{Parameter, Site};
use crate::{
    adapter::Module,
    checkpoint::Tensor,
    delta::{
        Planned,
        forms::{self, Boxed},
    },
    error::Result,
};

/// The type.
pub struct Beft;

impl AdapterType for Beft {
    fn about(&self) -> About {
        About { id: "BEFT", name: "BEFT", prefix: "beft_", slots: &["beft_bias"] }
    }

    fn changes_bias<'a>(&self, module: &Module<'a>) -> Option<Tensor<'a>> {
        module.get("beft_bias")
    }

    fn fits(&self, _: &Module, _: &Layer) -> Result<bool> {
        Ok(false)
    }

    fn build(&self, module: &Module, _: &Layer, _: f64) -> Result<Boxed> {
        Err(module.damaged("it changes a bias, not a weight"))
    }

    fn plan<'a>(&'static self, module: &Module<'a>, site: &Site) -> Result<Option<Planned<'a>>> {
        if site.parameter == Parameter::Weight {
            return Ok(None);
        }
        let (count, weight) = (module.need("beft_bias")?.elements(), site.weight);
        site.plan_bias(module, count, move |module| {
            let vector = values::list(module, "beft_bias")?;
            Ok(forms::adding((1, count), 8 * count, move |_, mut out| {
                out.iter_mut().zip(&vector).for_each(|(out, v)| *out = weight * v);
            }))
        })
    }
}
