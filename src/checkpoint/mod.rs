//! Bytes on disk: memory-mapped reading and streaming writing of safetensors, one file or many shards.
//!
//! Imports nothing of ours but the foundation (errors, staged outputs, digests); everything else reads and writes weights through it.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
pub mod dtype;
pub mod encodings;
mod file;
pub mod header;
mod index;
mod reader;
pub mod roundings;
mod select;
mod writer;

pub use dtype::Dtype;
pub use file::{MappedFile, Tensor, TensorFile};
pub use index::{INDEX_NAME, Index};
pub use reader::{READ, Reader};
pub use select::{Filter, natural_key};
pub use writer::{FileSpecs, TensorSpec, Writer};

use crate::{
    error::{Error, Result},
    inputs,
};
use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

/// Bytes of the largest configuration or index that is read.
const MAX_TEXT: u64 = 100_000_000;

/// Reads a configuration or an index whole; a file that is too large for one is refused before it fills the memory.
pub fn read_text(path: &Path) -> Result<Vec<u8>> {
    inputs::read(path, MAX_TEXT)
}

/// The name Hugging Face gives a model in one file.
pub const MODEL_NAME: &str = "model.safetensors";

/// The output head of causal models. Where the embedding is the head, too, no tensor of this name is stored.
pub const HEAD_NAME: &str = "lm_head.weight";

/// The input embedding of LLaMA.
pub const EMBEDDING_NAME: &str = "model.embed_tokens.weight";

/// `model-00001-of-00002.safetensors`.
fn is_shard(entry: std::fs::DirEntry) -> bool {
    entry.file_name().to_str().is_some_and(|name| name.starts_with("model-") && name.ends_with(".safetensors"))
}

/// A checkpoint: tensor name -> view, over all its files.
pub struct Checkpoint {
    path: PathBuf,
    files: Vec<TensorFile>,
    places: HashMap<String, (usize, usize)>,
}

impl Checkpoint {
    /// Opens one `.safetensors` file, or a Hugging Face folder with `model.safetensors` or shards and their index.
    pub fn open(path: &Path) -> Result<Checkpoint> {
        let meta = path.metadata().map_err(|e| Error::io("open", path, e))?;
        if !meta.is_dir() {
            return Self::from_files(path, vec![TensorFile::open(path)?]);
        }
        let (single, index) = (path.join(MODEL_NAME), path.join(INDEX_NAME));
        // An index may list the one file, too.
        if index.exists() && single.exists() && std::fs::read_dir(path).into_iter().flatten().flatten().any(is_shard) {
            return Err(Error::request(format!(
                "'{}' holds two models, {MODEL_NAME} and the shards of {INDEX_NAME}: transformers reads {MODEL_NAME}",
                path.display()
            ))
            .help(format!("remove the one that is out of date, or name '{}' itself", single.display())));
        }
        if index.exists() {
            Self::from_files(path, Index::open_shards(&index)?)
        } else if single.exists() {
            Self::from_files(path, vec![TensorFile::open(&single)?])
        } else {
            let other = ["pytorch_model.bin", "pytorch_model.bin.index.json"].iter().any(|n| path.join(n).exists());
            let hint = if other {
                "it holds a PyTorch checkpoint: run `relora-kit convert` first"
            } else if path.join("adapter_config.json").exists() {
                "it holds an adapter: pass it with --adapter"
            } else {
                "name a folder saved by `save_pretrained`, or a .safetensors file"
            };
            Err(Error::request(format!("'{}' holds neither {MODEL_NAME} nor {INDEX_NAME}", path.display())).help(hint))
        }
    }

    /// A checkpoint over files that are open already; `path` is what the user named.
    pub fn from_files(path: &Path, files: Vec<TensorFile>) -> Result<Checkpoint> {
        let mut places = HashMap::new();
        for (f, file) in files.iter().enumerate() {
            for (t, tensor) in file.tensors().enumerate() {
                if let Some((other, _)) = places.insert(tensor.name().to_owned(), (f, t)) {
                    return Err(Error::request(format!(
                        "tensor '{}' is stored twice: in '{}' and in '{}'",
                        tensor.name(),
                        files[other].path().display(),
                        file.path().display()
                    )));
                }
            }
        }
        Ok(Checkpoint { path: path.to_owned(), files, places })
    }

    /// What the user named: the folder or the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The folder with `config.json`, if the checkpoint is one.
    pub fn folder(&self) -> Option<&Path> {
        self.path.is_dir().then_some(&self.path)
    }

    /// The mapped files, in the order of their names.
    pub fn files(&self) -> &[TensorFile] {
        &self.files
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether there are no tensors.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// All tensors, file by file in the order of their bytes.
    pub fn tensors(&self) -> impl Iterator<Item = Tensor<'_>> {
        self.files.iter().flat_map(TensorFile::tensors)
    }

    /// The tensor called `name`, if there is one.
    pub fn get(&self, name: &str) -> Option<Tensor<'_>> {
        self.places.get(name).map(|&(f, t)| self.files[f].tensor(t))
    }

    /// The tensor called `name`, or an error that says where it was looked for.
    pub fn tensor(&self, name: &str) -> Result<Tensor<'_>> {
        self.get(name).ok_or_else(|| Error::request(format!("'{}' has no tensor '{name}'", self.path.display())))
    }
}
