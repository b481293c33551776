//! The text column of a Parquet table, row by row.

use super::{
    columns::{bytes_document, no_text, place},
    document::{Document, Sink},
};
use crate::error::{Error, Result};
use parquet::{
    basic::Compression,
    errors::ParquetError,
    file::{
        reader::{FileReader, SerializedFileReader},
        serialized_reader::ReadOptionsBuilder,
    },
    record::RowAccessor,
    schema::types::Type,
};
use std::{fs::File, path::Path, sync::Arc};

/// Calls `each` with the value of `column` in every row; a null is an empty document.
pub fn rows(path: &Path, column: &str, each: &mut Sink) -> Result<bool> {
    let wrong = |e: ParquetError| {
        Error::request(format!("'{}': {e}", path.display())).help(
            "write or download it again; with pyarrow: pq.write_table(pq.read_table('OLD'), 'NEW', compression='zstd')",
        )
    };
    if !path.metadata().map_err(|e| Error::io("open", path, e))?.is_file() {
        return Err(Error::request(format!(
            "'{}' is Parquet in a pipe, which cannot be read from its end",
            path.display()
        ))
        .help("write it into a file first"));
    }
    let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
    let reader = SerializedFileReader::new_with_options(file, ReadOptionsBuilder::new().build()).map_err(wrong)?;
    let schema = reader.metadata().file_metadata().schema();
    let columns: Vec<&str> = schema.get_fields().iter().map(|f| f.name()).collect();
    let place = place(path, &columns, column)?;
    let chunks = reader.metadata().row_groups().iter().flat_map(|group| group.columns());
    let codec = chunks.filter(|c| c.column_path().parts().first().is_some_and(|part| part == column));
    if codec.into_iter().any(|c| c.compression() == Compression::LZO) {
        return Err(wrong(ParquetError::General(format!(
            "column '{column}' is compressed by LZO, which has no reader"
        ))));
    }
    let wanted = vec![Arc::clone(&schema.get_fields()[place])];
    let projection = Type::group_type_builder(schema.name()).with_fields(wanted).build().map_err(wrong)?;
    for (i, row) in reader.get_row_iter(Some(projection)).map_err(wrong)?.enumerate() {
        let row = row.map_err(wrong)?;
        let document = if row.is_null(0).map_err(wrong)? {
            Document::Empty
        } else if let Ok(text) = row.get_string(0) {
            Document::Text(text.clone())
        } else if let Ok(bytes) = row.get_bytes(0) {
            bytes_document(path, i, bytes.data().to_vec())
        } else {
            return Err(no_text(path, column, schema.get_fields()[place].name()));
        };
        if !each(document)? {
            return Ok(false);
        }
    }
    Ok(true)
}
