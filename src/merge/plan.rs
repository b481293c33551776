//! What each tensor of the output is made of.

use super::sidecar_files::ConfigChanges;
use crate::{
    checkpoint::{Dtype, Tensor, TensorSpec, dtype},
    delta::Planned,
};
use std::path::Path;

/// The output, tensor by tensor, in the order of the base; tensors that the base lacks come last.
pub(super) struct Plan<'a> {
    pub outputs: Vec<Output<'a>>,
    pub config: ConfigChanges,
    pub warnings: Vec<String>,
}

/// One tensor of the output: its source, some rows replaced, then updated by one adapter after the other, rounded once.
pub(super) struct Output<'a> {
    pub spec: TensorSpec,
    /// What is updated: the base's tensor, or the one that replaces it.
    pub source: Tensor<'a>,
    /// The adapter that replaces the base's tensor, or adds one that the base lacks.
    pub replaced: Option<Replacement<'a>>,
    pub updates: Vec<Planned<'a>>,
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

/// Rows of an embedding that replace the base's.
pub(super) struct TokenRows<'a> {
    pub indices: Vec<usize>,
    pub rows: Tensor<'a>,
    pub adapter: &'a Path,
}

impl<'a> Output<'a> {
    /// A copy of `source` called `name`, converted to `to` if it is floating point.
    pub(super) fn new(name: &str, source: Tensor<'a>, to: Option<Dtype>) -> Output<'a> {
        let dtype = to.filter(|_| dtype::is_float(source.dtype())).unwrap_or(source.dtype());
        let spec = TensorSpec { name: name.to_owned(), dtype, shape: source.shape().to_vec() };
        Output { spec, source, replaced: None, updates: Vec::new(), tokens: Vec::new() }
    }

    /// Whether its values are the source's.
    pub(super) fn is_unchanged(&self) -> bool {
        self.updates.is_empty() && self.tokens.is_empty()
    }

    /// Whether its bytes are the source's.
    pub(super) fn is_copy(&self) -> bool {
        self.is_unchanged() && self.spec.dtype == self.source.dtype()
    }

    /// Whether it is computed in f64: the weight is stored as F64, or an update needs it.
    pub(super) fn in_double(&self) -> bool {
        self.source.dtype() == Dtype::F64 || self.updates.iter().any(Planned::needs_double)
    }

    /// Bytes that making it reads: its source, and the tensors of its updates.
    pub(super) fn bytes_read(&self) -> u64 {
        self.source.bytes().len() as u64 + self.updates.iter().map(Planned::bytes_read).sum::<u64>()
    }

    /// Sum of the ranks of its updates.
    pub(super) fn rank(&self) -> usize {
        self.updates.iter().map(|update| update.rank).sum()
    }

    /// The tensor seen as a matrix: as its updates see it; without one, all extents but the last make the rows, and a vector
    /// is one row.
    pub(super) fn matrix_shape(&self) -> (usize, usize) {
        if let Some(update) = self.updates.first() {
            return update.shape;
        }
        match self.spec.shape.split_last() {
            Some((&columns, [])) => (1, columns),
            Some((&columns, rows)) => (rows.iter().product(), columns),
            None => (1, 1),
        }
    }

    /// Blocks of about `elements` elements: whole rows, and those together that an update mixes with each other.
    pub(super) fn row_blocks(&self, elements: usize) -> impl Iterator<Item = std::ops::Range<usize>> + use<> {
        let (rows, columns) = self.matrix_shape();
        // A file of a few bytes may claim any number of empty rows.
        let rows = if columns == 0 { 0 } else { rows };
        let together = self.updates.iter().fold(1, |all, update| least_common_multiple(all, update.row_group)).max(1);
        let step = (elements / columns.max(1) / together).max(1).saturating_mul(together);
        (0..rows).step_by(step).map(move |at| at..rows.min(at.saturating_add(step)))
    }
}

fn least_common_multiple(a: usize, b: usize) -> usize {
    let divisor = |mut a: usize, mut b: usize| {
        while b > 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    (a / divisor(a, b).max(1)).saturating_mul(b)
}

impl Plan<'_> {
    /// What the output's tensors will look like.
    pub(super) fn specs(&self) -> Vec<TensorSpec> {
        self.outputs.iter().map(|o| o.spec.clone()).collect()
    }
}
