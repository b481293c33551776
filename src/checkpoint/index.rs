//! `model.safetensors.index.json`: which shard holds which tensor.

use super::file::TensorFile;
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

/// The name Hugging Face gives it.
pub const INDEX_NAME: &str = "model.safetensors.index.json";

/// The index file. Unknown keys are kept out: nothing we do depends on them.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Index {
    /// `total_size` (bytes of all tensors) and whatever else the writer noted.
    #[serde(default)]
    pub metadata: BTreeMap<String, serde_json::Value>,
    /// Tensor name -> file name beside the index.
    pub weight_map: BTreeMap<String, String>,
}

impl Index {
    /// Opens the shards that the index at `path` names, and checks that index and shards agree.
    pub fn open_shards(path: &Path) -> Result<Vec<TensorFile>> {
        let text = super::read_text(path)?;
        let index: Index = serde_json::from_slice(&text).map_err(|e| {
            Error::request(format!("'{}' is not a valid shard index: {e}", path.display()))
                .help("download the index again")
        })?;
        let names: BTreeSet<&String> = index.weight_map.values().collect();
        let mut files = Vec::new();
        for name in names {
            // A shard lies beside its index: a path that leads elsewhere is a mistake or an attack.
            if Path::new(name).file_name() != Some(name.as_ref()) {
                return Err(Error::request(format!(
                    "'{}' names the shard '{name}', which is not a plain file name",
                    path.display()
                )));
            }
            let shard = path.with_file_name(name);
            if !shard.exists() {
                return Err(Error::request(format!(
                    "'{}' names the shard '{name}', which does not exist",
                    path.display()
                ))
                .help("download the missing shard, or remove the index if the model is one file"));
            }
            files.push(TensorFile::open(&shard)?);
        }
        index.check_against(path, &files)?;
        Ok(files)
    }

    fn check_against(&self, path: &Path, files: &[TensorFile]) -> Result<()> {
        let mut stored = BTreeMap::new();
        for file in files {
            for tensor in file.tensors() {
                let shard = file.path().file_name().unwrap_or_default().to_string_lossy().into_owned();
                if self.weight_map.get(tensor.name()) != Some(&shard) {
                    let said = self.weight_map.get(tensor.name()).map_or("nowhere".to_owned(), |s| format!("in '{s}'"));
                    return Err(Error::request(format!(
                        "'{}' places tensor '{}' {said}, but '{shard}' holds it",
                        path.display(),
                        tensor.name()
                    ))
                    .help("the shards and the index come from different models; download them together"));
                }
                stored.insert(tensor.name(), shard);
            }
        }
        for (name, shard) in &self.weight_map {
            if !stored.contains_key(name.as_str()) {
                return Err(Error::request(format!(
                    "'{}' places tensor '{name}' in '{shard}', which does not hold it",
                    path.display()
                ))
                .help("the shards and the index come from different models; download them together"));
            }
        }
        Ok(())
    }
}
