//! Which tensors changed, which of them can be factored, and what PEFT has to be told about it.

use super::{Options, Size};
use crate::{
    checkpoint::{Checkpoint, HEAD_NAME, Tensor, dtype, natural_key},
    error::{Error, Result},
};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// A tensor that differs between the two checkpoints.
#[derive(Clone, Copy)]
pub(super) struct Changed<'a> {
    pub base: Tensor<'a>,
    pub tuned: Tensor<'a>,
}

/// Everything that is checked before the first SVD.
pub(super) struct Plan<'a> {
    /// Become pairs of factors.
    pub matrices: Vec<Changed<'a>>,
    /// Norms, embeddings, heads.
    pub rest: Vec<Changed<'a>>,
    pub unchanged: usize,
    /// Weights are stored `[in, out]` (GPT-2).
    pub transposed: bool,
    /// The head is the embedding.
    pub tied: bool,
    // Last component of a module's name -> how many matrices of the base could be factored under it.
    candidates: BTreeMap<&'a str, usize>,
}

/// Ends of the names of modules that are no linear layers inside the model: embeddings, and heads, which PEFT leaves alone
/// unless told otherwise.
const EMBEDDINGS_AND_HEADS: [&str; 14] = [
    "embed_tokens",
    "wte",
    "wpe",
    "word_embeddings",
    "position_embeddings",
    "token_type_embeddings",
    "embed_in",
    "embed_positions",
    "shared",
    "lm_head",
    "embed_out",
    "output_projection",
    "score",
    "classifier",
];

/// `model.norm.weight` -> `model.norm`.
pub(super) fn module(tensor: &str) -> &str {
    tensor.rsplit_once('.').map_or(tensor, |(module, _)| module)
}

fn last(module: &str) -> &str {
    module.rsplit('.').next().unwrap_or(module)
}

/// Whether an adapter can hold a low-rank delta of this tensor.
fn is_target(tensor: &Tensor) -> bool {
    tensor.shape().len() == 2
        && tensor.elements() > 0
        && tensor.name().ends_with(".weight")
        && !EMBEDDINGS_AND_HEADS.contains(&last(module(tensor.name())))
}

impl<'a> Plan<'a> {
    pub fn new(base: &'a Checkpoint, tuned: &'a Checkpoint, options: &Options) -> Result<Plan<'a>> {
        let config = config_of(base)?;
        let mut plan = Plan {
            matrices: Vec::new(),
            rest: Vec::new(),
            unchanged: 0,
            transposed: config["model_type"] == "gpt2",
            tied: config["tie_word_embeddings"] == true,
            candidates: BTreeMap::new(),
        };
        let mut names: Vec<&str> = base.tensors().map(|t| t.name()).filter(|n| options.filter.takes(n)).collect();
        names.sort_by_cached_key(|name| natural_key(name));
        if let Some(extra) = tuned.tensors().find(|t| options.filter.takes(t.name()) && base.get(t.name()).is_none()) {
            return Err(lacks(base, extra.name(), tuned));
        }
        for name in names {
            let before = base.tensor(name)?;
            let after = tuned.get(name).ok_or_else(|| lacks(tuned, name, base))?;
            plan.add(before, after, options)?;
        }
        for t in base.tensors().filter(is_target) {
            *plan.candidates.entry(last(module(t.name()))).or_default() += 1;
        }
        if plan.matrices.is_empty() && (plan.rest.is_empty() || !options.save_rest) {
            let what = if plan.rest.is_empty() { "no tensor changed" } else { "no matrix of a linear layer changed" };
            return Err(Error::request(format!(
                "{what} between '{}' and '{}'",
                base.path().display(),
                tuned.path().display()
            ))
            .help("there is nothing to extract; check the order of --base and --tuned, and --filter"));
        }
        if options.save_rest {
            plan.check_rest()?;
        }
        Ok(plan)
    }

    fn add(&mut self, base: Tensor<'a>, tuned: Tensor<'a>, options: &Options) -> Result<()> {
        let (name, shape) = (tuned.name(), tuned.shape());
        if base.shape() != shape {
            return Err(Error::request(format!(
                "tensor '{name}' has shape {:?} in '{}' but {shape:?} in '{}'",
                base.shape(),
                base.file().path().display(),
                tuned.file().path().display()
            ))
            .help("extract from a checkpoint and the one it was trained from"));
        }
        if base.dtype() == tuned.dtype() && base.bytes() == tuned.bytes() {
            self.unchanged += 1;
            return Ok(());
        }
        if !dtype::is_float(base.dtype()) || !dtype::is_float(tuned.dtype()) {
            return Err(Error::request(format!(
                "tensor '{name}' changed, but holds {:?} and {:?}, expected floating point",
                base.dtype(),
                tuned.dtype()
            ))
            .help("leave it out with --filter"));
        }
        // Another type or another zero, the same values. Values that are not finite are found here, before any output.
        if super::factor::difference(&base, &tuned)?.iter().all(|&d| d == 0.0) {
            self.unchanged += 1;
            return Ok(());
        }
        let changed = Changed { base, tuned };
        if !is_target(&tuned) {
            self.rest.push(changed);
            return Ok(());
        }
        if let Size::Rank(r) = options.size
            && r > shape[0].min(shape[1])
        {
            return Err(Error::request(format!(
                "rank {r} is more than tensor '{name}' with shape {shape:?} can have, expected at most {}",
                shape[0].min(shape[1])
            ))
            .help("choose a smaller --rank, or leave the tensor out with --filter"));
        }
        self.matrices.push(changed);
        Ok(())
    }

    /// What an adapter cannot store in full.
    fn check_rest(&self) -> Result<()> {
        let factored: BTreeSet<&str> = self.matrices.iter().map(|m| module(m.tuned.name())).collect();
        let found =
            self.rest.iter().find(|c| factored.contains(module(c.tuned.name())) || !c.tuned.name().contains('.'));
        match found {
            Some(c) => Err(Error::request(format!(
                "tensor '{}' changed, but an adapter cannot store it in full beside factors of its module",
                c.tuned.name()
            ))
            .help("leave it out with --filter, or run without --save-rest, which lists it")),
            None => Ok(()),
        }
    }

    /// The name under which PEFT looks for the head of a tied model whose embedding is stored in full.
    pub fn tied_head(&self) -> Option<(&'static str, Tensor<'a>)> {
        let is_embedding = |t: &Tensor| ["embed_tokens", "wte"].contains(&last(module(t.name())));
        let embedding = self.rest.iter().map(|c| c.tuned).find(is_embedding).filter(|_| self.tied)?;
        self.rest.iter().all(|c| c.tuned.name() != HEAD_NAME).then_some((HEAD_NAME, embedding))
    }

    /// `target_modules`: the last components of the names where all modules that have them are factored, whole names
    /// elsewhere.
    pub fn targets(&self, names: &[&str]) -> Vec<String> {
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        names.iter().for_each(|name| *counts.entry(last(name)).or_default() += 1);
        let all = |name: &str| counts.get(last(name)) == self.candidates.get(last(name));
        let target = |&name: &&str| if all(name) { last(name).to_owned() } else { name.to_owned() };
        let mut targets: Vec<String> = names.iter().map(target).collect();
        targets.sort();
        targets.dedup();
        targets
    }
}

fn lacks(checkpoint: &Checkpoint, name: &str, other: &Checkpoint) -> Error {
    let (path, other) = (checkpoint.path().display(), other.path().display());
    Error::request(format!("'{path}' has no tensor '{name}', which '{other}' has"))
        .help("extract from a checkpoint and the one it was trained from, or leave the tensor out with --filter")
}

/// `config.json`, or null.
fn config_of(checkpoint: &Checkpoint) -> Result<Value> {
    let Some(path) = checkpoint.folder().map(|f| f.join("config.json")).filter(|p| p.exists()) else {
        return Ok(Value::Null);
    };
    let text = crate::checkpoint::read_text(&path)?;
    serde_json::from_slice(&text).map_err(|e| Error::request(format!("'{}' is not valid JSON: {e}", path.display())))
}
