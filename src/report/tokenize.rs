//! `tokenize`: what was read, and what was left out.

use super::{Report, table::Table, train::facts, units::bytes};
use crate::tokenize::Summary;

impl Report for Summary {
    fn tables(&self) -> Vec<Table> {
        let mut rows = vec![
            ("documents", self.documents.to_string()),
            ("text", bytes(self.text_bytes)),
            ("tokens", self.tokens.to_string()),
            ("tokenizer", self.tokenizer.to_owned()),
            ("vocab_size", self.vocab_size.to_string()),
            ("documents skipped", self.skipped.to_string()),
        ];
        let left_out = &self.left_out;
        let counts = [
            ("  empty", self.empty),
            ("  unreadable", self.unreadable),
            ("  not UTF-8 text", left_out.not_text),
            ("hidden files and folders left out", left_out.hidden),
            ("files about data left out", left_out.about_data),
            ("links to folders left out", left_out.linked_folders),
            ("pipes and devices left out", left_out.special),
        ];
        rows.extend(counts.iter().filter(|(_, count)| *count > 0).map(|(name, count)| (*name, count.to_string())));
        facts(&format!("{}", self.output.display()), rows)
    }
}
