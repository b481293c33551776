//! Which tensors changed, which of them can be factored, and what PEFT has to be told about it.

use super::{Options, Size};
use crate::{
    architecture::{Architecture, LayerKind},
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
    pub architecture: Architecture,
    /// The embedding that is the head, too, and the head's name; only the embedding is stored.
    pub tied: Option<(String, String)>,
    // Last component of a module's name -> how many modules of the base have it, those that hold other modules included.
    modules: BTreeMap<&'a str, usize>,
}

/// Ends of the names of heads, which PEFT leaves alone unless told otherwise.
const HEADS: [&str; 5] = ["lm_head", "embed_out", "output_projection", "score", "classifier"];

/// Ends of the names that embeddings have, for architectures that the table lacks.
const EMBEDDINGS: [&str; 16] = [
    "embed_tokens",
    "wte",
    "wpe",
    "word_embeddings",
    "position_embeddings",
    "position_embedding",
    "token_type_embeddings",
    "token_embedding",
    "tokens_embed",
    "positions_embed",
    "embeddings",
    "embed_in",
    "embed_positions",
    "embed",
    "relative_attention_bias",
    "shared",
];

/// `model.norm.weight` -> `model.norm`.
pub(super) fn module(tensor: &str) -> &str {
    tensor.rsplit_once('.').map_or(tensor, |(module, _)| module)
}

fn last(module: &str) -> &str {
    module.rsplit('.').next().unwrap_or(module)
}

/// Whether an adapter can hold a low-rank delta of this tensor: the weight of a linear layer, by the architecture's own classes.
fn is_target(tensor: &Tensor, architecture: &Architecture) -> bool {
    let last = last(module(tensor.name()));
    let linear = match architecture.kind(tensor.name()) {
        Some(kind) => matches!(kind, LayerKind::Linear | LayerKind::Conv1d),
        None => !EMBEDDINGS.contains(&last),
    };
    let matrix = tensor.shape().len() == 2 && tensor.elements() > 0 && tensor.name().ends_with(".weight");
    matrix && linear && !HEADS.contains(&last)
}

/// The embedding that is the head, too, in a base that stores only the embedding and does not say that it is untied.
fn tied(base: &Checkpoint, architecture: &Architecture) -> Option<(String, String)> {
    if architecture.says_untied() || base.tensors().any(|t| HEADS[..2].contains(&last(module(t.name())))) {
        return None;
    }
    let renaming = architecture.renaming();
    let stored = |name: &str| renaming.as_ref().map_or(name.to_owned(), |r| r.apply(name));
    let known = architecture
        .tied()
        .find(|(head, input)| HEADS.contains(&last(module(head))) && base.get(&stored(input)).is_some());
    if let Some((head, input)) = known {
        return Some((stored(input), head.to_owned()));
    }
    let by_name = base.tensors().find(|t| ["embed_tokens", "wte"].contains(&last(module(t.name()))))?;
    (architecture.ties() == Some(true)).then(|| (by_name.name().to_owned(), HEAD_NAME.to_owned()))
}

impl<'a> Plan<'a> {
    pub fn new(base: &'a Checkpoint, tuned: &'a Checkpoint, options: &Options) -> Result<Plan<'a>> {
        let architecture = Architecture::of(&config_of(base)?);
        let mut plan = Plan {
            matrices: Vec::new(),
            rest: Vec::new(),
            unchanged: 0,
            tied: tied(base, &architecture),
            architecture,
            modules: BTreeMap::new(),
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
        let dots = |name: &'a str| name.match_indices('.').map(move |(i, _)| &name[..i]);
        let modules: BTreeSet<&str> = base.tensors().flat_map(|t| dots(t.name())).collect();
        for name in modules {
            *plan.modules.entry(last(name)).or_default() += 1;
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
            .help(match (base.shape(), shape) {
                (&[before, m], &[after, n]) if m == n && after > before => format!(
                    "training added {} tokens: leave the vocabulary out, for example with --filter '*layers*', or resize the \
                     base first (`resize_token_embeddings({after})`)",
                    after - before
                ),
                _ => "extract from a checkpoint and the one it was trained from".to_owned(),
            }));
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
        if !is_target(&tuned, &self.architecture) {
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

    /// Whether a changed tensor is the bias of a factored layer: PEFT stores it beside the factors, with `bias: "all"`.
    pub fn is_bias_of_factored(&self, name: &str) -> bool {
        name.ends_with(".bias") && self.matrices.iter().any(|m| module(m.tuned.name()) == module(name))
    }

    /// What an adapter cannot store in full.
    fn check_rest(&self) -> Result<()> {
        let factored: BTreeSet<&str> = self.matrices.iter().map(|m| module(m.tuned.name())).collect();
        let found = self
            .rest
            .iter()
            .map(|c| c.tuned.name())
            .find(|name| factored.contains(module(name)) && !self.is_bias_of_factored(name) || !name.contains('.'));
        match found {
            Some(name) => Err(Error::request(format!(
                "tensor '{name}' changed, but an adapter cannot store it in full beside factors of its module"
            ))
            .help("leave it out with --filter, or run without --save-rest, which lists it")),
            None => Ok(()),
        }
    }

    /// Whether the weight is stored `[in, out]`.
    pub fn is_transposed(&self, tensor: &Tensor) -> bool {
        self.architecture.kind(tensor.name()) == Some(LayerKind::Conv1d)
    }

    /// The name under which PEFT looks for the head of a tied model whose embedding is stored in full.
    pub fn tied_head(&self) -> Option<(&str, Tensor<'a>)> {
        let (input, head) = self.tied.as_ref()?;
        let embedding = self.rest.iter().map(|c| c.tuned).find(|t| t.name() == input)?;
        self.rest.iter().all(|c| c.tuned.name() != head).then_some((head, embedding))
    }

    /// `target_modules`: the last components of the names where all modules that end in them are factored, whole names elsewhere:
    /// PEFT compares with the end of every module's name, and `0` is a block, too.
    pub fn targets(&self, names: &[&str]) -> Vec<String> {
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        names.iter().for_each(|name| *counts.entry(last(name)).or_default() += 1);
        let all = |name: &str| counts.get(last(name)) == self.modules.get(last(name));
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
