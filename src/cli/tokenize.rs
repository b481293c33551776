//! `relora-kit tokenize`

use super::Outcome;
use crate::{
    error::Result,
    progress::Progress,
    report::{self, Format, units},
    tokenize,
};
use std::path::PathBuf;

/// Turn text into a token shard to train on
///
/// The byte tokenizer is built in: ids 0-255 are the bytes of the text, 256 ends a document. Files that are empty or not
/// UTF-8 are left out and counted.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  relora-kit tokenize book.txt -o book.safetensors
  relora-kit tokenize src/ docs/ --include '**/*.rs' --max-bytes 8MB -o code.safetensors")]
pub struct Args {
    /// Text files, or folders to search (in the order of their paths)
    #[arg(required = true, value_name = "INPUT")]
    inputs: Vec<PathBuf>,
    /// In folders, take only files whose path matches
    #[arg(long, value_name = "GLOB")]
    include: Option<globset::Glob>,
    /// Stop after so much text
    #[arg(long, value_name = "BYTES", value_parser = units::parse_bytes)]
    max_bytes: Option<u64>,
    /// The token shard to write
    #[arg(short, long, value_name = "SHARD")]
    output: PathBuf,
    /// Replace the shard if it exists
    #[arg(long)]
    force: bool,
    /// How the summary is printed
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

impl Args {
    pub(super) fn run(self, progress: &Progress) -> Result<Outcome> {
        let options = tokenize::Options {
            inputs: self.inputs,
            include: self.include.map(|glob| glob.compile_matcher()),
            max_bytes: self.max_bytes,
            output: self.output,
            force: self.force,
        };
        report::emit(&tokenize::run(&options, progress)?, self.format, None, false)?;
        Ok(Outcome::Yes)
    }
}
