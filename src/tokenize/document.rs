//! What the readers of files agree on: documents, and how files are cut into them.

use crate::error::{Error, Result};
use std::path::Path;

/// How files are cut into documents.
#[derive(Clone, Debug, Default)]
pub struct Layout {
    /// Field or column that holds the text, in files of records.
    pub field: String,
    /// In text files: what stands between two documents. Without it a file is one document.
    pub separator: Option<String>,
    /// What every file holds; by default its name and its first bytes tell.
    pub content: Option<Content>,
    /// Bytes that a document or record of text may have; `MAX_DOCUMENT` if that is more.
    pub max_document: u64,
}

/// Bytes of the largest document, unless more are wanted: what a small compressed file becomes has no other bound.
pub const MAX_DOCUMENT: u64 = 1 << 30;

/// What a file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Plain text.
    Text,
    /// JSON records: one per line, one after the other, or a list.
    Json,
    /// A Parquet table.
    Parquet,
    /// An Arrow table: a file, or a stream as `datasets` writes it.
    Arrow,
}

/// One document, or why there is none.
#[derive(Debug)]
pub enum Document {
    /// Its text.
    Text(String),
    /// A row without a value.
    Empty,
    /// A record that cannot be read.
    Unreadable(Error),
}

/// Takes documents until it returns false.
pub type Sink<'a> = dyn FnMut(Document) -> Result<bool> + 'a;

/// What a file's name says about its content, and whether it names a compression.
pub fn content_by_name(path: &Path) -> (Content, bool) {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let (name, compressed) = match name.rsplit_once('.') {
        Some((stem, "gz" | "zst" | "zstd")) => (stem.to_owned(), true),
        _ => (name, false),
    };
    let content = match name.rsplit_once('.').map(|(_, extension)| extension) {
        Some("json" | "jsonl" | "ndjson") => Content::Json,
        Some("parquet") => Content::Parquet,
        Some("arrow" | "feather") => Content::Arrow,
        _ => Content::Text,
    };
    (content, compressed)
}
