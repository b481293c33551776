//! Pickled PyTorch checkpoints: `pytorch_model.bin`, its shards, or one file of any name.

use super::{Planned, Source};
use crate::{
    checkpoint::{Dtype, INDEX_NAME, Index, MODEL_NAME, TensorSpec, dtype},
    error::{Error, Result},
    merge::sidecar_files::{self, ConfigChanges},
    pickle::{PickledFile, PickledTensor},
    progress::Progress,
};
use serde_json::Value;
use std::{
    collections::{BTreeSet, HashMap},
    ops::Range,
    path::{Path, PathBuf},
};

/// The names older versions of transformers gave a model.
const BIN_NAME: &str = "pytorch_model.bin";
const BIN_INDEX_NAME: &str = "pytorch_model.bin.index.json";

/// Opened files whose tensors are all planned.
pub(super) struct PytorchSource {
    folder: Option<PathBuf>,
    dtype: Option<Dtype>,
    files: Vec<PickledFile>,
    planned: Vec<Planned>,
    // For each planned tensor: its file and its place in it.
    stored: Vec<(usize, usize)>,
    left_out: Vec<String>,
}

impl PytorchSource {
    /// Opens a folder or a file and checks that nothing is stored twice.
    pub fn open(path: &Path, dtype: Option<Dtype>) -> Result<PytorchSource> {
        let folder = path.is_dir().then(|| path.to_owned());
        let files = match &folder {
            Some(folder) => open_folder(folder)?,
            None => vec![PickledFile::open(path)?],
        };
        let tied = folder.as_deref().map(says_tied).transpose()?.unwrap_or(false);
        let beside = files.iter().flat_map(|file| file.beside().iter().map(|key| format!("'{key}'")));
        let beside = beside.collect::<Vec<_>>().join(", ");
        let left_out =
            if beside.is_empty() { vec![] } else { vec![format!("beside the state dict, not converted: {beside}")] };
        let mut source = PytorchSource { folder, dtype, files, planned: vec![], stored: vec![], left_out };
        source.plan(tied)?;
        Ok(source)
    }

    fn plan(&mut self, tied: bool) -> Result<()> {
        let mut seen: HashMap<&str, usize> = HashMap::new();
        for (f, file) in self.files.iter().enumerate() {
            for (t, tensor) in file.tensors().iter().enumerate() {
                if let Some(other) = seen.insert(&tensor.name, f) {
                    return Err(Error::request(format!(
                        "tensor '{}' is stored twice: in '{}' and in '{}'",
                        tensor.name,
                        self.files[other].path().display(),
                        file.path().display()
                    )));
                }
                if tied && let Some(embedding) = tied_embedding(tensor, file) {
                    // What save_pretrained does: config.json says that the head is the embedding.
                    self.left_out.push(format!(
                        "'{}' is '{}' itself (tie_word_embeddings), it is stored once",
                        tensor.name, embedding.name
                    ));
                    continue;
                }
                let keeps = !dtype::is_float(tensor.dtype);
                let to = self.dtype.filter(|_| !keeps).unwrap_or(tensor.dtype);
                let spec = TensorSpec { name: tensor.name.clone(), dtype: to, shape: tensor.shape.clone() };
                let stored_bytes = (tensor.elements() * tensor.dtype.bitsize() / 8) as u64;
                let stored_as = format!("{:?}", tensor.dtype);
                self.planned.push(Planned { spec, source: tensor.name.clone(), stored_as, stored_bytes });
                self.stored.push((f, t));
            }
        }
        Ok(())
    }

    fn tensor(&self, tensor: usize) -> (&PickledFile, &PickledTensor) {
        let (f, t) = self.stored[tensor];
        (&self.files[f], &self.files[f].tensors()[t])
    }
}

impl Source for PytorchSource {
    fn format(&self) -> &'static str {
        "pytorch"
    }

    fn tensors(&self) -> &[Planned] {
        &self.planned
    }

    fn granule(&self, tensor: usize) -> usize {
        let (_, tensor) = self.tensor(tensor);
        if tensor.is_contiguous() { 1 } else { tensor.elements() }
    }

    fn read(&self, tensor: usize, elements: Range<usize>) -> Result<Vec<u8>> {
        let to = self.planned[tensor].spec.dtype;
        let (file, tensor) = self.tensor(tensor);
        let count = elements.len();
        let bytes = file.read(tensor, elements)?;
        if to == tensor.dtype {
            return Ok(bytes);
        }
        let mut out = vec![0; count * to.bitsize() / 8];
        if tensor.dtype == Dtype::F64 {
            let mut values = vec![0f64; count];
            dtype::decode_f64(tensor.dtype, &bytes, &mut values)?;
            dtype::encode_f64_into(to, &values, &mut out)?;
        } else {
            let mut values = vec![0f32; count];
            dtype::decode_f32(tensor.dtype, &bytes, &mut values)?;
            dtype::encode_f32_into(to, &values, &mut out)?;
        }
        Ok(out)
    }

    fn sidecar_files(&self, folder: &Path, _: &Progress) -> Result<Vec<String>> {
        if let Some(from) = &self.folder {
            sidecar_files::copy(from, folder, &ConfigChanges { dtype: self.dtype, ..ConfigChanges::default() })?;
        }
        Ok(self.left_out.clone())
    }
}

/// The embedding that an output head is another name for.
fn tied_embedding<'a>(tensor: &PickledTensor, file: &'a PickledFile) -> Option<&'a PickledTensor> {
    let ends = |name: &str, ends: &[&str]| ends.iter().any(|end| name.ends_with(end));
    if !ends(&tensor.name, &["lm_head.weight", "embed_out.weight", "output_projection.weight"]) {
        return None;
    }
    let embeddings =
        ["embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "shared.weight"];
    file.tensors().iter().find(|other| ends(&other.name, &embeddings) && other.is_same_view(tensor))
}

fn says_tied(folder: &Path) -> Result<bool> {
    let path = folder.join("config.json");
    if !path.exists() {
        return Ok(false);
    }
    let text = crate::checkpoint::read_text(&path)?;
    let config: Value = serde_json::from_slice(&text)
        .map_err(|e| Error::request(format!("'{}' is not valid JSON: {e}", path.display())))?;
    Ok(config["tie_word_embeddings"] == true)
}

fn open_folder(folder: &Path) -> Result<Vec<PickledFile>> {
    let (single, index) = (folder.join(BIN_NAME), folder.join(BIN_INDEX_NAME));
    if index.exists() && single.exists() {
        return Err(Error::request(format!("'{}' holds both {BIN_NAME} and {BIN_INDEX_NAME}", folder.display()))
            .help("remove the one that is out of date: they may be two models"));
    }
    if let Some(name) = [MODEL_NAME, INDEX_NAME].iter().find(|name| folder.join(name).exists())
        && (index.exists() || single.exists())
    {
        return Err(Error::request(format!("'{}' holds {name} beside {BIN_NAME}", folder.display())).help(
            "transformers and the commands here read the safetensors; to convert the other one, copy it with its config.json \
             into a folder of its own",
        ));
    }
    if index.exists() {
        return open_shards(&index);
    }
    if single.exists() {
        return Ok(vec![PickledFile::open(&single)?]);
    }
    if [MODEL_NAME, INDEX_NAME].iter().any(|name| folder.join(name).exists()) {
        return Err(Error::request(format!("'{}' holds safetensors already", folder.display()))
            .help("to change the type or the size of shards: relora-kit merge --base FOLDER --dtype bf16 -o OUTPUT"));
    }
    Err(Error::request(format!("'{}' holds no {BIN_NAME}, nor an index of its shards", folder.display()))
        .help("name the .gguf or .bin file itself"))
}

/// Opens the shards that the index names, and checks that both agree.
fn open_shards(path: &Path) -> Result<Vec<PickledFile>> {
    let text = crate::checkpoint::read_text(path)?;
    let index: Index = serde_json::from_slice(&text)
        .map_err(|e| Error::request(format!("'{}' is not a valid shard index: {e}", path.display())))?;
    let mixed = |what: String| {
        Error::request(what).help("the shards and the index come from different models; download them together")
    };
    let mut files = Vec::new();
    for name in index.weight_map.values().collect::<BTreeSet<_>>() {
        // A shard lies beside its index: a path that leads elsewhere is a mistake or an attack.
        if Path::new(name).file_name() != Some(name.as_ref()) {
            return Err(Error::request(format!(
                "'{}' names the shard '{name}', which is not a plain file name",
                path.display()
            )));
        }
        let file = PickledFile::open(&path.with_file_name(name))?;
        let held: BTreeSet<&str> = file.tensors().iter().map(|t| t.name.as_str()).collect();
        if let Some(tensor) = held.iter().find(|tensor| !index.weight_map.contains_key(**tensor)) {
            return Err(mixed(format!("'{}' does not list '{tensor}', which '{name}' holds", path.display())));
        }
        let listed = index.weight_map.iter().filter(|(_, shard)| *shard == name);
        if let Some((tensor, _)) = listed.into_iter().find(|(tensor, _)| !held.contains(tensor.as_str())) {
            return Err(mixed(format!("'{}' places '{tensor}' in '{name}', which does not hold it", path.display())));
        }
        files.push(file);
    }
    Ok(files)
}
