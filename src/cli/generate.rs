//! `relora-kit generate`

use super::{DEVICE_VARIABLE, DeviceChoice, Outcome, open_cuda, parse_device};
use crate::{
    checkpoint::Checkpoint,
    error::{Error, Result},
    generate::{Options, generate},
    model::Model,
    ops::{Cpu, Device},
    progress::Progress,
    report,
    tokenize::Tokenizer,
};
use std::path::PathBuf;

/// Continue a text with a model
///
/// The text goes to stdout as it grows, the prompt first. For models trained on bytes.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  relora-kit generate --model run/checkpoints/step-1000 --prompt 'fn main() {'
  relora-kit generate --model merged --prompt 'Once' --temperature 0.8 --top-k 40 --seed 7 --max-new-tokens 500
  relora-kit generate --model merged --prompt 'Once' --json")]
pub struct Args {
    /// The checkpoint
    #[arg(long, value_name = "CKPT")]
    model: PathBuf,
    /// The text to continue
    #[arg(long, value_name = "TEXT")]
    prompt: String,
    /// `bytes`, a tokenizer.json, or a folder that holds one [default: the one in the model's folder, else bytes]
    #[arg(long, value_name = "TOKENIZER")]
    tokenizer: Option<PathBuf>,
    /// Tokens to add at most
    #[arg(long, value_name = "N", default_value_t = 200)]
    max_new_tokens: usize,
    /// Divides the logits before the draw; 0 always takes the most likely token
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    temperature: f64,
    /// Draw among the K most likely tokens (0: among all)
    #[arg(long, value_name = "K", default_value_t = 0)]
    top_k: usize,
    /// Seed of the draw
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Leave out the special tokens that the tokenizer puts around a text, such as `<s>` in front of it
    #[arg(long)]
    no_special_tokens: bool,
    /// Print one JSON object at the end: prompt, prompt_tokens, text, tokens, finish
    #[arg(long)]
    json: bool,
    /// What to compute on: `cpu`, or an NVIDIA GPU, `cuda` or `cuda:N`
    #[arg(long, value_name = "DEVICE", env = DEVICE_VARIABLE, default_value = "cpu", value_parser = parse_device)]
    device: DeviceChoice,
}

impl Args {
    pub(super) fn run(self, progress: &Progress) -> Result<Outcome> {
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return Err(Error::request(format!("--temperature is {}, expected 0 or more", self.temperature)));
        }
        match self.device {
            DeviceChoice::Cpu => self.run_on(Cpu),
            DeviceChoice::Cuda(ordinal) => self.run_on(open_cuda(ordinal.unwrap_or(0), progress)?),
        }
    }

    fn run_on<D: Device>(&self, device: D) -> Result<Outcome> {
        let model = Model::load(device, &Checkpoint::open(&self.model)?)?;
        let folder = if self.model.is_dir() { &*self.model } else { self.model.parent().unwrap_or(&self.model) };
        let own = folder.join("tokenizer.json");
        let tokenizer = match &self.tokenizer {
            Some(path) => Tokenizer::load(path, None)?,
            None if own.exists() => Tokenizer::load(&own, None)?,
            None => Tokenizer::Bytes,
        };
        let options = Options {
            max_new_tokens: self.max_new_tokens,
            temperature: self.temperature,
            top_k: self.top_k,
            seed: self.seed,
            special_tokens: !self.no_special_tokens,
        };
        if self.json {
            let generated = generate(&model, &tokenizer, &self.prompt, &options, &mut |_| Ok(()))?;
            let json = serde_json::to_string_pretty(&generated).map_err(|e| Error::environment(e.to_string()))?;
            report::print(&(json + "\n"))?;
            return Ok(Outcome::Yes);
        }
        let mut prompt = Some(self.prompt.as_str());
        generate(&model, &tokenizer, &self.prompt, &options, &mut |piece| {
            report::print(prompt.take().unwrap_or_default())?;
            report::print(piece)
        })?;
        report::print("\n")?;
        Ok(Outcome::Yes)
    }
}
