//! Results -> table, JSON, CSV or Markdown. Computes nothing.

#[cfg(feature = "convert")]
mod convert;
mod diff;
mod extract;
pub mod html;
mod inspect;
mod merge;
mod merge_plan;
pub mod spectrum;
pub mod table;
#[cfg(feature = "train")]
mod tokenize;
#[cfg(feature = "train")]
mod train;
pub mod units;
pub mod verify;

use crate::{
    error::{Error, Result},
    escape, inputs,
    staged::{self, Target},
};
use serde::Serialize;
use std::io::Write;
use table::Table;

/// How a result is printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// Aligned columns for people.
    #[default]
    Table,
    /// One JSON object, stable keys, for programs.
    Json,
    /// Comma-separated rows with a header line (the first table of the report).
    Csv,
    /// For a pull request or an issue: the verdict, then the tables, long ones folded.
    Markdown,
}

/// A result that can be shown. JSON is its serialisation; the other formats show its tables and remarks.
pub trait Report: Serialize {
    /// The tables, most detailed first (CSV prints only this one).
    fn tables(&self) -> Vec<Table>;
    /// The table that CSV prints, if it is not the first of [`Report::tables`].
    fn detail(&self) -> Option<Table> {
        None
    }
    /// Sentences after the tables: totals, verdicts.
    fn remarks(&self) -> Vec<String> {
        Vec::new()
    }
}

/// Renders `report`.
pub fn render(report: &impl Report, format: Format) -> Result<String> {
    let mut out = String::new();
    match format {
        Format::Json => {
            out = serde_json::to_string_pretty(report)
                .map_err(|e| Error::environment(format!("cannot write JSON: {e}")))?;
            out.push('\n');
        }
        Format::Csv => {
            if let Some(table) = report.detail().or_else(|| report.tables().into_iter().next()) {
                out = table.to_csv();
            }
        }
        Format::Table => {
            report.tables().iter().for_each(|table| out += &(table.to_text() + "\n"));
            report.remarks().iter().for_each(|remark| out += &(escape::line(remark).into_owned() + "\n"));
        }
        // A comment is read from the top, and nobody scrolls through it.
        Format::Markdown => {
            report.remarks().iter().for_each(|remark| out += &(table::markdown(remark) + "\n\n"));
            report.tables().iter().for_each(|table| out += &(table.to_markdown() + "\n"));
        }
    }
    Ok(out)
}

/// Renders `report` to `output`, or to stdout. A closed pipe (`| head`) is not an error.
pub fn emit(report: &impl Report, format: Format, output: Option<Target>) -> Result<()> {
    let text = render(report, format)?;
    match output {
        Some(target) => staged::write_text(target, &text),
        None => {
            inputs::check_unchanged()?;
            print(&text)
        }
    }
}

/// Prints to stdout. A closed pipe (`| head`) is not an error.
pub fn print(text: &str) -> Result<()> {
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Error::environment(format!("cannot write to stdout: {e}")))
        }
        _ => Ok(()),
    }
}
