//! (IA)3 (arXiv:2205.05638): a trained vector scales the outputs of a layer, `W' = l[:, None] * W` and its bias with them, or the
//! inputs of a feed-forward layer, `W' = W * l[None, :]`.

use super::Site;
use super::{About, AdapterType, Layer, values};
use crate::{
    adapter::Module,
    delta::{
        Planned,
        forms::{self, Boxed},
    },
    error::{Error, Result},
};
use regex::Regex;
use serde_json::Value;

/// The type.
pub struct Ia3;

impl AdapterType for Ia3 {
    fn about(&self) -> About {
        About { id: "IA3", name: "(IA)3", prefix: "ia3_", slots: &["ia3_l"] }
    }

    fn no_sum(&self, _: &Module) -> Option<&'static str> {
        Some("scales it")
    }

    fn fits(&self, module: &Module, layer: &Layer) -> Result<bool> {
        let (l, inputs) = (module.need("ia3_l")?, scales_inputs(module)?);
        let shape = match l.shape() {
            [m, n] => [*m, *n],
            [1, n, rest @ ..] if rest.iter().all(|n| *n == 1) && inputs => [1, *n],
            [1, n, rest @ ..] if rest.iter().all(|n| *n == 1) => [*n, 1],
            _ => return Ok(false),
        };
        Ok(shape == if inputs { [1, layer.channels()] } else { [layer.out, 1] })
    }

    fn build(&self, module: &Module, layer: &Layer, _: f64) -> Result<Boxed> {
        let (l, inputs) = (values::list(module, "ia3_l")?, scales_inputs(module)?);
        let (kernel, held) = (layer.input / layer.channels().max(1), 8 * l.len());
        Ok(forms::rewriting(layer.shape(), held, move |rows, weight, mut out| {
            for ((mut out, weight), row) in out.outer_iter_mut().zip(weight.outer_iter()).zip(rows) {
                for (j, (out, w)) in out.iter_mut().zip(weight).enumerate() {
                    *out = w * l[if inputs { j / kernel } else { row }];
                }
            }
        }))
    }

    fn plan_bias<'a>(&'static self, module: &Module<'a>, site: &Site) -> Result<Option<Planned<'a>>> {
        if scales_inputs(module)? {
            return Ok(None);
        }
        let count = module.need("ia3_l")?.elements();
        site.plan_bias(module, count, move |module| {
            let l = values::list(module, "ia3_l")?;
            Ok(forms::rewriting((1, count), 8 * count, move |_, weight, mut out| {
                out.iter_mut().zip(weight).zip(&l).for_each(|((out, w), l)| *out = w * l);
            }))
        })
    }
}

/// Whether the module is one of `feedforward_modules`: a regular expression for its whole name, or a list of names and ends of names.
fn scales_inputs(module: &Module) -> Result<bool> {
    let name = module.name();
    match module.config().raw.get("feedforward_modules") {
        Some(Value::String(pattern)) => {
            let regex = Regex::new(&format!("^(?:{pattern})$")).map_err(|e| {
                Error::request(format!(
                    "feedforward_modules '{pattern}' is no regular expression that is supported: {e}"
                ))
            })?;
            Ok(regex.is_match(name))
        }
        Some(Value::Array(names)) => {
            Ok(names.iter().filter_map(Value::as_str).any(|end| name == end || name.ends_with(&format!(".{end}"))))
        }
        _ => Ok(false),
    }
}
