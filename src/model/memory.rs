//! How much memory and arithmetic a model takes, from its configuration alone: the same buffers that [`super::Model`] makes.

use super::{
    config::LlamaConfig,
    linear::extents,
    llama::logits_chunk,
    lora::LoraSpec,
    params::{ParamKind, TARGETS, table},
    product::Product,
};
use serde::Serialize;

/// Elements of the buffers of one training, by what they are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Elements {
    /// All parameters, LoRA factors included.
    pub weights: u64,
    /// Gradients of what trains.
    pub gradients: u64,
    /// Both moments of what trains.
    pub moments: u64,
    /// What forward keeps for backward, and scratch.
    pub activations: u64,
}

/// Elements of a training with windows of `len` tokens, `batch` at a time. With `lora`, the projections are frozen.
pub fn elements(
    config: &LlamaConfig,
    lora: Option<&LoraSpec>,
    [batch, len]: [usize; 2],
    activation_checkpointing: bool,
) -> Elements {
    let sizes = table(config).into_iter().map(|(_, kind, shape)| (kind, shape.iter().product::<usize>()));
    let (mut weights, mut trained) = (0, 0);
    for (kind, size) in sizes {
        weights += size;
        if lora.is_none() || kind != ParamKind::Linear {
            trained += size;
        }
    }
    if let Some(spec) = lora {
        let thin: usize = linears(config).iter().map(|(out, inner)| spec.r * (out + inner)).sum();
        let factors = config.num_hidden_layers * (thin + if spec.train_scaling { TARGETS.len() } else { 0 });
        weights += factors;
        trained += factors;
    }
    let activations = activations(config, lora, [batch, len], activation_checkpointing);
    let [weights, trained, activations] = [weights, trained, activations].map(|n| n as u64);
    Elements { weights, gradients: trained, moments: 2 * trained, activations }
}

/// Floating-point operations of one forward and backward, per token: products only, attention counted causally.
pub fn flops_per_token(config: &LlamaConfig, lora: Option<&LoraSpec>, [batch, len]: [usize; 2]) -> f64 {
    let rows = batch * len;
    let block: u64 = linears(config)
        .into_iter()
        .map(|dims| match lora {
            None => 3 * 2 * (rows * dims.0 * dims.1) as u64,
            Some(spec) => product(dims, rows, spec).flops(extents(dims, rows, spec.r)),
        })
        .sum();
    let width = config.num_attention_heads * config.head_dim;
    // q kᵀ and p v forward; both gradients of both, and the scores again, backward; half of the keys on average.
    let attention = 7.0 * 2.0 * (width * len) as f64 / 2.0;
    let head = 3.0 * 2.0 * (config.hidden_size * config.vocab_size) as f64;
    config.num_hidden_layers as f64 * (block as f64 / rows as f64 + attention) + head
}

/// `(out, in)` of the projections of a block, in the order of [`TARGETS`].
fn linears(config: &LlamaConfig) -> [(usize, usize); TARGETS.len()] {
    let (c, f) = (config.hidden_size, config.intermediate_size);
    let (q, kv) = (config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim);
    [(q, c), (kv, c), (kv, c), (c, q), (f, c), (f, c), (c, f)]
}

fn product(dims: (usize, usize), rows: usize, spec: &LoraSpec) -> Product {
    Product::choose(spec.product, extents(dims, rows, spec.r), spec.dropout > 0.0, spec.train_scaling)
}

/// The buffers of the workspace; `llama.rs`, `block.rs` and `linear.rs` make them.
fn activations(config: &LlamaConfig, lora: Option<&LoraSpec>, [batch, len]: [usize; 2], checkpointing: bool) -> usize {
    let (c, f, n) = (config.hidden_size, config.intermediate_size, batch * len);
    let (q, kv) = (config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim);
    let layers = config.num_hidden_layers;
    let residual = (layers + 1) * n * c;
    let mut kept = n * (2 + 2 * q + 2 * kv + config.num_attention_heads + c + 2 * f);
    let mut scratch = n * (3 * c + 2 * f + 2 * q + 2 * kv);
    if let Some(spec) = lora {
        let dims = linears(config);
        let ways = dims.map(|d| (d.0 * d.1, product(d, n, spec)));
        let distinct = |needed: &dyn Fn(Product) -> bool| {
            let mut lengths: Vec<usize> = ways.iter().filter(|w| needed(w.1)).map(|w| w.0).collect();
            lengths.sort_unstable();
            lengths.dedup();
            lengths.iter().sum::<usize>()
        };
        kept += n * spec.r * ways.iter().filter(|w| w.1 == Product::Factored).count();
        scratch += distinct(&|p| p != Product::Factored) + distinct(&|p| p == Product::WholeGradient);
        if ways.iter().any(|w| w.1 != Product::WholeGradient) {
            scratch += 2 * n * spec.r;
        }
        if spec.dropout > 0.0 {
            scratch += n * dims.iter().map(|d| d.1).max().unwrap_or(0);
        }
    }
    let head = n + n + logits_chunk(config.vocab_size, n) * config.vocab_size;
    let rope = 2 * len * (config.head_dim / 2);
    residual + kept * if checkpointing { layers.min(1) } else { layers } + scratch + head + rope
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        model::{Model, ProductChoice},
        ops::{Cpu, Profiled},
    };

    fn config() -> LlamaConfig {
        LlamaConfig::from_value(&serde_json::json!({"model_type": "llama", "hidden_size": 24, "intermediate_size": 40,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 37}))
        .unwrap()
    }

    #[test]
    fn the_count_is_that_of_the_buffers_the_model_makes() {
        let lora = |product, dropout, train_scaling| {
            Some(LoraSpec { product, dropout, train_scaling, ..LoraSpec::new(3, 6.0) })
        };
        for (lora, checkpointing) in [
            (None, false),
            (None, true),
            (lora(ProductChoice::Factored, 0.0, false), false),
            (lora(ProductChoice::Formed, 0.0, true), true),
            (lora(ProductChoice::WholeGradient, 0.0, false), false),
            (lora(ProductChoice::Auto, 0.1, true), false),
        ] {
            let device = Profiled::new(Cpu);
            let mut model = Model::init(device.clone(), config(), 1).unwrap();
            let before = device.allocated();
            if let Some(spec) = &lora {
                model.add_lora(spec.clone());
            }
            model.set_activation_checkpointing(checkpointing);
            let (params, grads) = model.params().iter().fold((0, 0), |(p, g), param| {
                (p + param.elements(), g + if param.grad.is_some() { param.elements() } else { 0 })
            });
            let factors = (device.allocated() - before) as usize;
            let tokens = [1; 15];
            let before = device.allocated();
            model.forward_backward(&tokens, 3, 5, 1.0).unwrap();
            let found = elements(&config(), lora.as_ref(), [3, 5], checkpointing);
            assert_eq!(found.weights as usize, params, "{lora:?}");
            assert_eq!(found.gradients as usize, grads, "{lora:?}");
            assert_eq!(found.activations, device.allocated() - before, "{lora:?} {checkpointing}");
            assert!(lora.is_none() || factors > 0);
        }
    }

    #[test]
    fn low_rank_training_saves_operations_where_matrices_are_wide() {
        let ratio = |name: &str, rows| {
            let config = LlamaConfig::preset(name).unwrap();
            let spec = LoraSpec::new(128, 32.0);
            flops_per_token(&config, None, rows) / flops_per_token(&config, Some(&spec), rows)
        };
        let (small, large) = (ratio("llama_130m", [8, 256]), ratio("llama_350m", [8, 256]));
        assert!(small > 1.0 && large > small && large < 1.5, "{small} {large}");
        // Three products per weight, and 2 · 3 · 12 · (heads and scores): close to the usual 6 per parameter.
        let config = LlamaConfig::preset("llama_1b").unwrap();
        let linear: usize = linears(&config).iter().map(|d| d.0 * d.1).sum::<usize>() * config.num_hidden_layers;
        let usual = 6.0 * (linear + config.hidden_size * config.vocab_size) as f64;
        assert!((flops_per_token(&config, None, [8, 256]) / usual - 1.0).abs() < 0.05);
    }
}
