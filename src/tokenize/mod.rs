//! Text -> token shard: documents are read in order, tokenized together on all threads, and written as they come, so
//! that memory does not grow with the text.

mod arrow;
mod columns;
mod document;
mod documents;
mod ids;
mod input_files;
mod json;
mod json_value;
mod parquet;
mod shard;
mod stream;
mod text_stream;
mod tokenizer;

pub use document::{Content, Layout};
pub use ids::{IdType, Number};
pub use input_files::LeftOut;
pub use text_stream::TextStream;
pub use tokenizer::{BYTE_VOCABULARY, END_OF_DOCUMENT, Tokenizer};

use crate::{
    error::{Error, Result},
    inputs::Inputs,
    interrupt,
    progress::Progress,
    staged::{StagedFile, Target},
};
use document::Document;
use ids::IdFile;
use indicatif::ProgressBar;
use input_files::InputFile;
use rayon::prelude::*;
use serde::Serialize;
use shard::{Origin, ShardWriter};
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
    /// Leave out and count what cannot be read, instead of refusing it.
    pub skip_unreadable: bool,
    /// Put the tokenizer's special tokens around each document, as its own template says.
    pub special_tokens: bool,
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
    /// Documents that were left out: the sum of the two counts below and of files that are no text.
    pub skipped: u64,
    /// Documents without text.
    pub empty: u64,
    /// Records that cannot be read, left out with `skip_unreadable`.
    pub unreadable: u64,
    /// What the search of folders passed over.
    pub left_out: LeftOut,
}

/// Reads every input in the order given (folders in the order of their paths) and writes one shard.
pub fn run(options: &Options, tokenizer: &Tokenizer, progress: &Progress) -> Result<Summary> {
    let mut files = Vec::new();
    let mut left_out = LeftOut::default();
    for input in &options.inputs {
        files.extend(input_files::files(input, options.include.as_ref(), options.layout.content, &mut left_out)?);
    }
    let total = files.iter().map(|f| f.path.metadata().map_or(0, |m| m.len())).sum::<u64>();
    let mut sources = Inputs::of(&options.inputs);
    sources.extend(tokenizer.path());
    sources.extend(files.iter().map(|f| &f.path));
    let staged = StagedFile::create(Target::file(&options.output, options.force, &sources)?)?;
    let bar = progress.bytes("tokenizing", total.min(options.max_bytes.unwrap_or(u64::MAX)));
    let mut job = Job {
        tokenizer,
        shard: ShardWriter::create(&staged, Origin::of(tokenizer))?,
        batch: Vec::new(),
        batched: 0,
        left: options.max_bytes.unwrap_or(u64::MAX),
        special_tokens: options.special_tokens,
        bar: &bar,
        documents: 0,
        text_bytes: 0,
        empty: 0,
        unreadable: 0,
    };
    let max_document = options.layout.max_document.max(options.max_bytes.unwrap_or(0));
    let layout = Layout { max_document, ..options.layout.clone() };
    for file in &files {
        let mut no_text = None;
        let wants_more = documents::read(&file.path, file.content, &layout, &mut |document| match document {
            Document::Text(text) => job.take(text),
            Document::Empty => job.take(String::new()),
            Document::Unreadable(_) if options.skip_unreadable => {
                job.unreadable += 1;
                Ok(true)
            }
            // A folder may hold pictures and programs beside its text.
            Document::Unreadable(error) if !file.named && is_whole_file(file, &options.layout) => {
                no_text = Some(error);
                Ok(true)
            }
            Document::Unreadable(error) => Err(error),
        })?;
        if let Some(error) = no_text {
            left_out.not_text += 1;
            progress.detail(&format!("left out: {error}"));
        }
        if !wants_more {
            break;
        }
    }
    job.flush()?;
    bar.finish_and_clear();
    let Job { shard, documents, text_bytes, empty, unreadable, .. } = job;
    let skipped = empty + unreadable + left_out.not_text;
    if documents == 0 {
        return Err(nothing(options, files.len(), empty, unreadable, &left_out));
    }
    warn(&left_out, unreadable, progress);
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
        empty,
        unreadable,
        left_out,
    })
}

/// Writes one shard from files of ids that another program made. Without a tokenizer, the largest id tells the vocabulary.
pub fn run_ids(options: &Options, kind: IdType, tokenizer: Option<&Tokenizer>, progress: &Progress) -> Result<Summary> {
    let mut left_out = LeftOut::default();
    let mut paths = Vec::new();
    for input in &options.inputs {
        let found = input_files::files(input, options.include.as_ref(), Some(Content::Text), &mut left_out)?;
        paths.extend(found.into_iter().map(|file| file.path));
    }
    if kind == IdType::Megatron {
        // An index is found beside its data.
        paths.retain(|path| path.extension().is_none_or(|e| e != "idx"));
    }
    let mut sources = Inputs::of(&options.inputs);
    sources.extend(tokenizer.and_then(Tokenizer::path));
    sources.extend(&paths);
    let staged = StagedFile::create(Target::file(&options.output, options.force, &sources)?)?;
    let files = paths.iter().map(|path| IdFile::open(path, kind)).collect::<Result<Vec<_>>>()?;
    let mut largest = None;
    for file in &files {
        largest = largest.max(file.largest()?);
    }
    let Some(largest) = largest else {
        return Err(Error::request("the files hold no ids").help("name files that hold some"));
    };
    let origin = match tokenizer {
        Some(tokenizer) if largest as usize >= tokenizer.vocab_size() => {
            return Err(Error::request(format!(
                "the largest id is {largest}, the tokenizer has {} ids",
                tokenizer.vocab_size()
            ))
            .help("name the tokenizer that made the ids, or none, and check --ids"));
        }
        Some(tokenizer) => Origin::of(tokenizer),
        None => Origin { tokenizer: "ids", file: None, vocab_size: largest as usize + 1, end_of_document: None },
    };
    let (vocab_size, tokenizer) = (origin.vocab_size, origin.tokenizer);
    let mut shard = ShardWriter::create(&staged, origin)?;
    let total = paths.iter().map(|p| p.metadata().map_or(0, |m| m.len())).sum();
    let bar = progress.bytes("copying ids", total);
    for (file, path) in files.iter().zip(&paths) {
        file.read(&mut |ids| {
            interrupt::check()?;
            shard.append(ids)
        })?;
        bar.inc(path.metadata().map_or(0, |m| m.len()));
    }
    bar.finish_and_clear();
    let tokens = shard.finish()?;
    staged.commit()?;
    Ok(Summary {
        output: options.output.clone(),
        documents: files.iter().map(|file| file.documents).sum(),
        text_bytes: 0,
        tokens,
        vocab_size,
        tokenizer,
        skipped: 0,
        empty: 0,
        unreadable: 0,
        left_out,
    })
}

/// Whether a file is one document, so that what is unreadable in it is all of it.
fn is_whole_file(file: &InputFile, layout: &Layout) -> bool {
    let content = layout.content.or(file.content).unwrap_or(document::content_by_name(&file.path).0);
    content == Content::Text && layout.separator.is_none()
}

fn nothing(options: &Options, files: usize, empty: u64, unreadable: u64, left_out: &LeftOut) -> Error {
    let names = options.inputs.iter().map(|p| format!("'{}'", p.display())).collect::<Vec<_>>().join(", ");
    let counts = [
        (empty, "documents are empty"),
        (unreadable, "records cannot be read"),
        (left_out.not_text, "files are not UTF-8 text"),
        (left_out.hidden, "files or folders are hidden"),
        (left_out.linked_folders, "are links to folders"),
        (left_out.special, "are pipes, devices or sockets"),
        (left_out.about_data, "only describe data"),
    ];
    let mut reasons: Vec<String> =
        counts.iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!("{n} {what}")).collect();
    if files == 0 && options.include.is_some() {
        reasons.push("no file matches --include".into());
    }
    if reasons.is_empty() {
        reasons.push(if files == 0 { "it holds no files".into() } else { format!("{files} files hold no document") });
    }
    Error::request(format!("no text in {names}: {}", reasons.join(", ")))
        .help("name text files or files of records themselves, or folders that hold some")
}

fn warn(left_out: &LeftOut, unreadable: u64, progress: &Progress) {
    for (count, what) in [
        (unreadable, "records that cannot be read were left out"),
        (left_out.not_text, "files that are no UTF-8 text were left out (-v names them)"),
        (left_out.linked_folders, "links to folders were not followed"),
        (left_out.special, "pipes, devices or sockets inside folders were left out"),
    ] {
        if count > 0 {
            progress.warn(&format!("{count} {what}"));
        }
    }
}

struct Job<'a> {
    tokenizer: &'a Tokenizer,
    shard: ShardWriter<'a>,
    batch: Vec<String>,
    batched: usize,
    /// Bytes of text that are still wanted.
    left: u64,
    special_tokens: bool,
    bar: &'a ProgressBar,
    documents: u64,
    text_bytes: u64,
    empty: u64,
    unreadable: u64,
}

impl Job<'_> {
    /// Queues a document. Returns whether more are wanted.
    fn take(&mut self, mut text: String) -> Result<bool> {
        interrupt::check()?;
        if text.is_empty() {
            self.empty += 1;
            return Ok(true);
        }
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
        let encode = |text: &String| match self.special_tokens {
            true => self.tokenizer.encode_with_special_tokens(text),
            false => self.tokenizer.encode(text),
        };
        let encoded: Vec<Vec<u32>> = self.batch.par_iter().map(encode).collect::<Result<_>>()?;
        let end = self.tokenizer.end_of_document();
        for ids in &encoded {
            self.shard.append(ids)?;
            // A template may have ended the document already.
            if !(self.special_tokens && ids.last() == Some(&end)) {
                self.shard.append(&[end])?;
            }
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
            layout: Layout { field: "text".into(), ..Layout::default() },
            max_bytes: None,
            skip_unreadable: false,
            special_tokens: false,
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
