//! The configuration of a run: one TOML file, every key also `--set section.key=value`.
//!
//! Key names are the official ReLoRA code's where it has them. Steps are updates of the weights.

mod changes;
mod check;
mod read;

use super::{schedule::Scheduler, tokens::TokenCount};
use crate::{
    error::{Error, Result},
    model::{LoraSpec, ProductChoice, StorageFormat},
    ops::Quantisation,
};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// A whole run.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// What is trained.
    pub model: ModelConfig,
    /// On what.
    pub data: DataConfig,
    /// How, for how long.
    pub train: TrainConfig,
    /// Full-rank training before the first cycle.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warm_start: Option<WarmStartConfig>,
    /// Low-rank cycles (modes `lora` and `relora`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub relora: Option<ReloraConfig>,
}

/// Exactly one of preset, config, checkpoint and warmed_up_model says where the model comes from.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// Name of a shipped size (`llama_9m`, ...): a new model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preset: Option<String>,
    /// A `config.json`: a new model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<PathBuf>,
    /// A Hugging Face checkpoint to start from, at update 0 (official: `model_name_or_path`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<PathBuf>,
    /// A checkpoint of an earlier full-rank training, whose updates and tokens count: the run goes on with the next update,
    /// under a schedule that begins there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warmed_up_model: Option<PathBuf>,
    /// Updates that `warmed_up_model` has seen; default: what its training state says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warmed_up_steps: Option<u64>,
    /// Tokens that `warmed_up_model` has seen; default: what its training state says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warmed_up_tokens: Option<u64>,
    /// Replaces keys of the preset's or file's `config.json`, e.g. `vocab_size = 257`.
    #[serde(default, skip_serializing_if = "toml::Table::is_empty")]
    pub overrides: toml::Table,
}

/// Training text, as token shards.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// Token shard made by `relora-kit tokenize`.
    pub train: PathBuf,
    /// Token shard for evaluation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation: Option<PathBuf>,
    /// Without `validation`: this share of the training windows is held out, at the end of the shard.
    #[serde(default)]
    pub validation_fraction: f64,
    /// Tokens per window.
    pub max_length: usize,
    /// Visit the windows in a random order (from `train.seed`), another one each epoch.
    #[serde(default = "yes")]
    pub shuffle: bool,
}

/// The numbers that weights may be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WeightDtype {
    /// Single precision.
    #[default]
    F32,
    /// bfloat16; everything else stays f32.
    Bf16,
}

/// What products are computed with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MixedPrecision {
    /// f32, everything.
    #[default]
    No,
    /// bf16 activations and factors of products, sums in f32, f32 master copies of what trains. Frozen weights are bf16.
    Bf16,
}

/// Where AdamW keeps its moments; the names are the official code's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OptimizerChoice {
    /// In every process.
    #[default]
    Adam,
    /// Shared out over the processes: less memory in each, more that travels. The same weights, bit for bit.
    AdamZero,
}

/// How weights become bf16 after an update or a merge.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WeightRounding {
    /// By chance, right on average: small updates add up.
    #[default]
    Stochastic,
    /// To the nearest: an update below half a unit in the last place is lost.
    Nearest,
}

/// What is trained, and how the weights move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Every weight.
    Full,
    /// One low-rank delta; embeddings, norms and head in full.
    Lora,
    /// A low-rank delta per cycle, merged at each restart; embeddings, norms and head in full.
    Relora,
}

/// The optimiser, the schedule, and what is written when.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// `full`, `lora` or `relora`.
    pub mode: Mode,
    /// Seeds initialisation, shuffling and restarts.
    #[serde(default)]
    pub seed: u64,
    /// Windows per forward and backward pass.
    pub batch_size: usize,
    /// Passes per update.
    #[serde(default = "one")]
    pub gradient_accumulation: usize,
    /// Windows per update: sets `gradient_accumulation` to `total_batch_size / batch_size`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_batch_size: Option<usize>,
    /// Updates in all, the warm start included.
    #[serde(default)]
    pub num_training_steps: u64,
    /// Tokens in all, such as `"100M"` or `"1B"`: sets `num_training_steps` to the whole updates that they allow.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_train_tokens: Option<TokenCount>,
    /// Updates (numbered as in metrics.jsonl, from 1) whose data are passed over.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub skip_batches: Vec<u64>,
    /// `f32`, or `bf16`: weights are rounded to bf16 after every update and merge, and stored as such. Gradients, moments and
    /// products stay f32.
    #[serde(default)]
    pub dtype: WeightDtype,
    /// How weights, or merges into weights, are rounded to bf16: `stochastic` or `nearest`.
    #[serde(default)]
    pub rounding: WeightRounding,
    /// `no`, or `bf16`: activations and what products read are bf16, sums f32; what trains keeps f32 master copies, frozen
    /// weights are rounded to bf16 when the first cycle begins and after every merge. The CPU rounds the same weights, and
    /// computes in f32.
    #[serde(default)]
    pub mixed_precision: MixedPrecision,
    /// Let products on an NVIDIA GPU round their factors to TF32 (10 bits instead of 23): faster. The CPU has none.
    #[serde(default)]
    pub tf32: bool,
    /// Ask an NVIDIA GPU for each pass as a whole (CUDA graphs): the same result, for models so small that asking takes longer
    /// than computing. Not set: as soon as the host is what an update waits for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cuda_graphs: Option<bool>,
    /// Keep only the input of each block for backward, and run its forward again: less memory, a third more work.
    #[serde(default)]
    pub activation_checkpointing: bool,
    /// `adam`, or `adam_zero`: several processes share out the moments.
    #[serde(default)]
    pub optimizer: OptimizerChoice,
    /// Highest learning rate (after the warm start).
    pub lr: f64,
    /// Shape of the learning rate.
    pub scheduler: Scheduler,
    /// Updates of the first warmup.
    #[serde(default)]
    pub warmup_steps: u64,
    /// Updates of the warmup after a restart.
    #[serde(default)]
    pub restart_warmup_steps: u64,
    /// Updates between two dips of the schedule; default: `relora.relora`, else the whole training.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cycle_length: Option<u64>,
    /// The dips come this many updates earlier.
    #[serde(default)]
    pub adjust_step: u64,
    /// Lowest rate of the cosine, as a share of `lr`.
    #[serde(default = "tenth")]
    pub min_lr_ratio: f64,
    /// AdamW's decay of the first moment.
    #[serde(default = "beta1")]
    pub adam_beta1: f64,
    /// AdamW's decay of the second moment.
    #[serde(default = "beta2")]
    pub adam_beta2: f64,
    /// AdamW's divisor guard.
    #[serde(default = "eps")]
    pub adam_eps: f64,
    /// Decoupled weight decay of everything trained.
    #[serde(default)]
    pub weight_decay: f64,
    /// Largest norm of the gradient; 0 switches clipping off.
    #[serde(default = "unit")]
    pub clip_grad_norm: f64,
    /// Updates between two checkpoints; the last update always gets one.
    #[serde(default = "thousand")]
    pub save_every: u64,
    /// Checkpoints to keep; 0 keeps all.
    #[serde(default)]
    pub keep_checkpoints: usize,
    /// Updates between two evaluations; 0 evaluates at the end only.
    #[serde(default)]
    pub eval_every: u64,
    /// Predictions per evaluation at most; the final one always uses all.
    #[serde(default = "million")]
    pub eval_tokens: u64,
}

/// Full-rank updates before the first cycle, with a schedule of their own.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WarmStartConfig {
    /// Updates.
    pub num_training_steps: u64,
    /// Highest learning rate; default: `train.lr`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lr: Option<f64>,
    /// Updates of warmup.
    #[serde(default)]
    pub warmup_steps: u64,
    /// Shape; default: the cosine, from the start of the run to its end, of which the warm start is the first part.
    #[serde(default = "cosine")]
    pub scheduler: Scheduler,
}

/// When a restart happens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RestartTiming {
    /// After update `k * relora`.
    #[default]
    Boundary,
    /// One update later, as the official code does.
    Official,
}

/// Bits of a frozen weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Quantize {
    /// NF4 (QLoRA, arXiv 2305.14314).
    #[serde(rename = "4bit")]
    FourBit,
    /// int8, with a scale per row.
    #[serde(rename = "8bit")]
    EightBit,
}

/// How magnitude pruning chooses what to keep.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PruningMask {
    /// One mask, from the first moment, for both moments.
    #[default]
    Joint,
    /// Each moment by its own magnitude, as the official code does: a first moment can outlive its second one.
    Separate,
}

/// The low-rank cycles.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReloraConfig {
    /// Rank of A and B.
    pub lora_r: usize,
    /// The delta is `lora_alpha / lora_r * B A`.
    pub lora_alpha: f64,
    /// Share of the inputs of A that is dropped while training.
    #[serde(default)]
    pub lora_dropout: f64,
    /// Train the scale of every delta: `tanh(p)` instead of `lora_alpha / lora_r`, p starting at 1.
    #[serde(default)]
    pub train_scaling: bool,
    /// With `train_scaling`, set p to 0 at a restart, as the official code does: with B = 0, nothing low-rank trains from there on.
    #[serde(default)]
    pub zero_restart_scaling: bool,
    /// Mode `lora`: drop the original weights of the projections and train `s B A` alone, both factors drawn at random.
    #[serde(default)]
    pub lora_only: bool,
    /// How products with `W + s B A` are computed: `auto`, `factored`, `formed`, `whole_gradient`.
    #[serde(default)]
    pub product: ProductChoice,
    /// Keep the frozen projections in `4bit` (NF4) or `8bit`: quantised when the first cycle begins, and anew at every merge.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantize: Option<Quantize>,
    /// With `quantize = "4bit"`, quantise the scales, too.
    #[serde(default = "yes")]
    pub use_double_quant: bool,
    /// Updates between two restarts (mode `relora`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub relora: Option<u64>,
    /// At a restart, zero the moments of A and B. Ignored where a pruning ratio is set.
    #[serde(default = "yes")]
    pub reset_optimizer_on_relora: bool,
    /// At a restart, zero this share of the moments of A and B, at random. 0.999 is what the official code calls a reset.
    #[serde(default)]
    pub optimizer_random_pruning: f64,
    /// At a restart, zero this share of the moments of A and B, the smallest ones.
    #[serde(default)]
    pub optimizer_magnitude_pruning: f64,
    /// How magnitude pruning chooses.
    #[serde(default)]
    pub pruning_mask: PruningMask,
    /// At a restart, let the bias correction of A and B begin anew. The official code never does.
    #[serde(default = "yes")]
    pub reset_adam_step: bool,
    /// When a restart happens.
    #[serde(default)]
    pub restart_timing: RestartTiming,
    /// Start the first cycle with A = 0, as the official code does by mistake: nothing low-rank trains before the first restart.
    #[serde(default)]
    pub zero_initial_a: bool,
}

fn yes() -> bool {
    true
}
fn one() -> usize {
    1
}
fn tenth() -> f64 {
    0.1
}
fn beta1() -> f64 {
    0.9
}
fn beta2() -> f64 {
    0.999
}
fn eps() -> f64 {
    1e-8
}
fn unit() -> f64 {
    1.0
}
fn thousand() -> u64 {
    1000
}
fn million() -> u64 {
    1_000_000
}
fn cosine() -> Scheduler {
    Scheduler::Cosine
}

impl From<&ReloraConfig> for LoraSpec {
    fn from(relora: &ReloraConfig) -> LoraSpec {
        LoraSpec {
            dropout: relora.lora_dropout,
            train_scaling: relora.train_scaling,
            product: relora.product,
            ..LoraSpec::new(relora.lora_r, relora.lora_alpha)
        }
    }
}

impl Config {
    /// What the projections may be while they are frozen.
    pub fn frozen_store(&self) -> StorageFormat {
        match self.relora.as_ref().and_then(|r| Some((r.quantize?, r.use_double_quant))) {
            Some((Quantize::FourBit, double)) => StorageFormat::Quantised(Quantisation::Nf4 { double }),
            Some((Quantize::EightBit, _)) => StorageFormat::Quantised(Quantisation::Int8),
            None if self.train.mixed_precision == MixedPrecision::Bf16 => StorageFormat::Bf16,
            None => StorageFormat::F32,
        }
    }

    /// Whether what a restart merges into is rounded.
    pub fn rounds_merges(&self) -> bool {
        self.train.dtype == WeightDtype::Bf16 || self.frozen_store() != StorageFormat::F32
    }

    /// The file that a run keeps.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string_pretty(self).map_err(|e| Error::environment(format!("cannot write the configuration: {e}")))
    }

    /// Updates before the mode's own training: those of the warm start, or of the model that was warmed up before.
    pub fn first_step(&self) -> u64 {
        let warm = self.warm_start.as_ref().map(|w| w.num_training_steps);
        warm.or(self.model.warmed_up_steps).unwrap_or(0)
    }

    /// Tokens that one update sees.
    pub fn tokens_per_update(&self) -> u64 {
        (self.train.batch_size * self.train.gradient_accumulation * self.data.max_length) as u64
    }
}
