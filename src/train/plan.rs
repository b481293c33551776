//! What a training will need, before it starts: memory and arithmetic of every mode.

use super::{
    config::{Config, MixedPrecision, Mode, OptimizerChoice},
    inputs::{architecture, preset},
    micro_batches::MicroBatches,
};
use crate::{
    error::Result,
    model::{LlamaConfig, LoraSpec, StorageFormat, memory},
    ops::{AttentionShape, Cpu, Device, Element, Quantisation},
};
use serde::Serialize;

/// What one mode needs, in bytes.
#[derive(Clone, Debug, Serialize)]
pub struct Needs {
    /// The model.
    pub model: String,
    /// What is trained.
    pub mode: Mode,
    /// `f32`; `bf16` for `train.mixed_precision = "bf16"` on a GPU; `4bit` for `relora.quantize = "4bit"` besides.
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

/// Lets the device get the memory of the run ready, of this one of `world_size` processes. Warnings, if it has not what the run asks for.
pub(super) fn reserve<D: Device>(device: &D, config: &Config, world_size: usize) -> Result<Vec<String>> {
    let mut warnings = Vec::new();
    let bf16 = config.train.mixed_precision == MixedPrecision::Bf16;
    if bf16 && device.width(Element::Bf16) == device.width(Element::F32) {
        warnings.push("the device has no bf16: frozen weights are rounded to it, everything is computed in f32".into());
    }
    // It decides about workspaces.
    device.allow_tf32(config.train.tf32);
    let peak = peak(device, config, world_size)?;
    if let (false, Some(available)) = (device.reserve(peak), device.free_memory()) {
        let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
        warnings.push(format!(
            "training will take about {:.1} GiB of memory, the device has {:.1} GiB to spare; see train --plan",
            gib(peak),
            gib(available)
        ));
    }
    Ok(warnings)
}

/// Bytes that the configured run takes on this device at its peak: with a warm start, the larger of both parts.
fn peak<D: Device>(device: &D, config: &Config, world_size: usize) -> Result<u64> {
    let llama = architecture(config)?;
    let bf16 = config.train.mixed_precision == MixedPrecision::Bf16;
    let mixed_precision = bf16 && device.width(Element::Bf16) < device.width(Element::F32);
    let passes = memory::Passes {
        mixed_precision,
        frozen: config.frozen_store(),
        ..passes(config, &MicroBatches::new(config, 0, world_size)?)
    };
    let holders = if config.train.optimizer == OptimizerChoice::AdamZero { world_size as u64 } else { 1 };
    let part = |lora: Option<&LoraSpec>| {
        let memory::Bytes { weights, gradients, optimiser, activations } =
            memory::elements(&llama, lora, passes).bytes(mixed_precision);
        // Those of the largest tensor stay together.
        let largest = 8 * (llama.vocab_size * llama.hidden_size) as u64;
        weights + gradients + optimiser.min(optimiser / holders + largest) + activations
    };
    let spec = config.relora.as_ref().map(LoraSpec::from);
    let own = part(spec.as_ref());
    let all = if config.warm_start.is_some() { own.max(part(None)) } else { own };
    let shape = AttentionShape {
        batch: passes.batch,
        len: passes.len,
        heads: llama.num_attention_heads,
        kv_heads: llama.num_key_value_heads,
        head_dim: llama.head_dim,
    };
    let element = if mixed_precision { Element::Bf16 } else { Element::F32 };
    // A merge that rounds has the weight three times more for a while: before, after, and the difference.
    let widest = (llama.num_attention_heads * llama.head_dim).max(llama.intermediate_size) * llama.hidden_size;
    let merge = if spec.is_some() && config.rounds_merges() { 12 * widest as u64 } else { 0 };
    Ok(all + merge + device.overhead(&shape, element))
}

fn passes(config: &Config, micro_batches: &MicroBatches) -> memory::Passes {
    memory::Passes {
        batch: micro_batches.batch,
        len: config.data.max_length,
        accumulation: micro_batches.passes,
        activation_checkpointing: config.train.activation_checkpointing,
        mixed_precision: false,
        frozen: StorageFormat::F32,
    }
}

/// Plans the configured model, or these presets (`all`: every one) with the batch and rank of `config`.
pub fn plan(config: &Config, presets: &[String]) -> Result<Plan> {
    let llama = &architecture(config)?;
    let t = &config.train;
    let (lora_r, spec) = match &config.relora {
        Some(r) => (r.lora_r, LoraSpec::from(r)),
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
    let passes = passes(config, &MicroBatches::new(config, 0, 1)?);
    let process = Cpu.overhead(&AttentionShape { batch: 0, len: 0, heads: 0, kv_heads: 1, head_dim: 0 }, Element::F32);
    let needs = |name: &str, llama: &LlamaConfig, mode, dtype| {
        let lora = (mode != Mode::Full).then_some(&spec);
        let (mixed_precision, frozen) = match dtype {
            "f32" => (false, StorageFormat::F32),
            "bf16" => (true, StorageFormat::Bf16),
            _ => (true, StorageFormat::Quantised(Quantisation::Nf4 { double: true })),
        };
        let passes = memory::Passes { mixed_precision, frozen, ..passes };
        let e = memory::elements(llama, lora, passes);
        let memory::Bytes { weights, gradients, optimiser, activations } = e.bytes(passes.mixed_precision);
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
            total: weights + gradients + optimiser + activations + process,
            flops_per_token: memory::flops_per_token(llama, lora, passes),
        }
    };
    let modes = [Mode::Full, Mode::Lora, Mode::Relora];
    let all = models.iter().flat_map(|(name, llama)| {
        modes.iter().flat_map(move |&mode| {
            let dtypes: &[&str] = if mode == Mode::Full { &["f32", "bf16"] } else { &["f32", "bf16", "4bit"] };
            dtypes.iter().map(move |dtype| needs(name, llama, mode, dtype))
        })
    });
    let configured_peak = if presets.is_empty() { Some(peak(&Cpu, config, 1)?) } else { None };
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
        let large = reserve(&Cpu, &config("llama_7b", 4096), 1).unwrap();
        if Cpu.free_memory().is_some() {
            assert!(large.len() == 1 && large[0].contains("GiB to spare"), "{large:?}");
        }
        assert!(reserve(&Cpu, &config("llama_9m", 1), 1).unwrap().is_empty());
    }
}
