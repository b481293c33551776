//! Sidecar files of a checkpoint (tokenizer, generation settings): copied into the run directory when the run begins, and from
//! there into every checkpoint, so that each checkpoint is complete without the folder that they came from.

use super::{config::Config, tokens::TokenShard};
use crate::{
    error::{Error, Result},
    progress::Progress,
    run::sha256_file,
};
use std::{fs, path::Path};

/// What Hugging Face keeps of a tokenizer beside a model.
const TOKENIZER: [&str; 10] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "merges.txt",
];

/// How the model is meant to generate. Belongs to a model, not to a tokenizer.
const GENERATION: &str = "generation_config.json";

/// Copies into `folder`, which is created if there is anything to copy: what the model that training starts from has; for a
/// new model, the tokenizer beside its `config.json` or the one that made the data, if it is still the same.
pub(super) fn collect(config: &Config, shard: &TokenShard, folder: &Path, progress: &Progress) -> Result<()> {
    let m = &config.model;
    let parent = |path: &Path| if path.is_dir() { path.to_owned() } else { path.with_file_name("") };
    if let Some(model) = m.checkpoint.as_deref().or(m.warmed_up_model.as_deref()).map(parent) {
        copy(&model, folder, &[GENERATION])?;
        if TOKENIZER.iter().any(|name| model.join(name).is_file()) {
            // Trainer::new compared its hash with the shard's.
            return copy(&model, folder, &TOKENIZER);
        }
    }
    let Some(expected) = shard.tokenizer_sha256() else { return Ok(()) };
    let candidates = [
        m.config.as_deref().map(|path| path.with_file_name("tokenizer.json")),
        shard.tokenizer_path().map(Path::to_owned),
    ];
    for path in candidates.iter().flatten().filter(|path| path.is_file()) {
        if sha256_file(path)? == expected {
            copy(&path.with_file_name(""), folder, &TOKENIZER[1..])?;
            // Whatever its name.
            return copy_file(path, &folder.join(TOKENIZER[0]));
        }
    }
    if let Some(path) = shard.tokenizer_path() {
        progress.warn(&format!(
            "'{}' is no longer the tokenizer that made the data; checkpoints will come without a tokenizer.json",
            path.display()
        ));
    }
    Ok(())
}

/// Copies what [`collect`] put into `from`, if anything, beside the weights in `folder`.
pub(super) fn copy_all(from: &Path, folder: &Path) -> Result<()> {
    copy(from, folder, &[GENERATION])?;
    copy(from, folder, &TOKENIZER)
}

fn copy(from: &Path, folder: &Path, names: &[&str]) -> Result<()> {
    for name in names.iter().filter(|name| from.join(name).is_file()) {
        copy_file(&from.join(name), &folder.join(name))?;
    }
    Ok(())
}

fn copy_file(from: &Path, to: &Path) -> Result<()> {
    let folder = to.parent().unwrap_or(to);
    fs::create_dir_all(folder).map_err(|e| Error::io("create", folder, e))?;
    fs::copy(from, to).map(drop).map_err(|e| Error::io("copy", from, e))
}
