//! What is known about the roundings between two checkpoints: from the metadata of our own outputs, from the manifest of
//! the run that wrote them, or from the command line.

use super::{Blocks, Numbers};
use crate::{
    checkpoint::{
        Checkpoint,
        roundings::{self, Kind, Step},
    },
    error::Result,
    run::{Manifest, RunDir},
};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// How often the weights of a source were rounded, and who says so.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Roundings {
    /// How often each weight was rounded between base and tuned.
    pub count: u64,
    /// How; several where roundings of different kinds follow each other.
    pub kinds: Vec<Kind>,
    /// Who says so.
    pub origin: Origin,
}

/// Where a number of roundings comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// The metadata of the tuned checkpoint.
    Metadata,
    /// The manifest of the run that wrote both checkpoints.
    Manifest,
    /// `--roundings`
    Option,
    /// Unknown: one rounding is assumed. Gates on the noise edge are refused.
    Assumed,
}

/// The roundings between two checkpoints, in the form that noise is computed from.
#[derive(Clone, Debug)]
pub(in crate::spectrum) struct History {
    /// Empty where nothing is known.
    steps: Vec<Step>,
    origin: Origin,
    /// `--roundings`
    given: Option<u64>,
}

/// Roundings to the same numbers. A stochastic one counts as two to nearest, since its variance is twice as large.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Term {
    /// Rounded to these.
    pub numbers: Numbers,
    /// How often.
    pub roundings: f64,
}

impl History {
    /// Of a pair of checkpoints; `given` is what the command line says.
    pub fn between(base: &Checkpoint, tuned: &Checkpoint, given: Option<u64>) -> Result<History> {
        let (steps, origin) = match from_metadata(base, tuned)? {
            Some(steps) => (steps, Origin::Metadata),
            None => match from_manifest(base, tuned) {
                Some(steps) => (steps, Origin::Manifest),
                None => (Vec::new(), Origin::Assumed),
            },
        };
        let origin = if given.is_some() { Origin::Option } else { origin };
        Ok(History { steps, origin, given })
    }

    /// Of the deltas of a run, of which `merges` are merged into its weights.
    pub fn of_run(manifest: &Manifest, merges: u64) -> History {
        let origin = if manifest.rounding_kind().is_some() { Origin::Manifest } else { Origin::Assumed };
        let kind = manifest.rounding_kind().unwrap_or(Kind::Nearest);
        let step =
            Step { base: String::new(), kind, dtype: None, count: merges, modules: Vec::new(), updates: 0, seed: None };
        History { steps: vec![step], origin, given: None }
    }

    /// What the report says about it.
    pub fn summary(&self) -> Roundings {
        let mut kinds: Vec<Kind> = self.steps.iter().filter(|s| s.count > 0).map(|s| s.kind).collect();
        kinds.dedup();
        let count = self.given.unwrap_or_else(|| match self.origin {
            Origin::Assumed if self.steps.is_empty() => 1,
            _ => self.total(),
        });
        Roundings { count, kinds: if kinds.is_empty() { vec![Kind::Nearest] } else { kinds }, origin: self.origin }
    }

    /// The number of roundings that metadata or a manifest know of, if the command line says another.
    pub fn contradicted(&self) -> Option<u64> {
        (!self.steps.is_empty() && self.given.is_some_and(|given| given != self.total())).then(|| self.total())
    }

    fn total(&self) -> u64 {
        self.steps.iter().map(|step| step.count).sum()
    }

    /// The roundings of the weight called `name`.
    pub fn terms(&self, name: &str) -> Vec<Term> {
        let total = self.total();
        if total == 0 {
            let roundings = match (self.given, self.origin) {
                (Some(given), _) => given,
                (None, Origin::Assumed) => 1,
                (None, _) => 0,
            };
            return term(Numbers::Shown, roundings as f64).into_iter().collect();
        }
        let module = name.strip_suffix(".weight").unwrap_or(name).rsplit('.').next().unwrap_or(name);
        let merged = |step: &&Step| step.modules.is_empty() || step.modules.iter().any(|m| m == module);
        let steps: Vec<&Step> = self.steps.iter().filter(merged).collect();
        if steps.is_empty() {
            // Trained in full. Whether merges are rounded stochastically or not, so are updates.
            let stochastic = self.steps.iter().any(|step| step.kind == Kind::Stochastic);
            let updates = self.steps.iter().map(|step| step.updates).max().unwrap_or(0);
            let roundings = if stochastic { 2.0 } else { 1.0 } * self.given.unwrap_or(updates) as f64;
            return term(Numbers::Type(None), roundings).into_iter().collect();
        }
        let scale = self.given.map_or(1.0, |given| given as f64 / total as f64);
        let mut terms: Vec<Term> = Vec::new();
        for step in steps {
            // The last rounding is that to the type that is stored; the ones before may have been coarser.
            let dtype = if self.steps.last() == Some(step) { None } else { step.dtype() };
            let (numbers, weight) = match step.kind {
                Kind::Nearest => (Numbers::Type(dtype), 1.0),
                Kind::Stochastic => (Numbers::Type(dtype), 2.0),
                Kind::Nf4 => (Numbers::Blocks(Blocks::Nf4), 1.0),
                Kind::Int8 => (Numbers::Blocks(Blocks::Int8), 1.0),
            };
            // Errors that were drawn from the same numbers add up as they are, not as variances: n of them count n times each.
            let same = self.steps.iter().filter(|other| step.seed.is_some() && other.seed == step.seed).count().max(1);
            let roundings = weight * scale * (step.count * same as u64) as f64;
            match terms.iter_mut().find(|term| term.numbers == numbers) {
                Some(term) => term.roundings += roundings,
                None => terms.extend(term(numbers, roundings)),
            }
        }
        terms.retain(|term| term.roundings > 0.0);
        terms
    }
}

fn term(numbers: Numbers, roundings: f64) -> Option<Term> {
    (roundings > 0.0).then_some(Term { numbers, roundings })
}

/// The steps from `base` on, if the files of `tuned` list them and it is the checkpoint that one of them started from.
fn from_metadata(base: &Checkpoint, tuned: &Checkpoint) -> Result<Option<Vec<Step>>> {
    let Some(steps) = roundings::read(tuned) else { return Ok(None) };
    let fingerprint = roundings::fingerprint(base)?;
    Ok(steps.iter().position(|step| step.base == fingerprint).map(|first| steps[first..].to_vec()))
}

/// The same from the manifest of the run that both lie in, `run/base` or `run/checkpoints/step-N`.
fn from_manifest(base: &Checkpoint, tuned: &Checkpoint) -> Option<Vec<Step>> {
    let (base, tuned) = (folder(base)?, folder(tuned)?);
    let run = RunDir(tuned.parent()?.parent()?.to_owned());
    let step = step_of(&run, &tuned)?;
    let from = match run.base_path().canonicalize().ok() == Some(base.clone()) {
        true => None,
        false => Some(step_of(&run, &base)?),
    };
    let manifest = run.manifest().ok()?;
    manifest.roundings(String::new(), from, step, run.trained_modules(&manifest))
}

fn folder(checkpoint: &Checkpoint) -> Option<PathBuf> {
    let path = checkpoint.path().canonicalize().ok()?;
    if path.is_dir() { Some(path) } else { path.parent().map(Path::to_owned) }
}

fn step_of(run: &RunDir, folder: &Path) -> Option<u64> {
    let step = folder.file_name()?.to_str()?.strip_prefix("step-")?.parse().ok()?;
    (run.0.join(RunDir::checkpoint_folder(step)) == folder).then_some(step)
}
