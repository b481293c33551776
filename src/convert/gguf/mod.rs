//! GGUF files of the LLaMA family: blocks unpacked, tensors under Hugging Face's names, configuration and tokenizer
//! from the metadata.

mod keys;
mod kind;
mod llama;
mod parts;
mod reader;
mod rope;
mod sentencepiece;
mod settings;
mod tokenizer;
mod vocabulary;

pub use reader::MAGIC;

use super::{Planned, Source};
use crate::{
    checkpoint::{Dtype, TensorSpec, dtype},
    error::{Error, Result},
    progress::Progress,
};
use llama::{Llama, Place};
use reader::{Gguf, TensorInfo};
use std::{collections::HashMap, fs, ops::Range, os::unix::fs::FileExt, path::Path};

/// An opened file whose tensors all have their place.
pub(super) struct GgufSource {
    file: Gguf,
    model: Llama,
    planned: Vec<Planned>,
    // For each planned tensor: its place in the file, and the rows of a head with paired rows.
    stored: Vec<(usize, Option<usize>)>,
    left_out: Vec<String>,
}

impl GgufSource {
    /// Opens and checks a file, or all parts of its model: every tensor must have its place and its shape, and none may be
    /// missing; every setting must have its place in `config.json`, or be named in `waived`.
    pub fn open(path: &Path, dtype: Option<Dtype>, waived: &[String]) -> Result<GgufSource> {
        let file = Gguf::open_model(path)?;
        let model = Llama::read(&file)?;
        let left_out = settings::check(&file, model.architecture(), model.head_dim(), waived)?;
        let mut left: HashMap<&str, usize> =
            file.tensors.iter().enumerate().map(|(i, t)| (t.name.as_str(), i)).collect();
        left.remove(rope::FACTORS);
        let (mut planned, mut stored) = (Vec::new(), Vec::new());
        for (name, Place { name: target, shape, paired_head }) in model.places() {
            let Some(i) = left.remove(name.as_str()) else {
                return Err(file.bad(format!("it has no tensor '{name}', expected one of shape {shape:?}")));
            };
            let info = &file.tensors[i];
            if info.shape != shape {
                return Err(
                    file.bad(format!("tensor '{name}' has shape {:?}, its metadata ask for {shape:?}", info.shape))
                );
            }
            let spec = TensorSpec { name: target, dtype: dtype.unwrap_or(info.kind.natural_dtype()), shape };
            planned.push(Planned { spec, source: name, stored_as: info.kind.name().into(), stored_bytes: info.bytes });
            stored.push((i, paired_head));
        }
        if let Some(name) = left.keys().min() {
            let count = left.len();
            return Err(file
                .bad(format!("{count} of its tensors have no place in the model, first: '{name}'"))
                .help("nothing is dropped in silence; the file seems to hold another architecture"));
        }
        Ok(GgufSource { file, model, planned, stored, left_out })
    }
}

impl Source for GgufSource {
    fn format(&self) -> &'static str {
        "gguf"
    }

    fn tensors(&self) -> &[Planned] {
        &self.planned
    }

    fn granule(&self, tensor: usize) -> usize {
        let row = self.planned[tensor].spec.shape.get(1).copied().unwrap_or(1);
        let rows = self.stored[tensor].1.unwrap_or(1);
        // A vector's blocks lie along it.
        (row * rows).next_multiple_of(self.file.tensors[self.stored[tensor].0].kind.block())
    }

    fn read(&self, tensor: usize, elements: Range<usize>) -> Result<Vec<u8>> {
        let (spec, (i, paired)) = (&self.planned[tensor].spec, self.stored[tensor]);
        let mut values = self.file.range(&self.file.tensors[i], elements)?;
        if let Some(head) = paired {
            values = take_pairs_apart(&values, head, spec.shape.get(1).copied().unwrap_or(1));
        }
        Ok(dtype::encode_f32(spec.dtype, &values)?.into_owned())
    }

    fn sidecar_files(&self, folder: &Path, progress: &Progress) -> Result<Vec<String>> {
        let weights = super::commonest_dtype(&self.planned);
        let (config, generation) = self.model.configs(&self.file, weights)?;
        let mut files = vec![("config.json", config), ("generation_config.json", generation)];
        let mut left_out = self.left_out.clone();
        left_out.iter().for_each(|sentence| progress.warn(sentence));
        match tokenizer::build(&self.file, self.model.vocabulary())? {
            Ok(tokenizer) => {
                files.push(("tokenizer.json", tokenizer.tokenizer));
                files.push(("tokenizer_config.json", tokenizer.config));
            }
            Err(reason) => {
                let sentence = format!("no tokenizer was written: {reason}");
                progress.warn(&sentence);
                left_out.push(sentence);
            }
        }
        for (name, value) in files {
            let path = folder.join(name);
            let text = serde_json::to_string_pretty(&value).map_err(|e| Error::environment(e.to_string()))?;
            fs::write(&path, text + "\n").map_err(|e| Error::io("write", &path, e))?;
        }
        Ok(left_out)
    }
}

impl Gguf {
    /// All values of a tensor.
    fn values(&self, tensor: &TensorInfo) -> Result<Vec<f32>> {
        self.range(tensor, 0..tensor.elements())
    }

    /// Values of whole blocks.
    fn range(&self, tensor: &TensorInfo, elements: Range<usize>) -> Result<Vec<f32>> {
        let (block, size) = (tensor.kind.block(), tensor.kind.block_bytes());
        let (first, last) = (elements.start / block * size, elements.end / block * size);
        // Blocks begin with numbers of up to 8 bytes, which the unpacking reads in place.
        let mut buffer = vec![0u64; (last - first).div_ceil(8)];
        let bytes = &mut bytemuck::cast_slice_mut(&mut buffer)[..last - first];
        let file = &self.files[tensor.file];
        file.read_exact_at(bytes, tensor.begin + first as u64).map_err(|e| Error::io("read", &self.path, e))?;
        tensor.kind.decode(bytes)
    }
}

/// Rows of whole heads from ggml's order, `2 j + i`, to Hugging Face's, `i D/2 + j`: element i of rotary pair j.
/// The LLaMA converter of llama.cpp does the reverse (`permute` in convert_hf_to_gguf.py).
fn take_pairs_apart(values: &[f32], head: usize, columns: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(values.len());
    for rows in values.chunks_exact(head * columns) {
        for i in 0..2 {
            for j in 0..head / 2 {
                let row = (2 * j + i) * columns;
                out.extend_from_slice(&rows[row..row + columns]);
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_side_by_side_become_halves() {
        let rows = [0., 0.5, 1., 1.5, 2., 2.5, 3., 3.5];
        assert_eq!(take_pairs_apart(&rows, 4, 2), [0., 0.5, 2., 2.5, 1., 1.5, 3., 3.5]);
        assert_eq!(take_pairs_apart(&[0., 1., 2., 3.], 2, 1), [0., 1., 2., 3.]);
    }
}
