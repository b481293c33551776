//! Checkpoints of the official ReLoRA code, which hold `lora_A`, `lora_B` and sometimes `scaling` beside the weights.

use crate::{
    adapter::{LoraModule, config},
    checkpoint::{Checkpoint, Tensor},
    error::{Error, Result},
};
use serde::Deserialize;

/// The configuration that the official code writes beside the model.
const CONFIG_NAME: &str = "relora_config.json";

/// The factors that a model file holds for its own weights.
#[derive(Default)]
pub(super) struct ReloraFactors<'a> {
    pub modules: Vec<LoraModule<'a>>,
    scalings: Vec<String>,
}

/// `relora_config.json`, what a merge needs of it.
#[derive(Deserialize)]
struct ReloraConfig {
    r: usize,
    lora_alpha: f64,
    #[serde(default)]
    trainable_scaling: bool,
}

impl ReloraFactors<'_> {
    /// Whether the tensor is part of a factorisation, and therefore no tensor of the merged model.
    pub(super) fn belongs(&self, name: &str) -> bool {
        !self.modules.is_empty()
            && (name.ends_with(".lora_A.weight")
                || name.ends_with(".lora_B.weight")
                || self.scalings.iter().any(|s| s == name))
    }
}

/// Finds them. The delta is `s * B @ A` with `s = lora_alpha / r`, or `tanh(scaling)` where the scaling was trained.
pub(super) fn find(base: &Checkpoint) -> Result<ReloraFactors<'_>> {
    let mut found = ReloraFactors::default();
    let factors: Vec<(&str, Tensor)> =
        base.tensors().filter_map(|a| Some((a.name().strip_suffix(".lora_A.weight")?, a))).collect();
    if factors.is_empty() {
        return Ok(found);
    }
    let config = read_config(base)?;
    for (name, a) in factors {
        let b = base.tensor(&format!("{name}.lora_B.weight"))?;
        let ((r, in_features), (out_features, r_b)) = (a.matrix_shape()?, b.matrix_shape()?);
        if r != r_b || r != config.r || r == 0 {
            return Err(Error::request(format!(
                "module '{name}' in '{}': A {:?} and B {:?} do not have the rank {} of {CONFIG_NAME}",
                base.path().display(),
                a.shape(),
                b.shape(),
                config.r
            ))
            .help("the checkpoint is damaged or incomplete"));
        }
        let scaling = format!("{name}.scaling");
        let scaling = match base.get(&scaling) {
            Some(tensor) if config.trainable_scaling => {
                let mut value = [0.0];
                let len = value.len().min(tensor.elements());
                tensor.read_f64(0, &mut value[..len])?;
                found.scalings.push(scaling);
                value[0].tanh()
            }
            _ => config::scaling(config.lora_alpha, config.r, false),
        };
        found.modules.push(LoraModule {
            name,
            embedding: false,
            a,
            b,
            magnitude: None,
            bias: None,
            diag: None,
            blocks: None,
            r,
            experts: 1,
            out_features,
            in_features,
            scaling,
        });
    }
    Ok(found)
}

fn read_config(base: &Checkpoint) -> Result<ReloraConfig> {
    let bad = |what: String| {
        Error::request(format!("'{}' holds low-rank factors, but {what}", base.path().display()))
            .help(format!("put the {CONFIG_NAME} of the training run beside the model: it says r and lora_alpha"))
    };
    let path = base.folder().ok_or_else(|| bad("is not a folder".into()))?.join(CONFIG_NAME);
    let bytes = crate::checkpoint::read_text(&path).map_err(|e| bad(format!("{CONFIG_NAME} cannot be read: {e}")))?;
    serde_json::from_slice(&bytes).map_err(|e| bad(format!("{CONFIG_NAME} is not valid: {e}")))
}

/// Factors without the weight they belong to.
pub(super) fn homeless(base: &Checkpoint, module: &LoraModule) -> Error {
    Error::request(format!(
        "'{}' holds '{}' but no '{}' that its delta belongs to",
        base.path().display(),
        module.a.name(),
        module.tensor_name()
    ))
    .help("checkpoints trained with lora_only hold no weights: merge them into the weights they started from")
}
