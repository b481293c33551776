//! What tables of all formats share: the place of a column, and what a value that is no text is called.

use super::document::Document;
use crate::error::{Error, Result};
use std::path::Path;

/// Where `column` stands among `columns`.
pub fn place(path: &Path, columns: &[&str], column: &str) -> Result<usize> {
    let mut places = columns.iter().enumerate().filter(|(_, name)| **name == column).map(|(i, _)| i);
    match (places.next(), places.next()) {
        (Some(place), None) => Ok(place),
        (None, _) => {
            Err(Error::request(format!("'{}' has no column '{column}': it has {}", path.display(), columns.join(", ")))
                .help("name the column with --field"))
        }
        (Some(_), Some(_)) => Err(Error::request(format!("'{}' has more than one column '{column}'", path.display()))
            .help("write the table again with one column of that name")),
    }
}

/// The document of a value without a declared encoding; rows count from 0.
pub fn bytes_document(path: &Path, row: usize, bytes: Vec<u8>) -> Document {
    String::from_utf8(bytes).map_or_else(
        |_| {
            Document::Unreadable(
                Error::request(format!("'{}' row {}: its bytes are not UTF-8 text", path.display(), row + 1))
                    .help("leave such rows out with --skip-unreadable"),
            )
        },
        Document::Text,
    )
}

/// The refusal of a column of another kind.
pub fn no_text(path: &Path, column: &str, kind: impl std::fmt::Display) -> Error {
    Error::request(format!("'{}': column '{column}' holds {kind}, expected text", path.display()))
        .help("name the column that holds the text with --field")
}
