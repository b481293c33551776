//! RoAd (arXiv:2409.00119): outputs are turned and scaled in pairs. In each group of g rows, row j and row j + g/2 become
//! `first * W[j] - second * W[j + g/2]` and `first * W[j + g/2] + second * W[j]`, `first = alpha cos(theta)`, `second = alpha sin(theta)`;
//! the bias with them.

use super::Site;
use super::{About, AdapterType, Layer, values};
use crate::{
    adapter::Module,
    delta::{
        Planned,
        forms::{self, Boxed},
    },
    error::Result,
};
use ndarray::{ArrayView2, ArrayViewMut2};

/// The type.
pub struct Road;

impl AdapterType for Road {
    fn about(&self) -> About {
        About { id: "ROAD", name: "RoAd", prefix: "road_", slots: &["road_theta", "road_alpha"] }
    }

    fn no_sum(&self, _: &Module) -> Option<&'static str> {
        Some("rotates it")
    }

    fn row_group(&self, module: &Module, _: &Layer) -> usize {
        group(module)
    }

    fn fits(&self, module: &Module, layer: &Layer) -> Result<bool> {
        Ok(layer.out.is_multiple_of(group(module)) && angles(module, layer.out)?.is_some())
    }

    fn build(&self, module: &Module, layer: &Layer, _: f64) -> Result<Boxed> {
        let (g, turn) = (group(module), turn(module, layer.out)?);
        Ok(forms::rewriting(layer.shape(), 16 * layer.out, move |rows, weight, out| {
            rotate(&turn, g, rows.start, weight, out);
        }))
    }

    fn plan_bias<'a>(&'static self, module: &Module<'a>, site: &Site) -> Result<Option<Planned<'a>>> {
        let (count, g) = (site.shape.iter().product::<usize>(), group(module));
        if count % g != 0 || angles(module, count)?.is_none() {
            return Err(site.refuse(module, &format!("shape {:?}, which its angles do not fit", site.shape)));
        }
        site.plan_bias(module, count, move |module| {
            let turn = turn(module, count)?;
            Ok(forms::rewriting((1, count), 16 * count, move |_, weight, out| {
                rotate(&turn, g, 0, weight.reversed_axes(), out.reversed_axes());
            }))
        })
    }
}

/// Rows of a group; an even number.
fn group(module: &Module) -> usize {
    module.config().integer("group_size").filter(|g| *g > 0 && g % 2 == 0).unwrap_or(64)
}

/// Per output: its angle's cosine and sine, each scaled.
type Turn = Vec<(f64, f64)>;

/// For each of `count` outputs, where the cosine's and the sine's parameters are; `None` if the tensors do not fit.
fn angles(module: &Module, count: usize) -> Result<Option<Vec<(usize, usize)>>> {
    let (stored, g) = (module.need("road_theta")?.elements(), group(module));
    if module.need("road_alpha")?.elements() != stored {
        return Ok(None);
    }
    let place: fn(usize, usize) -> (usize, usize) = match module.config().text("variant") {
        Some("road_1") if 2 * stored == count => |i, g| {
            let at = i / g * (g / 2) + i % (g / 2);
            (at, at)
        },
        Some("road_2") if stored == count => |i, _| (i, i),
        Some("road_4") if stored == 2 * count => |i, g| (i / g * 2 * g + i % g, i / g * 2 * g + g + i % g),
        _ => return Ok(None),
    };
    Ok(Some((0..count).map(|i| place(i, g)).collect()))
}

fn turn(module: &Module, count: usize) -> Result<Turn> {
    let (theta, alpha) = (values::list(module, "road_theta")?, values::list(module, "road_alpha")?);
    let places = angles(module, count)?.ok_or_else(|| module.damaged("its angles do not fit its layer"))?;
    Ok(places.iter().map(|&(cos, sin)| (alpha[cos] * theta[cos].cos(), alpha[sin] * theta[sin].sin())).collect())
}

/// `weight` and `out` hold whole groups of rows, the first of them `first`.
fn rotate(turn: &Turn, g: usize, first: usize, weight: ArrayView2<f64>, mut out: ArrayViewMut2<f64>) {
    for (i, mut out) in out.outer_iter_mut().enumerate() {
        let (upper, (cos, sin)) = (i % g < g / 2, turn[first + i]);
        let (partner, sin) = if upper { (i + g / 2, -sin) } else { (i - g / 2, sin) };
        let (own, partner) = (weight.row(i), weight.row(partner));
        out.iter_mut().zip(own.iter().zip(partner)).for_each(|(out, (own, partner))| *out = cos * own + sin * partner);
    }
}
