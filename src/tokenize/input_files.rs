//! The files that the inputs stand for. Folders are searched as the library `datasets` searches them: hidden files and what
//! describes the data are left out and counted, links to files are followed, and a data set that `save_to_disk` wrote is
//! read in its own order.

use super::document::{Content, content_by_name};
use crate::error::{Error, Result};
use serde::Serialize;
use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
};

/// One file to read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InputFile {
    /// Where it is.
    pub path: PathBuf,
    /// The user named it itself, not a folder above it.
    pub named: bool,
    /// What it holds, where the folder says so.
    pub content: Option<Content>,
}

/// What a search of folders passed over, counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LeftOut {
    /// Files and folders whose names begin with a dot.
    pub hidden: u64,
    /// Files about the data beside the data: cards, descriptions, caches.
    pub about_data: u64,
    /// Links to folders.
    pub linked_folders: u64,
    /// Pipes, devices and sockets.
    pub special: u64,
    /// Files that are no UTF-8 text; counted as they are read.
    pub not_text: u64,
}

/// What `datasets` passes over in a folder of data files (`FILES_TO_IGNORE`).
const ABOUT_DATA: [&str; 6] =
    ["README.md", "config.json", "dataset_info.json", "dataset_infos.json", "dummy_data.zip", "dataset_dict.json"];

/// Every file of `input`, in order: itself, or those below it by their paths.
pub fn files(
    input: &Path,
    include: Option<&globset::GlobMatcher>,
    content: Option<Content>,
    left_out: &mut LeftOut,
) -> Result<Vec<InputFile>> {
    if !input.metadata().map_err(|e| Error::io("open", input, e))?.is_dir() {
        return Ok(vec![InputFile { path: input.to_owned(), named: true, content: None }]);
    }
    let mut search = Search { include, left_out, groups: Vec::new() };
    search.folder(input)?;
    search.groups.sort_by(|a, b| a.0.cmp(&b.0));
    let mut files: Vec<InputFile> = search.groups.into_iter().flat_map(|(_, files)| files).collect();
    if content.is_none() {
        let data = files.iter().any(|f| !holds_text(f));
        if data {
            let about = |f: &InputFile| f.content.is_none() && ABOUT_DATA.iter().any(|name| f.path.ends_with(name));
            let before = files.len();
            files.retain(|f| !about(f));
            left_out.about_data += (before - files.len()) as u64;
        }
        if include.is_none() {
            refuse_mixture(input, &files)?;
        }
    }
    Ok(files)
}

fn holds_text(file: &InputFile) -> bool {
    file.content.unwrap_or(content_by_name(&file.path).0) == Content::Text
}

/// Records beside text files: trained on as text, one of the two is a mistake.
fn refuse_mixture(input: &Path, files: &[InputFile]) -> Result<()> {
    let text: Vec<&InputFile> = files.iter().filter(|f| holds_text(f)).collect();
    let data: Vec<&InputFile> = files.iter().filter(|f| !holds_text(f)).collect();
    let (Some(first_text), Some(first_data)) = (text.first(), data.first()) else { return Ok(()) };
    Err(Error::request(format!(
        "'{}' holds files of records ({}, first '{}') and other files ({}, first '{}'): it is not clear which are the text",
        input.display(),
        data.len(),
        first_data.path.display(),
        text.len(),
        first_text.path.display()
    ))
    .help("choose with --include GLOB (such as '**/*.jsonl' or '*' for all), or read every file as text with --as text"))
}

struct Search<'a> {
    include: Option<&'a globset::GlobMatcher>,
    left_out: &'a mut LeftOut,
    /// What stays together and in order, a file or a saved data set, by its path.
    groups: Vec<(PathBuf, Vec<InputFile>)>,
}

impl Search<'_> {
    fn folder(&mut self, top: &Path) -> Result<()> {
        let mut folders = vec![top.to_owned()];
        while let Some(folder) = folders.pop() {
            if self.saved_data_set(&folder)? {
                continue;
            }
            for entry in fs::read_dir(&folder).map_err(|e| Error::io("read", &folder, e))? {
                let entry = entry.map_err(|e| Error::io("read", &folder, e))?;
                let path = entry.path();
                if entry.file_name().as_encoded_bytes().starts_with(b".") {
                    self.left_out.hidden += 1;
                    continue;
                }
                let linked = entry.file_type().map_err(|e| Error::io("read", &path, e))?.is_symlink();
                // What a link leads to counts: a cache of models and data consists of links.
                let kind = path.metadata().map_err(|e| broken(&path, linked, e))?.file_type();
                if kind.is_dir() && linked {
                    self.left_out.linked_folders += 1;
                } else if kind.is_dir() {
                    folders.push(path);
                } else if !kind.is_file() {
                    self.left_out.special += 1;
                } else if self.include.is_none_or(|glob| glob.is_match(&path)) {
                    self.groups.push((path.clone(), vec![InputFile { path, named: false, content: None }]));
                }
            }
        }
        Ok(())
    }

    /// Takes the parts of a data set that `datasets` saved or cached in `folder`, if it did.
    fn saved_data_set(&mut self, folder: &Path) -> Result<bool> {
        let state = folder.join("state.json");
        let (splits, info) = (folder.join("dataset_dict.json"), folder.join("dataset_info.json"));
        if splits.is_file() {
            let splits = json(&splits)?;
            let names: Vec<&str> =
                splits["splits"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
            if let [_, second, ..] = names[..] {
                return Err(one_split(folder, &names, &folder.join(second)));
            }
            return Ok(false);
        }
        if state.is_file() {
            let described = json(&state)?;
            if let Some(parts) = described["_data_files"].as_array() {
                if described["_indices_data_files"].as_array().is_some_and(|files| !files.is_empty()) {
                    return Err(Error::request(format!(
                        "'{}' is a data set whose rows are chosen by an index (_indices_data_files)",
                        folder.display()
                    ))
                    .help("save it again: dataset.flatten_indices().save_to_disk(FOLDER)"));
                }
                return self.parts(folder, &state, parts).map(|()| true);
            }
        }
        if info.is_file() {
            return self.cached_data_set(folder, &json(&info)?);
        }
        Ok(false)
    }

    fn parts(&mut self, folder: &Path, state: &Path, parts: &[Value]) -> Result<()> {
        let mut files = Vec::new();
        for part in parts {
            let name = part["filename"].as_str().unwrap_or_default();
            if name.is_empty() || Path::new(name).file_name() != Some(name.as_ref()) {
                return Err(Error::request(format!(
                    "'{}' names the part '{name}', expected the name of a file beside it",
                    state.display()
                )));
            }
            let path = folder.join(name);
            if !path.is_file() {
                return Err(Error::request(format!(
                    "'{}' names the part '{name}', which is not there",
                    state.display()
                ))
                .help("copy the whole folder, or save the data set again"));
            }
            if self.include.is_none_or(|glob| glob.is_match(&path)) {
                files.push(InputFile { path, named: false, content: Some(Content::Arrow) });
            }
        }
        self.groups.push((folder.to_owned(), files));
        let entries = fs::read_dir(folder).map_err(|e| Error::io("read", folder, e))?.count();
        self.left_out.about_data += entries.saturating_sub(parts.len()) as u64;
        Ok(())
    }

    /// The folder where `load_dataset` keeps a data set: Arrow files, and `cache-*` of what was computed from them.
    fn cached_data_set(&mut self, folder: &Path, info: &Value) -> Result<bool> {
        let mut parts = Vec::new();
        let mut others = 0;
        for entry in fs::read_dir(folder).map_err(|e| Error::io("read", folder, e))? {
            let path = entry.map_err(|e| Error::io("read", folder, e))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name.ends_with(".arrow") && !name.starts_with("cache-") {
                parts.push(path);
            } else {
                others += 1;
            }
        }
        if parts.is_empty() {
            return Ok(false);
        }
        let splits: Vec<&str> =
            info["splits"].as_object().into_iter().flat_map(|s| s.keys().map(String::as_str)).collect();
        if splits.len() > 1 && self.include.is_none() {
            return Err(Error::request(format!("'{}' holds the splits {}", folder.display(), splits.join(", ")))
                .help("choose one with --include '**/*-train*.arrow'"));
        }
        self.left_out.about_data += others;
        parts.retain(|path| self.include.is_none_or(|glob| glob.is_match(path)));
        parts.sort();
        let files = parts.into_iter().map(|path| InputFile { path, named: false, content: Some(Content::Arrow) });
        self.groups.push((folder.to_owned(), files.collect()));
        Ok(true)
    }
}

fn one_split(folder: &Path, names: &[&str], example: &Path) -> Error {
    Error::request(format!("'{}' holds the splits {}: one shard takes one", folder.display(), names.join(", ")))
        .help(format!("name the folder of one, such as {}", example.display()))
}

fn json(path: &Path) -> Result<Value> {
    let bytes = fs::read(path).map_err(|e| Error::io("read", path, e))?;
    serde_json::from_slice(&bytes).map_err(|e| {
        Error::request(format!("'{}' is not valid JSON: {e}", path.display())).help("copy or save the data set again")
    })
}

fn broken(path: &Path, linked: bool, e: std::io::Error) -> Error {
    if linked && e.kind() == std::io::ErrorKind::NotFound {
        return Error::request(format!("'{}' is a link to a file that is not there", path.display()))
            .help("download the data again, or narrow the folder down with --include");
    }
    Error::io("open", path, e)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn found(input: &Path) -> Result<(Vec<String>, LeftOut)> {
        let mut left_out = LeftOut::default();
        let files = files(input, None, None, &mut left_out)?;
        let name = |f: &InputFile| f.path.strip_prefix(input).unwrap_or(&f.path).display().to_string();
        Ok((files.iter().map(name).collect(), left_out))
    }

    fn write(root: &Path, files: &[(&str, &str)]) {
        for (name, text) in files {
            let path = root.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
    }

    #[test]
    fn a_snapshot_of_links_is_read_and_hidden_files_are_counted() {
        let root = tempfile::tempdir().unwrap();
        write(root.path(), &[("blobs/dead", "{}"), ("snap/data/b.jsonl", "{}"), ("snap/.gitattributes", "x")]);
        write(root.path(), &[("snap/.cache/huggingface/b.metadata", "x"), ("snap/README.md", "card")]);
        symlink("../../blobs/dead", root.path().join("snap/data/a.jsonl")).unwrap();
        symlink("../blobs", root.path().join("snap/more")).unwrap();
        let (files, left_out) = found(&root.path().join("snap")).unwrap();
        assert_eq!(files, ["data/a.jsonl", "data/b.jsonl"]);
        assert_eq!(left_out, LeftOut { hidden: 2, about_data: 1, linked_folders: 1, ..LeftOut::default() });
        symlink("../../blobs/gone", root.path().join("snap/data/c.jsonl")).unwrap();
        let error = found(&root.path().join("snap")).unwrap_err();
        assert!(error.message.contains("c.jsonl' is a link to a file that is not there"), "{error}");
    }

    #[test]
    fn a_readme_is_text_where_there_are_no_records() {
        let root = tempfile::tempdir().unwrap();
        write(root.path(), &[("README.md", "a"), ("docs/a.md", "b")]);
        assert_eq!(found(root.path()).unwrap().0, ["README.md", "docs/a.md"]);
    }

    #[test]
    fn records_beside_text_are_refused_with_both() {
        let root = tempfile::tempdir().unwrap();
        write(root.path(), &[("package.json", "{}"), ("src/a.rs", "b")]);
        let error = found(root.path()).unwrap_err();
        assert!(error.message.contains("package.json") && error.message.contains("src/a.rs"), "{error}");
        let mut left_out = LeftOut::default();
        let files = |content, include: Option<&str>, left_out: &mut LeftOut| {
            let glob = include.map(|g| globset::Glob::new(g).unwrap().compile_matcher());
            files(root.path(), glob.as_ref(), content, left_out).unwrap().len()
        };
        assert_eq!(files(Some(Content::Text), None, &mut left_out), 2);
        assert_eq!(files(None, Some("**/*.rs"), &mut left_out), 1);
        assert_eq!(files(None, Some("*"), &mut left_out), 2);
    }

    #[test]
    fn a_saved_data_set_is_read_in_its_own_order_and_nothing_beside_it() {
        let root = tempfile::tempdir().unwrap();
        let state = r#"{"_data_files": [{"filename": "data-00001.arrow"}, {"filename": "data-00000.arrow"}]}"#;
        write(root.path(), &[("s/state.json", state), ("s/dataset_info.json", "{}")]);
        write(root.path(), &[("s/data-00000.arrow", ""), ("s/data-00001.arrow", ""), ("s/cache-1.arrow", "")]);
        let (files, left_out) = found(&root.path().join("s")).unwrap();
        assert_eq!(files, ["data-00001.arrow", "data-00000.arrow"]);
        assert_eq!(left_out.about_data, 3);
        fs::remove_file(root.path().join("s/data-00000.arrow")).unwrap();
        let error = found(&root.path().join("s")).unwrap_err();
        assert!(error.message.contains("names the part 'data-00000.arrow', which is not there"), "{error}");
        let outside = state.replace("data-00001.arrow", "../x.arrow");
        write(root.path(), &[("s/state.json", &outside)]);
        assert!(found(&root.path().join("s")).unwrap_err().message.contains("'../x.arrow'"));
        let indexed = r#"{"_data_files": [], "_indices_data_files": [{"filename": "indices.arrow"}]}"#;
        write(root.path(), &[("s/state.json", indexed)]);
        assert!(found(&root.path().join("s")).unwrap_err().message.contains("chosen by an index"));
    }

    #[test]
    fn several_splits_are_refused_and_one_is_read() {
        let root = tempfile::tempdir().unwrap();
        let state = r#"{"_data_files": [{"filename": "data.arrow"}]}"#;
        write(root.path(), &[("d/dataset_dict.json", r#"{"splits": ["train", "test"]}"#)]);
        write(root.path(), &[("d/train/state.json", state), ("d/train/data.arrow", "")]);
        let error = found(&root.path().join("d")).unwrap_err();
        assert!(error.message.contains("holds the splits train, test"), "{error}");
        assert_eq!(found(&root.path().join("d/train")).unwrap().0, ["data.arrow"]);
        write(root.path(), &[("d/dataset_dict.json", r#"{"splits": ["train"]}"#)]);
        assert_eq!(found(&root.path().join("d")).unwrap().0, ["train/data.arrow"]);
        let info = r#"{"splits": {"train": {}, "test": {}}}"#;
        write(root.path(), &[("c/dataset_info.json", info), ("c/x-train.arrow", ""), ("c/cache-1.arrow", "")]);
        assert!(found(&root.path().join("c")).unwrap_err().message.contains("holds the splits"));
        write(root.path(), &[("c/dataset_info.json", r#"{"splits": {"train": {}}}"#)]);
        assert_eq!(found(&root.path().join("c")).unwrap().0, ["x-train.arrow"]);
    }
}
