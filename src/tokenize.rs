//! Text -> token shard.
//!
//! The byte tokenizer needs no vocabulary file: ids 0-255 are the bytes of the UTF-8 text, 256 ends a document.

use crate::{
    checkpoint::{Dtype, TensorSpec, Writer},
    error::{Error, Result},
    interrupt,
    progress::Progress,
    staged::StagedFile,
    train::tokens,
};
use serde::Serialize;
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

/// Id that ends a document.
pub const END_OF_DOCUMENT: u16 = 256;
/// Ids of the byte tokenizer.
pub const VOCAB_SIZE: usize = 257;

/// What to tokenize.
pub struct Options {
    /// Text files, or folders that are searched for them.
    pub inputs: Vec<PathBuf>,
    /// In folders, only files whose path matches.
    pub include: Option<globset::GlobMatcher>,
    /// Stop after this many bytes of text.
    pub max_bytes: Option<u64>,
    /// The shard.
    pub output: PathBuf,
    /// Replace the shard if it exists.
    pub force: bool,
}

/// What came out.
#[derive(Debug, Serialize)]
pub struct Summary {
    /// The shard.
    pub output: PathBuf,
    /// Documents (files) read.
    pub documents: usize,
    /// Tokens written, the ends of documents included.
    pub tokens: u64,
    /// Ids are below this.
    pub vocab_size: usize,
    /// Name of the tokenizer.
    pub tokenizer: &'static str,
    /// Files that were left out because they are not UTF-8 text, or empty.
    pub skipped: usize,
}

/// Reads every input in the order of its path and writes one shard.
pub fn run(options: &Options, progress: &Progress) -> Result<Summary> {
    let documents = Documents::find(options)?;
    let staged = StagedFile::create(&options.output, options.force)?;
    let spec = TensorSpec { name: tokens::TENSOR.into(), dtype: Dtype::U16, shape: vec![documents.tokens() as usize] };
    let metadata = BTreeMap::from([
        (tokens::TOKENIZER.to_owned(), "bytes".to_owned()),
        (tokens::VOCAB_SIZE.to_owned(), VOCAB_SIZE.to_string()),
        ("end_of_document".to_owned(), END_OF_DOCUMENT.to_string()),
    ]);
    let writer = Writer::create_file(staged.path(), &[spec], &metadata)?;
    let bar = progress.bytes("tokenizing", documents.bytes);
    let mut offset = 0;
    for (path, len) in &documents.files {
        interrupt::check()?;
        let text = read_text(path)?.unwrap_or_default();
        let text = &text[..(*len as usize).min(text.len())];
        let ids: Vec<u16> = text.iter().map(|&b| u16::from(b)).chain([END_OF_DOCUMENT]).collect();
        let bytes = bytemuck::cast_slice(&ids);
        writer.write(tokens::TENSOR, offset, bytes)?;
        offset += bytes.len() as u64;
        bar.inc(*len);
    }
    bar.finish_and_clear();
    writer.finish()?;
    staged.commit()?;
    Ok(Summary {
        output: options.output.clone(),
        documents: documents.files.len(),
        tokens: documents.tokens(),
        vocab_size: VOCAB_SIZE,
        tokenizer: "bytes",
        skipped: documents.skipped,
    })
}

/// The text to read, found and measured before anything is written.
struct Documents {
    /// Path, and how many of its bytes are taken.
    files: Vec<(PathBuf, u64)>,
    bytes: u64,
    skipped: usize,
}

impl Documents {
    fn find(options: &Options) -> Result<Documents> {
        let mut found = Documents { files: Vec::new(), bytes: 0, skipped: 0 };
        let limit = options.max_bytes.unwrap_or(u64::MAX);
        for input in &options.inputs {
            for path in text_files(input, options.include.as_ref())? {
                interrupt::check()?;
                match read_text(&path)?.filter(|t| !t.is_empty()) {
                    None => found.skipped += 1,
                    Some(text) => {
                        let len = (text.len() as u64).min(limit - found.bytes);
                        found.bytes += len;
                        found.files.push((path, len));
                    }
                }
                if found.bytes >= limit {
                    return Ok(found);
                }
            }
        }
        if found.bytes == 0 {
            let names = options.inputs.iter().map(|p| format!("'{}'", p.display())).collect::<Vec<_>>().join(", ");
            return Err(Error::request(format!("no text in {names}: {} files are empty or not UTF-8", found.skipped))
                .help("name text files, or folders that hold some"));
        }
        Ok(found)
    }

    fn tokens(&self) -> u64 {
        self.bytes + self.files.len() as u64
    }
}

/// `None` if it is not UTF-8.
fn read_text(path: &Path) -> Result<Option<Vec<u8>>> {
    let bytes = fs::read(path).map_err(|e| Error::io("read", path, e))?;
    Ok(std::str::from_utf8(&bytes).is_ok().then_some(bytes))
}

/// `input` itself if it is a file, else the files below it, sorted by path.
fn text_files(input: &Path, include: Option<&globset::GlobMatcher>) -> Result<Vec<PathBuf>> {
    if !input.metadata().map_err(|e| Error::io("open", input, e))?.is_dir() {
        return Ok(vec![input.to_owned()]);
    }
    let mut files = Vec::new();
    let mut folders = vec![input.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).map_err(|e| Error::io("read", &folder, e))? {
            let entry = entry.map_err(|e| Error::io("read", &folder, e))?;
            let kind = entry.file_type().map_err(|e| Error::io("read", &folder, e))?;
            let path = entry.path();
            if kind.is_dir() {
                folders.push(path);
            } else if kind.is_file() && include.is_none_or(|glob| glob.is_match(&path)) {
                files.push(path);
            }
        }
    }
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::tokens::TokenShard;

    fn options(root: &Path) -> Options {
        Options {
            inputs: vec![root.join("in")],
            include: None,
            max_bytes: None,
            output: root.join("shard.safetensors"),
            force: false,
        }
    }

    #[test]
    fn documents_come_in_the_order_of_their_paths_each_with_its_end() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("in/sub")).unwrap();
        fs::write(root.path().join("in/b.txt"), "B").unwrap();
        fs::write(root.path().join("in/sub/c.txt"), "é").unwrap();
        fs::write(root.path().join("in/a.txt"), "A!").unwrap();
        fs::write(root.path().join("in/empty.txt"), "").unwrap();
        fs::write(root.path().join("in/binary"), [0xff, 0xfe]).unwrap();
        let summary = run(&options(root.path()), &Progress::hidden()).unwrap();
        assert_eq!((summary.documents, summary.skipped, summary.tokens), (3, 2, 8));
        let shard = TokenShard::open(&summary.output).unwrap();
        let mut ids = Vec::new();
        shard.read(0, shard.len(), &mut ids).unwrap();
        assert_eq!(ids, [65, 33, 256, 66, 256, 0xc3, 0xa9, 256]);
    }

    #[test]
    fn a_limit_cuts_the_last_document() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("in")).unwrap();
        fs::write(root.path().join("in/a"), "abc").unwrap();
        fs::write(root.path().join("in/b"), "def").unwrap();
        let summary = run(&Options { max_bytes: Some(4), ..options(root.path()) }, &Progress::hidden()).unwrap();
        assert_eq!((summary.documents, summary.tokens), (2, 6));
    }

    #[test]
    fn text_of_zero_length_is_refused() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("in")).unwrap();
        fs::write(root.path().join("in/a"), "").unwrap();
        let error = run(&options(root.path()), &Progress::hidden()).unwrap_err();
        assert!(error.message.contains("no text in"), "{error}");
        assert!(!root.path().join("shard.safetensors").exists());
    }
}
