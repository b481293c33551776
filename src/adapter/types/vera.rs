//! VeRA (arXiv:2310.11454) and its probabilistic form PVeRA: `dW = (b * B) @ (d * A)` with trained vectors b `[out]` and d `[r]`,
//! and random A `[r, in]` and B `[out, r]` that all layers share, each taking the first rows and columns it needs.
//!
//! A file may leave A and B out: they come from PyTorch's generator, seeded by `projection_prng_key`. PVeRA's d and A hold means
//! and variances one after the other; merged are the means.

use super::torch_random::Mt19937;
use super::{About, AdapterType, Layer, values};
use crate::{
    adapter::{Adapter, Module},
    delta::forms::{self, Boxed},
    error::{Error, Result},
};
use ndarray::{Array2, Axis, s};

/// VeRA.
pub static VERA: Vera = Vera {
    about: About {
        id: "VERA",
        name: "VeRA",
        prefix: "vera_",
        slots: &["vera_lambda_b", "vera_lambda_d", "vera_A", "vera_B"],
    },
    slots: ["vera_lambda_b", "vera_lambda_d", "vera_A", "vera_B"],
};

/// PVeRA.
pub static PVERA: Vera = Vera {
    about: About {
        id: "PVERA",
        name: "PVeRA",
        prefix: "pvera_",
        slots: &["pvera_lambda_b", "pvera_lambda_d", "pvera_A", "pvera_B"],
    },
    slots: ["pvera_lambda_b", "pvera_lambda_d", "pvera_A", "pvera_B"],
};

/// The type.
pub struct Vera {
    about: About,
    /// b, d, A, B.
    slots: [&'static str; 4],
}

impl AdapterType for Vera {
    fn about(&self) -> About {
        self.about
    }

    fn check_mergeable(&self, adapter: &Adapter) -> Result<()> {
        let [_, _, a, b] = self.slots;
        let stored = adapter.shared(a).is_some() && adapter.shared(b).is_some();
        if stored || self.about.id == "VERA" && adapter.config().integer("projection_prng_key").is_some() {
            return Ok(());
        }
        Err(Error::request(format!(
            "adapter '{}' cannot be merged: it has no '{a}' and '{b}'",
            adapter.path().display()
        ))
        .help("save it with save_projection=True"))
    }

    fn fits(&self, module: &Module, layer: &Layer) -> Result<bool> {
        let (r, [b, d, shared_a, shared_b]) = (module.config().r, self.slots);
        let means = if self.about.id == "VERA" { r } else { 2 * r };
        let fits = |slot, rows: usize, columns: usize| {
            let shape = module.adapter().shared(slot).map(|t| t.shape());
            shape.is_none_or(|shape| matches!(shape, [m, n] if *m >= rows && *n >= columns))
        };
        let own = module.need(b)?.elements() == layer.out && module.need(d)?.elements() == means;
        Ok(own && r > 0 && fits(shared_a, r, layer.input) && fits(shared_b, layer.out, r))
    }

    fn rank(&self, module: &Module) -> usize {
        module.config().r
    }

    fn build(&self, module: &Module, layer: &Layer, weight: f64) -> Result<Boxed> {
        let (r, [b, d, shared_a, shared_b]) = (module.config().r, self.slots);
        let read = |slot| {
            let shared = module.adapter().shared(slot).map(|t| (t, t.shape()[0], t.shape()[1]));
            shared.map(|(tensor, m, n)| values::matrix::<f64>(&tensor, (m, n))).transpose()
        };
        let (a, b_factor) = match (read(shared_a)?, read(shared_b)?) {
            (Some(a), Some(b)) => (a, b),
            _ => draw(module, layer)?,
        };
        let (mut right, mut left) =
            (a.slice(s![..r, ..layer.input]).to_owned(), b_factor.slice(s![..layer.out, ..r]).to_owned());
        right.axis_iter_mut(Axis(0)).zip(values::list(module, d)?).for_each(|(mut row, d)| row *= d);
        left.axis_iter_mut(Axis(0)).zip(values::list(module, b)?).for_each(|(mut row, b)| row *= b);
        Ok(forms::low_rank(left, right, weight))
    }
}

/// A, then B, as PEFT draws them: Kaiming-uniform, as large as the largest layer needs.
fn draw(module: &Module, layer: &Layer) -> Result<(Array2<f64>, Array2<f64>)> {
    let config = module.config();
    let seed = config.integer("projection_prng_key").unwrap_or(0);
    let (out, input) = layer.all.iter().fold((0, 0), |(out, input), of| (out.max(of.0), input.max(of.1)));
    let mut generator = Mt19937::new(seed as u32);
    let mut draw = |rows: usize, columns: usize| {
        let bound = 3f64.sqrt() * (2f64.sqrt() / (columns as f64).sqrt());
        Array2::from_shape_simple_fn((rows, columns), || f64::from(generator.uniform(-bound, bound)))
    };
    let a = draw(config.r, input);
    Ok((a, draw(out, config.r)))
}
