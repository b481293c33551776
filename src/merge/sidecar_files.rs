//! The files beside the weights: configuration, tokenizer, generation settings. Copied along; `config.json` is updated.

use crate::{adapter::Adapter, architecture::Architecture, checkpoint::Checkpoint};
use crate::{
    checkpoint::{Dtype, dtype, read_text},
    error::{Error, Result},
};
use serde_json::{Map, Value, json};
use std::{
    collections::BTreeMap,
    fs,
    path::{Component, Path, PathBuf},
};

/// What the merge changes in `config.json`.
#[derive(Clone, Debug, Default)]
pub(crate) struct ConfigChanges {
    /// The type all weights were converted to.
    pub dtype: Option<Dtype>,
    /// The input embedding and the output head are no longer one matrix.
    pub untie: bool,
    /// The vocabulary has this many rows now.
    pub vocabulary: Option<usize>,
    /// The classifier has this many labels.
    pub labels: Option<usize>,
    /// What the class of a classifier ends in: `ForSequenceClassification`.
    pub task: Option<String>,
    /// Tokenizer files that take the place of the base's.
    pub tokenizer: Vec<PathBuf>,
}

/// Names of the files of a tokenizer, as `save_pretrained` writes them.
const TOKENIZER: [&str; 13] = [
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "spm.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
];

/// The tokenizer files of the adapters that differ from the base's: they are those of the training. Where two adapters have
/// different ones, the base's stay.
pub(super) fn tokenizer(
    base: &Checkpoint,
    adapters: &[(Adapter, f64)],
    warnings: &mut Vec<String>,
) -> Result<Vec<PathBuf>> {
    let Some(folder) = base.folder() else { return Ok(Vec::new()) };
    let mut found: BTreeMap<&str, (PathBuf, Vec<u8>)> = BTreeMap::new();
    for (adapter, _) in adapters {
        for name in TOKENIZER {
            let path = adapter.path().join(name);
            if !path.is_file() {
                continue;
            }
            refuse_link_outside(adapter.path(), &path)?;
            let bytes = fs::read(&path).map_err(|e| Error::io("read", &path, e))?;
            if let Some((other, before)) = found.get(name)
                && *before != bytes
            {
                warnings.push(format!(
                    "'{}' and '{}' differ: the output gets the base's tokenizer",
                    other.display(),
                    path.display()
                ));
                return Ok(Vec::new());
            }
            found.insert(name, (path, bytes));
        }
    }
    found.retain(|name, (_, bytes)| fs::read(folder.join(name)).ok().as_ref() != Some(bytes));
    if let Some((path, _)) = found.values().next() {
        let names: Vec<&str> = found.keys().copied().collect();
        warnings.push(format!(
            "the tokenizer files of '{}' take the place of the base's: {}",
            path.parent().unwrap_or(path).display(),
            names.join(", ")
        ));
    }
    Ok(found.into_values().map(|(path, _)| path).collect())
}

/// Weights in any format, and what training leaves beside them.
const WEIGHTS: [&str; 11] =
    ["safetensors", "bin", "pt", "pth", "gguf", "h5", "msgpack", "onnx", "ckpt", "ot", "tflite"];

/// Copies what comes along from `base` to `folder`. Subfolders stay behind, except further chat templates and the modules of
/// sentence-transformers, which modules.json names.
pub(crate) fn copy(base: &Path, folder: &Path, changes: &ConfigChanges) -> Result<()> {
    copy_files(base, folder, changes)?;
    copy_modules(base, folder)?;
    for path in &changes.tokenizer {
        let target = folder.join(path.file_name().unwrap_or_default());
        fs::copy(path, &target).map_err(|e| Error::io("copy", path, e))?;
    }
    Ok(())
}

/// sentence-transformers lists its modules with their folders: `1_Pooling`.
fn copy_modules(base: &Path, folder: &Path) -> Result<()> {
    let list = base.join("modules.json");
    let Some(modules) = list.is_file().then(|| read_text(&list)).transpose()? else { return Ok(()) };
    let Ok(Value::Array(modules)) = serde_json::from_slice(&modules) else { return Ok(()) };
    for path in modules.iter().filter_map(|module| module["path"].as_str()).filter(|path| !path.is_empty()) {
        let plain = Path::new(path).components().collect::<Vec<_>>();
        let from = base.join(path);
        if !matches!(plain[..], [Component::Normal(_)]) || !from.is_dir() || from.is_symlink() {
            return Err(Error::request(format!(
                "'{}' names the module folder '{path}', which is not a folder of '{}'",
                list.display(),
                base.display()
            ))
            .help("download the model again with all its folders"));
        }
        let target = folder.join(path);
        fs::create_dir_all(&target).map_err(|e| Error::io("create", &target, e))?;
        for entry in fs::read_dir(&from).map_err(|e| Error::io("read", &from, e))? {
            let file = entry.map_err(|e| Error::io("read", &from, e))?.path();
            if file.is_file() {
                refuse_link_outside(base, &file)?;
                let target = target.join(file.file_name().unwrap_or_default());
                fs::copy(&file, &target).map_err(|e| Error::io("copy", &file, e))?;
            }
        }
    }
    Ok(())
}

fn copy_files(base: &Path, folder: &Path, changes: &ConfigChanges) -> Result<()> {
    for entry in fs::read_dir(base).map_err(|e| Error::io("read", base, e))? {
        let path = entry.map_err(|e| Error::io("read", base, e))?.path();
        let name = path.file_name().unwrap_or_default();
        let target = folder.join(name);
        if path.is_dir() && name == "additional_chat_templates" && !path.is_symlink() {
            fs::create_dir(&target).map_err(|e| Error::io("create", &target, e))?;
            copy_files(&path, &target, &ConfigChanges::default())?;
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
    if let Some(labels) = changes.labels {
        let same = config.get("id2label").and_then(Value::as_object).is_some_and(|map| map.len() == labels);
        if !same {
            // transformers' own names for labels that have none.
            let name = |i: usize| format!("LABEL_{i}");
            let ids: Map<String, Value> = (0..labels).map(|i| (i.to_string(), name(i).into())).collect();
            config.insert("id2label".into(), ids.into());
            let labels: Map<String, Value> = (0..labels).map(|i| (name(i), i.into())).collect();
            config.insert("label2id".into(), labels.into());
            config.remove("num_labels");
        }
    }
    if let Some(task) = &changes.task
        && let Some(class) = config.get("architectures").and_then(|a| a[0].as_str()).and_then(|c| classifier(c, task))
    {
        config.insert("architectures".into(), json!([class]));
    }
    if let Some(rows) = changes.vocabulary.filter(|_| config.contains_key("vocab_size")) {
        config.insert("vocab_size".into(), rows.into());
    }
    for key in ["text_config", "llm_config"] {
        if let (Some(Value::Object(inner)), Some(rows)) = (config.get_mut(key), changes.vocabulary)
            && inner.contains_key("vocab_size")
        {
            inner.insert("vocab_size".into(), rows.into());
        }
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

/// The class of the same family for another task, if transformers has it: `LlamaForCausalLM` -> `LlamaForSequenceClassification`.
fn classifier(class: &str, task: &str) -> Option<String> {
    let family = ["LMHeadModel", "Model"].iter().find_map(|end| class.strip_suffix(end));
    let family = family.or_else(|| class.split_once("For").map(|(family, _)| family))?;
    Some(format!("{family}{task}")).filter(|name| Architecture::is_class(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_head_and_a_larger_vocabulary_reach_the_configuration() {
        let mut config =
            json!({"architectures": ["LlamaForCausalLM"], "vocab_size": 40, "text_config": {"vocab_size": 40}});
        let task = Some("ForSequenceClassification".to_owned());
        let changes = ConfigChanges { labels: Some(3), task, vocabulary: Some(42), ..ConfigChanges::default() };
        apply(config.as_object_mut().unwrap(), &changes);
        let ids = json!({"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"});
        let labels = json!({"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2});
        assert_eq!(
            config,
            json!({"architectures": ["LlamaForSequenceClassification"], "vocab_size": 42, "text_config": {"vocab_size": 42},
                   "id2label": ids, "label2id": labels})
        );
        assert_eq!(classifier("MyModel", "ForSequenceClassification"), None);
    }

    #[test]
    fn folders_that_modules_json_names_come_along_and_others_are_refused() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::create_dir(from.path().join("1_Pooling")).unwrap();
        fs::write(from.path().join("1_Pooling/config.json"), "{}").unwrap();
        fs::write(from.path().join("modules.json"), r#"[{"path": ""}, {"path": "1_Pooling"}]"#).unwrap();
        copy(from.path(), to.path(), &ConfigChanges::default()).unwrap();
        assert!(to.path().join("1_Pooling/config.json").exists());
        for path in ["2_Dense", "../x", "/etc"] {
            fs::write(from.path().join("modules.json"), format!(r#"[{{"path": "{path}"}}]"#)).unwrap();
            let error = copy(from.path(), tempfile::tempdir().unwrap().path(), &ConfigChanges::default()).unwrap_err();
            assert!(error.message.contains("names the module folder"), "{error}");
        }
    }

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
        let changes = ConfigChanges { dtype: Some(Dtype::F32), untie: true, ..ConfigChanges::default() };
        apply(config.as_object_mut().unwrap(), &changes);
        assert_eq!(
            config,
            serde_json::json!({"torch_dtype": "float32", "text_config": {"tie_word_embeddings": false}, "tie_word_embeddings": false})
        );
    }
}
