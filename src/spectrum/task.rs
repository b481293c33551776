//! One weight to measure: what its update is made of, and what measuring it needs.

use super::{
    Reason, Skipped,
    factors::CycleFactors,
    measures,
    names::ModuleId,
    pair::Pair,
    svd::{PANEL, SvdOptions},
};
use crate::{checkpoint::Dtype, delta::Planned, work_queue::Need};

/// One weight of one source.
pub(super) struct Task<'a> {
    pub label: String,
    pub name: String,
    pub module: ModuleId,
    pub shape: (usize, usize),
    pub dtype: Dtype,
    pub r: Option<usize>,
    /// The cycles it covers; `None` where there are no cycles.
    pub cycles: Option<Vec<u64>>,
    pub delta: Delta<'a>,
}

/// The update of one weight.
pub(super) enum Delta<'a> {
    /// Dense difference of two stored matrices.
    Difference(Pair<'a>),
    /// Factors of one delta per cycle, or of an adapter.
    Factored(CycleFactors<'a>),
    /// The update of an adapter of another type than LoRA, which its tensors alone determine.
    Adapter(Planned<'a>),
}

impl Task<'_> {
    /// Work: the cube that the eigenvalues take plus the product before. Memory: the Gram matrix and a panel, or the
    /// dense matrix and a workspace. On a GPU: the Gram matrix, a workspace of at most its size, and a panel.
    pub fn need(&self, svd: SvdOptions) -> Need {
        let (short, long) = (self.shape.0.min(self.shape.1) as f64, self.shape.0.max(self.shape.1) as f64);
        let tolerance = measures::default_tolerance(self.shape);
        let panel = PANEL as f64 + 44.0;
        let on_gpu = |n: f64| 8.0 * n * (2.0 * n + panel);
        let cost = short * short * (short + long);
        match &self.delta {
            Delta::Difference(_) if svd.takes_gram(self.shape, tolerance) && svd.gpu.is_some() => {
                Need { cost, memory: 8.0 * short * panel, gpu_memory: on_gpu(short) }
            }
            Delta::Difference(_) if svd.takes_gram(self.shape, tolerance) => {
                Need { cost, memory: 8.0 * short * (short + panel), gpu_memory: 0.0 }
            }
            Delta::Difference(_) => Need { cost, memory: 8.0 * short * (long + short.min(300.0)), gpu_memory: 0.0 },
            Delta::Adapter(_) => {
                Need { cost, memory: 8.0 * (short * long + short * (long + short.min(300.0))), gpu_memory: 0.0 }
            }
            Delta::Factored(factors) => {
                let rank = factors.total_rank() as f64;
                let core = (rank.min(short), rank.min(long));
                let gram = svd.gpu.is_some() && svd.takes_gram((core.0 as usize, core.1 as usize), tolerance);
                Need {
                    cost: rank * rank * (short + long) + core.0 * core.1 * short,
                    memory: 8.0 * (3.0 * rank * (short + long) + 3.0 * core.0 * core.1),
                    gpu_memory: if gram { on_gpu(core.0) } else { 0.0 },
                }
            }
        }
    }
}

/// A tensor that is left out. `weight`: whether it is a weight whose update is unknown, so that no gate may hold for it.
pub(super) fn skipped(name: &str, label: &str, reason: Reason, detail: String, weight: bool) -> Skipped {
    Skipped { name: name.to_owned(), label: label.to_owned(), reason, detail, weight }
}
