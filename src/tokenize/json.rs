//! Records out of JSON, as Python's `json` module reads them: one per line, one after the other, or a list of them.
//!
//! Beyond RFC 8259, `NaN`, `Infinity` and `-Infinity` are numbers, a byte order mark may begin the file, and half of a
//! UTF-16 pair may stand in a string, though not in the text: no tokenizer takes it.

use super::{
    document::{Document, Sink},
    json_value::{Fault, Found, text_field},
    stream::read_error,
};
use crate::error::{Error, Result};
use std::{
    io::{self, BufRead},
    path::Path,
};

/// The byte order mark of UTF-8.
pub const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Calls `each` with the text in `field` of every record. `head` is what `reader` begins with, as far as it was read ahead.
/// A file whose name says that it holds lines (`.jsonl`) is never read as values of several lines.
pub fn records(
    path: &Path,
    head: &[u8],
    named_lines: bool,
    mut reader: impl BufRead,
    field: &str,
    each: &mut Sink,
) -> Result<bool> {
    let io = |e| read_error(path, e);
    let start = head.strip_prefix(BYTE_ORDER_MARK).unwrap_or(head);
    reader.fill_buf().map_err(io)?;
    reader.consume(head.len() - start.len());
    let file = File { path, field };
    let first = start.trim_ascii_start();
    if first.starts_with(b"[") {
        return file.list(Values { reader, line: 1 }, each);
    }
    let line = start.split(|&b| b == b'\n').find(|line| !line.trim_ascii().is_empty()).unwrap_or_default();
    let whole = text_field(line.trim_ascii(), field).is_ok();
    if first.starts_with(b"{") && !named_lines && !whole && first.contains(&b'\n') {
        return file.sequence(Values { reader, line: 1 }, each);
    }
    let (mut number, mut line) = (0, Vec::new());
    loop {
        line.clear();
        if reader.read_until(b'\n', &mut line).map_err(io)? == 0 {
            return Ok(true);
        }
        number += 1;
        if !line.trim_ascii().is_empty() && !each(file.record(line.trim_ascii(), number))? {
            return Ok(false);
        }
    }
}

struct File<'a> {
    path: &'a Path,
    field: &'a str,
}

impl File<'_> {
    fn at(&self, line: u64, what: impl std::fmt::Display) -> Error {
        Error::request(format!("'{}' line {line}: {what}", self.path.display()))
    }

    /// The document of one record that begins on `line`.
    fn record(&self, bytes: &[u8], line: u64) -> Document {
        let field = self.field;
        let found = match text_field(bytes, field) {
            Ok(Found::Text(text)) => return Document::Text(text),
            Ok(found) => found,
            Err(fault) => {
                let help = if fault.not_utf8 {
                    "convert the file to UTF-8 (iconv -f LATIN1 -t UTF-8), or leave such records out with --skip-unreadable"
                } else {
                    "mend the record, leave such records out with --skip-unreadable, or read the file as text with --as text"
                };
                return Document::Unreadable(self.damaged(&fault, bytes, line).help(help));
            }
        };
        let missing = format!("no text in the field '{field}'");
        let name = "name the field with --field, or leave such records out with --skip-unreadable";
        Document::Unreadable(match found {
            Found::HalfPair => self
                .at(line, format!("the field '{field}' holds half of a UTF-16 pair, which is no character"))
                .help("leave such records out with --skip-unreadable, or write them again without it"),
            Found::Twice => self
                .at(line, format!("the field '{field}' stands twice in one record"))
                .help("readers of JSON differ in which one they take: write the record again with one of them"),
            Found::NoObject(kind) => {
                self.at(line, format!("{missing}: the record is {kind}, expected an object")).help(name)
            }
            Found::Other(kind) => self.at(line, format!("{missing}: it is {kind}")).help(name),
            Found::Missing(others) if others.is_empty() => {
                self.at(line, format!("{missing}: the record is empty")).help(name)
            }
            Found::Missing(others) => {
                self.at(line, format!("{missing}: the record has {}", others.join(", "))).help(name)
            }
            Found::Text(_) => self.at(line, missing),
        })
    }

    /// The document of a record of several lines. Where a damaged one ends is not known, so no flag skips it.
    fn enclosed_record(&self, bytes: &[u8], line: u64) -> Result<Document> {
        match text_field(bytes, self.field) {
            Err(fault) => Err(self.damaged(&fault, bytes, line).help(if fault.not_utf8 {
                "convert the file to UTF-8 (iconv -f LATIN1 -t UTF-8)"
            } else {
                "mend or download the file, or read it as text with --as text"
            })),
            Ok(_) => Ok(self.record(bytes, line)),
        }
    }

    fn damaged(&self, fault: &Fault, bytes: &[u8], line: u64) -> Error {
        let before = &bytes[..fault.at.min(bytes.len())];
        let line = line + before.iter().filter(|&&b| b == b'\n').count() as u64;
        let column = before.len() - before.iter().rposition(|&b| b == b'\n').map_or(0, |at| at + 1) + 1;
        self.at(line, format!("{} at column {column}: this is not JSON", fault.what))
    }

    /// Records inside `[` and `]`.
    fn list(&self, mut values: Values<impl BufRead>, each: &mut Sink) -> Result<bool> {
        let io = |e| read_error(self.path, e);
        let mut record = Vec::new();
        values.space().map_err(io)?;
        values.next().map_err(io)?;
        let mut expects_value = false;
        loop {
            values.space().map_err(io)?;
            let line = values.line;
            match values.peek().map_err(io)? {
                Some(b']') if !expects_value => {
                    values.next().map_err(io)?;
                    values.space().map_err(io)?;
                    return match values.peek().map_err(io)? {
                        None => Ok(true),
                        Some(_) => Err(self
                            .at(values.line, "something follows the end of the list")
                            .help("expected one list of records, or one record per line without a list around them")),
                    };
                }
                None => return Err(self.cut(values.line)),
                Some(_) => {}
            }
            values.value(&mut record).map_err(io)?;
            if !each(self.enclosed_record(&record, line)?)? {
                return Ok(false);
            }
            values.space().map_err(io)?;
            expects_value = match values.peek().map_err(io)? {
                Some(b',') => values.next().map_err(io)?.is_some(),
                Some(b']') => false,
                None => return Err(self.cut(values.line)),
                Some(other) => {
                    return Err(self
                        .at(values.line, format!("expected ',' or ']' after a record, found {:?}", char::from(other)))
                        .help("mend the list, or read the file as text with --as text"));
                }
            };
        }
    }

    /// Records of several lines each, one after the other.
    fn sequence(&self, mut values: Values<impl BufRead>, each: &mut Sink) -> Result<bool> {
        let io = |e| read_error(self.path, e);
        let mut record = Vec::new();
        loop {
            values.space().map_err(io)?;
            let line = values.line;
            if values.peek().map_err(io)?.is_none() {
                return Ok(true);
            }
            values.value(&mut record).map_err(io)?;
            if !each(self.enclosed_record(&record, line)?)? {
                return Ok(false);
            }
        }
    }

    fn cut(&self, line: u64) -> Error {
        self.at(line, "the list of records does not end: the file is cut short").help("write or download it again")
    }
}

/// Cuts a stream into JSON values by their brackets alone; whether they are values is for the parser to say.
struct Values<R> {
    reader: R,
    line: u64,
}

impl<R: BufRead> Values<R> {
    fn peek(&mut self) -> io::Result<Option<u8>> {
        Ok(self.reader.fill_buf()?.first().copied())
    }

    fn next(&mut self) -> io::Result<Option<u8>> {
        let byte = self.peek()?;
        if let Some(byte) = byte {
            self.reader.consume(1);
            self.line += u64::from(byte == b'\n');
        }
        Ok(byte)
    }

    fn space(&mut self) -> io::Result<()> {
        while self.peek()?.is_some_and(|b| b.is_ascii_whitespace()) {
            self.next()?;
        }
        Ok(())
    }

    /// Reads up to the end of the value that begins here, or of the file.
    fn value(&mut self, out: &mut Vec<u8>) -> io::Result<()> {
        out.clear();
        let (mut depth, mut in_string) = (0u32, false);
        while let Some(byte) = self.peek()? {
            let ends_scalar = depth == 0 && !in_string && !out.is_empty();
            if ends_scalar && (matches!(byte, b',' | b']' | b'}') || byte.is_ascii_whitespace()) {
                return Ok(());
            }
            self.next()?;
            out.push(byte);
            match byte {
                b'\\' if in_string => out.extend(self.next()?),
                b'"' => in_string = !in_string,
                b'{' | b'[' if !in_string => depth += 1,
                b'}' | b']' if !in_string => depth = depth.saturating_sub(1),
                _ => continue,
            }
            if depth == 0 && !in_string {
                return Ok(());
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(name: &str, bytes: &[u8]) -> (Vec<String>, Vec<String>) {
        let (mut texts, mut faults) = (Vec::new(), Vec::new());
        let lines = name.ends_with("jsonl");
        let result = records(Path::new(name), bytes, lines, bytes, "text", &mut |document| {
            match document {
                Document::Text(text) => texts.push(text),
                Document::Unreadable(error) => faults.push(error.message),
                Document::Empty => panic!("no such document in JSON"),
            }
            Ok(true)
        });
        faults.extend(result.err().map(|e| e.message));
        (texts, faults)
    }

    #[test]
    fn every_arrangement_of_records_gives_the_same_documents() {
        let expected = ["one \"1\"", "\u{e4}\u{1f600}", "th\nree"];
        let records = [
            r#"{"text": "one \"1\"", "n": [1, {"text": "inner"}]}"#,
            r#"{"n": {}, "text": "ä\ud83d\ude00"}"#,
            r#"{"text":"th\nree"}"#,
        ];
        let spread = records.map(|r| r.replacen('{', "{\n  ", 1).replacen(", ", ",\n  ", 1));
        for (name, text) in [
            ("a.jsonl", records.join("\n")),
            ("a.jsonl", format!("\n{}\r\n\r\n", records.join("\r\n"))),
            ("a.json", records.join("\n") + "\n"),
            ("a.json", format!("[{}]", records.join(","))),
            ("a.json", format!(" [\n{}\n]\n", spread.join(",\n"))),
            ("a.jsonl", format!("[\n{}\n]\n", records.join(",\n"))),
            ("a.json", spread.join("\n")),
        ] {
            for mark in ["", "\u{feff}"] {
                let (texts, faults) = read(name, format!("{mark}{text}").as_bytes());
                assert_eq!(
                    (texts.as_slice(), faults.len()),
                    (&expected.map(str::to_owned)[..], 0),
                    "{text}: {faults:?}"
                );
            }
        }
        assert_eq!(read("a.json", b" [ ] "), (vec![], vec![]));
        assert_eq!(read("a.json", b""), (vec![], vec![]));
    }

    #[test]
    fn records_without_the_text_are_named_and_the_rest_is_read() {
        for (record, words) in [
            ("[\"a\"]", "no text in the field 'text': the record is a list, expected an object"),
            ("\"a\"", "the record is a string, expected an object"),
            ("5", "the record is a number"),
            ("true", "the record is true or false"),
            ("null", "the record is null"),
            ("{}", "no text in the field 'text': the record is empty"),
            ("{\"title\": 1, \"url\": 2}", "no text in the field 'text': the record has title, url"),
            ("{\"text\": null}", "no text in the field 'text': it is null"),
            ("{\"text\": [\"a\"]}", "no text in the field 'text': it is a list"),
            ("{\"text\": \"a\", \"text\": \"b\"}", "the field 'text' stands twice"),
            ("{\"text\": \"cut \\ud83d end\"}", "half of a UTF-16 pair"),
            ("{\"text\": \"a\"", "line 2: the record ends too early at column 13"),
            ("{\"text\": \"a\"} {\"text\": \"b\"}", "line 2: something follows the record at column 15"),
            ("{\"text\": 'a'}", "line 2: '\\'' where a value should begin at column 10"),
        ] {
            let lines = format!("{{\"text\": \"first\"}}\n{record}\n{{\"text\": \"last\"}}\n");
            let (texts, faults) = read("a.jsonl", lines.as_bytes());
            assert_eq!(texts, ["first", "last"], "{record}");
            assert!(faults.len() == 1 && faults[0].contains("line 2: ") && faults[0].contains(words), "{faults:?}");
        }
        let (texts, faults) = read("a.jsonl", b"{\"text\":\"ok\"}\n{\"text\":\"caf\xe9\"}\n");
        assert_eq!(texts, ["ok"]);
        assert!(faults[0].contains("line 2: the byte 0xe9, which is not UTF-8, at column 13"), "{faults:?}");
    }

    #[test]
    fn what_python_accepts_beyond_the_standard_is_read() {
        let lines = "{\"score\": NaN, \"text\": \"a\"}\n{\"text\": \"b\", \"s\": [-Infinity, Infinity, 1e5, -0.5E-3]}\n\
                     {\"other\": \"\\ud83d\", \"text\": \"c\"}\n";
        assert_eq!(read("a.jsonl", lines.as_bytes()), (vec!["a".into(), "b".into(), "c".into()], vec![]));
    }

    #[test]
    fn damaged_lists_are_refused() {
        for (text, words) in [
            ("[{\"text\":\"a\"}", "does not end"),
            ("[{\"text\":\"a\"},", "does not end"),
            ("[{\"text\":\"a\"},]", "']' where a value should begin"),
            ("[{\"text\":\"a\"}]\n[1]", "line 2: something follows the end of the list"),
            ("[{\"text\":\"a\"}\n{\"text\":\"b\"}]", "line 2: expected ',' or ']'"),
            ("plain text", "line 1: 'p' where a value should begin at column 1"),
        ] {
            let (_, faults) = read("a.json", text.as_bytes());
            assert!(faults.iter().any(|f| f.contains(words)), "{text}: {faults:?}");
        }
    }
}
