//! Models in several GGUF files, as llama.cpp's `gguf-split` writes them: `NAME-00001-of-00003.gguf`. The first holds the
//! metadata; each says with `split.no` (from 0) and `split.count` which part it is.

use super::reader::Gguf;
use crate::error::{Error, Result};
use std::{collections::HashSet, path::Path};

/// As many as the names have digits for.
const MAX_PARTS: usize = 99_999;

impl Gguf {
    /// Opens a file, and all the others of its model if it is one part of several.
    pub fn open_model(path: &Path) -> Result<Gguf> {
        let named = Gguf::open(path)?;
        let Some(count) = named.count("split.count")?.filter(|&n| n > 1) else { return Ok(named) };
        let number = named.count("split.no")?.unwrap_or(0);
        if count > MAX_PARTS || number >= count {
            return Err(named.bad(format!("it says that it is part {} of {count}", number + 1)));
        }
        let suffix = |i: usize| format!("-{:05}-of-{count:05}.gguf", i + 1);
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let Some(stem) = name.strip_suffix(&suffix(number)) else {
            return Err(named
                .bad(format!("it is part {} of {count}, but its name does not end in '{}'", number + 1, suffix(number)))
                .help("give all parts their names back and name one of them"));
        };
        let part = |i: usize| path.with_file_name(format!("{stem}{}", suffix(i)));
        let mut model = if number == 0 { named } else { Gguf::open(&part(0))? };
        model.is_part(0, count)?;
        let mut names: HashSet<String> = model.tensors.iter().map(|t| t.name.clone()).collect();
        for i in 1..count {
            let other = Gguf::open(&part(i)).map_err(|e| missing(e, i, count))?;
            other.is_part(i, count)?;
            for (key, value) in other.metadata.iter().filter(|(key, _)| !key.starts_with("split.")) {
                if model.metadata.get(key) != Some(value) {
                    return Err(other
                        .bad(format!("its metadata key '{key}' is not that of the first part"))
                        .help("the parts come from different models; download them together"));
                }
            }
            let file = model.files.len();
            model.files.extend(other.files);
            for tensor in other.tensors {
                if !names.insert(tensor.name.clone()) {
                    return Err(model.bad(format!("tensor '{}' is stored twice, in part {}, too", tensor.name, i + 1)));
                }
                model.tensors.push(super::reader::TensorInfo { file, ..tensor });
            }
        }
        match model.count("split.tensors.count")? {
            Some(n) if n != model.tensors.len() => Err(model
                .bad(format!("split.tensors.count is {n}, its {count} parts hold {} tensors", model.tensors.len()))
                .help("the parts come from different models; download them together")),
            _ => Ok(model),
        }
    }

    fn is_part(&self, number: usize, count: usize) -> Result<()> {
        let found = (self.count("split.no")?.unwrap_or(0), self.count("split.count")?.unwrap_or(1));
        if found == (number, count) {
            return Ok(());
        }
        Err(self
            .bad(format!("it is part {} of {}, expected part {} of {count}", found.0 + 1, found.1, number + 1))
            .help("give the parts the names that they were made with"))
    }
}

fn missing(e: Error, i: usize, count: usize) -> Error {
    let help = format!("all {count} parts must lie in one folder; part {} is missing or damaged", i + 1);
    if e.help.as_deref() == Some("check the path") { e.help(help) } else { e }
}
