//! `relora-kit convert`

use super::Outcome;
use crate::{
    convert::{self, Options},
    error::Result,
    progress::Progress,
    report::{self, Format, units},
};
use std::path::PathBuf;

/// Turn GGUF files and pickled PyTorch checkpoints into safetensors
///
/// GGUF: LLaMA-family models; quantised types are unpacked, tensors get Hugging Face's names and order, configuration and
/// tokenizer are written from the file's metadata. PyTorch: `pytorch_model.bin`, its shards, or a single .bin file, read as
/// data; nothing in them is executed. The result loads in transformers and in every command here.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  relora-kit convert SmolLM2-135M-Instruct.Q4_1.gguf -o smollm2
  relora-kit convert llama.Q4_K_M.gguf -o llama --dtype bf16
  relora-kit convert old-model/ -o new-model
  relora-kit convert pytorch_model.bin -o model --dtype f16 --max-shard-size 2GB")]
pub struct Args {
    /// A .gguf file (or one part of several), a folder with pytorch_model.bin or its shards, or a .bin file
    #[arg(value_name = "IN")]
    input: PathBuf,
    /// The folder to create
    #[arg(short, long, value_name = "FOLDER")]
    output: PathBuf,
    /// Type of all floating point tensors of the output
    #[arg(long, value_enum, default_value_t)]
    dtype: super::merge::TargetDtype,
    /// A new file begins before it would exceed this size
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = units::parse_bytes)]
    max_shard_size: u64,
    /// Convert a GGUF file although this setting of it changes the arithmetic and has no place in config.json (repeatable)
    #[arg(long, value_name = "KEY")]
    leave_out: Vec<String>,
    /// Replace the output folder if it exists
    #[arg(long)]
    force: bool,
    /// How the report is printed
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

impl Args {
    pub(super) fn run(self, progress: &Progress) -> Result<Outcome> {
        let options = Options {
            input: self.input,
            output: self.output,
            dtype: self.dtype.dtype(),
            max_shard_size: self.max_shard_size,
            force: self.force,
            leave_out: self.leave_out,
        };
        let result = convert::run(&options, progress)?;
        report::emit(&result, self.format, None)?;
        Ok(Outcome::Yes)
    }
}
