//! The stored factors of one weight's deltas, one pair per cycle.

use super::noise::{self, StepSums, known::Term};
use crate::{adapter::LoraModule, checkpoint::Tensor, delta::LowRank, error::Result};

/// The factors of one weight's deltas, one pair per cycle.
pub(super) struct CycleFactors<'a> {
    /// With `fan_in_fan_out` of the adapter.
    pub modules: Vec<(LoraModule<'a>, bool)>,
    /// The weight the deltas are merged into, and one merge's roundings: what they can add counts as noise.
    pub merged_into: Option<(Tensor<'a>, Vec<Term>)>,
}

impl CycleFactors<'_> {
    /// Reads them as f64, exactly.
    pub fn read(&self) -> Result<Vec<LowRank<f64>>> {
        self.modules.iter().map(|(module, fan_in_fan_out)| module.low_rank(*fan_in_fan_out)).collect()
    }

    /// Sum of the ranks of all cycles.
    pub fn total_rank(&self) -> usize {
        self.modules.iter().map(|(module, _)| module.r).sum()
    }

    /// What one merge into the weight can add, as sums of each kind of rounding.
    pub fn noise(&self) -> Result<Vec<(StepSums, f64)>> {
        let Some((weight, terms)) = &self.merged_into else { return Ok(Vec::new()) };
        terms.iter().map(|term| Ok((noise::of_tensor(weight, term.numbers)?, term.roundings))).collect()
    }
}
