//! One table, three renderings.

use crate::escape;
use comfy_table::{CellAlignment, ContentArrangement, presets};
use std::borrow::Cow;

/// Characters of a cell that the terminal shows: beyond it, the layout would be of one cell, and take its time.
const WIDEST: usize = 200;

/// Longer tables are folded in Markdown.
const FOLDED: usize = 32;

/// A titled table of strings. Columns whose cells all look like numbers are right-aligned.
#[derive(Clone, Debug, Default)]
pub struct Table {
    /// Shown above the table; empty for none.
    pub title: String,
    /// Column names.
    pub header: Vec<String>,
    /// Cells, one `Vec` per row, as long as `header`.
    pub rows: Vec<Vec<String>>,
}

impl Table {
    /// An empty table.
    pub fn new(title: impl Into<String>, header: &[&str]) -> Self {
        Table { title: title.into(), header: header.iter().map(|s| (*s).to_owned()).collect(), rows: Vec::new() }
    }

    /// Appends a row.
    pub fn row(&mut self, cells: Vec<String>) {
        debug_assert_eq!(cells.len(), self.header.len());
        self.rows.push(cells);
    }

    /// Aligned columns.
    pub fn to_text(&self) -> String {
        let mut table = comfy_table::Table::new();
        table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
        if self.header.iter().any(|name| !name.is_empty()) {
            table.set_header(self.header.iter().map(|cell| shown(cell)));
        }
        table.add_rows(self.rows.iter().map(|cells| cells.iter().map(|cell| shown(cell))));
        for i in 0..self.header.len() {
            if self.is_numeric(i)
                && let Some(column) = table.column_mut(i)
            {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        let body: String = table.lines().map(|line| line.trim_end().to_owned() + "\n").collect();
        if self.title.is_empty() { body } else { format!("{}\n{body}", shown(&self.title)) }
    }

    /// A GitHub-flavoured Markdown table; a long one opens on a click.
    pub fn to_markdown(&self) -> String {
        let line =
            |cells: &[String]| format!("| {} |\n", cells.iter().map(|c| markdown(c)).collect::<Vec<_>>().join(" | "));
        let mut out = if self.title.is_empty() { String::new() } else { format!("**{}**\n\n", markdown(&self.title)) };
        out += &line(&self.header);
        let rule: Vec<String> =
            (0..self.header.len()).map(|i| if self.is_numeric(i) { "---:".into() } else { "---".into() }).collect();
        out += &line(&rule);
        self.rows.iter().for_each(|row| out += &line(row));
        match self.rows.len() {
            n if n > FOLDED => {
                format!("<details><summary>{n} rows: {}</summary>\n\n{out}\n</details>\n", markdown(&self.header[0]))
            }
            _ => out,
        }
    }

    /// RFC 4180, without the title. Control characters are replaced, and what a spreadsheet would take for a formula
    /// gets an apostrophe in front.
    pub fn to_csv(&self) -> String {
        let quote = |cell: &String| {
            let formula = cell.starts_with(['=', '+', '-', '@', '\t', '\r']) && cell.parse::<f64>().is_err();
            let cell = escape::line(cell);
            let cell = if formula { format!("'{cell}") } else { cell.into_owned() };
            match cell.contains([',', '"']) {
                true => format!("\"{}\"", cell.replace('"', "\"\"")),
                false => cell,
            }
        };
        std::iter::once(&self.header)
            .chain(&self.rows)
            .map(|row| row.iter().map(quote).collect::<Vec<_>>().join(",") + "\n")
            .collect()
    }

    fn is_numeric(&self, column: usize) -> bool {
        let looks_numeric =
            |cell: &String| cell.starts_with(|c: char| c.is_ascii_digit() || c == '-' || c == '.') || cell == "null";
        !self.rows.is_empty() && self.rows.iter().all(|row| looks_numeric(&row[column]))
    }
}

/// A cell on a terminal: plain characters, and not more of them than anybody reads.
fn shown(cell: &str) -> Cow<'_, str> {
    match cell.char_indices().nth(WIDEST) {
        None => escape::line(cell),
        Some((end, _)) => format!("{}...", escape::line(&cell[..end])).into(),
    }
}

/// Text for Markdown with nothing left that means something there: no tags, no emphasis, no code, no links.
pub fn markdown(text: &str) -> String {
    let text = escape::line(text);
    let mut out = String::with_capacity(text.len());
    let mut before = ' ';
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        let inside_word = before.is_alphanumeric() && rest.peek().is_some_and(|next| next.is_alphanumeric());
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            // Between letters it begins no emphasis.
            '_' if inside_word => out.push('_'),
            '\\' | '`' | '*' | '_' | '[' | ']' | '|' | '~' => out.extend(['\\', c]),
            // Half of a link that needs no brackets.
            '/' if before == ':' => out += "\\/",
            _ => out.push(c),
        }
        before = c;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_three_renderings_show_the_same_cells() {
        let mut table = Table::new("T", &["name", "n"]);
        table.row(vec!["a,b".into(), "1".into()]);
        table.row(vec!["c|d".into(), "20".into()]);
        assert_eq!(table.to_text(), "T\n name   n\n a,b    1\n c|d   20\n");
        assert_eq!(table.to_markdown(), "**T**\n\n| name | n |\n| --- | ---: |\n| a,b | 1 |\n| c\\|d | 20 |\n");
        assert_eq!(table.to_csv(), "name,n\n\"a,b\",1\nc|d,20\n");
        (0..FOLDED).for_each(|i| table.row(vec![i.to_string(), "3".into()]));
        assert!(table.to_markdown().starts_with("<details><summary>34 rows: name</summary>\n\n**T**"));
    }

    #[test]
    fn names_mean_nothing_in_any_format() {
        let mut table = Table::new("", &["name", "n"]);
        for name in [
            "=cmd|' /C calc'!A0",
            "-2+3",
            "<!-- `a` *b* _c_ [l](javascript:x) http://x",
            "\u{202e}x\n\u{1b}[2J",
            "self_attn.q_proj",
        ] {
            table.row(vec![name.into(), "-1.5e3".into()]);
        }
        let csv = table.to_csv();
        assert!(csv.contains("\n'=cmd|' /C calc'!A0,-1.5e3\n'-2+3,-1.5e3\n") && !csv.contains('\u{1b}'), "{csv}");
        let markdown = table.to_markdown();
        assert!(
            markdown.contains("| &lt;!-- \\`a\\` \\*b\\* \\_c\\_ \\[l\\](javascript:x) http:\\//x |"),
            "{markdown}"
        );
        assert!(
            markdown.contains("| self_attn.q_proj |") && markdown.contains("| \u{fffd}x\u{fffd}\u{fffd}\\[2J |"),
            "{markdown}"
        );
        assert!(table.to_text().contains("\u{fffd}x\u{fffd}\u{fffd}[2J"));
    }

    #[test]
    fn a_long_cell_is_cut_on_the_terminal_and_whole_elsewhere() {
        let mut table = Table::new("", &["key", "value"]);
        table.row(vec!["a".into(), "x".repeat(30_000_000)]);
        let began = std::time::Instant::now();
        let text = table.to_text();
        assert!(text.len() < 300 && text.contains(&format!("{}...", "x".repeat(WIDEST))), "{}", text.len());
        assert!(began.elapsed().as_secs() < 5, "{:?}", began.elapsed());
        assert!(table.to_csv().len() > 30_000_000);
    }

    #[test]
    fn columns_align_whatever_is_in_the_cells() {
        let mut table = Table::new("", &["name", "n"]);
        table.row(vec!["\u{1b}[2Jgone\n".into(), "1".into()]);
        table.row(vec!["".into(), "".into()]);
        table.row(vec!["模型".into(), "-20".into()]);
        assert_eq!(table.to_text(), " name       n\n \u{fffd}[2Jgone\u{fffd}  1\n\n 模型       -20\n");
    }
}
