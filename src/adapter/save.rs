//! Writing an adapter that PEFT loads.

use super::{ADAPTER_NAME, AdapterConfig, config::CONFIG_NAME, names};
use crate::{
    checkpoint::{Dtype, TensorSpec, Writer},
    error::{Error, Result},
};
use std::{collections::BTreeMap, path::Path};

/// The factors of one module, row-major.
#[derive(Clone, Copy)]
pub struct NewModule<'a> {
    /// Name inside the model: `model.layers.0.self_attn.q_proj`.
    pub name: &'a str,
    /// Rank.
    pub r: usize,
    /// Rows of the weight.
    pub out_features: usize,
    /// Columns of the weight.
    pub in_features: usize,
    /// `[r, in_features]`.
    pub a: &'a [f32],
    /// `[out_features, r]`.
    pub b: &'a [f32],
}

/// Writes `adapter_config.json` and `adapter_model.safetensors` (F32) into `folder`, which exists and is staged.
/// Refuses factors whose size or rank contradicts `config`.
pub fn save(folder: &Path, config: &AdapterConfig, modules: &[NewModule]) -> Result<()> {
    let mut specs = Vec::with_capacity(2 * modules.len());
    for m in modules {
        let (configured, a_len, b_len) = (config.rank_of(m.name), m.r * m.in_features, m.out_features * m.r);
        if m.r == 0 || m.r != configured || m.a.len() != a_len || m.b.len() != b_len {
            return Err(Error::request(format!(
                "module '{}': expected rank {configured} with factors of {a_len} and {b_len} elements, found rank {} with {} and {}",
                m.name,
                m.r,
                m.a.len(),
                m.b.len()
            )));
        }
        let spec = |name, shape: [usize; 2]| TensorSpec { name, dtype: Dtype::F32, shape: shape.to_vec() };
        specs.push(spec(names::key_a(m.name), [m.r, m.in_features]));
        specs.push(spec(names::key_b(m.name), [m.out_features, m.r]));
    }
    config.write(&folder.join(CONFIG_NAME))?;
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    let writer = Writer::create_file(&folder.join(ADAPTER_NAME), &specs, &metadata)?;
    for m in modules {
        writer.write_f32(&names::key_a(m.name), Dtype::F32, m.a)?;
        writer.write_f32(&names::key_b(m.name), Dtype::F32, m.b)?;
    }
    writer.finish()
}
