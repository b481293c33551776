//! Tests of the readers of documents.

use super::*;
use std::{
    fs::{self, File},
    io::Write,
    sync::Arc,
};

fn all(path: &Path, layout: &Layout) -> Result<Vec<Option<String>>> {
    let mut found = Vec::new();
    read(path, None, layout, &mut |document| {
        found.push(match document {
            Document::Text(text) => Some(text),
            Document::Empty => None,
            Document::Unreadable(error) => return Err(error),
        });
        Ok(true)
    })?;
    Ok(found)
}

#[test]
fn every_layout_and_compression_gives_the_same_documents() {
    let root = tempfile::tempdir().unwrap();
    let layout = Layout { field: "text".into(), separator: Some("<|end|>".into()), ..Layout::default() };
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
    let whole = Layout { separator: None, ..layout.clone() };
    assert_eq!(all(&path, &whole).unwrap(), [Some(plain.to_owned())]);
}

#[test]
fn a_parquet_column_is_read_row_by_row() {
    use ::parquet::{
        data_type::{ByteArray, ByteArrayType},
        file::{properties::WriterProperties, writer::SerializedFileWriter},
        schema::parser::parse_message_type,
    };
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("a.parquet");
    let schema = "message m { required binary url (UTF8); optional binary text (UTF8); }";
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let properties = WriterProperties::builder().set_compression(::parquet::basic::Compression::SNAPPY).build();
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

    let layout = |field: &str| Layout { field: field.into(), ..Layout::default() };
    assert_eq!(all(&path, &layout("text")).unwrap(), [Some("one".to_owned()), None, Some("drei".to_owned())]);
    let error = all(&path, &layout("content")).unwrap_err();
    assert!(error.message.contains("no column 'content': it has url, text"), "{error}");
    fs::write(&path, "PAR1 but not really PAR1").unwrap();
    assert!(all(&path, &layout("text")).is_err());
}

#[test]
fn damaged_lines_and_streams_are_named() {
    let root = tempfile::tempdir().unwrap();
    let layout = Layout { field: "text".into(), ..Layout::default() };
    let path = root.path().join("a.jsonl");
    fs::write(&path, "{\"text\":\"x\"}\n{\"title\":\"y\"}\n").unwrap();
    assert!(all(&path, &layout).unwrap_err().message.contains("line 2: no text in the field 'text'"));
    for name in ["b.txt.gz", "b.txt.zst"] {
        let path = root.path().join(name);
        fs::write(&path, "not compressed").unwrap();
        assert!(all(&path, &layout).unwrap_err().message.contains(name));
    }
}

#[test]
fn a_byte_order_mark_is_no_text_and_damage_is_the_files_fault() {
    let root = tempfile::tempdir().unwrap();
    let layout = Layout { field: "text".into(), ..Layout::default() };
    let path = root.path().join("a.json");
    fs::write(&path, "\u{feff}[{\"text\": \"marked\"}]").unwrap();
    assert_eq!(all(&path, &layout).unwrap(), [Some("marked".to_owned())]);
    let path = root.path().join("a.txt");
    fs::write(&path, "\u{feff}marked").unwrap();
    assert_eq!(all(&path, &layout).unwrap(), [Some("marked".to_owned())]);
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(&[b'x'; 100]).unwrap();
    let gzip = encoder.finish().unwrap();
    let zstd = zstd::encode_all(&[b'x'; 100][..], 1).unwrap();
    for (name, bytes) in [("a.txt.gz", gzip), ("a.txt.zst", zstd)] {
        let path = root.path().join(name);
        fs::write(&path, &bytes[..bytes.len() - 5]).unwrap();
        let error = all(&path, &layout).unwrap_err();
        assert!(error.message.contains("is damaged or cut short") && error.exit_code() == 2, "{error}");
    }
}

#[test]
fn a_file_of_another_format_is_named() {
    let root = tempfile::tempdir().unwrap();
    let layout = Layout { field: "text".into(), ..Layout::default() };
    for (name, bytes, words) in [
        ("a.zip", b"PK\x03\x04rest".as_slice(), "it is a zip archive"),
        ("a.txt", b"\xff\xfea\0", "it is UTF-16 text"),
        ("a.bz2", b"BZh91AY", "compressed by bzip2"),
        ("a.txt", b"first\nsecond \xe9", "line 2: the byte 0xe9 is not UTF-8 text"),
        ("a.csv", b"text,label\nx,1\n", "holds a table (csv)"),
        ("a.parquet", b"text", "Parquet"),
        ("a.arrow", b"text", "cannot be read as an Arrow table"),
        ("a.txt.gz", b"", "neither gzip's nor zstd's"),
    ] {
        let path = root.path().join(name);
        fs::write(&path, bytes).unwrap();
        let error = all(&path, &layout).unwrap_err();
        assert!(error.message.contains(words) && error.message.contains(name), "{name}: {error}");
        assert!(error.help.is_some(), "{name}");
    }
    let as_text = Layout { content: Some(Content::Text), ..layout };
    assert_eq!(all(&root.path().join("a.csv"), &as_text).unwrap(), [Some("text,label\nx,1\n".to_owned())]);
}
