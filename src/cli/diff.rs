//! `relora-kit diff`

use super::{Outcome, Output};
use crate::{checkpoint::Filter, diff, error::Result, inputs::Inputs, progress::Progress, report};
use std::path::PathBuf;

/// Compare two checkpoints, tensor by tensor
///
/// Lists tensors that only one has, that differ in shape, and for every other one the largest difference, the relative
/// Frobenius norm of the difference and the cosine. Values are equal if |a - b| <= atol + rtol * |b|; types are
/// compared by value, so an F32 and a BF16 model can be equal within a tolerance. Exit code 1 if anything differs.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  relora-kit diff merged/ run/checkpoints/step-20000
  relora-kit diff model-f32/ model-bf16/ --rtol 0.004
  relora-kit diff before.safetensors after.safetensors --filter '*self_attn*' --format csv
  relora-kit diff a/ b/ --format json | jq '.tensors[] | select(.status != \"identical\").name'")]
pub struct Args {
    /// A checkpoint (folder or .safetensors file) or an adapter folder
    #[arg(value_name = "A")]
    a: PathBuf,
    /// What it is compared with
    #[arg(value_name = "B")]
    b: PathBuf,
    /// Absolute tolerance
    #[arg(long, value_name = "X", default_value_t = 0.0, help_heading = "What counts as equal")]
    atol: f64,
    /// Tolerance relative to the value in B
    #[arg(long, value_name = "X", default_value_t = 0.0, help_heading = "What counts as equal")]
    rtol: f64,
    /// Only tensors whose names match this glob; repeat for more
    #[arg(long, value_name = "GLOB", help_heading = "Selection")]
    filter: Vec<String>,
    #[command(flatten)]
    output: Output,
}

impl Args {
    pub(super) fn run(self, progress: &Progress) -> Result<Outcome> {
        let target = self.output.target(&Inputs::of([&self.a, &self.b]))?;
        let filter = Filter::new(&self.filter)?;
        let options = diff::Options { a: self.a, b: self.b, filter, atol: self.atol, rtol: self.rtol };
        let result = diff::run(&options, progress)?;
        report::emit(&result, self.output.format, target)?;
        Ok(if result.equal { Outcome::Yes } else { Outcome::No })
    }
}
