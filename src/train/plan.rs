//! What a training will need, before it starts: memory and arithmetic of every mode.

use super::{
    config::{Config, Mode},
    inputs::{architecture, preset},
};
use crate::{
    error::Result,
    model::{LlamaConfig, LoraSpec, memory},
};
use serde::Serialize;

/// Memory of the program itself: code, thread stacks, the buffers of the BLAS library, text being read. Measured.
const PROCESS: u64 = 20 << 20;

/// What one mode needs, in bytes.
#[derive(Clone, Debug, Serialize)]
pub struct Needs {
    /// The model.
    pub model: String,
    /// What is trained.
    pub mode: Mode,
    /// `f32`, as this program trains; `bf16`: weights, gradients and activations in bf16, moments in f32.
    pub dtype: &'static str,
    /// Parameters in all, LoRA factors included.
    pub parameters: u64,
    /// Parameters that train.
    pub trained: u64,
    /// Weights.
    pub weights: u64,
    /// Gradients.
    pub gradients: u64,
    /// The moments of AdamW.
    pub optimiser: u64,
    /// Kept from forward to backward, and scratch.
    pub activations: u64,
    /// Sum, and the program itself.
    pub total: u64,
    /// Floating-point operations per token of one forward and backward.
    pub flops_per_token: f64,
}

/// The needs of every model and mode.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    /// Windows per pass.
    pub batch_size: usize,
    /// Tokens per window.
    pub max_length: usize,
    /// Rank of the modes `lora` and `relora`.
    pub lora_r: usize,
    /// See `train.activation_checkpointing`.
    pub activation_checkpointing: bool,
    /// Per model: full, LoRA and ReLoRA, each in f32 and bf16.
    pub needs: Vec<Needs>,
    /// Bytes that the configured run will need at its peak: with a warm start, the larger of both parts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub configured_peak: Option<u64>,
}

/// Plans the configured model, or these presets (`all`: every one) with the batch and rank of `config`.
pub fn plan(config: &Config, presets: &[String]) -> Result<Plan> {
    let llama = &architecture(config)?;
    let t = &config.train;
    let (lora_r, spec) = match &config.relora {
        Some(r) => (
            r.lora_r,
            LoraSpec {
                dropout: r.lora_dropout,
                train_scaling: r.train_scaling,
                product: r.product,
                ..LoraSpec::new(r.lora_r, r.lora_alpha)
            },
        ),
        None => (128, LoraSpec::new(128, 32.0)),
    };
    let name = config.model.preset.clone().filter(|_| config.model.overrides.is_empty());
    let mut models = vec![(name.unwrap_or_else(|| "the configured model".into()), llama.clone())];
    if !presets.is_empty() {
        models.clear();
        let all: Vec<String> = LlamaConfig::preset_names().into_iter().map(str::to_owned).collect();
        for name in if presets == ["all"] { &all } else { presets } {
            models.push((name.clone(), preset(name)?));
        }
    }
    let shape = [t.batch_size, config.data.max_length];
    let needs = |name: &str, llama: &LlamaConfig, mode, dtype| {
        let lora = (mode != Mode::Full).then_some(&spec);
        let e = memory::elements(llama, lora, shape, t.activation_checkpointing);
        let width: u64 = if dtype == "f32" { 4 } else { 2 };
        let (weights, gradients, optimiser) = (width * e.weights, width * e.gradients, 4 * e.moments);
        let activations = width * e.activations;
        Needs {
            model: name.to_owned(),
            mode,
            dtype,
            parameters: e.weights,
            trained: e.gradients,
            weights,
            gradients,
            optimiser,
            activations,
            total: weights + gradients + optimiser + activations + PROCESS,
            flops_per_token: memory::flops_per_token(llama, lora, shape),
        }
    };
    let modes = [Mode::Full, Mode::Lora, Mode::Relora];
    let all = models.iter().flat_map(|(name, llama)| {
        modes.iter().flat_map(move |&mode| ["f32", "bf16"].map(|dtype| needs(name, llama, mode, dtype)))
    });
    let configured_peak = presets.is_empty().then(|| {
        let own = needs("", llama, t.mode, "f32").total;
        if config.warm_start.is_some() { own.max(needs("", llama, Mode::Full, "f32").total) } else { own }
    });
    Ok(Plan {
        batch_size: t.batch_size,
        max_length: config.data.max_length,
        lora_r,
        activation_checkpointing: t.activation_checkpointing,
        needs: all.collect(),
        configured_peak,
    })
}
