//! `relora-kit extract`

use super::Outcome;
use crate::{
    checkpoint::Filter,
    error::Result,
    extract::{self, Options, Size},
    progress::Progress,
    report::{self, Format},
};
use std::path::PathBuf;

/// Turn the difference of two checkpoints into a PEFT adapter
///
/// Each changed matrix of a linear layer becomes a pair of factors by a truncated SVD in f64, with lora_alpha = r. The
/// report says how much of every change the factors hold. Norms, embeddings and heads are stored in full with --save-rest.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  relora-kit extract --base llama --tuned llama-instruct --rank 64 -o instruct-lora
  relora-kit extract --base llama --tuned llama-instruct --energy 0.99 -o instruct-lora
  relora-kit extract --base run/base --tuned run/checkpoints/step-20000 --rank 128 --save-rest -o update
  relora-kit extract --base llama --tuned tuned --rank 16 --filter '*self_attn*' -o attention --format json")]
#[command(group(clap::ArgGroup::new("size").required(true).args(["rank", "energy"])))]
pub struct Args {
    /// The checkpoint before
    #[arg(long, value_name = "CKPT")]
    base: PathBuf,
    /// The checkpoint after
    #[arg(long, value_name = "CKPT")]
    tuned: PathBuf,
    /// Rank of all factors
    #[arg(long, value_name = "R")]
    rank: Option<usize>,
    /// For each matrix the smallest rank that holds this share of its squared delta norm
    #[arg(long, value_name = "SHARE")]
    energy: Option<f64>,
    /// Only tensors whose names match this glob; repeat for more
    #[arg(long, value_name = "GLOB")]
    filter: Vec<String>,
    /// StorageFormat changed norms, embeddings and heads in full (modules_to_save)
    #[arg(long)]
    save_rest: bool,
    /// The adapter folder to create
    #[arg(short, long, value_name = "ADAPTER")]
    output: PathBuf,
    /// Replace the adapter if it exists
    #[arg(long)]
    force: bool,
    /// How the report is printed
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

impl Args {
    pub(super) fn run(self, progress: &Progress) -> Result<Outcome> {
        let size = match (self.rank, self.energy) {
            (_, Some(share)) => Size::Energy(share),
            (rank, None) => Size::Rank(rank.unwrap_or(0)),
        };
        let options = Options {
            base: self.base,
            tuned: self.tuned,
            output: self.output,
            size,
            filter: Filter::new(&self.filter)?,
            save_rest: self.save_rest,
            force: self.force,
        };
        let result = extract::run(&options, progress)?;
        report::emit(&result, self.format, None)?;
        Ok(Outcome::Yes)
    }
}
