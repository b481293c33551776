//! Where an output may go: decided before any work from what lies there and from what the command reads.

use super::sibling;
use crate::{
    error::{Error, Result},
    inputs::{Inputs, kind},
};
use std::{
    collections::BTreeSet,
    ffi::OsStr,
    fs::{self, Metadata},
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

/// What an output is, and for a folder what it may hold if it is to be replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holds {
    /// Not a folder: one file.
    File,
    /// A Hugging Face model folder: weights, their index, configuration, tokenizer.
    Checkpoint,
    /// A PEFT adapter.
    Adapter,
    /// One part of a merge of several jobs.
    Part,
    /// A run directory: never replaced.
    Run,
    /// A folder inside one that this process owns, such as a checkpoint of a locked run: replaced whatever it holds.
    Own,
}

/// An output that was checked: it is, contains and lies behind no input, and what lies there may be replaced or is
/// nothing. A path is the target of one output at a time.
pub struct Target {
    path: PathBuf,
    holds: Holds,
    force: bool,
    inputs: Inputs,
    claim: Option<PathBuf>,
    /// Where text goes instead.
    stream: Option<Stream>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stream {
    Stdout,
    /// A device or a pipe that exists.
    Device,
}

/// Paths that are targets in this process.
static CLAIMED: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

/// Files beside the weights of a model in Hugging Face's formats.
const SIDECAR_FILES: [&str; 24] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tekken.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "merge_report.json",
    "relora_kit.json",
];

impl Target {
    /// What the command reads.
    pub(super) fn inputs(&self) -> &Inputs {
        &self.inputs
    }

    /// A file. `inputs` are all files and folders that the command reads.
    pub fn file(path: &Path, force: bool, inputs: &Inputs) -> Result<Target> {
        Self::new(path, Holds::File, force, inputs)
    }

    /// A folder. `inputs` are all files and folders that the command reads.
    pub fn folder(path: &Path, holds: Holds, force: bool, inputs: &Inputs) -> Result<Target> {
        Self::new(path, holds, force, inputs)
    }

    /// A text: a file, or stdout (`-`, `/dev/stdout`), or a device or pipe that exists, which is written to and not
    /// replaced.
    pub fn text(path: &Path, force: bool, inputs: &Inputs) -> Result<Target> {
        let stream = match path.metadata() {
            _ if path == Path::new("-") || path == Path::new("/dev/stdout") => Some(Stream::Stdout),
            Ok(meta) if meta.file_type().is_char_device() || meta.file_type().is_fifo() => Some(Stream::Device),
            _ => None,
        };
        match stream {
            Some(_) => Ok(Target {
                path: path.to_owned(),
                holds: Holds::File,
                force,
                inputs: inputs.clone(),
                claim: None,
                stream,
            }),
            None => Self::new(path, Holds::File, force, inputs),
        }
    }

    /// A file or folder inside one that this process owns: replaced if it is of the same kind.
    pub(super) fn own(path: &Path, holds: Holds) -> Result<Target> {
        Self::new(path, holds, true, &Inputs::none())
    }

    fn new(path: &Path, holds: Holds, force: bool, inputs: &Inputs) -> Result<Target> {
        sibling::prefix(path)?;
        let mut target =
            Target { path: path.to_owned(), holds, force, inputs: inputs.clone(), claim: None, stream: None };
        target.check()?;
        let claim = resolve(path);
        if !claimed().insert(claim.clone()) {
            return Err(
                Error::request(format!("two outputs go to '{}'", path.display())).help("give each a path of its own")
            );
        }
        target.claim = Some(claim);
        Ok(target)
    }

    /// The final name.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn stream(&self) -> Option<Stream> {
        self.stream
    }

    pub(super) fn is_folder(&self) -> bool {
        self.holds != Holds::File
    }

    /// Refuses what lies there now, unless it may be replaced. Returns whether there is something to replace.
    pub(super) fn check(&self) -> Result<bool> {
        let meta = match self.path.symlink_metadata() {
            Ok(meta) => meta,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(false),
            Err(e) => return Err(Error::io("create", &self.path, e)),
        };
        self.refuse_inputs(&meta)?;
        let shown = self.path.display();
        let wanted = if self.is_folder() { "a folder" } else { "a file" };
        let fits = if self.is_folder() { meta.is_dir() } else { meta.is_file() };
        if !fits {
            let found = kind(&meta);
            return Err(Error::request(format!(
                "output '{shown}' exists and is {found}; this command writes {wanted}"
            ))
            .help(match meta.is_symlink() {
                true => "name what the link leads to, or another output",
                false => "choose another output; it is not replaced",
            }));
        }
        if !self.force {
            return Err(Error::request(format!("output '{shown}' exists already")).help(match self.holds {
                Holds::Run => "choose another output",
                _ => "choose another output, or pass --force to replace it",
            }));
        }
        if self.is_folder()
            && let Some(name) = self.foreign_entry()?
        {
            return Err(Error::request(format!(
                "output '{shown}' holds '{}', which this command does not write; the folder is not replaced",
                name.to_string_lossy()
            ))
            .help("move it away, or choose another output"));
        }
        Ok(true)
    }

    /// Refuses an existing output that is, contains, lies in or shares its inode with an input.
    fn refuse_inputs(&self, meta: &Metadata) -> Result<()> {
        let shown = self.path.display();
        let refuse = |what: String| {
            Err(Error::request(format!("output '{shown}' {what}"))
                .help("choose another output; inputs are never replaced"))
        };
        let Ok(resolved) = self.path.canonicalize() else { return Ok(()) };
        for (given, input) in self.inputs.resolved() {
            let given = given.display();
            if resolved == input {
                return refuse(format!("is the input '{given}'"));
            }
            if input.starts_with(&resolved) {
                return refuse(format!("contains the input '{given}'"));
            }
            if resolved.starts_with(input) {
                return refuse(format!("exists and is part of the input '{given}'"));
            }
        }
        if meta.is_file()
            && meta.nlink() > 1
            && let Some(input) = self.inputs.same_file(meta)
        {
            return refuse(format!("is another name of the input '{}'", input.display()));
        }
        Ok(())
    }

    /// An entry of the existing folder that this command would not have written.
    fn foreign_entry(&self) -> Result<Option<std::ffi::OsString>> {
        foreign_entry(&self.path, self.holds, &self.inputs)
    }
}

/// See [`Target::foreign_entry`].
pub(super) fn foreign_entry(folder: &Path, holds: Holds, inputs: &Inputs) -> Result<Option<std::ffi::OsString>> {
    if holds == Holds::Own {
        return Ok(None);
    }
    let io = |e| Error::io("read", folder, e);
    let mut weights = false;
    let mut count = 0;
    for entry in fs::read_dir(folder).map_err(io)? {
        let entry = entry.map_err(io)?;
        let (name, file_type) = (entry.file_name(), entry.file_type().map_err(io)?);
        let nested = name == "additional_chat_templates" && file_type.is_dir();
        if !(file_type.is_file() || nested) || !is_written(&name, holds, inputs) {
            return Ok(Some(name));
        }
        weights |= is_weights(&name, holds);
        count += 1;
    }
    match holds == Holds::Checkpoint && count > 0 && !weights {
        // Only files that any folder may have: none of ours.
        true => Ok(fs::read_dir(folder).map_err(io)?.flatten().next().map(|entry| entry.file_name())),
        false => Ok(None),
    }
}

fn is_written(name: &OsStr, holds: Holds, inputs: &Inputs) -> bool {
    match holds {
        Holds::Checkpoint => {
            is_weights(name, holds)
                || name.to_str().is_some_and(|name| SIDECAR_FILES.contains(&name))
                || inputs.have_entry(name)
        }
        Holds::Adapter => is_weights(name, holds) || name == "adapter_config.json",
        Holds::Part => is_weights(name, holds) || name == "part.json",
        Holds::File | Holds::Run | Holds::Own => false,
    }
}

fn is_weights(name: &OsStr, holds: Holds) -> bool {
    let Some(name) = name.to_str() else { return false };
    match holds {
        Holds::Adapter => name == "adapter_model.safetensors",
        _ => name == "model.safetensors" || (name.starts_with("model-") && name.ends_with(".safetensors")),
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if let Some(claim) = &self.claim {
            claimed().remove(claim);
        }
    }
}

fn claimed() -> std::sync::MutexGuard<'static, BTreeSet<PathBuf>> {
    CLAIMED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The path with links resolved as far as it exists.
fn resolve(path: &Path) -> PathBuf {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    for ancestor in absolute.ancestors() {
        if let (Ok(resolved), Ok(rest)) = (ancestor.canonicalize(), absolute.strip_prefix(ancestor)) {
            return resolved.join(rest);
        }
    }
    absolute
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(target: Result<Target>) -> String {
        let error = target.err().expect("refused");
        assert_eq!(error.exit_code(), 2);
        error.message + " / " + &error.help.unwrap_or_default()
    }

    #[test]
    fn an_output_that_is_contains_or_lies_behind_an_input_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        fs::create_dir_all(at("models/base")).unwrap();
        fs::write(at("models/base/model.safetensors"), "x").unwrap();
        std::os::unix::fs::symlink("models/base", at("link")).unwrap();
        fs::hard_link(at("models/base/model.safetensors"), at("hard")).unwrap();
        let inputs = Inputs::of([at("models/base")]);
        let folder = |name: &str| refusal(Target::folder(&at(name), Holds::Checkpoint, true, &inputs));
        assert!(folder("models/base").contains("is the input"));
        assert!(folder("models/../models/base").contains("is the input"));
        assert!(folder("link").contains("is the input"));
        assert!(folder("models").contains("contains the input"));
        let file = |name: &str| refusal(Target::file(&at(name), true, &inputs));
        assert!(file("hard").contains("is another name of the input"));
        assert!(file("models/base/model.safetensors").contains("part of the input"));
        assert!(!file("models/base/model.safetensors").contains("--force"));
    }

    #[test]
    fn folders_files_links_and_devices_do_not_replace_each_other() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        fs::create_dir(at("folder")).unwrap();
        fs::write(at("file"), "x").unwrap();
        std::os::unix::fs::symlink("file", at("link")).unwrap();
        let none = Inputs::none();
        assert!(refusal(Target::file(&at("folder"), true, &none)).contains("is a folder; this command writes a file"));
        let folder = |name: &str| refusal(Target::folder(&at(name), Holds::Adapter, true, &none));
        assert!(folder("file").contains("is a regular file; this command writes a folder"));
        assert!(refusal(Target::file(&at("link"), true, &none)).contains("is a symbolic link"));
        for force in [false, true] {
            let device = refusal(Target::file(Path::new("/dev/null"), force, &none));
            assert!(device.contains("is a device") && !device.contains("--force"), "{device}");
        }
        assert_eq!(Target::text(Path::new("/dev/null"), false, &none).unwrap().stream(), Some(Stream::Device));
        assert_eq!(Target::text(Path::new("-"), false, &none).unwrap().stream(), Some(Stream::Stdout));
    }

    #[test]
    fn a_folder_is_replaced_only_if_it_holds_what_the_command_writes() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        let base = at("base");
        for folder in ["base", "out"] {
            fs::create_dir(at(folder)).unwrap();
        }
        fs::write(base.join("LICENSE"), "x").unwrap();
        let inputs = Inputs::of([&base]);
        let target = || Target::folder(&at("out"), Holds::Checkpoint, true, &inputs);
        for name in ["model-00001-of-00002.safetensors", "config.json", "LICENSE"] {
            fs::write(at("out").join(name), "x").unwrap();
        }
        target().unwrap();
        fs::write(at("out/notes.txt"), "precious").unwrap();
        assert!(refusal(target()).contains("holds 'notes.txt', which this command does not write"));
        fs::remove_file(at("out/notes.txt")).unwrap();
        fs::remove_file(at("out/model-00001-of-00002.safetensors")).unwrap();
        assert!(refusal(target()).contains("which this command does not write"), "no weights: not a model of ours");
    }

    #[test]
    fn two_outputs_on_one_path_are_refused_and_a_path_is_free_again_afterwards() {
        let root = tempfile::tempdir().unwrap();
        let (path, other) = (root.path().join("a"), root.path().join("./b/../a"));
        fs::create_dir(root.path().join("b")).unwrap();
        let first = Target::file(&path, false, &Inputs::none()).unwrap();
        assert!(refusal(Target::file(&other, false, &Inputs::none())).contains("two outputs go to"));
        drop(first);
        Target::file(&other, false, &Inputs::none()).unwrap();
    }
}
