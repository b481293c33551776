//! The configuration of a run: one TOML file, every key also `--set section.key=value`.
//!
//! Key names are the official ReLoRA code's where it has them. Steps are updates of the weights.

use super::{schedule::Scheduler, tokens::TokenCount};
use crate::{
    error::{Error, Result},
    model::ProductChoice,
};
use serde::{Deserialize, Serialize};
use std::{
    fs,
    path::{Path, PathBuf},
};

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
    /// With `dtype = "bf16"`: `stochastic` or `nearest`.
    #[serde(default)]
    pub rounding: WeightRounding,
    /// Keep only the input of each block for backward, and run its forward again: less memory, a third more work.
    #[serde(default)]
    pub activation_checkpointing: bool,
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

impl Config {
    /// Reads `path`, replaces the keys named in `set` (`section.key=value`), and checks the result.
    /// Paths in the file are relative to the file's folder, those in `set` to the current one.
    pub fn read(path: &Path, set: &[String]) -> Result<Config> {
        let text = fs::read_to_string(path).map_err(|e| Error::io("read", path, e))?;
        Config::parse(&text, path, set)
    }

    /// [`Config::read`] of a text that would stand in the file `path`.
    pub fn parse(text: &str, path: &Path, set: &[String]) -> Result<Config> {
        let mut table: toml::Table = toml::from_str(text).map_err(|e| {
            Error::request(format!("'{}' is not valid TOML: {}", path.display(), one_line(&e.to_string())))
        })?;
        // Absolute, so that the copy of the configuration inside the run means the same files.
        let absolute = std::path::absolute(path).map_err(|e| Error::io("find", path, e))?;
        resolve_paths(&mut table, absolute.parent().unwrap_or(Path::new("/")));
        for assignment in set {
            apply(&mut table, assignment)?;
        }
        let here = std::path::absolute(".").map_err(|e| Error::io("find", Path::new("."), e))?;
        resolve_paths(&mut table, &here);
        let mut config: Config = table.try_into().map_err(|e: toml::de::Error| {
            Error::request(format!("'{}': {}", path.display(), one_line(&e.to_string())))
                .help("`relora-kit train --help` lists the sections; docs/train.md every key")
        })?;
        config.resolve()?;
        config.check()?;
        Ok(config)
    }

    /// Turns `total_batch_size` and `max_train_tokens` into the keys that they stand for.
    fn resolve(&mut self) -> Result<()> {
        let t = &mut self.train;
        if let Some(total) = t.total_batch_size.take() {
            if t.gradient_accumulation != 1 && t.gradient_accumulation * t.batch_size != total {
                return Err(Error::request(format!(
                    "train.total_batch_size is {total}, but batch_size {} times gradient_accumulation {} is {}",
                    t.batch_size,
                    t.gradient_accumulation,
                    t.batch_size * t.gradient_accumulation
                ))
                .help("leave out train.gradient_accumulation"));
            }
            if t.batch_size == 0 || total == 0 || total % t.batch_size != 0 {
                return Err(Error::request(format!(
                    "train.total_batch_size is {total}, not a multiple of train.batch_size {}",
                    t.batch_size
                )));
            }
            t.gradient_accumulation = total / t.batch_size;
        }
        if let Some(tokens) = t.max_train_tokens.take() {
            let per_update = self.tokens_per_update();
            self.train.num_training_steps = tokens.0.checked_div(per_update).unwrap_or(0);
            if self.train.num_training_steps == 0 {
                return Err(Error::request(format!(
                    "train.max_train_tokens is {}, less than the {per_update} tokens of one update",
                    tokens.0
                )));
            }
        }
        Ok(())
    }

    /// The file that a run keeps.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string_pretty(self).map_err(|e| Error::world(format!("cannot write the configuration: {e}")))
    }

    /// Refuses settings that contradict each other.
    pub fn check(&self) -> Result<()> {
        self.check_ranges()?;
        self.check_relora()?;
        for phase in self.phases() {
            phase.schedule.check()?;
        }
        Ok(())
    }

    fn check_ranges(&self) -> Result<()> {
        let t = &self.train;
        let m = &self.model;
        let origins = [m.preset.is_some(), m.config.is_some(), m.checkpoint.is_some(), m.warmed_up_model.is_some()];
        if origins.iter().filter(|&&x| x).count() != 1 {
            return Err(Error::request(
                "[model] must have exactly one of preset, config, checkpoint and warmed_up_model",
            ));
        }
        if m.warmed_up_model.is_none() && (m.warmed_up_steps.is_some() || m.warmed_up_tokens.is_some()) {
            return Err(Error::request("[model] warmed_up_steps and warmed_up_tokens belong to warmed_up_model"));
        }
        if m.warmed_up_model.is_some() && self.warm_start.is_some() {
            return Err(Error::request("[model] warmed_up_model and [warm_start] are two ways to do the same")
                .help("remove [warm_start]: the model is warmed up already"));
        }
        if (m.checkpoint.is_some() || m.warmed_up_model.is_some()) && !m.overrides.is_empty() {
            return Err(Error::request("[model] overrides are for new models: a checkpoint keeps its config.json"));
        }
        let positive = [
            ("data.max_length", self.data.max_length as f64 - 1.0),
            ("train.batch_size", t.batch_size as f64),
            ("train.gradient_accumulation", t.gradient_accumulation as f64),
            ("train.num_training_steps", t.num_training_steps as f64),
            ("train.lr", t.lr),
            ("train.adam_eps", t.adam_eps),
            ("train.save_every", t.save_every as f64),
        ];
        if let Some((key, _)) = positive.iter().find(|(_, value)| value.is_nan() || *value <= 0.0) {
            let least = if *key == "data.max_length" { "at least 2" } else { "a positive number" };
            return Err(Error::request(format!("{key} must be {least}")));
        }
        let shares = [
            ("data.validation_fraction", self.data.validation_fraction),
            ("train.adam_beta1", t.adam_beta1),
            ("train.adam_beta2", t.adam_beta2),
        ];
        if let Some((key, value)) = shares.iter().find(|(_, value)| !(0.0..1.0).contains(value)) {
            return Err(Error::request(format!("{key} is {value}, expected 0 or more, below 1")));
        }
        if !(t.weight_decay >= 0.0 && t.clip_grad_norm >= 0.0) {
            return Err(Error::request("train.weight_decay and train.clip_grad_norm must not be negative"));
        }
        Ok(())
    }

    fn check_relora(&self) -> Result<()> {
        let warm = self.first_step();
        if warm >= self.train.num_training_steps {
            let key = if self.warm_start.is_some() { "warm_start.num_training_steps" } else { "model.warmed_up_steps" };
            return Err(Error::request(format!(
                "{key} {warm} leaves nothing of train.num_training_steps {}",
                self.train.num_training_steps
            ))
            .help("train.num_training_steps counts all updates, those of the warm start included"));
        }
        let Some(relora) = &self.relora else {
            return match self.train.mode {
                Mode::Full if self.warm_start.is_none() => Ok(()),
                Mode::Full => Err(Error::request("[warm_start] is for the modes lora and relora")),
                _ => Err(Error::request("modes lora and relora need a [relora] section with lora_r and lora_alpha")),
            };
        };
        match (self.train.mode, relora.relora) {
            (Mode::Full, _) => return Err(Error::request("[relora] is for the modes lora and relora, not for full")),
            (Mode::Lora, Some(_)) => {
                return Err(Error::request("relora.relora is for mode relora: mode lora never restarts"));
            }
            (Mode::Relora, None | Some(0)) => {
                return Err(Error::request("mode relora needs relora.relora, the updates between two restarts"));
            }
            _ => {}
        }
        if relora.lora_r == 0 || !relora.lora_alpha.is_finite() || relora.lora_alpha <= 0.0 {
            return Err(Error::request(format!(
                "relora.lora_r is {} and relora.lora_alpha {}, expected positive numbers",
                relora.lora_r, relora.lora_alpha
            )));
        }
        if !(0.0..1.0).contains(&relora.lora_dropout) {
            return Err(Error::request(format!(
                "relora.lora_dropout is {}, expected 0 or more, below 1",
                relora.lora_dropout
            )));
        }
        if relora.zero_restart_scaling && !relora.train_scaling {
            return Err(Error::request("relora.zero_restart_scaling is for relora.train_scaling"));
        }
        if relora.lora_only && self.train.mode == Mode::Relora {
            return Err(Error::request(
                "relora.lora_only is for mode lora: without weights there is nothing to merge into",
            ));
        }
        let (random, magnitude) = (relora.optimizer_random_pruning, relora.optimizer_magnitude_pruning);
        if !(0.0..1.0).contains(&random) || !(0.0..1.0).contains(&magnitude) || (random > 0.0 && magnitude > 0.0) {
            return Err(Error::request(format!(
                "relora.optimizer_random_pruning is {random} and relora.optimizer_magnitude_pruning {magnitude}, expected shares below 1, one of them 0"
            )));
        }
        Ok(())
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

/// Paths in a file are relative to the file, so that a run can be started from anywhere.
fn resolve_paths(table: &mut toml::Table, folder: &Path) {
    let paths = [
        ("model", "config"),
        ("model", "checkpoint"),
        ("model", "warmed_up_model"),
        ("data", "train"),
        ("data", "validation"),
    ];
    for (section, key) in paths {
        if let Some(toml::Value::String(path)) = table.get_mut(section).and_then(|s| s.get_mut(key)) {
            *path = folder.join(&*path).to_string_lossy().into_owned();
        }
    }
}

/// `section.key=value`; the value is TOML, or a string if it is not.
fn apply(table: &mut toml::Table, assignment: &str) -> Result<()> {
    let bad = || {
        Error::request(format!("'--set {assignment}' is not of the form section.key=value"))
            .help("for example: --set train.lr=1e-3")
    };
    let (key, value) = assignment.split_once('=').ok_or_else(bad)?;
    let (section, key) = key.trim().split_once('.').ok_or_else(bad)?;
    let parsed = toml::from_str::<toml::Table>(&format!("v = {value}")).ok().and_then(|mut t| t.remove("v"));
    let value = parsed.unwrap_or_else(|| toml::Value::String(value.to_owned()));
    let mut place = table.entry(section).or_insert_with(|| toml::Value::Table(toml::Table::new()));
    let mut keys = key.split('.').peekable();
    while let Some(key) = keys.next() {
        let table = place.as_table_mut().ok_or_else(bad)?;
        if keys.peek().is_none() {
            table.insert(key.to_owned(), value);
            return Ok(());
        }
        place = table.entry(key).or_insert_with(|| toml::Value::Table(toml::Table::new()));
    }
    Err(bad())
}

/// TOML errors draw the line under the text; an error of ours is one sentence.
fn one_line(message: &str) -> String {
    message
        .lines()
        .filter(|l| !l.trim_start().starts_with('|') && !l.contains(" | "))
        .map(str::trim)
        .collect::<Vec<_>>()
        .join(" ")
        .trim()
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUN: &str = r#"
        [model]
        preset = "llama_9m"
        [data]
        train = "t.safetensors"
        max_length = 64
        [train]
        mode = "relora"
        batch_size = 4
        num_training_steps = 160
        lr = 1e-3
        scheduler = "cosine_restarts"
        warmup_steps = 5
        [warm_start]
        num_training_steps = 40
        [relora]
        lora_r = 8
        lora_alpha = 16
        relora = 20
    "#;

    fn read(text: &str, set: &[&str]) -> Result<Config> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.toml");
        fs::write(&path, text).unwrap();
        Config::read(&path, &set.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn a_run_has_a_warm_start_and_then_cycles() {
        let config = read(RUN, &[]).unwrap();
        let phases = config.phases();
        assert_eq!((phases[0].steps, phases[0].low_rank), (40, false));
        assert_eq!((phases[1].first_step, phases[1].steps, phases[1].low_rank), (40, 120, true));
        assert_eq!(phases[1].schedule.cycle_length, 20);
        assert!(config.data.train.is_absolute(), "paths are relative to the file");
        let set = read(RUN, &["data.train=elsewhere.safetensors"]).unwrap().data.train;
        assert_eq!(set, std::env::current_dir().unwrap().join("elsewhere.safetensors"));
    }

    #[test]
    fn every_key_can_be_set_from_outside() {
        let config =
            read(RUN, &["train.lr=0.5", "relora.lora_r = 4", "model.overrides.vocab_size=257", "train.mode=relora"])
                .unwrap();
        assert_eq!((config.train.lr, config.relora.as_ref().unwrap().lora_r), (0.5, 4));
        assert_eq!(config.model.overrides["vocab_size"].as_integer(), Some(257));
        let back: Config = toml::from_str(&config.to_toml().unwrap()).unwrap();
        assert_eq!(back.to_toml().unwrap(), config.to_toml().unwrap());
    }

    #[test]
    fn windows_and_tokens_in_all_set_the_accumulation_and_the_updates() {
        let config = read(RUN, &["train.total_batch_size=12", "train.max_train_tokens=0.123M"]).unwrap();
        // 123000 tokens are 160 updates of 12 windows of 64, and some.
        assert_eq!((config.train.gradient_accumulation, config.train.num_training_steps), (3, 160));
        let back: Config = toml::from_str(&config.to_toml().unwrap()).unwrap();
        assert_eq!((back.train.gradient_accumulation, back.train.num_training_steps), (3, 160));
    }

    #[test]
    fn contradictions_are_refused_in_one_sentence() {
        for (set, expected) in [
            ("train.learning_rate=1", "unknown field `learning_rate`"),
            ("train.lr=fast", "invalid type: string \"fast\", expected f64"),
            ("train.lr=-1", "train.lr must be a positive number"),
            ("train.lr=nan", "train.lr must be a positive number"),
            ("relora.lora_r=0", "relora.lora_r is 0"),
            ("train.mode=full", "[relora] is for the modes lora and relora"),
            ("train.mode=lora", "mode lora never restarts"),
            ("relora.relora=0", "mode relora needs relora.relora"),
            ("relora.relora=50", "not a multiple of cycle_length 50"),
            ("warm_start.num_training_steps=160", "leaves nothing"),
            ("model.config=x.json", "exactly one of preset, config, checkpoint and warmed_up_model"),
            ("model.warmed_up_steps=3", "belong to warmed_up_model"),
            ("train.total_batch_size=10", "not a multiple of train.batch_size 4"),
            ("train.max_train_tokens=100", "less than the 256 tokens of one update"),
            ("train.max_train_tokens=many", "a number of tokens"),
            ("relora.lora_dropout=1", "relora.lora_dropout is 1"),
            ("relora.lora_only=true", "relora.lora_only is for mode lora"),
            ("relora.zero_restart_scaling=true", "is for relora.train_scaling"),
            ("relora.optimizer_magnitude_pruning=1.5", "expected shares below 1"),
            ("lr", "not of the form section.key=value"),
        ] {
            let message = read(RUN, &[set]).unwrap_err().message;
            assert!(message.contains(expected), "{set}: {message}");
            assert!(!message.contains('\n'), "{message}");
        }
    }
}
