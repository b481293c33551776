//! What a training will need, before it starts: memory and arithmetic of every mode.

use super::{
    config::{Config, Mode},
    inputs::{architecture, preset},
};
use crate::{
    error::Result,
    model::{LlamaConfig, LoraSpec, memory},
    ops::{Cpu, Device},
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
    /// Gradients that have memory of their own: with one pass per update, those of most projections lie where activations were.
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
    /// Bytes of memory that this machine has to spare now (Linux).
    pub available: Option<u64>,
}

/// A sentence about memory, if the device does not have what the run will take.
pub(super) fn shortage<D: Device>(device: &D, config: &Config) -> Result<Option<String>> {
    let plan = plan(config, &[])?;
    let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
    Ok(plan.configured_peak.zip(device.free_memory()).filter(|(peak, available)| peak > available).map(
        |(peak, available)| {
            format!(
                "training will take about {:.1} GiB of memory, the device has {:.1} GiB to spare; see train --plan",
                gib(peak),
                gib(available)
            )
        },
    ))
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
    let passes = memory::Passes {
        batch: t.batch_size,
        len: config.data.max_length,
        accumulation: t.gradient_accumulation,
        activation_checkpointing: t.activation_checkpointing,
    };
    let needs = |name: &str, llama: &LlamaConfig, mode, dtype| {
        let lora = (mode != Mode::Full).then_some(&spec);
        let e = memory::elements(llama, lora, passes);
        let width: u64 = if dtype == "f32" { 4 } else { 2 };
        let (weights, gradients, optimiser) = (width * e.weights, width * e.gradients, 4 * e.moments);
        let activations = width * e.activations;
        Needs {
            model: name.to_owned(),
            mode,
            dtype,
            parameters: e.weights,
            trained: e.trained,
            weights,
            gradients,
            optimiser,
            activations,
            total: weights + gradients + optimiser + activations + PROCESS,
            flops_per_token: memory::flops_per_token(llama, lora, [passes.batch, passes.len]),
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
        available: Cpu.free_memory(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn config(preset: &str, batch_size: usize) -> Config {
        let text = format!(
            "[model]\npreset = \"{preset}\"\n[data]\ntrain = \"t\"\nmax_length = 512\n[train]\nmode = \"full\"\n\
             batch_size = {batch_size}\nnum_training_steps = 9\nlr = 1e-3\nscheduler = \"constant\"\n"
        );
        Config::parse(&text, Path::new("test.toml"), &[]).unwrap()
    }

    #[test]
    fn a_run_that_does_not_fit_is_announced() {
        // Terabytes of activations, whatever machine this is; and 0.3 GiB.
        let large = shortage(&Cpu, &config("llama_7b", 4096)).unwrap();
        if Cpu.free_memory().is_some() {
            assert!(large.is_some_and(|warning| warning.contains("GiB to spare")));
        }
        assert_eq!(shortage(&Cpu, &config("llama_9m", 1)).unwrap(), None);
    }
}
