//! OSF: the largest singular parts of the weight stay, the others are replaced: `W' = U_k S_k V_k + U_low diag(S_low) V_low`.
//! k is `effective_rank`. The decomposition is LAPACK's, in f64.

use super::{About, AdapterType, Layer, values};
use crate::{
    adapter::Module,
    delta::forms::{self, Boxed},
    error::Result,
};
use ndarray::Axis;

/// The type.
pub struct Osf;

impl AdapterType for Osf {
    fn about(&self) -> About {
        About {
            id: "OSF",
            name: "OSF",
            prefix: "osf_",
            slots: &["osf_svd_params.U_low", "osf_svd_params.S_low", "osf_svd_params.V_low"],
        }
    }

    fn no_sum(&self, _: &Module) -> Option<&'static str> {
        Some("replaces some of its singular parts")
    }

    fn fits(&self, module: &Module, layer: &Layer) -> Result<bool> {
        let [u, v] = ["U_low", "V_low"].map(|part| values::extents(module, &format!("osf_svd_params.{part}")));
        let ((rows, r), (r_v, columns), kept) = (u?, v?, kept(module)?);
        let count = module.need("osf_svd_params.S_low")?.elements();
        Ok(r == r_v && r == count && (rows, columns) == layer.shape() && kept + r == layer.out.min(layer.input))
    }

    fn build(&self, module: &Module, layer: &Layer, _: f64) -> Result<Boxed> {
        let (mut u, v) =
            (values::table(module, "osf_svd_params.U_low")?, values::table(module, "osf_svd_params.V_low")?);
        let k = kept(module)?;
        let s = values::list(module, "osf_svd_params.S_low")?;
        u.axis_iter_mut(Axis(1)).zip(s).for_each(|(mut column, s)| column *= s);
        Ok(forms::whole(layer.shape(), 8 * (u.len() + v.len()), move |weight| {
            Ok(values::largest_parts(weight, k)? + u.dot(&v))
        }))
    }
}

/// How many of the largest singular parts stay.
fn kept(module: &Module) -> Result<usize> {
    let config = module.config();
    let pattern = config.rank_pattern.get(module.name()).map(|k| k as usize);
    pattern
        .or_else(|| config.integer("effective_rank"))
        .ok_or_else(|| module.damaged("adapter_config.json has no effective_rank"))
}
