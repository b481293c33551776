//! DeLoRA (arXiv:2503.18225): `dW = B diag(lambda / r / (||A_i|| ||B_i||)) A * w_norm[None, :]`, w_norm the norms of the base's columns when
//! the adapter was made. Norms count as at least 1e-4.

use super::{About, AdapterType, Layer, values};
use crate::{
    adapter::Module,
    delta::forms::{self, Boxed},
    error::Result,
};
use ndarray::{ArrayView1, Axis};

/// The type.
pub struct DeLora;

impl AdapterType for DeLora {
    fn about(&self) -> About {
        About {
            id: "DELORA",
            name: "DeLoRA",
            prefix: "delora_",
            slots: &["delora_A", "delora_B", "delora_lambda", "delora_w_norm"],
        }
    }

    fn shape(&self, module: &Module) -> Result<Option<(usize, usize)>> {
        Ok(Some((values::extents(module, "delora_B")?.0, values::extents(module, "delora_A")?.1)))
    }

    fn fits(&self, module: &Module, layer: &Layer) -> Result<bool> {
        let (a, b) = (values::extents(module, "delora_A")?, values::extents(module, "delora_B")?);
        let rank = a.0 == b.1 && a.0 == module.config().rank_of(module.name());
        let vectors =
            module.need("delora_lambda")?.elements() == 1 && module.need("delora_w_norm")?.elements() == layer.input;
        Ok(rank && vectors && (b.0, a.1) == layer.shape())
    }

    fn rank(&self, module: &Module) -> usize {
        module.config().rank_of(module.name())
    }

    fn build(&self, module: &Module, _: &Layer, weight: f64) -> Result<Boxed> {
        const SMALLEST: f64 = 1e-4;
        let (mut a, mut b) = (values::table(module, "delora_A")?, values::table(module, "delora_B")?);
        let lambda = values::list(module, "delora_lambda")?[0] / self.rank(module) as f64;
        let norm = |v: ArrayView1<f64>| v.dot(&v).sqrt().max(SMALLEST);
        for (a, mut b) in a.axis_iter(Axis(0)).zip(b.axis_iter_mut(Axis(1))) {
            let scale = lambda / (norm(a) * norm(b.view()));
            b *= scale;
        }
        let norms = values::list(module, "delora_w_norm")?;
        a.axis_iter_mut(Axis(1)).zip(norms).for_each(|(mut column, norm)| column *= norm);
        Ok(forms::low_rank(b, a, weight))
    }
}
