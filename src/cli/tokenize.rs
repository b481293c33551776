//! `relora-kit tokenize`

use super::Outcome;
use crate::{
    error::Result,
    progress::Progress,
    report::{self, Format, units},
    tokenize,
};
use std::path::{Path, PathBuf};

/// Turn text into a token shard to train on
///
/// Reads text, JSON records, Parquet and Arrow tables, and data sets that the Python library `datasets` saved, plain or
/// compressed (gzip, zstd), and writes one shard. The byte tokenizer is built in: ids 0-255 are the bytes of the text, 256
/// ends a document. Empty documents are left out and counted; a record that cannot be read is an error.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  relora-kit tokenize book.txt -o book.safetensors
  relora-kit tokenize src/ docs/ --include '**/*.rs' --max-bytes 8MB -o code.safetensors
  relora-kit tokenize c4/*.json.gz wiki.parquet saved_data_set/ --tokenizer llama/tokenizer.json -o text.safetensors
  relora-kit tokenize stories.txt --split-on '<|endoftext|>' --tokenizer SmolLM2-135M -o stories.safetensors")]
pub struct Args {
    /// Files, or folders to search (in the order of their paths)
    #[arg(required = true, value_name = "INPUT")]
    inputs: Vec<PathBuf>,
    /// `bytes`, a tokenizer.json, or a model's folder that holds one [default: bytes]
    #[arg(long, value_name = "TOKENIZER")]
    tokenizer: Option<PathBuf>,
    /// Token after each document [default: eos_token of the tokenizer_config.json, or a common name]
    #[arg(long, value_name = "TOKEN")]
    end_of_document: Option<String>,
    /// Put the tokenizer's special tokens around each document, such as `<s>` in front, as transformers does
    #[arg(long)]
    add_special_tokens: bool,
    /// Field of JSON records, or column of a table, that holds the text
    #[arg(long, value_name = "NAME", default_value = "text")]
    field: String,
    /// In text files: what stands between two documents (default: a file is one document)
    #[arg(long, value_name = "TEXT", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    split_on: Option<String>,
    /// What the files hold [default: what their names and first bytes say]
    #[arg(long = "as", value_name = "CONTENT", value_enum)]
    content: Option<ContentArg>,
    /// The files hold token ids, not text: plain numbers of this type, or data sets of Megatron (.bin with its .idx)
    #[arg(long, value_name = "TYPE", value_enum, conflicts_with_all = ["content", "split_on", "add_special_tokens", "skip_unreadable", "max_bytes"])]
    ids: Option<IdsArg>,
    /// Leave out and count records and files that cannot be read, instead of refusing them
    #[arg(long)]
    skip_unreadable: bool,
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

/// [`tokenize::Content`] on the command line.
#[derive(Clone, Copy, clap::ValueEnum)]
enum ContentArg {
    /// Plain text
    Text,
    /// JSON records: one per line, one after the other, or a list
    Json,
    /// A Parquet table
    Parquet,
    /// An Arrow table, as a file or a stream
    Arrow,
}

impl ContentArg {
    fn content(self) -> tokenize::Content {
        match self {
            ContentArg::Text => tokenize::Content::Text,
            ContentArg::Json => tokenize::Content::Json,
            ContentArg::Parquet => tokenize::Content::Parquet,
            ContentArg::Arrow => tokenize::Content::Arrow,
        }
    }
}

/// [`tokenize::IdType`] on the command line.
#[derive(Clone, Copy, clap::ValueEnum)]
enum IdsArg {
    /// 8 bits
    U8,
    /// 16 bits, as nanoGPT writes them
    U16,
    /// 32 bits
    U32,
    /// 32 bits, signed
    I32,
    /// 64 bits, signed
    I64,
    /// A data set of Megatron-LM; its index says the type
    Megatron,
}

impl IdsArg {
    fn id_type(self) -> tokenize::IdType {
        use tokenize::{IdType, Number};
        match self {
            IdsArg::U8 => IdType::Plain(Number::U8),
            IdsArg::U16 => IdType::Plain(Number::U16),
            IdsArg::U32 => IdType::Plain(Number::U32),
            IdsArg::I32 => IdType::Plain(Number::I32),
            IdsArg::I64 => IdType::Plain(Number::I64),
            IdsArg::Megatron => IdType::Megatron,
        }
    }
}

impl Args {
    pub(super) fn run(self, progress: &Progress) -> Result<Outcome> {
        let options = tokenize::Options {
            inputs: self.inputs,
            include: self.include.map(|glob| glob.compile_matcher()),
            layout: tokenize::Layout {
                field: self.field,
                separator: self.split_on,
                content: self.content.map(ContentArg::content),
                max_document: 0,
            },
            max_bytes: self.max_bytes,
            skip_unreadable: self.skip_unreadable,
            special_tokens: self.add_special_tokens,
            output: self.output,
            force: self.force,
        };
        let load = |path: &Path| tokenize::Tokenizer::load(path, self.end_of_document.as_deref());
        let summary = match self.ids {
            Some(ids) => {
                let tokenizer = self.tokenizer.as_deref().map(load).transpose()?;
                tokenize::run_ids(&options, ids.id_type(), tokenizer.as_ref(), progress)?
            }
            None => {
                let tokenizer = load(self.tokenizer.as_deref().unwrap_or(Path::new("bytes")))?;
                tokenize::run(&options, &tokenizer, progress)?
            }
        };
        report::emit(&summary, self.format, None)?;
        Ok(Outcome::Yes)
    }
}
