//! What is in a checkpoint or an adapter: names, shapes, dtypes, sizes; on request the values' statistics.

#[cfg(target_arch = "x86_64")]
mod avx512;
mod moments;
pub mod stats;
mod tree;

pub use stats::Stats;
pub use tree::Node;

use crate::{
    adapter::{self, AdapterConfig, Stored, config::CONFIG_NAME, names::Key},
    checkpoint::{Checkpoint, Dtype, Filter, Tensor, TensorFile},
    error::{Error, Result},
    progress::Progress,
};
use serde::Serialize;
use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

/// What to look at.
#[derive(Clone, Debug)]
pub struct Options {
    /// A checkpoint (folder or file), or an adapter folder.
    pub path: PathBuf,
    /// Which tensors.
    pub filter: Filter,
    /// Read the values, too.
    pub stats: bool,
    /// Group the tensors by module.
    pub tree: bool,
}

/// The result of `inspect`.
#[derive(Clone, Debug, Serialize)]
pub struct Inspection {
    /// Version of this layout.
    pub schema: u32,
    /// What was inspected.
    #[serde(serialize_with = "crate::escape::lossy")]
    pub path: PathBuf,
    /// Its files.
    pub files: Vec<FileSummary>,
    /// What `adapter_config.json` says, for an adapter.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapter: Option<AdapterSummary>,
    /// The tensors that match the filter, in the order of their bytes.
    pub tensors: Vec<TensorSummary>,
    /// Elements of these tensors.
    pub parameters: u64,
    /// Bytes of these tensors.
    pub bytes: u64,
    /// Elements by dtype.
    pub dtypes: BTreeMap<String, u64>,
    /// With `tree`: the modules.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tree: Option<Vec<Node>>,
}

/// One file of a checkpoint.
#[derive(Clone, Debug, Serialize)]
pub struct FileSummary {
    /// File name.
    pub name: String,
    /// Bytes, header included.
    pub bytes: u64,
    /// Tensors in it.
    pub tensors: usize,
    /// `__metadata__`.
    pub metadata: BTreeMap<String, String>,
}

/// One tensor.
#[derive(Clone, Debug, Serialize)]
pub struct TensorSummary {
    /// Name as stored.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Extents.
    pub shape: Vec<usize>,
    /// Bytes.
    pub bytes: u64,
    /// File name.
    pub file: String,
    /// With `stats`, for types whose values can be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stats: Option<Stats>,
}

/// What an adapter is, before it meets its base.
#[derive(Clone, Debug, Serialize)]
pub struct AdapterSummary {
    /// `LORA`, ...
    pub peft_type: String,
    /// `CAUSAL_LM`, ...
    pub task_type: Option<String>,
    /// What it was trained on.
    pub base_model_name_or_path: Option<String>,
    /// Rank, where no pattern says otherwise.
    pub r: usize,
    /// Numerator of the scaling, where no pattern says otherwise.
    pub lora_alpha: f64,
    /// What B @ A is multiplied with, where no pattern says otherwise.
    pub scaling: f64,
    /// Whether some modules have a rank or an alpha of their own.
    pub patterns: bool,
    /// Scaled by `1 / sqrt(r)`.
    pub use_rslora: bool,
    /// Weight-decomposed.
    pub use_dora: bool,
    /// As written in the configuration.
    pub target_modules: Option<serde_json::Value>,
    /// Modules that have an A and a B factor in the file.
    pub modules: usize,
    /// Parameters that are stored in full.
    pub full: Vec<String>,
}

/// Looks into the headers; with `stats`, also reads the values, on all threads.
pub fn run(options: &Options, progress: &Progress) -> Result<Inspection> {
    let (checkpoint, adapter) = open(&options.path)?;
    let tensors: Vec<Tensor> = checkpoint.tensors().filter(|t| options.filter.takes(t.name())).collect();
    if tensors.is_empty() && !checkpoint.is_empty() {
        return Err(Error::request(format!("no tensor of '{}' matches the filter", options.path.display()))
            .help("* matches any characters: --filter '*self_attn*'"));
    }
    let stats = if options.stats { stats::of(&tensors, progress)? } else { vec![None; tensors.len()] };
    let mut dtypes: BTreeMap<String, u64> = BTreeMap::new();
    for t in &tensors {
        *dtypes.entry(format!("{:?}", t.dtype())).or_default() += t.elements() as u64;
    }
    Ok(Inspection {
        schema: 1,
        path: options.path.clone(),
        files: checkpoint.files().iter().map(FileSummary::of).collect(),
        adapter,
        parameters: tensors.iter().map(|t| t.elements() as u64).sum(),
        bytes: tensors.iter().map(|t| t.bytes().len() as u64).sum(),
        dtypes,
        tree: options.tree.then(|| tree::of(&tensors)),
        tensors: tensors.iter().zip(stats).map(|(t, stats)| TensorSummary::of(t, stats)).collect(),
    })
}

fn open(path: &Path) -> Result<(Checkpoint, Option<AdapterSummary>)> {
    if adapter::is_adapter(path) {
        let file = adapter::open_tensors(path)?;
        let summary = AdapterSummary::of(&AdapterConfig::open(&path.join(CONFIG_NAME))?, &file);
        return Ok((Checkpoint::from_files(path, vec![file])?, Some(summary)));
    }
    Ok((Checkpoint::open(path)?, None))
}

fn file_name(file: &TensorFile) -> String {
    file.path().file_name().unwrap_or_default().to_string_lossy().into_owned()
}

impl FileSummary {
    fn of(file: &TensorFile) -> FileSummary {
        FileSummary {
            name: file_name(file),
            // Of an adapter that was pickled, `file` is a copy in another format.
            bytes: file.path().metadata().map_or(file.len(), |meta| meta.len()),
            tensors: file.tensors().len(),
            metadata: file.metadata().clone(),
        }
    }
}

impl TensorSummary {
    fn of(tensor: &Tensor, stats: Option<Stats>) -> TensorSummary {
        TensorSummary {
            name: tensor.name().to_owned(),
            dtype: tensor.dtype(),
            shape: tensor.shape().to_vec(),
            bytes: tensor.bytes().len() as u64,
            file: file_name(tensor.file()),
            stats,
        }
    }
}

impl AdapterSummary {
    fn of(config: &AdapterConfig, file: &TensorFile) -> AdapterSummary {
        let (mut modules, mut full) = (BTreeSet::new(), Vec::new());
        for tensor in file.tensors() {
            match adapter::types::parse_key(&config.peft_type, tensor.name()) {
                Some(Key::Stored { name, stored: Stored::Full }) => full.push(name),
                Some(Key::Stored { name, .. } | Key::Slot { module: name, .. }) => drop(modules.insert(name)),
                None => {}
            }
        }
        AdapterSummary {
            peft_type: config.peft_type.clone(),
            task_type: config.task_type.clone(),
            base_model_name_or_path: config.base_model_name_or_path.clone(),
            r: config.r,
            lora_alpha: config.lora_alpha,
            scaling: crate::adapter::config::scaling(config.lora_alpha, config.r, config.use_rslora),
            patterns: !config.rank_pattern.is_empty() || !config.alpha_pattern.is_empty(),
            use_rslora: config.use_rslora,
            use_dora: config.use_dora,
            target_modules: config.target_modules.clone(),
            modules: modules.len(),
            full,
        }
    }
}
