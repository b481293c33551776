//! What of a run's configuration may change when the run is resumed.

use super::Config;
use crate::{
    error::{Error, Result},
    run::ConfigChange,
};
use serde_json::Value;
use std::collections::BTreeMap;

/// Keys that may change between two updates: they alter neither the model nor which data an update reads.
const MAY_CHANGE: &[&str] = &[
    "data.train",
    "data.validation",
    "train.activation_checkpointing",
    "train.clip_grad_norm",
    "train.cuda_graphs",
    "train.eval_every",
    "train.eval_tokens",
    "train.keep_checkpoints",
    "train.lr",
    "train.min_lr_ratio",
    "train.num_training_steps",
    "train.save_every",
    "train.skip_batches",
    "train.tf32",
    "train.weight_decay",
];

/// Where the first model came from: it is read again only while there is no checkpoint.
const ORIGIN: &[&str] = &["model.checkpoint", "model.config", "model.warmed_up_model"];

/// How an update is divided into passes, which only their product decides.
const PASSES: [&str; 2] = ["train.batch_size", "train.gradient_accumulation"];
const UPDATE: &str = "train.batch_size x train.gradient_accumulation";

impl Config {
    /// Every key with its value: `train.lr` -> 0.001. The product of batch size and gradient accumulation stands for both.
    pub fn keys(&self) -> Result<BTreeMap<String, Value>> {
        let value = serde_json::to_value(self).map_err(|e| Error::environment(e.to_string()))?;
        let mut keys = BTreeMap::new();
        flatten("", &value, &mut keys);
        PASSES.iter().for_each(|key| drop(keys.remove(*key)));
        keys.insert(UPDATE.to_owned(), (self.train.batch_size * self.train.gradient_accumulation).into());
        Ok(keys)
    }

    /// How this configuration differs from `before`, the keys that a run had until `step` updates were made. A change that would make
    /// it another run is refused by its key. `has_checkpoint`: the model comes from a checkpoint of the run.
    pub fn changes_since(
        &self,
        before: &BTreeMap<String, Value>,
        step: u64,
        has_checkpoint: bool,
    ) -> Result<Vec<ConfigChange>> {
        let after = self.keys()?;
        let names = before.keys().chain(after.keys().filter(|key| !before.contains_key(*key)));
        let change = |key: &String| {
            let of = |keys: &BTreeMap<String, Value>| keys.get(key).cloned().unwrap_or(Value::Null);
            ConfigChange { step, key: key.clone(), from: of(before), to: of(&after) }
        };
        let changes: Vec<ConfigChange> = names.map(change).filter(|c| !same(&c.from, &c.to)).collect();
        let may = |c: &&ConfigChange| {
            let path_only = !c.key.starts_with("data.") || (!c.from.is_null() && !c.to.is_null());
            let key = c.key.as_str();
            (MAY_CHANGE.contains(&key) && path_only) || (ORIGIN.contains(&key) && has_checkpoint)
        };
        match changes.iter().find(|c| !may(c)) {
            None => Ok(changes),
            Some(ConfigChange { key, from, to, .. }) => Err(Error::request(format!(
                "{key} was {from} when the run began and is {to} in its config.toml: that would be another run"
            ))
            .help(format!("write {from} again, or start a new run; docs/train.md lists the keys that may change"))),
        }
    }
}

/// Equal, and numbers by their value: 1 and 1.0 are the same setting.
fn same(a: &Value, b: &Value) -> bool {
    a == b || a.as_f64().zip(b.as_f64()).is_some_and(|(a, b)| a == b)
}

fn flatten(prefix: &str, value: &Value, keys: &mut BTreeMap<String, Value>) {
    match value {
        Value::Object(object) => {
            for (key, value) in object {
                let name = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
                flatten(&name, value, keys);
            }
        }
        value => drop(keys.insert(prefix.to_owned(), value.clone())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn config(set: &[&str]) -> Config {
        let text = "[model]\npreset = \"llama_9m\"\n[data]\ntrain = \"t\"\nmax_length = 8\n[train]\nmode = \"full\"\n\
                    batch_size = 8\nnum_training_steps = 9\nlr = 1e-3\nscheduler = \"constant\"\n";
        Config::parse(text, Path::new("/run/config.toml"), &set.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>())
            .unwrap()
    }

    #[test]
    fn what_makes_another_run_is_refused_by_its_key() {
        let before = config(&[]).keys().unwrap();
        for set in [
            "train.batch_size=16",
            "train.gradient_accumulation=2",
            "data.max_length=16",
            "train.seed=5",
            "data.validation_fraction=0.5",
            "data.shuffle=false",
            "data.validation=v",
            "model.preset=llama_20m",
            "train.adam_beta2=0.99",
            "train.dtype=bf16",
            "train.optimizer=adam_zero",
        ] {
            let error = config(&[set]).changes_since(&before, 4, true).unwrap_err();
            let key = set.split('=').next().unwrap();
            assert!(error.message.contains(key), "{set}: {error}");
        }
    }

    #[test]
    fn what_changes_neither_model_nor_data_is_recorded() {
        let before = config(&[]).keys().unwrap();
        let after = config(&["train.lr=1e-4", "train.num_training_steps=20", "data.train=moved"]);
        let changes = after.changes_since(&before, 4, true).unwrap();
        let keys: Vec<&str> = changes.iter().map(|c| c.key.as_str()).collect();
        assert_eq!(keys, ["data.train", "train.lr", "train.num_training_steps"]);
        assert_eq!((changes[1].step, changes[1].from.as_f64(), changes[1].to.as_f64()), (4, Some(1e-3), Some(1e-4)));
        // The same update in smaller passes is the same update.
        let smaller = config(&["train.batch_size=2", "train.gradient_accumulation=4"]);
        assert!(smaller.changes_since(&before, 4, true).unwrap().is_empty());
    }
}
