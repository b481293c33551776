//! One table, three renderings.

use comfy_table::{CellAlignment, ContentArrangement, presets};
use std::borrow::Cow;

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
            table.set_header(&self.header);
        }
        table.add_rows(self.rows.iter().map(|cells| cells.iter().map(|cell| printable(cell))));
        for i in 0..self.header.len() {
            if self.is_numeric(i)
                && let Some(column) = table.column_mut(i)
            {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        let body: String = table.lines().map(|line| line.trim_end().to_owned() + "\n").collect();
        if self.title.is_empty() { body } else { format!("{}\n{body}", self.title) }
    }

    /// A GitHub-flavoured Markdown table; a long one opens on a click.
    pub fn to_markdown(&self) -> String {
        let line = |cells: &[String]| {
            format!("| {} |\n", cells.iter().map(|c| c.replace('|', "\\|")).collect::<Vec<_>>().join(" | "))
        };
        let mut out = if self.title.is_empty() { String::new() } else { format!("**{}**\n\n", self.title) };
        out += &line(&self.header);
        let rule: Vec<String> =
            (0..self.header.len()).map(|i| if self.is_numeric(i) { "---:".into() } else { "---".into() }).collect();
        out += &line(&rule);
        self.rows.iter().for_each(|row| out += &line(row));
        match self.rows.len() {
            n if n > FOLDED => {
                format!("<details><summary>{n} rows: {}</summary>\n\n{out}\n</details>\n", self.header[0])
            }
            _ => out,
        }
    }

    /// RFC 4180, without the title.
    pub fn to_csv(&self) -> String {
        let quote = |cell: &String| match cell.contains([',', '"', '\n', '\r']) {
            true => format!("\"{}\"", cell.replace('"', "\"\"")),
            false => cell.clone(),
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

/// A name in a file of somebody else may hold line breaks and commands for the terminal.
fn printable(cell: &str) -> Cow<'_, str> {
    if cell.contains(char::is_control) { cell.replace(char::is_control, "\u{fffd}").into() } else { cell.into() }
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
    fn columns_align_whatever_is_in_the_cells() {
        let mut table = Table::new("", &["name", "n"]);
        table.row(vec!["\u{1b}[2Jgone\n".into(), "1".into()]);
        table.row(vec!["".into(), "".into()]);
        table.row(vec!["模型".into(), "-20".into()]);
        assert_eq!(table.to_text(), " name       n\n \u{fffd}[2Jgone\u{fffd}  1\n\n 模型       -20\n");
    }
}
