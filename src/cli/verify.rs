//! `relora-kit verify`

use super::{Outcome, Output};
use crate::{error::Result, progress::Progress, report, staged, verify};
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
        let output = &self.output;
        if let Some(path) = &output.output {
            staged::refuse_existing(path, output.force)?;
        }
        let result = verify::run(&self.run, progress)?;
        report::emit(&result, output.format, output.output.as_deref(), output.force)?;
        Ok(if result.verified { Outcome::Yes } else { Outcome::No })
    }
}
