//! `relora-kit verify`

use super::{Outcome, Output};
use crate::{error::Result, inputs::Inputs, progress::Progress, report, verify};
use std::path::PathBuf;

/// Recompute what a run claims
///
/// Every hash of the manifest matches, the cycles follow each other without a gap, each has the rank and scale it
/// claims, and base + sum of scaling * B @ A equals the newest checkpoint within what rounding allows. Parameters
/// trained in full are listed as such. Exit code 1 and the mismatches, if there are any.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  relora-kit verify runs/a
  relora-kit verify runs/a --format json -o verify.json
  relora-kit verify runs/a --format markdown >> $GITHUB_STEP_SUMMARY")]
pub struct Args {
    /// A run directory written by `relora-kit train`
    run: PathBuf,
    #[command(flatten)]
    output: Output,
}

impl Args {
    pub(super) fn run(self, progress: &Progress) -> Result<Outcome> {
        let target = self.output.target(&Inputs::of([&self.run]))?;
        let result = verify::run(&self.run, progress)?;
        report::emit(&result, self.output.format, target)?;
        Ok(if result.verified { Outcome::Yes } else { Outcome::No })
    }
}
