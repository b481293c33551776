//! Documents out of text, JSON lines and Parquet files, plain or compressed, one after the other.

use crate::error::{Error, Result};
use parquet::{
    file::{reader::SerializedFileReader, serialized_reader::ReadOptionsBuilder},
    record::RowAccessor,
    schema::types::Type,
};
use serde_json::Value;
use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
    sync::Arc,
};

/// How files are cut into documents.
#[derive(Clone, Debug, Default)]
pub struct Layout {
    /// Field or column of JSON lines and Parquet that holds the text.
    pub field: String,
    /// In text files: what stands between two documents. Without it a file is one document.
    pub separator: Option<String>,
}

/// What a file's name says about its content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Text,
    JsonLines,
    Parquet,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Compression {
    None,
    Gzip,
    Zstd,
}

fn kind_of(path: &Path) -> (Kind, Compression) {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let (name, compression) = match name.rsplit_once('.') {
        Some((stem, "gz")) => (stem.to_owned(), Compression::Gzip),
        Some((stem, "zst" | "zstd")) => (stem.to_owned(), Compression::Zstd),
        _ => (name, Compression::None),
    };
    let kind = match name.rsplit_once('.').map(|(_, extension)| extension) {
        Some("jsonl" | "ndjson") => Kind::JsonLines,
        Some("parquet") => Kind::Parquet,
        _ => Kind::Text,
    };
    (kind, compression)
}

/// Calls `each` with every document of `path`, in order, until it returns false. Returns whether all were wanted.
/// A text file that is not UTF-8 counts as `None`.
pub fn read(path: &Path, layout: &Layout, each: &mut dyn FnMut(Option<String>) -> Result<bool>) -> Result<bool> {
    let (kind, compression) = kind_of(path);
    match kind {
        Kind::Parquet if compression == Compression::None => parquet_rows(path, &layout.field, each),
        Kind::Parquet => Err(Error::request(format!("'{}' is Parquet inside another compression", path.display()))
            .help("decompress it first: Parquet compresses its own pages")),
        Kind::JsonLines => json_lines(path, compression, &layout.field, each),
        Kind::Text => text(path, compression, layout.separator.as_deref(), each),
    }
}

fn open(path: &Path, compression: Compression) -> Result<Box<dyn Read>> {
    let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
    Ok(match compression {
        Compression::None => Box::new(file),
        Compression::Gzip => Box::new(flate2::read::MultiGzDecoder::new(BufReader::new(file))),
        Compression::Zstd => {
            Box::new(zstd::stream::read::Decoder::new(file).map_err(|e| Error::io("decompress", path, e))?)
        }
    })
}

fn text(
    path: &Path,
    compression: Compression,
    separator: Option<&str>,
    each: &mut dyn FnMut(Option<String>) -> Result<bool>,
) -> Result<bool> {
    let mut reader = BufReader::with_capacity(1 << 20, open(path, compression)?);
    let Some(separator) = separator else {
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes).map_err(|e| Error::io("read", path, e))?;
        return each(String::from_utf8(bytes).ok());
    };
    // Up to the last byte of the separator; the piece is a document if it ends with the whole of it.
    let (separator, mut piece) = (separator.as_bytes(), Vec::new());
    loop {
        let before = piece.len();
        let last = separator[separator.len() - 1];
        reader.read_until(last, &mut piece).map_err(|e| Error::io("read", path, e))?;
        let at_end = piece.len() == before;
        if at_end && piece.is_empty() {
            return Ok(true);
        }
        if at_end || piece.ends_with(separator) {
            let end = piece.len() - if piece.ends_with(separator) { separator.len() } else { 0 };
            if !each(String::from_utf8(piece[..end].to_vec()).ok())? {
                return Ok(false);
            }
            piece.clear();
        }
    }
}

fn json_lines(
    path: &Path,
    compression: Compression,
    field: &str,
    each: &mut dyn FnMut(Option<String>) -> Result<bool>,
) -> Result<bool> {
    let reader = BufReader::with_capacity(1 << 20, open(path, compression)?);
    for (i, line) in reader.split(b'\n').enumerate() {
        let line = line.map_err(|e| Error::io("read", path, e))?;
        if line.trim_ascii().is_empty() {
            continue;
        }
        let wrong = |what: String| Error::request(format!("'{}' line {}: {what}", path.display(), i + 1));
        let mut value: Value = serde_json::from_slice(&line).map_err(|e| wrong(e.to_string()))?;
        let Value::String(text) = value[field].take() else {
            return Err(wrong(format!("no text in the field '{field}'")).help("name the field with --field"));
        };
        if !each(Some(text))? {
            return Ok(false);
        }
    }
    Ok(true)
}

fn parquet_rows(path: &Path, column: &str, each: &mut dyn FnMut(Option<String>) -> Result<bool>) -> Result<bool> {
    use parquet::file::reader::FileReader;
    let wrong = |e: parquet::errors::ParquetError| Error::request(format!("'{}': {e}", path.display()));
    let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
    let options = ReadOptionsBuilder::new().build();
    let reader = SerializedFileReader::new_with_options(file, options).map_err(wrong)?;
    let schema = reader.metadata().file_metadata().schema();
    let columns: Vec<&str> = schema.get_fields().iter().map(|f| f.name()).collect();
    let Some(place) = columns.iter().position(|name| *name == column) else {
        return Err(Error::request(format!(
            "'{}' has no column '{column}': it has {}",
            path.display(),
            columns.join(", ")
        ))
        .help("name the column with --field"));
    };
    let wanted = vec![Arc::clone(&schema.get_fields()[place])];
    let projection = Type::group_type_builder(schema.name()).with_fields(wanted).build().map_err(wrong)?;
    for row in reader.get_row_iter(Some(projection)).map_err(wrong)? {
        let row = row.map_err(wrong)?;
        if row.is_null(0).map_err(wrong)? {
            continue;
        }
        let text = match (row.get_string(0), row.get_bytes(0)) {
            (Ok(text), _) => Some(text.clone()),
            (_, Ok(bytes)) => String::from_utf8(bytes.data().to_vec()).ok(),
            (Err(e), _) => return Err(wrong(e).help("the column must hold text")),
        };
        if !each(text)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// `input` itself if it is a file, else the files below it, sorted by path.
pub fn files(input: &Path, include: Option<&globset::GlobMatcher>) -> Result<Vec<PathBuf>> {
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
    use std::io::Write;

    fn all(path: &Path, layout: &Layout) -> Result<Vec<Option<String>>> {
        let mut found = Vec::new();
        read(path, layout, &mut |document| {
            found.push(document);
            Ok(true)
        })?;
        Ok(found)
    }

    #[test]
    fn every_layout_and_compression_gives_the_same_documents() {
        let root = tempfile::tempdir().unwrap();
        let layout = Layout { field: "text".into(), separator: Some("<|end|>".into()) };
        let lines = "{\"text\":\"one\\ntwo\",\"id\":1}\n\n{\"id\":2,\"text\":\"drei\"}\n";
        let plain = "one\ntwo<|end|>drei";
        let gzip = |bytes: &str| {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(bytes.as_bytes()).unwrap();
            encoder.finish().unwrap()
        };
        let files = [
            ("a.jsonl", lines.as_bytes().to_vec()),
            ("a.jsonl.gz", gzip(lines)),
            ("a.ndjson.zst", zstd::encode_all(lines.as_bytes(), 1).unwrap()),
            ("a.txt", plain.as_bytes().to_vec()),
            ("a.txt.gz", gzip(plain)),
            ("a.md.zst", zstd::encode_all(plain.as_bytes(), 1).unwrap()),
        ];
        for (name, bytes) in files {
            let path = root.path().join(name);
            fs::write(&path, bytes).unwrap();
            let expected = [Some("one\ntwo".to_owned()), Some("drei".to_owned())];
            assert_eq!(all(&path, &layout).unwrap(), expected, "{name}");
        }
        let path = root.path().join("a.txt");
        let whole = Layout { separator: None, ..layout };
        assert_eq!(all(&path, &whole).unwrap(), [Some(plain.to_owned())]);
    }

    #[test]
    fn a_parquet_column_is_read_row_by_row() {
        use parquet::{
            data_type::{ByteArray, ByteArrayType},
            file::{properties::WriterProperties, writer::SerializedFileWriter},
            schema::parser::parse_message_type,
        };
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("a.parquet");
        let schema = "message m { required binary url (UTF8); optional binary text (UTF8); }";
        let schema = Arc::new(parse_message_type(schema).unwrap());
        let properties = WriterProperties::builder().set_compression(parquet::basic::Compression::SNAPPY).build();
        let file = File::create(&path).unwrap();
        let mut writer = SerializedFileWriter::new(file, schema, Arc::new(properties)).unwrap();
        let mut rows = writer.next_row_group().unwrap();
        for (values, levels) in [(["u", "v", "w"].as_slice(), None), (&["one", "drei"], Some(&[1i16, 0, 1][..]))] {
            let mut column = rows.next_column().unwrap().unwrap();
            let values: Vec<ByteArray> = values.iter().map(|v| ByteArray::from(*v)).collect();
            column.typed::<ByteArrayType>().write_batch(&values, levels, None).unwrap();
            column.close().unwrap();
        }
        rows.close().unwrap();
        writer.close().unwrap();

        let layout = |field: &str| Layout { field: field.into(), separator: None };
        assert_eq!(all(&path, &layout("text")).unwrap(), [Some("one".to_owned()), Some("drei".to_owned())]);
        let error = all(&path, &layout("content")).unwrap_err();
        assert!(error.message.contains("no column 'content': it has url, text"), "{error}");
        fs::write(&path, "PAR1 but not really PAR1").unwrap();
        assert!(all(&path, &layout("text")).is_err());
    }

    #[test]
    fn damaged_lines_and_streams_are_named() {
        let root = tempfile::tempdir().unwrap();
        let layout = Layout { field: "text".into(), separator: None };
        let path = root.path().join("a.jsonl");
        fs::write(&path, "{\"text\":\"x\"}\n{\"title\":\"y\"}\n").unwrap();
        assert!(all(&path, &layout).unwrap_err().message.contains("line 2: no text in the field 'text'"));
        for name in ["b.txt.gz", "b.txt.zst"] {
            let path = root.path().join(name);
            fs::write(&path, "not compressed").unwrap();
            assert!(all(&path, &layout).unwrap_err().message.contains(name));
        }
    }
}
