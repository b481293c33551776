//! What a run is made of: its first model, its data, and their hashes.

use super::{
    config::{Config, MixedPrecision, Mode},
    tokens::{TokenShard, Windows},
    trainer::Trainer,
};
use crate::{
    checkpoint::Checkpoint,
    error::{Error, Result},
    model::{LlamaConfig, Model, StorageFormat},
    ops::Device,
    progress::Progress,
    run::{Hashed, sha256_file},
};
use serde::Deserialize;
use std::collections::BTreeMap;

/// The model that update 1 starts from.
pub(super) fn initial_model<D: Device>(device: D, config: &Config) -> Result<Model<D>> {
    let m = &config.model;
    if let Some(path) = m.checkpoint.as_ref().or(m.warmed_up_model.as_ref()) {
        // Where nothing trains the projections first, they are read as they will be frozen.
        let frozen = config.train.mode != Mode::Full && config.warm_start.is_none();
        let store = if frozen { config.frozen_store() } else { StorageFormat::F32 };
        let mixed = config.train.mixed_precision == MixedPrecision::Bf16;
        return Model::load_as(device, &Checkpoint::open(path)?, store, mixed);
    }
    Model::init(device, architecture(config)?, config.train.seed)
}

/// The architecture that the configuration names, without its weights.
pub fn architecture(config: &Config) -> Result<LlamaConfig> {
    let m = &config.model;
    if let Some(path) = m.checkpoint.as_ref().or(m.warmed_up_model.as_ref()) {
        let folder = if path.is_dir() { path } else { path.parent().unwrap_or(path) };
        return LlamaConfig::from_json(&folder.join("config.json"));
    }
    let json = match (&m.preset, &m.config) {
        (Some(name), _) => preset(name)?.to_json(),
        (None, Some(path)) => LlamaConfig::from_json(path)?.to_json(),
        (None, None) => return Err(Error::request("[model] names no origin of the model")),
    };
    override_keys(json, &m.overrides)
}

/// A shipped size.
pub(super) fn preset(name: &str) -> Result<LlamaConfig> {
    LlamaConfig::preset(name).ok_or_else(|| {
        let names = LlamaConfig::preset_names().join(", ");
        Error::request(format!("there is no preset '{name}'")).help(format!("presets: {names}"))
    })
}

/// Updates and tokens that `warmed_up_model` has seen, from the training state in its folder: ours, or the official code's
/// `training_state.json`. Without either, both count from 0, with a warning.
pub(super) fn resolve_warm_up(config: &mut Config, progress: &Progress) -> Result<()> {
    #[derive(Deserialize)]
    struct Counts {
        #[serde(alias = "update_step")]
        step: u64,
        #[serde(default, alias = "tokens_seen")]
        tokens: u64,
    }
    let m = &mut config.model;
    let Some(folder) = m.warmed_up_model.clone() else { return Ok(()) };
    if m.warmed_up_steps.is_none() || m.warmed_up_tokens.is_none() {
        let files = ["training_state/state.json", "training_state.json"].map(|name| folder.join(name));
        match files.iter().find(|f| f.exists()) {
            Some(path) => {
                let bytes = crate::checkpoint::read_text(path)?;
                let counts: Counts = serde_json::from_slice(&bytes).map_err(|e| {
                    Error::request(format!("'{}' is not a training state: {e}", path.display()))
                        .help("say with [model] warmed_up_steps how many updates the model has seen")
                })?;
                m.warmed_up_steps = m.warmed_up_steps.or(Some(counts.step));
                m.warmed_up_tokens = m.warmed_up_tokens.or(Some(counts.tokens));
            }
            None if m.warmed_up_steps.is_some() => {}
            None => {
                m.warmed_up_steps = Some(0);
                progress.warn(&format!(
                    "'{}' has no training state; updates and tokens count from 0 (see [model] warmed_up_steps)",
                    folder.display()
                ));
            }
        }
    }
    config.resolve_token_budget()?;
    config.check()
}

/// Sizes that follow from others are derived anew, unless they are given, too.
fn override_keys(mut json: serde_json::Value, overrides: &toml::Table) -> Result<LlamaConfig> {
    if let Some(object) = json.as_object_mut() {
        let given = |key: &str| overrides.contains_key(key);
        let one_kv_head_each = object.get("num_key_value_heads") == object.get("num_attention_heads");
        if (given("hidden_size") || given("num_attention_heads")) && !given("head_dim") {
            object.remove("head_dim");
        }
        if given("num_attention_heads") && one_kv_head_each && !given("num_key_value_heads") {
            object.remove("num_key_value_heads");
        }
    }
    for (key, value) in overrides {
        let value = serde_json::to_value(value).map_err(|e| Error::request(format!("[model] overrides.{key}: {e}")))?;
        match json.as_object_mut().filter(|o| o.contains_key(key)) {
            Some(object) => object.insert(key.clone(), value),
            None => {
                return Err(Error::request(format!("[model] overrides.{key} is no key of the model's config.json"))
                    .help("for example: vocab_size, hidden_size, num_hidden_layers"));
            }
        };
    }
    LlamaConfig::from_value(&json).map_err(|e| Error { message: format!("[model] with overrides: {}", e.message), ..e })
}

/// Refuses a run that asks for evaluations but holds nothing out for them.
pub(super) fn check_validation<D: Device>(
    trainer: &Trainer<D>,
    validation: &Option<(TokenShard, Windows)>,
) -> Result<()> {
    let (data, t) = (&trainer.config().data, &trainer.config().train);
    if validation.is_some() {
        return Ok(());
    }
    if data.validation_fraction > 0.0 {
        let sequences = trainer.shard().len() / data.max_length;
        return Err(Error::request(format!(
            "data.validation_fraction {} of {sequences} sequences holds out none",
            data.validation_fraction
        ))
        .help(format!("set it to {:.4} or more, or to 0", 1.0 / sequences.max(1) as f64)));
    }
    if t.eval_every > 0 {
        return Err(Error::request(format!("train.eval_every is {}, but no data are held out", t.eval_every))
            .help("set data.validation or data.validation_fraction, or remove train.eval_every"));
    }
    Ok(())
}

pub(super) fn open_validation<D: Device>(trainer: &Trainer<D>) -> Result<Option<(TokenShard, Windows)>> {
    let data = &trainer.config().data;
    let (shard, windows) = match &data.validation {
        Some(path) => {
            let shard = TokenShard::open(path)?;
            shard.check_vocabulary(trainer.model.config().vocab_size)?;
            let hashes = (shard.tokenizer_sha256(), trainer.shard().tokenizer_sha256());
            if let (Some(a), Some(b)) = hashes
                && a != b
            {
                return Err(Error::request(format!(
                    "'{}' was made with a tokenizer.json of sha256 {a}, the training shard with one of {b}",
                    path.display()
                ))
                .help("tokenize both with the same tokenizer"));
            }
            let windows = Windows::all(&shard, data.max_length, "data.max_length")?;
            (shard, windows)
        }
        None => {
            let shard = TokenShard::open(&data.train)?;
            let (_, windows) = Windows::split(&shard, data.max_length, None, data.validation_fraction)?;
            (shard, windows)
        }
    };
    Ok((windows.count() > 0).then_some((shard, windows)))
}

pub(super) fn hash_data(config: &Config) -> Result<BTreeMap<String, Hashed>> {
    let mut data = BTreeMap::new();
    let shards = [("train", Some(&config.data.train)), ("validation", config.data.validation.as_ref())];
    for (name, path) in shards.into_iter().filter_map(|(name, path)| Some((name, path?))) {
        data.insert(name.to_owned(), Hashed { path: path.clone(), sha256: sha256_file(path)? });
    }
    Ok(data)
}
