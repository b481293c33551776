//! `relora-kit inspect`

use super::{Outcome, Output};
use crate::{checkpoint::Filter, error::Result, inputs::Inputs, inspect, progress::Progress, report};
use std::path::PathBuf;

/// What is in a checkpoint or an adapter: tensors, shapes, dtypes, bytes, metadata
///
/// Reads headers only, so it takes milliseconds whatever the size of the model. With --stats it reads the values, too.
/// A file that breaks the format is refused with the tensor and the offset at fault.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  relora-kit inspect model/
  relora-kit inspect model/ --tree
  relora-kit inspect model-00001-of-00003.safetensors --stats --filter '*norm*'
  relora-kit inspect lora/ --format json | jq .adapter
  relora-kit inspect model/ --stats --format csv -o stats.csv")]
pub struct Args {
    /// A folder saved by `save_pretrained`, a .safetensors file, or an adapter folder
    #[arg(value_name = "CKPT")]
    checkpoint: PathBuf,
    /// Smallest, largest, mean, standard deviation, zeros, NaN and infinities of every tensor
    #[arg(long, help_heading = "What to show")]
    stats: bool,
    /// Only tensors whose names match this glob; repeat for more
    #[arg(long, value_name = "GLOB", help_heading = "What to show")]
    filter: Vec<String>,
    /// Group tensors by module, equal layers folded into one
    #[arg(long, conflicts_with = "stats", help_heading = "What to show")]
    tree: bool,
    #[command(flatten)]
    output: Output,
}

impl Args {
    pub(super) fn run(self, progress: &Progress) -> Result<Outcome> {
        let target = self.output.target(&Inputs::of([&self.checkpoint]))?;
        let filter = Filter::new(&self.filter)?;
        let options = inspect::Options { path: self.checkpoint, filter, stats: self.stats, tree: self.tree };
        let inspection = inspect::run(&options, progress)?;
        report::emit(&inspection, self.output.format, target)?;
        Ok(Outcome::Yes)
    }
}
