//! The files beside the weights: configuration, tokenizer, generation settings. Copied along; `config.json` is updated.

use crate::{
    checkpoint::{Dtype, dtype, read_text},
    error::{Error, Result},
};
use serde_json::{Map, Value};
use std::{fs, path::Path};

/// What the merge changes in `config.json`.
#[derive(Clone, Debug, Default)]
pub(crate) struct ConfigChanges {
    /// The type all weights were converted to.
    pub dtype: Option<Dtype>,
    /// The input embedding and the output head are no longer one matrix.
    pub untie: bool,
}

/// Weights in any format, and what training leaves beside them.
const WEIGHTS: [&str; 11] =
    ["safetensors", "bin", "pt", "pth", "gguf", "h5", "msgpack", "onnx", "ckpt", "ot", "tflite"];

/// Copies what comes along from `base` to `folder`. Subfolders stay behind, except further chat templates.
pub(crate) fn copy(base: &Path, folder: &Path, changes: &ConfigChanges) -> Result<()> {
    for entry in fs::read_dir(base).map_err(|e| Error::io("read", base, e))? {
        let path = entry.map_err(|e| Error::io("read", base, e))?.path();
        let name = path.file_name().unwrap_or_default();
        let target = folder.join(name);
        if path.is_dir() && name == "additional_chat_templates" && !path.is_symlink() {
            fs::create_dir(&target).map_err(|e| Error::io("create", &target, e))?;
            copy(&path, &target, &ConfigChanges::default())?;
        } else if path.is_file() && comes_along(&name.to_string_lossy()) {
            refuse_link_outside(base, &path)?;
            if name == "config.json" {
                copy_config(&path, &target, changes)?;
            } else {
                fs::copy(&path, &target).map_err(|e| Error::io("copy", &path, e))?;
            }
        }
    }
    Ok(())
}

/// A link in the base could publish any file of this machine in the output. Those that stay in the folder are followed, and
/// those of a Hugging Face cache, whose `snapshots/REVISION/` links to `blobs/`.
fn refuse_link_outside(base: &Path, path: &Path) -> Result<()> {
    if !path.is_symlink() {
        return Ok(());
    }
    let resolve = |path: &Path| path.canonicalize().map_err(|e| Error::io("read", path, e));
    let (base, target) = (resolve(base)?, resolve(path)?);
    let blobs = base.ancestors().find(|a| a.file_name().is_some_and(|n| n == "snapshots")).and_then(Path::parent);
    let in_cache = blobs.is_some_and(|repository| target.parent() == Some(&*repository.join("blobs")));
    match target.starts_with(&base) || in_cache {
        true => Ok(()),
        false => Err(Error::request(format!(
            "'{}' is a link out of its folder, to '{}'; it is not copied into the output",
            path.display(),
            target.display()
        ))
        .help("put the file itself there, or remove the link")),
    }
}

fn comes_along(name: &str) -> bool {
    let extension = name.rsplit_once('.').map_or("", |(_, e)| e);
    // `.index.json` lists shards that are written anew; the model card describes the base, not the merge.
    !name.starts_with('.') && !WEIGHTS.contains(&extension) && !name.ends_with(".index.json") && name != "README.md"
}

fn copy_config(path: &Path, target: &Path, changes: &ConfigChanges) -> Result<()> {
    let bytes = read_text(path)?;
    let mut config: Map<String, Value> = serde_json::from_slice(&bytes)
        .map_err(|e| Error::request(format!("'{}' is not a JSON object: {e}", path.display())))?;
    let before = config.clone();
    apply(&mut config, changes);
    // Unchanged means unchanged, to the byte.
    let bytes = match config == before {
        true => bytes,
        false => serde_json::to_vec_pretty(&config).map_err(|e| Error::environment(e.to_string()))?,
    };
    fs::write(target, bytes).map_err(|e| Error::io("write", target, e))
}

fn apply(config: &mut Map<String, Value>, changes: &ConfigChanges) {
    if let Some(dtype) = changes.dtype {
        // `torch_dtype` until transformers 4.55, `dtype` since.
        let key = if config.contains_key("dtype") { "dtype" } else { "torch_dtype" };
        config.insert(key.into(), dtype::torch_name(dtype).into());
    }
    if changes.untie {
        config.insert("tie_word_embeddings".into(), false.into());
    }
    for key in ["text_config", "llm_config"] {
        if let Some(Value::Object(inner)) = config.get_mut(key) {
            if let (Some(dtype), Some(key)) =
                (changes.dtype, ["dtype", "torch_dtype"].iter().find(|k| inner.contains_key(**k)))
            {
                inner.insert((*key).into(), dtype::torch_name(dtype).into());
            }
            if changes.untie && inner.contains_key("tie_word_embeddings") {
                inner.insert("tie_word_embeddings".into(), false.into());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unchanged_configuration_is_copied_to_the_byte_and_weights_stay_behind() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let text = "{\"b\":1,   \"a\": [2]}\n";
        for (name, text) in
            [("config.json", text), ("tokenizer.json", "{}"), ("model.safetensors", "x"), ("training_args.bin", "x")]
        {
            fs::write(from.path().join(name), text).unwrap();
        }
        copy(from.path(), to.path(), &ConfigChanges::default()).unwrap();
        assert_eq!(fs::read_to_string(to.path().join("config.json")).unwrap(), text);
        assert!(to.path().join("tokenizer.json").exists());
        assert_eq!(fs::read_dir(to.path()).unwrap().count(), 2);
    }

    #[test]
    fn a_link_out_of_the_folder_is_refused_except_into_the_blobs_of_a_hub_cache() {
        use std::os::unix::fs::symlink;
        let root = tempfile::tempdir().unwrap();
        let snapshot = root.path().join("models--a--b/snapshots/0123");
        let (blobs, out) = (root.path().join("models--a--b/blobs"), root.path().join("out"));
        for folder in [&snapshot, &blobs, &out] {
            fs::create_dir_all(folder).unwrap();
        }
        fs::write(blobs.join("abcd"), "{}").unwrap();
        symlink("../../blobs/abcd", snapshot.join("tokenizer.json")).unwrap();
        copy(&snapshot, &out, &ConfigChanges::default()).unwrap();
        assert_eq!(fs::read_to_string(out.join("tokenizer.json")).unwrap(), "{}");
        fs::write(root.path().join("secret"), "x").unwrap();
        symlink(root.path().join("secret"), snapshot.join("vocab.json")).unwrap();
        let error = copy(&snapshot, &out, &ConfigChanges::default()).unwrap_err();
        assert!(error.message.contains("is a link out of its folder") && error.exit_code() == 2, "{error}");
    }

    #[test]
    fn names_that_are_not_utf8_stay_as_they_are() {
        use std::os::unix::ffi::OsStrExt;
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for name in [b"x\xff.json", b"x\xfe.json"] {
            fs::write(from.path().join(std::ffi::OsStr::from_bytes(name)), name).unwrap();
        }
        copy(from.path(), to.path(), &ConfigChanges::default()).unwrap();
        for name in [b"x\xff.json", b"x\xfe.json"] {
            assert_eq!(fs::read(to.path().join(std::ffi::OsStr::from_bytes(name))).unwrap(), name);
        }
    }

    #[test]
    fn a_new_type_and_untying_reach_the_configuration() {
        let mut config = serde_json::json!({"torch_dtype": "bfloat16", "text_config": {"tie_word_embeddings": true}});
        let changes = ConfigChanges { dtype: Some(Dtype::F32), untie: true };
        apply(config.as_object_mut().unwrap(), &changes);
        assert_eq!(
            config,
            serde_json::json!({"torch_dtype": "float32", "text_config": {"tie_word_embeddings": false}, "tie_word_embeddings": false})
        );
    }
}
