//! Recomputes what a run claims: every hash, the chain of steps, the rank of every cycle, and
//! `base + sum of scaling * B @ A = final checkpoint`.
//!
//! The stages go from cheap to dear and each relies on the one before, so the first stage that finds a mismatch is
//! the last: [`Verification::mismatches`] then names everything that stage found.

mod chain;
mod files;
mod metrics;
mod settings;
mod sum;

pub use sum::{WeightCheck, WeightKind};

use crate::{
    adapter::Adapter,
    error::{Error, Kind, Result},
    progress::Progress,
    run::{Manifest, RunDir},
};
use serde::Serialize;
use std::path::{Path, PathBuf};

/// The result of [`run`].
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Verification {
    /// Version of this layout.
    pub schema: u32,
    /// The run directory.
    #[serde(serialize_with = "crate::escape::lossy")]
    pub run: PathBuf,
    /// Whether everything that was recomputed agrees.
    pub verified: bool,
    /// What the stages looked at, in their order.
    pub checks: Vec<Check>,
    /// What does not agree; the first is the one to look at first.
    pub mismatches: Vec<Mismatch>,
    /// Every tensor of the final checkpoint; empty if an earlier stage failed.
    pub weights: Vec<WeightCheck>,
    /// What could not be looked at, and what is only worth knowing.
    pub notes: Vec<String>,
}

/// One stage.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Check {
    /// What was checked.
    pub what: String,
    /// How much of it.
    pub detail: String,
    /// Whether all of it agrees.
    pub passed: bool,
}

/// A claim that does not hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Mismatch {
    /// The file, cycle or tensor.
    pub what: String,
    /// Expected and found.
    pub detail: String,
}

impl Mismatch {
    fn new(what: impl Into<String>, detail: impl Into<String>) -> Self {
        Mismatch { what: what.into(), detail: detail.into() }
    }
}

/// What one stage found.
#[derive(Default)]
struct Findings {
    detail: String,
    mismatches: Vec<Mismatch>,
    notes: Vec<String>,
}

impl Findings {
    fn expect(&mut self, holds: bool, what: impl Into<String>, detail: impl FnOnce() -> String) {
        if !holds {
            self.mismatches.push(Mismatch::new(what, detail()));
        }
    }
}

/// Verifies the run in `path`. An error means that it could not be looked at; a claim that fails is a mismatch.
pub fn run(path: &Path, progress: &Progress) -> Result<Verification> {
    let dir = RunDir(path.to_owned());
    let manifest = dir.manifest()?;
    let mut result = Verification {
        schema: 1,
        run: path.to_owned(),
        verified: false,
        checks: Vec::new(),
        mismatches: Vec::new(),
        weights: Vec::new(),
        notes: Vec::new(),
    };
    result.verified = result.stage("file hashes", files::check(&dir, &manifest, progress)?)
        && result.stage("chain of steps", chain::check(&dir, &manifest)?)
        && result.recompute(&dir, &manifest, progress)?;
    Ok(result)
}

impl Verification {
    /// Records a stage; whether it passed.
    fn stage(&mut self, what: &str, found: Findings) -> bool {
        let passed = found.mismatches.is_empty();
        self.checks.push(Check { what: what.into(), detail: found.detail, passed });
        self.mismatches.extend(found.mismatches);
        self.notes.extend(found.notes);
        passed
    }

    fn recompute(&mut self, dir: &RunDir, manifest: &Manifest, progress: &Progress) -> Result<bool> {
        let mut broken = Findings { detail: "readable".into(), ..Findings::default() };
        let mut cycles = Vec::new();
        for record in &manifest.cycles {
            let what = format!("cycle {}", record.cycle);
            cycles.extend(readable(Adapter::open(&dir.0.join(&record.folder)), &what, &mut broken)?);
        }
        if !broken.mismatches.is_empty() {
            return Ok(self.stage("cycles", broken));
        }
        if !self.stage("rank and scale of each cycle", chain::check_cycles(manifest, &cycles, progress)?) {
            return Ok(false);
        }
        let (findings, weights) = sum::check(dir, manifest, &cycles, progress)?;
        self.weights = weights;
        Ok(self.stage("base + cycles = checkpoint", findings))
    }
}

/// The opened file, or its fault as a mismatch. Failures of the machine stay errors.
fn readable<T>(opened: Result<T>, what: &str, findings: &mut Findings) -> Result<Option<T>> {
    match opened {
        Ok(value) => Ok(Some(value)),
        Err(Error { kind: Kind::Request, message, .. }) => {
            findings.mismatches.push(Mismatch::new(what, message));
            Ok(None)
        }
        Err(e) => Err(e),
    }
}
