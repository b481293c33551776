//! From a TOML file and `--set` to a checked configuration.

use super::Config;
use crate::{
    error::{Error, Result},
    inputs,
};
use std::path::Path;

/// Parts of a key; the configuration has two.
const MAX_PARTS: usize = 8;

/// Bytes of the largest configuration that is read.
const MAX_BYTES: u64 = 10_000_000;

impl Config {
    /// Reads `path`, replaces the keys named in `set` (`section.key=value`), and checks the result.
    /// Paths in the file are relative to the file's folder, those in `set` to the current one.
    pub fn read(path: &Path, set: &[String]) -> Result<Config> {
        let text = String::from_utf8(inputs::read(path, MAX_BYTES)?)
            .map_err(|_| Error::request(format!("'{}' is not UTF-8 text, expected TOML", path.display())))?;
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
        let m = &self.model;
        let counted = m.warmed_up_model.is_none() || (m.warmed_up_steps.is_some() && m.warmed_up_tokens.is_some());
        if counted { self.resolve_token_budget() } else { Ok(()) }
    }

    /// Turns `max_train_tokens` into `num_training_steps`: as many whole updates as the tokens allow that no warmed-up model
    /// has seen. What such a model has seen must be known.
    pub(in crate::train) fn resolve_token_budget(&mut self) -> Result<()> {
        let Some(tokens) = self.train.max_train_tokens.take() else { return Ok(()) };
        let per_update = self.tokens_per_update();
        let before = self.model.warmed_up_tokens.unwrap_or(0);
        let updates = tokens.0.saturating_sub(before).checked_div(per_update).unwrap_or(0);
        if updates == 0 {
            let seen = if before > 0 { format!(", of which the model has seen {before}") } else { String::new() };
            return Err(Error::request(format!(
                "train.max_train_tokens is {}{seen}: less than the {per_update} tokens of one update remain",
                tokens.0
            )));
        }
        self.train.num_training_steps = self.model.warmed_up_steps.unwrap_or(0) + updates;
        Ok(())
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
    let shown: String = assignment.chars().take(100).collect();
    let bad = || {
        Error::request(format!("'--set {shown}' is not of the form section.key=value"))
            .help("for example: --set train.lr=1e-3")
    };
    let (key, value) = assignment.split_once('=').ok_or_else(bad)?;
    // Tables inside tables are read, and dropped, by functions that call themselves.
    if key.matches('.').count() >= MAX_PARTS {
        return Err(bad());
    }
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
        std::fs::write(&path, text).unwrap();
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
            ("train.max_train_tokens=100", "less than the 256 tokens of one update remain"),
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
