//! Text -> token shard: documents are read in order, tokenized together on all threads, and written as they come, so
//! that memory does not grow with the text.

mod documents;
mod shard;
mod tokenizer;

pub use documents::Layout;
pub use tokenizer::{BYTE_VOCABULARY, END_OF_DOCUMENT, TextStream, Tokenizer};

use crate::{
    error::{Error, Result},
    inputs::Inputs,
    interrupt,
    progress::Progress,
    staged::{StagedFile, Target},
};
use indicatif::ProgressBar;
use rayon::prelude::*;
use serde::Serialize;
use shard::ShardWriter;
use std::path::PathBuf;

/// Bytes of text that are tokenized together.
const BATCH: usize = 8 << 20;

/// What to tokenize.
pub struct Options {
    /// Files, or folders that are searched for them.
    pub inputs: Vec<PathBuf>,
    /// In folders, only files whose path matches.
    pub include: Option<globset::GlobMatcher>,
    /// How files are cut into documents.
    pub layout: Layout,
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
    #[serde(serialize_with = "crate::escape::lossy")]
    pub output: PathBuf,
    /// Documents read.
    pub documents: u64,
    /// Bytes of their text.
    pub text_bytes: u64,
    /// Tokens written, the ends of documents included.
    pub tokens: u64,
    /// Ids are below this.
    pub vocab_size: usize,
    /// Name of the tokenizer.
    pub tokenizer: &'static str,
    /// Documents that were left out because they are not UTF-8 text, or empty.
    pub skipped: u64,
}

/// Reads every input in the order given (folders in the order of their paths) and writes one shard.
pub fn run(options: &Options, tokenizer: &Tokenizer, progress: &Progress) -> Result<Summary> {
    let mut files = Vec::new();
    for input in &options.inputs {
        files.extend(documents::files(input, options.include.as_ref())?);
    }
    let total = files.iter().map(|f| f.metadata().map_or(0, |m| m.len())).sum::<u64>();
    let mut inputs = Inputs::of(&options.inputs);
    inputs.extend(tokenizer.path());
    inputs.extend(&files);
    let staged = StagedFile::create(Target::file(&options.output, options.force, &inputs)?)?;
    let bar = progress.bytes("tokenizing", total.min(options.max_bytes.unwrap_or(u64::MAX)));
    let mut job = Job {
        tokenizer,
        shard: ShardWriter::create(&staged, tokenizer)?,
        batch: Vec::new(),
        batched: 0,
        left: options.max_bytes.unwrap_or(u64::MAX),
        bar: &bar,
        documents: 0,
        text_bytes: 0,
        skipped: 0,
    };
    for file in &files {
        if !documents::read(file, &options.layout, &mut |document| job.take(document))? {
            break;
        }
    }
    job.flush()?;
    bar.finish_and_clear();
    if job.documents == 0 {
        let names = options.inputs.iter().map(|p| format!("'{}'", p.display())).collect::<Vec<_>>().join(", ");
        return Err(Error::request(format!("no text in {names}: {} documents are empty or not UTF-8", job.skipped))
            .help("name text files, or folders that hold some"));
    }
    let Job { shard, documents, text_bytes, skipped, .. } = job;
    let tokens = shard.finish()?;
    staged.commit()?;
    Ok(Summary {
        output: options.output.clone(),
        documents,
        text_bytes,
        tokens,
        vocab_size: tokenizer.vocab_size(),
        tokenizer: tokenizer.name(),
        skipped,
    })
}

struct Job<'a> {
    tokenizer: &'a Tokenizer,
    shard: ShardWriter<'a>,
    batch: Vec<String>,
    batched: usize,
    /// Bytes of text that are still wanted.
    left: u64,
    bar: &'a ProgressBar,
    documents: u64,
    text_bytes: u64,
    skipped: u64,
}

impl Job<'_> {
    /// Queues a document. Returns whether more are wanted.
    fn take(&mut self, document: Option<String>) -> Result<bool> {
        interrupt::check()?;
        let Some(mut text) = document.filter(|text| !text.is_empty()) else {
            self.skipped += 1;
            return Ok(true);
        };
        if text.len() as u64 > self.left {
            let end = text.floor_char_boundary(self.left as usize);
            text.truncate(end);
            self.left = end as u64;
        }
        self.left -= text.len() as u64;
        self.batched += text.len();
        if !text.is_empty() {
            self.batch.push(text);
        }
        if self.batched >= BATCH {
            self.flush()?;
        }
        Ok(self.left > 0)
    }

    fn flush(&mut self) -> Result<()> {
        let encoded: Vec<Vec<u32>> =
            self.batch.par_iter().map(|text| self.tokenizer.encode(text)).collect::<Result<_>>()?;
        for ids in &encoded {
            self.shard.append(ids)?;
            self.shard.append(&[self.tokenizer.end_of_document()])?;
        }
        self.documents += self.batch.len() as u64;
        self.text_bytes += self.batched as u64;
        self.bar.inc(self.batched as u64);
        self.batch.clear();
        self.batched = 0;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::tokens::TokenShard;
    use std::{fs, path::Path};

    fn options(root: &Path) -> Options {
        Options {
            inputs: vec![root.join("in")],
            include: None,
            layout: Layout { field: "text".into(), separator: None },
            max_bytes: None,
            output: root.join("shard.safetensors"),
            force: false,
        }
    }

    fn ids(path: &Path) -> Vec<u32> {
        let shard = TokenShard::open(path).unwrap();
        let mut ids = Vec::new();
        shard.read(0, shard.len(), &mut ids).unwrap();
        ids
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
        let summary = run(&options(root.path()), &Tokenizer::Bytes, &Progress::hidden()).unwrap();
        assert_eq!((summary.documents, summary.skipped, summary.tokens, summary.text_bytes), (3, 2, 8, 5));
        assert_eq!(ids(&summary.output), [65, 33, 256, 66, 256, 0xc3, 0xa9, 256]);
    }

    #[test]
    fn a_limit_cuts_the_last_document_between_two_characters() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("in")).unwrap();
        fs::write(root.path().join("in/a"), "abc").unwrap();
        fs::write(root.path().join("in/b"), "dé").unwrap();
        fs::write(root.path().join("in/c"), "never").unwrap();
        for (limit, tokens) in [(4, 6), (5, 6), (6, 8)] {
            let options = Options { max_bytes: Some(limit), force: true, ..options(root.path()) };
            let summary = run(&options, &Tokenizer::Bytes, &Progress::hidden()).unwrap();
            assert_eq!((summary.documents, summary.tokens), (2, tokens), "{limit}");
        }
    }

    #[test]
    fn text_of_zero_length_is_refused() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("in")).unwrap();
        fs::write(root.path().join("in/a"), "").unwrap();
        let error = run(&options(root.path()), &Tokenizer::Bytes, &Progress::hidden()).unwrap_err();
        assert!(error.message.contains("no text in"), "{error}");
        assert!(!root.path().join("shard.safetensors").exists());
    }
}
