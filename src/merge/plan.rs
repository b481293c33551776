//! What each tensor of the output is made of. Everything that can be refused is refused before anything is written.

use super::{companions::ConfigChanges, matcher::Matcher};
use crate::{
    adapter::{Adapter, Module},
    checkpoint::{Checkpoint, Dtype, Tensor, TensorSpec, dtype},
    error::Result,
};
use std::path::Path;

/// The output, tensor by tensor, in the order of the base; tensors that the base lacks come last.
pub(super) struct Plan<'a> {
    pub outputs: Vec<Output<'a>>,
    pub config: ConfigChanges,
    pub warnings: Vec<String>,
}

/// One tensor of the output: `round(source + sum of terms)`, some rows replaced.
pub(super) struct Output<'a> {
    pub spec: TensorSpec,
    /// What deltas are added to: the base's tensor, or the one that replaces it.
    pub source: Tensor<'a>,
    /// The adapter that replaces the base's tensor, or adds one that the base lacks.
    pub replaced: Option<Replacement<'a>>,
    pub terms: Vec<Term<'a>>,
    /// Rows that replace the source's.
    pub tokens: Vec<TokenRows<'a>>,
}

/// Who replaced a tensor.
#[derive(Clone, Copy)]
pub(super) struct Replacement<'a> {
    pub adapter: &'a Path,
    /// The cycle of a training run that the adapter holds.
    pub cycle: Option<u64>,
    /// The base has no tensor of this name.
    pub added: bool,
}

/// Something that is added to a tensor.
pub(super) enum Term<'a> {
    /// `weight * scaling * B @ A`, transposed where the weight is stored `[in, out]`. One such product per expert, below
    /// each other, for expert parameters. With a magnitude (DoRA) the sum is rescaled.
    LowRank { module: Module<'a>, transposed: bool, weight: f64 },
    /// `factor * vector`: the bias of B.
    Bias { vector: Tensor<'a>, factor: f64 },
}

/// Rows of an embedding that replace the base's.
pub(super) struct TokenRows<'a> {
    pub indices: Vec<usize>,
    pub rows: Tensor<'a>,
    pub adapter: &'a Path,
}

impl Term<'_> {
    /// Rank of what it adds.
    pub(super) fn rank(&self) -> usize {
        match self {
            Term::LowRank { module, .. } => module.r,
            Term::Bias { .. } => 0,
        }
    }
}

impl<'a> Output<'a> {
    /// A copy of `source` called `name`, converted to `to` if it is floating point.
    pub(super) fn new(name: &str, source: Tensor<'a>, to: Option<Dtype>) -> Output<'a> {
        let dtype = to.filter(|_| dtype::is_float(source.dtype())).unwrap_or(source.dtype());
        let spec = TensorSpec { name: name.to_owned(), dtype, shape: source.shape().to_vec() };
        Output { spec, source, replaced: None, terms: Vec::new(), tokens: Vec::new() }
    }

    /// Whether its values are the source's.
    pub(super) fn is_unchanged(&self) -> bool {
        self.terms.is_empty() && self.tokens.is_empty()
    }

    /// Whether its bytes are the source's.
    pub(super) fn is_copy(&self) -> bool {
        self.is_unchanged() && self.spec.dtype == self.source.dtype()
    }

    /// Bytes that making it reads: its source, and the tensors of its terms.
    pub(super) fn bytes_read(&self) -> u64 {
        let terms = self.terms.iter().map(|term| match term {
            Term::LowRank { module, .. } => module.a.bytes().len() + module.b.bytes().len(),
            Term::Bias { vector, .. } => vector.bytes().len(),
        });
        (self.source.bytes().len() + terms.sum::<usize>()) as u64
    }

    /// The module whose magnitude rescales the sum (DoRA), and whether its weight is stored `[in, out]`.
    pub(super) fn dora(&self) -> Option<(&Module<'a>, bool)> {
        self.terms.iter().find_map(|term| match term {
            Term::LowRank { module, transposed, .. } if module.magnitude.is_some() => Some((module, *transposed)),
            _ => None,
        })
    }

    /// The tensor seen as a matrix: all extents but the last make the rows; a vector is one row.
    pub(super) fn matrix_shape(&self) -> (usize, usize) {
        match self.spec.shape.split_last() {
            Some((&columns, [])) => (1, columns),
            Some((&columns, rows)) => (rows.iter().product(), columns),
            None => (1, 1),
        }
    }
}

impl<'a> Plan<'a> {
    /// What the output's tensors will look like.
    pub(super) fn specs(&self) -> Vec<TensorSpec> {
        self.outputs.iter().map(|o| o.spec.clone()).collect()
    }

    /// Matches every tensor of every adapter with its target in `base`.
    pub(super) fn new(base: &'a Checkpoint, adapters: &'a [(Adapter, f64)], to: Option<Dtype>) -> Result<Plan<'a>> {
        let mut matcher = Matcher::new(base, to)?;
        for (adapter, weight) in adapters {
            matcher.add(adapter, *weight)?;
        }
        matcher.finish()
    }
}
