//! The run directory: what `train` leaves behind, and `spectrum --run` and `verify` read.
//!
//! ```text
//! run/config.toml            the resolved configuration
//! run/manifest.json          versions, seeds, hashes, and per cycle: steps, rank, scale, sha256 of its files
//! run/metrics.jsonl          one object per update
//! run/tensorboard/           the same numbers as TensorBoard events
//! run/base/                  the checkpoint the first cycle started from
//! run/cycles/cycle-001/      the cycle's delta as a PEFT adapter
//! run/checkpoints/step-N/    a Hugging Face checkpoint, and beside it the state that resuming needs
//! ```

use crate::{
    checkpoint::roundings::{Kind, Step},
    error::{self, Error, Result},
    inputs,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::{
    collections::BTreeMap,
    fs,
    io::Read,
    path::{Path, PathBuf},
};

/// Bytes of the largest manifest that is read.
const MAX_MANIFEST: u64 = 100_000_000;

/// `run/manifest.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of this file's layout.
    pub schema: u32,
    /// `relora-kit` and its version.
    pub tool: String,
    /// `full`, `lora` or `relora`.
    pub mode: String,
    /// Seed of initialisation, shuffling and restarts.
    pub seed: u64,
    /// Updates that the model had seen before this run.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub first_step: u64,
    /// Whether merged weights were rounded stochastically (bf16), so that they may be off by a whole unit in the last place.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub stochastic_rounding: bool,
    /// Whether merged weights were quantised, `nf4` or `int8`, and are stored as the values that this left.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantised: Option<String>,
    /// The configuration, key by key, that the newest update was made with; empty in runs of 0.1.0.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub configuration: BTreeMap<String, Value>,
    /// Keys that were changed when the run was resumed, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub changes: Vec<ConfigChange>,
    /// Training data: path, and sha256 of the token shard.
    pub data: BTreeMap<String, Hashed>,
    /// The checkpoint the first cycle started from; absent before the first cycle starts and in `full` mode.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base: Option<BaseRecord>,
    /// Finished cycles, in order.
    pub cycles: Vec<CycleRecord>,
    /// The newest complete checkpoint; after the last update, the final one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<CheckpointRecord>,
    /// Whether the last update has been made and its checkpoint written.
    pub finished: bool,
}

fn is_zero(n: &u64) -> bool {
    *n == 0
}

impl Manifest {
    /// How many cycles are merged into the checkpoint of `step`, and whether it lies inside a cycle, so that the delta so far
    /// was added to its stored weights.
    pub fn merges_before(&self, step: u64) -> (u64, bool) {
        let merged: Vec<&CycleRecord> = self.cycles.iter().filter(|c| c.last_step <= step).collect();
        let last = merged.last().map(|c| c.last_step).or(self.base.as_ref().map(|b| b.step));
        (merged.len() as u64, last.is_some_and(|last| step > last))
    }

    /// How a merge rounds the weights; `None` where this version does not know the word.
    pub fn rounding_kind(&self) -> Option<Kind> {
        match self.quantised.as_deref() {
            Some("nf4") => Some(Kind::Nf4),
            Some("int8") => Some(Kind::Int8),
            Some(_) => None,
            None if self.stochastic_rounding => Some(Kind::Stochastic),
            None => Some(Kind::Nearest),
        }
    }

    /// How the weights of the checkpoint of `step` were rounded since `from`, the step of another checkpoint of this run, or
    /// since `run/base` if none. `base` is the fingerprint of that checkpoint, `modules` what the cycles train. `None`
    /// where the manifest does not tell.
    pub fn roundings(&self, base: String, from: Option<u64>, step: u64, modules: Vec<String>) -> Option<Vec<Step>> {
        if self.mode == "full" {
            let count = step.checked_sub(from?)?;
            let kind = if self.stochastic_rounding { Kind::Stochastic } else { Kind::Nearest };
            return Some(vec![Step { base, kind, dtype: None, count, modules: Vec::new(), updates: 0, seed: None }]);
        }
        let base_step = self.base.as_ref()?.step;
        let (merges, inside) = self.merges_before(step);
        let (before, was_inside) = from.map_or((0, false), |from| self.merges_before(from));
        let start = from.unwrap_or(base_step);
        if step < start || start < base_step {
            return None;
        }
        let updates = step - start;
        // Inside a cycle the stored weight is a rounded copy of the frozen one and the delta so far.
        let copies = u64::from(inside) + u64::from(was_inside);
        let kind = self.rounding_kind()?;
        let step = |kind, count| {
            let (base, modules) = (base.clone(), modules.clone());
            Step { base, kind, dtype: None, count, modules, updates, seed: None }
        };
        match kind {
            Kind::Nf4 | Kind::Int8 => Some(vec![step(kind, merges - before), step(Kind::Nearest, copies)]),
            _ => Some(vec![step(kind, merges - before + copies)]),
        }
    }
}

/// A key of the configuration that was changed between two updates.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConfigChange {
    /// Updates made before the change.
    pub step: u64,
    /// `section.key`.
    pub key: String,
    /// Its value before; null if it was absent.
    pub from: Value,
    /// Its value from then on.
    pub to: Value,
}

/// A file outside the run, and what it was.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hashed {
    /// As given in the configuration.
    pub path: PathBuf,
    /// Hexadecimal sha256 of its content.
    pub sha256: String,
}

/// `run/base/`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BaseRecord {
    /// Updates made before the first cycle (the warm start).
    pub step: u64,
    /// File name -> sha256, for every file of the folder.
    pub files: BTreeMap<String, String>,
}

/// One finished cycle: the delta `scaling * B @ A` of every targeted weight, stored in `folder` as a PEFT adapter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CycleRecord {
    /// From 1.
    pub cycle: u64,
    /// Relative to the run directory: `cycles/cycle-001`.
    pub folder: PathBuf,
    /// Updates made when the cycle began and when it was merged: it covers `first_step < n <= last_step`.
    pub first_step: u64,
    /// See `first_step`.
    pub last_step: u64,
    /// Rank of A and B.
    pub r: usize,
    /// `lora_alpha / r`, or `tanh(scaling)` where it is trained.
    pub scaling: f64,
    /// Share of the delta that survived the rounding of the weights it was merged into, where these are rounded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retention: Option<f64>,
    /// File name -> sha256, for every file of the folder.
    pub files: BTreeMap<String, String>,
}

/// One checkpoint folder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckpointRecord {
    /// Updates made.
    pub step: u64,
    /// Relative to the run directory: `checkpoints/step-100`.
    pub folder: PathBuf,
    /// File name (relative to the folder) -> sha256, for every file in it.
    pub files: BTreeMap<String, String>,
}

/// Paths inside a run directory.
#[derive(Clone, Debug)]
pub struct RunDir(pub PathBuf);

impl RunDir {
    /// Folder of the tokenizer's files, which every checkpoint gets a copy of; relative to the run directory. Not there if
    /// the tokenizer is that of bytes, or unknown.
    pub const TOKENIZER: &str = "tokenizer";

    /// `manifest.json`
    pub fn manifest_path(&self) -> PathBuf {
        self.0.join("manifest.json")
    }

    /// `config.toml`
    pub fn config_path(&self) -> PathBuf {
        self.0.join("config.toml")
    }

    /// `metrics.jsonl`
    pub fn metrics_path(&self) -> PathBuf {
        self.0.join("metrics.jsonl")
    }

    /// `base/`
    pub fn base_path(&self) -> PathBuf {
        self.0.join("base")
    }

    /// `cycles/cycle-00K`, K from 1, relative to the run directory.
    pub fn cycle_folder(cycle: u64) -> PathBuf {
        PathBuf::from(format!("cycles/cycle-{cycle:03}"))
    }

    /// `checkpoints/step-N`, relative to the run directory.
    pub fn checkpoint_folder(step: u64) -> PathBuf {
        PathBuf::from(format!("checkpoints/step-{step}"))
    }

    /// The last components of the names of the modules that the cycles train; none if the first cycle does not list them.
    pub fn trained_modules(&self, manifest: &Manifest) -> Vec<String> {
        let config = manifest.cycles.first().map(|cycle| self.0.join(&cycle.folder).join("adapter_config.json"));
        let json = config.and_then(|path| inputs::read(&path, MAX_MANIFEST).ok());
        let value = json.and_then(|json| serde_json::from_slice::<serde_json::Value>(&json).ok());
        let targets = value.as_ref().and_then(|value| value["target_modules"].as_array());
        targets.into_iter().flatten().filter_map(|name| name.as_str().map(str::to_owned)).collect()
    }

    /// Reads and checks the manifest.
    pub fn manifest(&self) -> Result<Manifest> {
        let path = self.manifest_path();
        let bytes = inputs::read(&path, MAX_MANIFEST).map_err(|e| match e.kind {
            error::Kind::Request => e.help("name a folder written by `relora-kit train`"),
            error::Kind::Environment | error::Kind::Interrupted => e,
        })?;
        let manifest: Manifest = serde_json::from_slice(&bytes)
            .map_err(|e| Error::request(format!("'{}' is not a run manifest: {e}", path.display())))?;
        if manifest.schema != 1 {
            return Err(Error::request(format!("'{}' has schema {}, expected 1", path.display(), manifest.schema))
                .help("use the relora-kit version that wrote it"));
        }
        Ok(manifest)
    }
}

/// Hexadecimal sha256 of a file's content.
pub fn sha256_file(path: &Path) -> Result<String> {
    let mut file = inputs::open(path)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).map_err(|e| Error::io("read", path, e))? {
            0 => return Ok(hasher.finalize().iter().map(|b| format!("{b:02x}")).collect()),
            n => hasher.update(&buffer[..n]),
        }
    }
}

/// sha256 of every file below `folder`, by path relative to it.
pub fn sha256_folder(folder: &Path) -> Result<BTreeMap<String, String>> {
    let mut hashes = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(dir) = folders.pop() {
        for entry in fs::read_dir(&dir).map_err(|e| Error::io("read", &dir, e))? {
            let path = entry.map_err(|e| Error::io("read", &dir, e))?.path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(folder).unwrap_or(&path).to_string_lossy().into_owned();
                hashes.insert(name, sha256_file(&path)?);
            }
        }
    }
    Ok(hashes)
}
