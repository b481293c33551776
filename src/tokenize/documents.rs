//! Documents out of text, JSON, Parquet and Arrow files, plain or compressed, one after the other.

use super::{
    arrow,
    document::{Content, Document, Layout, MAX_DOCUMENT, Sink, content_by_name},
    json, parquet, stream,
};
use crate::{
    error::{Error, Result},
    guard,
};
use std::{
    io::{BufRead, BufReader, Cursor, Read},
    path::Path,
};

/// Bytes that are looked at before a file is read: enough for every signature.
const HEAD: usize = 64 << 10;

/// The extensions of tables that have no reader here: their commas and headers are no text.
const TABLES: [&str; 4] = ["csv", "tsv", "xlsx", "xls"];

/// Formats that are not text, by their first bytes (at an offset).
const FOREIGN: [(usize, &[u8], &str); 9] = [
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"BZh", "compressed by bzip2"),
    (0, b"\xfd7zXZ\0", "compressed by xz"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (257, b"ustar", "a tar archive"),
    (0, b"%PDF-", "a PDF document"),
    (0, b"\xff\xfe", "UTF-16 text"),
    (0, b"\xfe\xff", "UTF-16 text"),
    (0, b"\x93NUMPY", "a NumPy array"),
];

/// Calls `each` with every document of `path`, in order, until it returns false. Returns whether all were wanted.
/// `content` is what the folder around the file says that it holds.
pub fn read(path: &Path, content: Option<Content>, layout: &Layout, each: &mut Sink) -> Result<bool> {
    let source = stream::open(path)?;
    let (head, rest) = look_ahead(source, path)?;
    let (by_name, named_compressed) = content_by_name(path);
    let named = content.unwrap_or(by_name);
    let decompressed: Box<dyn Read> = match compression(&head) {
        Some(kind) => {
            let whole = BufReader::new(Cursor::new(head).chain(rest));
            match kind {
                Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(whole)),
                Compression::Zstd => Box::new(
                    zstd::stream::read::Decoder::with_buffer(whole).map_err(|e| Error::io("decompress", path, e))?,
                ),
            }
        }
        None if named_compressed => {
            return Err(Error::request(format!(
                "'{}' is named as a compressed file, but its first bytes are neither gzip's nor zstd's",
                path.display()
            ))
            .help("rename it if it holds plain data, else write or download it again"));
        }
        None => return plain(path, head, rest, named, layout, false, each),
    };
    let (head, rest) = look_ahead(decompressed, path)?;
    plain(path, head, rest, named, layout, true, each)
}

/// Reads what is not compressed, or no longer so. `head` comes before `rest`.
fn plain(
    path: &Path,
    head: Vec<u8>,
    rest: Box<dyn Read>,
    named: Content,
    layout: &Layout,
    compressed: bool,
    each: &mut Sink,
) -> Result<bool> {
    let found = match layout.content {
        Some(content) => content,
        None => content_by_head(&head).unwrap_or(named),
    };
    let extension = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
    if layout.content.is_none() && TABLES.contains(&extension.as_str()) {
        return Err(Error::request(format!(
            "'{}' holds a table ({extension}), which has no reader here",
            path.display()
        ))
        .help("write it as .jsonl or .parquet, or train on its commas and names, too, with --as text"));
    }
    let whole = |head: Vec<u8>, rest| BufReader::with_capacity(1 << 20, Cursor::new(head).chain(rest));
    match found {
        Content::Parquet | Content::Arrow if compressed => {
            Err(Error::request(format!("'{}' is {} inside another compression", path.display(), name(found)))
                .help("decompress it first: the format compresses its own pages"))
        }
        // The readers of tables panic on some damaged files.
        Content::Parquet => guard::caught(path, "Parquet file", || parquet::rows(path, &layout.field, each)),
        Content::Arrow if head.starts_with(arrow::FILE_MAGIC) => {
            guard::caught(path, "Arrow file", || arrow::file_rows(path, &layout.field, each))
        }
        Content::Arrow => {
            guard::caught(path, "Arrow stream", || arrow::stream_rows(path, whole(head, rest), &layout.field, each))
        }
        Content::Json => {
            let (rest, spent) = stream::limited(rest, path, layout.max_document.max(MAX_DOCUMENT));
            let each: &mut Sink = &mut |document| {
                spent.set(0);
                each(document)
            };
            let lines = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
            let lines = [".jsonl", ".ndjson"].iter().any(|end| lines.contains(end));
            let copy = head.clone();
            // The reader begins at the head's first byte again.
            json::records(path, &copy, lines, whole(head, rest), &layout.field, each)
        }
        Content::Text => {
            if let Some(kind) = foreign(&head) {
                return each(Document::Unreadable(not_text(path, kind)));
            }
            let (rest, spent) = stream::limited(rest, path, layout.max_document.max(MAX_DOCUMENT));
            let each: &mut Sink = &mut |document| {
                spent.set(0);
                each(document)
            };
            text(path, &head, whole(head.clone(), rest), layout.separator.as_deref(), each)
        }
    }
}

fn name(content: Content) -> &'static str {
    match content {
        Content::Text => "text",
        Content::Json => "JSON",
        Content::Parquet => "Parquet",
        Content::Arrow => "Arrow",
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Compression {
    Gzip,
    Zstd,
}

fn compression(head: &[u8]) -> Option<Compression> {
    match head {
        [0x1f, 0x8b, ..] => Some(Compression::Gzip),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Some(Compression::Zstd),
        _ => None,
    }
}

/// The formats that begin with a signature, whatever the file is called.
fn content_by_head(head: &[u8]) -> Option<Content> {
    match head {
        [b'P', b'A', b'R', b'1', ..] => Some(Content::Parquet),
        _ if head.starts_with(arrow::FILE_MAGIC) || arrow::begins_stream(head) => Some(Content::Arrow),
        _ => None,
    }
}

fn foreign(head: &[u8]) -> Option<&'static str> {
    FOREIGN.iter().find(|(at, magic, _)| head.get(*at..).is_some_and(|h| h.starts_with(magic))).map(|f| f.2)
}

fn not_text(path: &Path, kind: &str) -> Error {
    Error::request(format!("'{}' is no UTF-8 text: it is {kind}", path.display())).help(match kind {
        "UTF-16 text" => "convert it first: iconv -f UTF-16 -t UTF-8",
        _ => "unpack or convert it first, or leave such files out with --skip-unreadable",
    })
}

/// The first bytes, and a reader of what follows them.
fn look_ahead(mut source: Box<dyn Read>, path: &Path) -> Result<(Vec<u8>, Box<dyn Read>)> {
    let mut head = Vec::new();
    source.by_ref().take(HEAD as u64).read_to_end(&mut head).map_err(|e| stream::read_error(path, e))?;
    Ok((head, source))
}

fn text(path: &Path, head: &[u8], mut reader: impl BufRead, separator: Option<&str>, each: &mut Sink) -> Result<bool> {
    let io = |e| stream::read_error(path, e);
    if head.starts_with(json::BYTE_ORDER_MARK) {
        reader.fill_buf().map_err(io)?;
        reader.consume(json::BYTE_ORDER_MARK.len());
    }
    let document = |bytes: Vec<u8>, line: u64| match String::from_utf8(bytes) {
        Ok(text) => Document::Text(text),
        Err(e) => {
            let valid = &e.as_bytes()[..e.utf8_error().valid_up_to()];
            let byte = e.as_bytes().get(valid.len()).copied().unwrap_or_default();
            let line = line + newlines(valid);
            Document::Unreadable(
                Error::request(format!("'{}' line {line}: the byte {byte:#04x} is not UTF-8 text", path.display()))
                    .help("convert it to UTF-8 (iconv -f LATIN1 -t UTF-8), or leave it out with --skip-unreadable"),
            )
        }
    };
    let Some(separator) = separator else {
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes).map_err(io)?;
        return each(document(bytes, 1));
    };
    // Up to the last byte of the separator; the piece is a document if it ends with the whole of it.
    let (separator, mut piece, mut line) = (separator.as_bytes(), Vec::new(), 1);
    let last = separator.last().copied().unwrap_or(b'\n');
    loop {
        let before = piece.len();
        reader.read_until(last, &mut piece).map_err(io)?;
        let at_end = piece.len() == before;
        if at_end && piece.is_empty() {
            return Ok(true);
        }
        if at_end || piece.ends_with(separator) {
            let end = piece.len() - if piece.ends_with(separator) { separator.len() } else { 0 };
            if !each(document(piece[..end].to_vec(), line))? {
                return Ok(false);
            }
            line += newlines(&piece);
            piece.clear();
        }
    }
}

fn newlines(bytes: &[u8]) -> u64 {
    bytes.iter().filter(|&&b| b == b'\n').count() as u64
}

#[cfg(test)]
mod tests;
