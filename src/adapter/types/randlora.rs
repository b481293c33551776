//! RandLoRA (arXiv:2502.00987): `dW = alpha / r * UB @ UA`, transposed where in > out, with `UA = lambda * A * gamma` flattened
//! `(rank, base)` and `UB = B` flattened `(base, rank)`: the two run in different orders, in PEFT's forward pass as well.

use super::{About, AdapterType, Layer, values};
use crate::{
    adapter::{Adapter, Module},
    checkpoint::Tensor,
    delta::forms::{self, Boxed},
    error::{Error, Result},
};
use ndarray::Array2;

/// The type.
pub struct RandLora;

impl AdapterType for RandLora {
    fn about(&self) -> About {
        About {
            id: "RANDLORA",
            name: "RandLoRA",
            prefix: "randlora_",
            slots: &["randlora_lambda", "randlora_gamma", "randlora_A", "randlora_B"],
        }
    }

    fn check_mergeable(&self, adapter: &Adapter) -> Result<()> {
        let stored =
            |module: &Module| projection(module, "randlora_A").is_ok() && projection(module, "randlora_B").is_ok();
        if adapter.modules().all(|module| stored(&module)) {
            return Ok(());
        }
        Err(Error::request(format!(
            "adapter '{}' cannot be merged: it has no randlora_A and randlora_B, which PEFT draws when it loads the adapter, in \
             a type that depends on the machine",
            adapter.path().display()
        ))
        .help("save it with save_projection=True"))
    }

    fn fits(&self, module: &Module, layer: &Layer) -> Result<bool> {
        let (lambda, gamma) = (values::extents(module, "randlora_lambda")?, values::extents(module, "randlora_gamma")?);
        let (low, high) = (layer.out.min(layer.input), layer.out.max(layer.input));
        let ([r_a, 1, columns], [rows, bases, r_b]) =
            (projection(module, "randlora_A")?.shape(), projection(module, "randlora_B")?.shape())
        else {
            return Ok(false);
        };
        let (r, used) = lambda;
        let factors = (*r_a, *r_b) == (r, r) && *columns >= low && *rows >= high && *bases >= used;
        Ok(factors && gamma == (used, low) && r == module.config().r)
    }

    fn build(&self, module: &Module, layer: &Layer, weight: f64) -> Result<Boxed> {
        let (lambda, gamma) = (values::table(module, "randlora_lambda")?, values::table(module, "randlora_gamma")?);
        let (low, high) = (layer.out.min(layer.input), layer.out.max(layer.input));
        let (a, b) = (projection(module, "randlora_A")?, projection(module, "randlora_B")?);
        let (r, used) = lambda.dim();
        let bases = b.shape()[1];
        let a = values::matrix::<f64>(&a, (r, a.shape()[2]))?;
        let b = values::matrix::<f64>(&b, (b.shape()[0], bases * r))?;
        let ua = Array2::from_shape_fn((r * used, low), |(i, column)| {
            let (rank, base) = (i / used, i % used);
            lambda[[rank, base]] * a[[rank, column]] * gamma[[base, column]]
        });
        let ub = b.slice(ndarray::s![..high, ..used * r]).to_owned();
        let alpha = module.config().number("randlora_alpha");
        let alpha = alpha.ok_or_else(|| module.damaged("adapter_config.json has no randlora_alpha"))?;
        let scaling = weight * alpha / r as f64;
        Ok(match low == layer.input {
            true => forms::low_rank(ub, ua, scaling),
            false => forms::low_rank(ua.reversed_axes(), ub.reversed_axes(), scaling),
        })
    }
}

/// A or B: shared by all modules, or stored with each.
fn projection<'a>(module: &Module<'a>, slot: &str) -> Result<Tensor<'a>> {
    module.adapter().shared(slot).map_or_else(|| module.need(slot), Ok)
}
