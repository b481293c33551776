//! PEANuT: a small network of the weight, `dW = scaling * B x^T`, `x = act(W^T A^T)` passed through `depth` encoders and as many decoders
//! with residuals. x is found in one pass over the weight.

use super::{About, AdapterType, Layer, values};
use crate::{
    adapter::Module,
    delta::forms::{self, Boxed},
    error::Result,
};
use ndarray::{Array2, s};

/// The type.
pub struct Peanut;

impl AdapterType for Peanut {
    fn about(&self) -> About {
        About {
            id: "PEANUT",
            name: "PEANuT",
            prefix: "peanut_",
            slots: &["peanut_A", "peanut_B", "peanut_encoders.#", "peanut_decoders.#"],
        }
    }

    fn no_sum(&self, _: &Module) -> Option<&'static str> {
        Some("is no linear function of it")
    }

    fn fits(&self, module: &Module, layer: &Layer) -> Result<bool> {
        let (a, b) = (values::extents(module, "peanut_A")?, values::extents(module, "peanut_B")?);
        let within = (0..depth(module)).flat_map(|i| [format!("peanut_encoders.{i}"), format!("peanut_decoders.{i}")]);
        let square = within.map(|slot| values::extents(module, &slot)).collect::<Result<Vec<_>>>()?;
        let chain = square.iter().all(|shape| *shape == (a.0, a.0));
        Ok(chain && activation(module).is_some() && a.1 == layer.out && b == (layer.out, a.0))
    }

    fn build(&self, module: &Module, layer: &Layer, _: f64) -> Result<Boxed> {
        let act = activation(module).ok_or_else(|| module.damaged("its act_fn is not known"))?;
        let a = values::table(module, "peanut_A")?;
        let read = |kind: &str| {
            (0..depth(module)).map(|i| values::table(module, &format!("peanut_{kind}.{i}"))).collect::<Result<Vec<_>>>()
        };
        let (encoders, decoders) = (read("encoders")?, read("decoders")?);
        let left = values::table(module, "peanut_B")? * module.config().number("scaling").unwrap_or(1.0);
        let held = 8 * (a.len() + left.len() + 2 * encoders.len() * a.nrows() * a.nrows());
        let input = layer.input;
        Ok(forms::low_rank_of_weight(layer.shape(), held, move |weight| {
            let mut x = Array2::zeros((input, a.nrows()));
            weight.blocks(&mut |rows, block| {
                x += &block.t().dot(&a.slice(s![.., rows]).t());
                Ok(())
            })?;
            x.mapv_inplace(act);
            let mut saved = Vec::with_capacity(encoders.len());
            for encoder in &encoders {
                saved.push(x.clone());
                x = x.dot(&encoder.t()).mapv(act);
            }
            for decoder in &decoders {
                x = x.dot(&decoder.t()).mapv(act);
                saved.pop().iter().for_each(|before| x += before);
            }
            Ok((left.clone(), x.reversed_axes()))
        }))
    }
}

fn depth(module: &Module) -> usize {
    module.config().integer("depth").unwrap_or(0)
}

fn activation(module: &Module) -> Option<fn(f64) -> f64> {
    match module.config().text("act_fn")? {
        "relu" => Some(|x| x.max(0.0)),
        "tanh" => Some(f64::tanh),
        "silu" => Some(|x| x / (1.0 + (-x).exp())),
        _ => None,
    }
}
