//! `relora-kit eval`

use super::{DEVICE_VARIABLE, DeviceChoice, Outcome, Output, open_cuda, parse_device};
use crate::{
    adapter::config::CONFIG_NAME,
    checkpoint::Checkpoint,
    collective::Alone,
    error::{Error, Result},
    inputs::Inputs,
    model::Model,
    ops::{Cpu, Device},
    progress::Progress,
    report,
    train::{
        evaluate::evaluate,
        tokens::{TokenShard, Windows},
    },
};
use std::path::PathBuf;

/// Mean loss and perplexity of a checkpoint on a token shard
#[derive(clap::Args)]
#[command(after_help = "Examples:
  relora-kit eval --model run/checkpoints/step-1000 --data validation.safetensors
  relora-kit eval --model merged --data validation.safetensors --max-length 512 --format json")]
pub struct Args {
    /// The checkpoint
    #[arg(long, value_name = "CKPT")]
    model: PathBuf,
    /// The token shard, or a .bin file of nanoGPT or llm.c
    #[arg(long, value_name = "SHARD")]
    data: PathBuf,
    /// Tokens per window (default: the model's max_position_embeddings)
    #[arg(long, value_name = "TOKENS")]
    max_length: Option<usize>,
    /// Windows per forward pass
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..))]
    batch_size: u16,
    /// Evaluate the first N predictions only (default: all)
    #[arg(long, value_name = "N")]
    max_predictions: Option<u64>,
    /// What to compute on: `cpu`, or an NVIDIA GPU, `cuda` or `cuda:N`
    #[arg(long, value_name = "DEVICE", env = DEVICE_VARIABLE, default_value = "cpu", value_parser = parse_device)]
    device: DeviceChoice,
    #[command(flatten)]
    output: Output,
}

impl Args {
    pub(super) fn run(self, progress: &Progress) -> Result<Outcome> {
        match self.device {
            DeviceChoice::Cpu => self.run_on(Cpu, progress),
            DeviceChoice::Cuda(ordinal) => self.run_on(open_cuda(ordinal.unwrap_or(0), progress)?, progress),
        }
    }

    fn run_on<D: Device>(&self, device: D, progress: &Progress) -> Result<Outcome> {
        let target = self.output.target(&Inputs::of([&self.model, &self.data]))?;
        let shard = TokenShard::open(&self.data)?;
        shard.check_tokenizer(&self.model)?;
        if self.model.join(CONFIG_NAME).exists() && !self.model.join("config.json").exists() {
            return Err(Error::request(format!("'{}' holds an adapter, expected a checkpoint", self.model.display()))
                .help("merge it into its base first: relora-kit merge --base BASE --adapter ADAPTER -o MERGED"));
        }
        let mut model = Model::load(device, &Checkpoint::open(&self.model)?)?;
        let longest = model.config().max_position_embeddings;
        let max_length = self.max_length.unwrap_or(longest);
        if max_length < 2 || max_length > longest {
            return Err(Error::request(format!(
                "--max-length is {max_length}, expected 2 to max_position_embeddings {longest}"
            )));
        }
        shard.check_vocabulary(model.config().vocab_size)?;
        let windows = Windows::all(&shard, max_length, "--max-length")?;
        let limit = self.max_predictions.unwrap_or(u64::MAX);
        let result = evaluate(&mut model, &shard, &windows, self.batch_size.into(), limit, &Alone, progress)?;
        report::emit(&result, self.output.format, target)?;
        Ok(Outcome::Yes)
    }
}
