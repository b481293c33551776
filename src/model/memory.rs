//! How much memory and arithmetic a model takes, from its configuration alone: the same buffers that [`super::Model`] makes.

use super::{
    config::LlamaConfig,
    linear::extents,
    llama::logits_chunk,
    lora::LoraSpec,
    params::{ParamKind, StorageFormat, TARGETS, table},
    pool::best_fit,
    product::Product,
};
use serde::Serialize;

/// Elements of the buffers of one training, by what they are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Elements {
    /// All parameters, LoRA factors included.
    pub weights: u64,
    /// Of these, what trains.
    pub trained: u64,
    /// Bytes of what is frozen.
    pub frozen_bytes: u64,
    /// Copies of what trains that products read.
    pub copies: u64,
    /// Gradients of what trains, but those that lie where activations were.
    pub gradients: u64,
    /// Both moments of what trains.
    pub moments: u64,
    /// What forward keeps for backward, and scratch.
    pub activations: u64,
    /// Of the same, what is always f32: a few numbers per row.
    pub statistics: u64,
}

/// Bytes of the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Bytes {
    /// Parameters, and copies of them.
    pub weights: u64,
    /// Gradients that have memory of their own.
    pub gradients: u64,
    /// Moments.
    pub optimiser: u64,
    /// Kept from forward to backward, and scratch.
    pub activations: u64,
}

impl Elements {
    /// What trains in f32, and so the rest; with mixed precision, copies and activations in bf16.
    pub fn bytes(&self, mixed: bool) -> Bytes {
        let narrow = if mixed { 2 } else { 4 };
        Bytes {
            weights: 4 * self.trained + self.frozen_bytes + narrow * self.copies,
            gradients: 4 * self.gradients,
            optimiser: 4 * self.moments,
            activations: narrow * self.activations + 4 * self.statistics,
        }
    }
}

/// What an update goes through.
#[derive(Clone, Copy, Debug)]
pub struct Passes {
    /// Windows per pass.
    pub batch: usize,
    /// Tokens per window.
    pub len: usize,
    /// Passes per update.
    pub accumulation: usize,
    /// See [`super::Model::set_activation_checkpointing`].
    pub activation_checkpointing: bool,
    /// See [`super::Model::set_mixed_precision`].
    pub mixed_precision: bool,
    /// What frozen projections may be.
    pub frozen: StorageFormat,
}

/// Elements of a training. With `lora`, the projections are frozen.
pub fn elements(config: &LlamaConfig, lora: Option<&LoraSpec>, passes: Passes) -> Elements {
    let (mut weights, mut trained, mut copies, mut frozen_bytes) = (0, 0, 0, 0);
    let tied = config.tie_word_embeddings;
    for (_, kind, shape) in table(config) {
        let size = shape.iter().product::<usize>();
        weights += size;
        if lora.is_none() || kind != ParamKind::Linear {
            trained += size;
            let multiplied =
                matches!(kind, ParamKind::Linear | ParamKind::Head) || (kind == ParamKind::Embedding && tied);
            copies += if multiplied { size } else { 0 };
        } else {
            frozen_bytes += match passes.frozen {
                StorageFormat::Quantised(how) => how.bytes(shape[0], shape[1]),
                StorageFormat::Bf16 if passes.mixed_precision => 2 * size,
                _ => 4 * size,
            };
        }
    }
    if let Some(spec) = lora {
        let thin: usize = linears(config).iter().map(|(out, inner)| spec.r * (out + inner)).sum();
        let scalings = if spec.train_scaling { TARGETS.len() } else { 0 };
        weights += config.num_hidden_layers * (thin + scalings);
        trained += config.num_hidden_layers * (thin + scalings);
        copies += config.num_hidden_layers * thin;
    }
    let copies = if passes.mixed_precision { copies } else { 0 };
    let lent = if lora.is_none() { lent(config, passes) } else { 0 };
    let (activations, statistics) = activations(config, lora, passes);
    let [weights, trained, copies, lent] = [weights, trained, copies, lent].map(|n| n as u64);
    let (gradients, frozen_bytes) = (trained - lent, frozen_bytes as u64);
    Elements { weights, trained, frozen_bytes, copies, gradients, moments: 2 * trained, activations, statistics }
}

/// Floating-point operations of one forward and backward, per token: products only, attention counted causally.
pub fn flops_per_token(config: &LlamaConfig, lora: Option<&LoraSpec>, passes: Passes) -> f64 {
    let (rows, len, exact) = (passes.batch * passes.len, passes.len, passes.frozen == StorageFormat::F32);
    let block: u64 = linears(config)
        .into_iter()
        .map(|dims| match lora {
            None => 3 * 2 * (rows * dims.0 * dims.1) as u64,
            Some(spec) => product(dims, rows, spec, exact).flops(extents(dims, rows, spec.r)),
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

fn product(dims: (usize, usize), rows: usize, spec: &LoraSpec, exact: bool) -> Product {
    Product::choose(spec, extents(dims, rows, spec.r), exact)
}

/// Widths of what a block of a model without factors keeps for backward, per row: activations, and statistics.
fn kept_widths(config: &LlamaConfig) -> ([usize; 7], [usize; 2]) {
    let (c, f, heads) = (config.hidden_size, config.intermediate_size, config.num_attention_heads);
    let (q, kv) = (heads * config.head_dim, config.num_key_value_heads * config.head_dim);
    ([q, kv, kv, q, c, f, f], [1, heads])
}

/// Elements of the gradients of projections that lie where the block above kept its activations: with one pass per update,
/// and none of them needed again.
fn lent(config: &LlamaConfig, passes: Passes) -> usize {
    if passes.accumulation > 1 || passes.activation_checkpointing {
        return 0;
    }
    let rows = passes.batch * passes.len;
    let (narrow, (activations, statistics)) = (if passes.mixed_precision { 2 } else { 4 }, kept_widths(config));
    let (mut free, mut lent) = (Vec::new(), 0);
    for _ in 1..config.num_hidden_layers {
        free.extend(activations.map(|width| narrow * rows * width));
        free.extend(statistics.map(|width| 4 * rows * width));
        // In the order of backward.
        for (out, inner) in linears(config).into_iter().rev() {
            if let Some(at) = best_fit(&free, 4 * out * inner) {
                free.swap_remove(at);
                lent += out * inner;
            }
        }
    }
    lent
}

/// The buffers of the workspace, activations and statistics; `llama.rs`, `block.rs` and `linear.rs` make them.
fn activations(config: &LlamaConfig, lora: Option<&LoraSpec>, passes: Passes) -> (u64, u64) {
    let (c, f, n) = (config.hidden_size, config.intermediate_size, passes.batch * passes.len);
    let q = config.num_attention_heads * config.head_dim;
    let layers = config.num_hidden_layers;
    let residual = (layers + 1) * n * c;
    let (kept, kept_statistics) = kept_widths(config);
    let mut kept = n * kept.iter().sum::<usize>();
    let kept_statistics = n * kept_statistics.iter().sum::<usize>();
    let mut scratch = 3 * n * c + (n * f).max(logits_chunk(config.vocab_size, n) * config.vocab_size);
    if q != c {
        scratch += n * q;
    }
    if let Some(spec) = lora {
        let dims = linears(config);
        let ways = dims.map(|d| (d.0 * d.1, product(d, n, spec, passes.frozen == StorageFormat::F32)));
        let distinct = |needed: &dyn Fn(Product) -> bool| {
            let mut lengths: Vec<usize> = ways.iter().filter(|w| needed(w.1)).map(|w| w.0).collect();
            lengths.sort_unstable();
            lengths.dedup();
            lengths.iter().sum::<usize>()
        };
        kept += n * spec.r * ways.iter().filter(|w| w.1 == Product::Factored).count();
        let quantised = matches!(passes.frozen, StorageFormat::Quantised(_));
        scratch += distinct(&|p| quantised || p != Product::Factored) + distinct(&|p| p == Product::WholeGradient);
        if ways.iter().any(|w| w.1 != Product::WholeGradient) {
            scratch += 2 * n * spec.r;
        }
        if spec.dropout > 0.0 {
            scratch += n * dims.iter().map(|d| d.1).max().unwrap_or(0);
        }
    }
    // Losses, rstd of the norms before blocks and head, rotary angles.
    let statistics = n + (layers + 1) * n + 2 * passes.len * (config.head_dim / 2);
    let blocks = if passes.activation_checkpointing { layers.min(1) } else { layers };
    ((residual + kept * blocks + scratch) as u64, (kept_statistics * blocks + statistics) as u64)
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

    /// Checks the count after a few updates of so many passes of 8 windows of 9 tokens.
    fn check(lora: Option<LoraSpec>, accumulation: usize, activation_checkpointing: bool) -> Elements {
        let (config, device) = (config(), Profiled::new(Cpu));
        let mut model = Model::init(device.clone(), config.clone(), 1).unwrap();
        if let Some(spec) = &lora {
            model.add_lora(spec.clone());
        }
        model.set_activation_checkpointing(activation_checkpointing);
        model.set_gradient_accumulation(accumulation > 1);
        for _ in 0..3 {
            for _ in 0..accumulation {
                model.forward_backward(&[1; 72], 8, 9, 1.0).unwrap();
            }
            model.zero_grad();
            // An evaluation takes what is there.
            model.loss(&[2; 72], 8, 9).unwrap();
        }
        let (weights, trained) = model.params().iter().fold((0, 0), |(all, trained), p| {
            (all + p.elements() as u64, trained + if p.trainable { p.elements() as u64 } else { 0 })
        });
        let what = format!("{lora:?} {accumulation} {activation_checkpointing}");
        let passes = Passes {
            batch: 8,
            len: 9,
            accumulation,
            activation_checkpointing,
            mixed_precision: false,
            frozen: StorageFormat::F32,
        };
        let found = elements(&config, lora.as_ref(), passes);
        assert_eq!((found.weights, found.trained), (weights, trained), "{what}");
        let all = found.weights + found.gradients + found.activations + found.statistics;
        assert_eq!(all, device.allocated(), "{what}");
        found
    }

    #[test]
    fn the_count_is_that_of_the_buffers_the_model_makes() {
        let lora = |product, dropout, train_scaling| {
            Some(LoraSpec { product, dropout, train_scaling, ..LoraSpec::new(3, 6.0) })
        };
        check(lora(ProductChoice::Factored, 0.0, false), 1, false);
        check(lora(ProductChoice::Formed, 0.0, true), 2, true);
        check(lora(ProductChoice::WholeGradient, 0.0, false), 1, false);
        check(lora(ProductChoice::Auto, 0.1, true), 1, false);
    }

    #[test]
    fn gradients_of_projections_lie_where_activations_were() {
        let one = check(None, 1, false);
        let block: u64 = linears(&config()).iter().map(|(out, inner)| (out * inner) as u64).sum();
        // All blocks but the last.
        assert_eq!(one.trained - one.gradients, 2 * block);
        for (accumulation, checkpointing) in [(2, false), (1, true)] {
            let more = check(None, accumulation, checkpointing);
            assert_eq!(more.gradients, more.trained);
        }
    }

    #[test]
    fn low_rank_training_saves_operations_where_matrices_are_wide() {
        let passes = Passes {
            batch: 8,
            len: 256,
            accumulation: 1,
            activation_checkpointing: false,
            mixed_precision: false,
            frozen: StorageFormat::F32,
        };
        let ratio = |name: &str| {
            let config = LlamaConfig::preset(name).unwrap();
            let spec = LoraSpec::new(128, 32.0);
            flops_per_token(&config, None, passes) / flops_per_token(&config, Some(&spec), passes)
        };
        let (small, large) = (ratio("llama_130m"), ratio("llama_350m"));
        assert!(small > 1.0 && large > small && large < 1.5, "{small} {large}");
        // Three products per weight, and 2 · 3 · 12 · (heads and scores): close to the usual 6 per parameter.
        let config = LlamaConfig::preset("llama_1b").unwrap();
        let linear: usize = linears(&config).iter().map(|d| d.0 * d.1).sum::<usize>() * config.num_hidden_layers;
        let usual = 6.0 * (linear + config.hidden_size * config.vocab_size) as f64;
        assert!((flops_per_token(&config, None, passes) / usual - 1.0).abs() < 0.05);
    }
}
