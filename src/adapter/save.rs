//! Writing an adapter that PEFT loads.

use super::{ADAPTER_NAME, AdapterConfig, config::CONFIG_NAME, names};
use crate::{
    checkpoint::{Dtype, TensorSpec, Writer},
    error::{Error, Result},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

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

/// A parameter trained in full, stored as PEFT stores the parameters of `modules_to_save`.
#[derive(Clone, Copy)]
pub struct FullTensor<'a> {
    /// Name inside the model: `model.norm.weight`.
    pub name: &'a str,
    /// Extents.
    pub shape: &'a [usize],
    /// Row-major.
    pub values: &'a [f32],
}

/// Writes `adapter_config.json` and `adapter_model.safetensors` (F32) into `folder`, which exists and is staged.
/// Refuses factors whose size or rank contradicts `config`.
pub fn save(folder: &Path, config: &AdapterConfig, modules: &[NewModule]) -> Result<()> {
    save_with(folder, config, modules, &[], &BTreeMap::new())
}

/// [`save`], with parameters trained in full, whose modules become the configuration's `modules_to_save` unless it names
/// some, and metadata of the tensor file.
pub fn save_with(
    folder: &Path,
    config: &AdapterConfig,
    modules: &[NewModule],
    full: &[FullTensor],
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let mut specs = Vec::with_capacity(2 * modules.len() + full.len());
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
    for t in full {
        let expected: usize = t.shape.iter().product();
        if t.values.len() != expected {
            return Err(Error::request(format!(
                "tensor '{}': expected {expected} values for shape {:?}, found {}",
                t.name,
                t.shape,
                t.values.len()
            )));
        }
        specs.push(TensorSpec { name: names::key_full(t.name), dtype: Dtype::F32, shape: t.shape.to_vec() });
    }
    let mut config = config.clone();
    if !full.is_empty() && config.modules_to_save.is_none() {
        let tied = config.other.get("ensure_weight_tying") == Some(&true.into());
        let mut modules = modules_of(full);
        // PEFT adds a tied head itself.
        modules.retain(|module| !tied || module != "lm_head");
        config.modules_to_save = Some(modules);
    }
    config.write(&folder.join(CONFIG_NAME))?;
    let mut metadata = metadata.clone();
    metadata.insert("format".to_owned(), "pt".to_owned());
    let writer = Writer::create_file(&folder.join(ADAPTER_NAME), &specs, &metadata)?;
    for m in modules {
        writer.write_f32(&names::key_a(m.name), Dtype::F32, m.a)?;
        writer.write_f32(&names::key_b(m.name), Dtype::F32, m.b)?;
    }
    for t in full {
        writer.write_f32(&names::key_full(t.name), Dtype::F32, t.values)?;
    }
    writer.finish()
}

/// The last components of the modules' names, which is what PEFT compares with: `model.norm.weight` -> `norm`.
fn modules_of(full: &[FullTensor]) -> Vec<String> {
    let module = |t: &FullTensor| {
        let module = t.name.rsplit_once('.').map_or(t.name, |(module, _)| module);
        module.rsplit('.').next().unwrap_or(module).to_owned()
    };
    full.iter().map(module).collect::<BTreeSet<_>>().into_iter().collect()
}
