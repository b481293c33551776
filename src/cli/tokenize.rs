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
/// Reads text, JSON lines (.jsonl) and Parquet, plain or compressed (.gz, .zst), and writes one shard. The byte tokenizer
/// is built in: ids 0-255 are the bytes of the text, 256 ends a document. Documents that are empty or not UTF-8 are left
/// out and counted.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  relora-kit tokenize book.txt -o book.safetensors
  relora-kit tokenize src/ docs/ --include '**/*.rs' --max-bytes 8MB -o code.safetensors
  relora-kit tokenize c4/*.jsonl.zst wiki.parquet --tokenizer llama/tokenizer.json -o text.safetensors
  relora-kit tokenize stories.txt --split-on '<|endoftext|>' --tokenizer SmolLM2-135M -o stories.safetensors")]
pub struct Args {
    /// Files, or folders to search (in the order of their paths)
    #[arg(required = true, value_name = "INPUT")]
    inputs: Vec<PathBuf>,
    /// `bytes`, a tokenizer.json, or a model's folder that holds one
    #[arg(long, value_name = "TOKENIZER", default_value = "bytes")]
    tokenizer: PathBuf,
    /// Token after each document [default: eos_token of the tokenizer_config.json, or a common name]
    #[arg(long, value_name = "TOKEN")]
    end_of_document: Option<String>,
    /// Field of JSON lines, or column of Parquet, that holds the text
    #[arg(long, value_name = "NAME", default_value = "text")]
    field: String,
    /// In text files: what stands between two documents (default: a file is one document)
    #[arg(long, value_name = "TEXT", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    split_on: Option<String>,
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
            layout: tokenize::Layout { field: self.field, separator: self.split_on },
            max_bytes: self.max_bytes,
            output: self.output,
            force: self.force,
        };
        let tokenizer = tokenize::Tokenizer::load(&self.tokenizer, self.end_of_document.as_deref())?;
        report::emit(&tokenize::run(&options, &tokenizer, progress)?, self.format, None)?;
        Ok(Outcome::Yes)
    }
}
