//! The text column of an Arrow table, as a file or as the stream that the library `datasets` writes.

use super::{
    columns::{bytes_document, no_text, place},
    document::{Document, Sink},
};
use crate::error::{Error, Result};
use arrow_array::{Array, ArrayRef, RecordBatch, cast::AsArray};
use arrow_ipc::reader::{FileReader, StreamReader};
use arrow_schema::{ArrowError, DataType, Schema};
use std::{
    fs::File,
    io::{BufRead, BufReader},
    path::Path,
};

/// What an Arrow file begins with. A stream has no signature of its own.
pub const FILE_MAGIC: &[u8] = b"ARROW1";

/// Whether a stream begins here: the mark of a message, and a length that fits a schema.
pub fn begins_stream(head: &[u8]) -> bool {
    match head {
        [0xff, 0xff, 0xff, 0xff, a, b, c, d, ..] => {
            let length = u32::from_le_bytes([*a, *b, *c, *d]);
            length > 0 && length < 1 << 28 && length.is_multiple_of(8)
        }
        _ => false,
    }
}

/// Calls `each` with the value of `column` in every row of an Arrow file; a null is an empty document.
pub fn file_rows(path: &Path, column: &str, each: &mut Sink) -> Result<bool> {
    let file = BufReader::new(File::open(path).map_err(|e| Error::io("open", path, e))?);
    let reader = FileReader::try_new(file, None).map_err(|e| wrong(path, &e))?;
    let place = find(path, &reader.schema(), column)?;
    batches(path, reader, place, column, each)
}

/// Calls `each` with the value of `column` in every row of an Arrow stream; a null is an empty document.
pub fn stream_rows(path: &Path, reader: impl BufRead, column: &str, each: &mut Sink) -> Result<bool> {
    let reader = StreamReader::try_new(reader, None).map_err(|e| wrong(path, &e))?;
    let place = find(path, &reader.schema(), column)?;
    batches(path, reader, place, column, each)
}

fn wrong(path: &Path, e: &ArrowError) -> Error {
    Error::request(format!("'{}' cannot be read as an Arrow table: {e}", path.display()))
        .help("write or download it again, or export it: Dataset.to_parquet('x.parquet')")
}

fn find(path: &Path, schema: &Schema, column: &str) -> Result<usize> {
    let columns: Vec<&str> = schema.fields().iter().map(|f| f.name().as_str()).collect();
    place(path, &columns, column)
}

fn batches(
    path: &Path,
    reader: impl Iterator<Item = std::result::Result<RecordBatch, ArrowError>>,
    place: usize,
    column: &str,
    each: &mut Sink,
) -> Result<bool> {
    let mut first = 0;
    for batch in reader {
        let batch = batch.map_err(|e| wrong(path, &e))?;
        let array = batch.column(place);
        for row in 0..array.len() {
            let document = value(path, array, row, first + row, column)?;
            if !each(document)? {
                return Ok(false);
            }
        }
        first += array.len();
    }
    Ok(true)
}

/// The document in `row` of `array`, which is row `of_table` of the table.
fn value(path: &Path, array: &ArrayRef, row: usize, of_table: usize, column: &str) -> Result<Document> {
    if array.is_null(row) {
        return Ok(Document::Empty);
    }
    let text = |text: &str| Ok(Document::Text(text.to_owned()));
    let bytes = |bytes: &[u8]| Ok(bytes_document(path, of_table, bytes.to_vec()));
    match array.data_type() {
        DataType::Utf8 => text(array.as_string::<i32>().value(row)),
        DataType::LargeUtf8 => text(array.as_string::<i64>().value(row)),
        DataType::Utf8View => text(array.as_string_view().value(row)),
        DataType::Binary => bytes(array.as_binary::<i32>().value(row)),
        DataType::LargeBinary => bytes(array.as_binary::<i64>().value(row)),
        DataType::BinaryView => bytes(array.as_binary_view().value(row)),
        DataType::Dictionary(..) => {
            let dictionary = array.as_any_dictionary();
            match dictionary.normalized_keys().get(row) {
                Some(&key) if key < dictionary.values().len() => {
                    value(path, dictionary.values(), key, of_table, column)
                }
                _ => Ok(Document::Empty),
            }
        }
        DataType::Null => Ok(Document::Empty),
        other => Err(no_text(path, column, other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow_array::{DictionaryArray, LargeStringArray, StringArray, StringViewArray, types::Int32Type};
    use arrow_ipc::{
        CompressionType,
        writer::{FileWriter, IpcWriteOptions, StreamWriter},
    };
    use std::sync::Arc;

    fn tables() -> Vec<(&'static str, ArrayRef)> {
        let texts = vec![Some("one"), None, Some("zw\u{f6}lf")];
        vec![
            ("utf8", Arc::new(StringArray::from(texts.clone()))),
            ("large_utf8", Arc::new(LargeStringArray::from(texts.clone()))),
            ("utf8_view", Arc::new(StringViewArray::from(texts.clone()))),
            ("dictionary", Arc::new(texts.into_iter().collect::<DictionaryArray<Int32Type>>())),
        ]
    }

    fn read(path: &Path, field: &str) -> Result<Vec<String>> {
        let mut found = Vec::new();
        let mut each = |document| {
            found.push(match document {
                Document::Text(text) => text,
                Document::Empty => "(null)".into(),
                Document::Unreadable(error) => return Err(error),
            });
            Ok(true)
        };
        let bytes = std::fs::read(path).unwrap();
        if bytes.starts_with(FILE_MAGIC) {
            file_rows(path, field, &mut each)?;
        } else {
            assert!(begins_stream(&bytes) || bytes.len() < 100);
            stream_rows(path, &bytes[..], field, &mut each)?;
        }
        Ok(found)
    }

    #[test]
    fn every_type_of_text_is_read_from_files_and_streams() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("a.arrow");
        for (name, array) in tables() {
            let ids: ArrayRef = Arc::new(arrow_array::Int64Array::from(vec![1, 2, 3]));
            let batch = RecordBatch::try_from_iter([("id", ids), ("text", array)]).unwrap();
            for compression in [None, Some(CompressionType::LZ4_FRAME), Some(CompressionType::ZSTD)] {
                let options = IpcWriteOptions::default().try_with_compression(compression).unwrap();
                for streamed in [true, false] {
                    let file = File::create(&path).unwrap();
                    if streamed {
                        let mut writer =
                            StreamWriter::try_new_with_options(file, &batch.schema(), options.clone()).unwrap();
                        writer.write(&batch).unwrap();
                        writer.write(&batch.slice(2, 1)).unwrap();
                        writer.finish().unwrap();
                    } else {
                        let mut writer =
                            FileWriter::try_new_with_options(file, &batch.schema(), options.clone()).unwrap();
                        writer.write(&batch).unwrap();
                        writer.write(&batch.slice(2, 1)).unwrap();
                        writer.finish().unwrap();
                    }
                    let found = read(&path, "text").unwrap();
                    assert_eq!(
                        found,
                        ["one", "(null)", "zw\u{f6}lf", "zw\u{f6}lf"],
                        "{name} {compression:?} {streamed}"
                    );
                    let error = read(&path, "content").unwrap_err();
                    assert!(error.message.contains("no column 'content': it has id, text"), "{error}");
                    let error = read(&path, "id").unwrap_err();
                    assert!(error.message.contains("column 'id' holds Int64, expected text"), "{error}");
                }
            }
        }
    }

    #[test]
    fn a_file_that_is_cut_short_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("a.arrow");
        let (_, array) = tables().swap_remove(0);
        let batch = RecordBatch::try_from_iter([("text", array)]).unwrap();
        let mut bytes = Vec::new();
        let mut writer = StreamWriter::try_new(&mut bytes, &batch.schema()).unwrap();
        writer.write(&batch).unwrap();
        writer.finish().unwrap();
        drop(writer);
        for len in [20, bytes.len() / 2, bytes.len() - 60] {
            std::fs::write(&path, &bytes[..len]).unwrap();
            let error = read(&path, "text").unwrap_err();
            assert!(error.message.contains("cannot be read as an Arrow table"), "{len}: {error}");
        }
        std::fs::write(&path, "no table").unwrap();
        assert!(read(&path, "text").is_err());
    }
}
