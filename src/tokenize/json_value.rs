//! One JSON value: the text in one field of it. The grammar is that of Python's `json` module with its defaults.

/// Containers inside each other, as many as Python's default recursion allows.
const MAX_DEPTH: u32 = 990;

/// What the field of a record holds.
#[derive(Debug, PartialEq, Eq)]
pub enum Found {
    /// A string.
    Text(String),
    /// A string with half of a UTF-16 pair.
    HalfPair,
    /// No string, but this.
    Other(&'static str),
    /// The field stands there twice.
    Twice,
    /// There is none; the names of the others.
    Missing(Vec<String>),
    /// The record is no object, but this.
    NoObject(&'static str),
}

/// Why a value is none.
#[derive(Debug, PartialEq, Eq)]
pub struct Fault {
    /// The byte, from 0.
    pub at: usize,
    /// What is there.
    pub what: String,
    /// The bytes are not UTF-8.
    pub not_utf8: bool,
}

/// Parses one whole record and returns what the top-level field `field` holds.
pub fn text_field(bytes: &[u8], field: &str) -> Result<Found, Fault> {
    if let Err(e) = std::str::from_utf8(bytes) {
        let at = e.valid_up_to();
        let byte = bytes.get(at).copied().unwrap_or_default();
        return Err(Fault { at, what: format!("the byte {byte:#04x}, which is not UTF-8,"), not_utf8: true });
    }
    let mut parser = Parser { bytes, at: 0, depth: 0 };
    let found = parser.record(field)?;
    parser.space();
    if parser.at < bytes.len() {
        return Err(parser.fault("something follows the record"));
    }
    Ok(found)
}

/// What kind of value was passed.
enum Kind {
    Text(Option<String>),
    Other(&'static str),
}

type Member<'a, P> = dyn FnMut(&mut P, Option<String>) -> Result<(), Fault> + 'a;

struct Parser<'a> {
    /// UTF-8.
    bytes: &'a [u8],
    at: usize,
    depth: u32,
}

impl Parser<'_> {
    fn record(&mut self, field: &str) -> Result<Found, Fault> {
        self.space();
        if self.peek() != Some(b'{') {
            return Ok(Found::NoObject(match self.value()? {
                Kind::Text(_) => "a string",
                Kind::Other(kind) => kind,
            }));
        }
        let (mut found, mut twice, mut others) = (None, false, Vec::new());
        self.object(&mut |parser, name| {
            let value = parser.value()?;
            if name.as_deref() == Some(field) {
                twice |= found.is_some();
                found = Some(value);
            } else if found.is_none() {
                others.push(name.unwrap_or_else(|| "\u{fffd}".into()));
            }
            Ok(())
        })?;
        Ok(match found {
            _ if twice => Found::Twice,
            None => Found::Missing(others),
            Some(Kind::Text(Some(text))) => Found::Text(text),
            Some(Kind::Text(None)) => Found::HalfPair,
            Some(Kind::Other(kind)) => Found::Other(kind),
        })
    }

    fn value(&mut self) -> Result<Kind, Fault> {
        self.space();
        let rest = &self.bytes[self.at..];
        let constants = [
            ("true", "true or false"),
            ("false", "true or false"),
            ("null", "null"),
            ("NaN", "a number"),
            ("Infinity", "a number"),
            ("-Infinity", "a number"),
        ];
        if let Some((word, kind)) = constants.iter().find(|(word, _)| rest.starts_with(word.as_bytes())) {
            self.at += word.len();
            return Ok(Kind::Other(kind));
        }
        match self.peek() {
            Some(b'"') => self.string().map(Kind::Text),
            Some(b'{') => {
                self.object(&mut |parser, _| parser.value().map(drop))?;
                Ok(Kind::Other("an object"))
            }
            Some(b'[') => {
                self.items(b']', &mut |parser| parser.value().map(drop))?;
                Ok(Kind::Other("a list"))
            }
            Some(b'-' | b'0'..=b'9') => {
                self.number()?;
                Ok(Kind::Other("a number"))
            }
            None => Err(self.fault("the record ends too early")),
            Some(_) => Err(self.unexpected("where a value should begin")),
        }
    }

    /// Calls `member` with each name (`None`: one with half of a UTF-16 pair) where its value begins.
    fn object(&mut self, member: &mut Member<'_, Self>) -> Result<(), Fault> {
        self.items(b'}', &mut |parser| {
            if parser.peek() != Some(b'"') {
                return Err(parser.unexpected("where a name should begin"));
            }
            let name = parser.string()?;
            parser.space();
            if parser.peek() != Some(b':') {
                return Err(parser.unexpected("where ':' should stand"));
            }
            parser.at += 1;
            member(parser, name)
        })
    }

    /// What stands between the bracket here and the one that closes it, separated by commas.
    fn items(&mut self, close: u8, item: &mut dyn FnMut(&mut Self) -> Result<(), Fault>) -> Result<(), Fault> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(self.fault("containers inside each other, more than 990,"));
        }
        self.at += 1;
        self.space();
        if self.peek() == Some(close) {
            self.at += 1;
            self.depth -= 1;
            return Ok(());
        }
        loop {
            self.space();
            item(self)?;
            self.space();
            match self.peek() {
                Some(b',') => self.at += 1,
                Some(byte) if byte == close => break,
                _ => return Err(self.unexpected("where ',' or the end should stand")),
            }
        }
        self.at += 1;
        self.depth -= 1;
        Ok(())
    }

    /// `None` for a string with half of a UTF-16 pair.
    fn string(&mut self) -> Result<Option<String>, Fault> {
        self.at += 1;
        let (mut text, mut whole) = (Vec::new(), true);
        loop {
            let rest = &self.bytes[self.at..];
            let plain = rest.iter().position(|&b| b == b'"' || b == b'\\' || b < 0x20).unwrap_or(rest.len());
            text.extend_from_slice(&rest[..plain]);
            self.at += plain;
            match self.peek() {
                None => return Err(self.fault("the record ends too early")),
                Some(b'"') => break,
                Some(b'\\') => match self.escape()? {
                    Some(c) => text.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
                    None => whole = false,
                },
                Some(byte) => return Err(self.fault(&format!("the control character {byte:#04x} inside a string"))),
            }
        }
        self.at += 1;
        Ok(if whole { String::from_utf8(text).ok() } else { None })
    }

    /// `None` for half of a UTF-16 pair.
    fn escape(&mut self) -> Result<Option<char>, Fault> {
        let kind = self.bytes.get(self.at + 1).copied();
        let plain = match kind {
            Some(b @ (b'"' | b'\\' | b'/')) => b,
            Some(b'b') => 8,
            Some(b'f') => 12,
            Some(b'n') => b'\n',
            Some(b'r') => b'\r',
            Some(b't') => b'\t',
            Some(b'u') => {
                let first = self.unit()?;
                if !(0xd800..0xdc00).contains(&first) || !self.bytes[self.at..].starts_with(b"\\u") {
                    return Ok(char::from_u32(first));
                }
                let back = self.at;
                let second = self.unit()?;
                if !(0xdc00..0xe000).contains(&second) {
                    self.at = back;
                    return Ok(None);
                }
                return Ok(char::from_u32(0x10000 + ((first - 0xd800) << 10) + (second - 0xdc00)));
            }
            _ => return Err(self.fault("an unknown escape")),
        };
        self.at += 2;
        Ok(Some(plain.into()))
    }

    /// The code unit of a `\u` escape with its four hexadecimal digits.
    fn unit(&mut self) -> Result<u32, Fault> {
        let digits = self.bytes.get(self.at + 2..self.at + 6);
        let digits = digits.filter(|d| d.iter().all(u8::is_ascii_hexdigit)).and_then(|d| std::str::from_utf8(d).ok());
        let unit = digits.and_then(|d| u32::from_str_radix(d, 16).ok());
        let unit = unit.ok_or_else(|| self.fault("an unknown escape"))?;
        self.at += 6;
        Ok(unit)
    }

    fn number(&mut self) -> Result<(), Fault> {
        if self.peek() == Some(b'-') {
            self.at += 1;
        }
        match self.peek() {
            Some(b'0') => self.at += 1,
            _ => self.digits()?,
        }
        if self.peek() == Some(b'.') {
            self.at += 1;
            self.digits()?;
        }
        if matches!(self.peek(), Some(b'e' | b'E')) {
            self.at += 1;
            if matches!(self.peek(), Some(b'+' | b'-')) {
                self.at += 1;
            }
            self.digits()?;
        }
        Ok(())
    }

    fn digits(&mut self) -> Result<(), Fault> {
        let count = self.bytes[self.at..].iter().take_while(|b| b.is_ascii_digit()).count();
        if count == 0 {
            return Err(self.unexpected("where a digit should stand"));
        }
        self.at += count;
        Ok(())
    }

    fn space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    fn fault(&self, what: &str) -> Fault {
        Fault { at: self.at, what: what.to_owned(), not_utf8: false }
    }

    fn unexpected(&self, place: &str) -> Fault {
        let rest = std::str::from_utf8(&self.bytes[self.at..]).unwrap_or_default();
        match rest.chars().next() {
            None => self.fault("the record ends too early"),
            Some(c) => self.fault(&format!("{c:?} {place}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    #[test]
    fn deep_nesting_is_refused_and_not_a_stack_overflow() {
        let deep = |n: usize| format!("{{\"a\":{}1{}}}", "[".repeat(n), "]".repeat(n));
        assert!(text_field(deep(900).as_bytes(), "text").is_ok());
        for n in [1000, 1_000_000] {
            assert!(text_field(deep(n).as_bytes(), "text").unwrap_err().what.contains("more than 990"));
        }
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            ".*".prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 16, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map(".*", inner, 0..4).prop_map(|m| json!(m)),
            ]
        })
    }

    proptest! {
        /// serde_json is the judge of what both accept.
        #[test]
        fn the_text_is_what_serde_json_reads(value in any_json(), text in ".*", pretty: bool) {
            let record = json!({"before": value, "text": text, "after": [value]});
            let written = if pretty { serde_json::to_string_pretty(&record) } else { serde_json::to_string(&record) };
            prop_assert_eq!(text_field(written.unwrap().as_bytes(), "text"), Ok(Found::Text(text)));
        }

        #[test]
        fn damage_is_seen_as_serde_json_sees_it(value in any_json(), at in 0usize..200, byte: u8) {
            let mut written = serde_json::to_vec(&json!({"text": "x", "value": value})).unwrap();
            let at = at % written.len();
            written[at] = byte;
            let theirs: Result<Value, _> = serde_json::from_slice(&written);
            let ours = text_field(&written, "text");
            // Python's json reads more: constants, and halves of pairs. It never reads less.
            if theirs.is_ok() {
                prop_assert!(ours.is_ok(), "{ours:?}: {}", String::from_utf8_lossy(&written));
            }
        }
    }
}
