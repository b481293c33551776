//! Text that came from a file, made safe to print: one rule, used by every message, log line, table and page.
//!
//! Names of tensors, modules, fields and files are chosen by whoever wrote the file. They may hold line breaks that forge
//! further lines, escape sequences that control a terminal, and format characters that reverse or hide what follows them.

use std::{
    borrow::Cow,
    fmt,
    path::{Path, PathBuf},
};

/// Whether `c` may reach a terminal or a page as it is: no control character (Unicode Cc), no character that changes how
/// its neighbours are shown (bidirectional controls, zero-width and invisible ones of Cf), no line or paragraph separator.
pub fn is_plain(c: char) -> bool {
    !c.is_control()
        && !matches!(c,
            '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

/// One line of text: everything that is not plain becomes U+FFFD.
pub fn line(text: &str) -> Cow<'_, str> {
    match text.chars().all(is_plain) {
        true => text.into(),
        false => text.replace(|c| !is_plain(c), "\u{fffd}").into(),
    }
}

/// Text of our own that may span lines, with text of others in it: line breaks stay, the rest is as in [`line`].
pub fn lines(text: &str) -> Cow<'_, str> {
    let kept = |c: char| c == '\n' || is_plain(c);
    match text.chars().all(kept) {
        true => text.into(),
        false => text.replace(|c| !kept(c), "\u{fffd}").into(),
    }
}

/// A path as one line of text; bytes that are not UTF-8 become U+FFFD.
pub fn path(path: &Path) -> String {
    line(&path.to_string_lossy()).into_owned()
}

/// Shows a value through [`line`].
pub struct Line<T>(pub T);

impl<T: fmt::Display> fmt::Display for Line<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&line(&self.0.to_string()))
    }
}

/// Serialises a path as text; bytes that are not UTF-8 become U+FFFD instead of an error.
/// For `#[serde(serialize_with = "crate::escape::lossy")]`.
pub fn lossy<S: serde::Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&path.to_string_lossy())
}

/// [`lossy`], of a path that may be absent.
pub fn lossy_option<S: serde::Serializer>(path: &Option<PathBuf>, serializer: S) -> Result<S::Ok, S::Error> {
    match path {
        Some(path) => serializer.serialize_some(&path.to_string_lossy()),
        None => serializer.serialize_none(),
    }
}

/// [`lossy`], of paths with a text each.
pub fn lossy_pairs<S: serde::Serializer>(pairs: &[(PathBuf, String)], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(pairs.iter().map(|(path, text)| (path.to_string_lossy(), text)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_controls_a_terminal_or_reorders_text_is_replaced_and_all_else_stays() {
        assert_eq!(line("model.layers.0.w_1 [é 模型 ]"), "model.layers.0.w_1 [é 模型 ]");
        assert_eq!(line("a\u{1b}[2Jb\nc\r\u{9b}"), "a\u{fffd}[2Jb\u{fffd}c\u{fffd}\u{fffd}");
        assert_eq!(line("x\u{202e}y\u{200b}z\u{2066}\u{feff}\u{2028}"), "x\u{fffd}y\u{fffd}z\u{fffd}\u{fffd}\u{fffd}");
        assert_eq!(lines("a\nb\tc\u{7}"), "a\nb\u{fffd}c\u{fffd}");
    }
}
