//! Which products `B @ A` a GPU takes, and how it computes them.
//!
//! A product of rank r costs the CPU `2 r` operations per element of the weight, shared by its threads. The GPU multiplies in
//! no time, but 4 bytes per element have to come back. So the GPU pays where
//!
//! ```text
//! 2 r / (PRODUCTS * threads) > 4 / READ_BACK,    r > 23.3 * threads
//! ```
//!
//! with r the sum of the ranks of all that is added to a tensor: it is read back once.

use super::plan::{Output, Term};
use crate::{
    checkpoint::Dtype,
    delta::{LowRank, Real},
    error::Result,
    ops::{GpuMatrix, Products},
    threads,
};
use ndarray::Array2;
use std::ops::Range;

/// Operations per second of one thread: what PyTorch's products of rank 128 reached on the machine of docs/benchmarks.md.
const PRODUCTS: f64 = 70e9;

/// Bytes per second from the GPU to memory that is not page-locked. An assumption: PCIe 4.0 with a copy on the way.
const READ_BACK: f64 = 6e9;

/// The GPU of a merge.
pub(super) struct Gpu(Products);

/// The factors of one tensor's deltas, on the GPU.
pub(super) struct Uploaded<'a> {
    gpu: &'a Gpu,
    deltas: Vec<Delta>,
}

/// One product: where its rows begin, its factors, its scale.
struct Delta {
    first: usize,
    left: GpuMatrix,
    right: GpuMatrix,
    scaling: f32,
    rows: usize,
}

impl Gpu {
    pub(super) fn new(products: Products) -> Gpu {
        Gpu(products)
    }

    /// `cuda:N`.
    pub(super) fn name(&self) -> &str {
        self.0.name()
    }

    /// Whether it takes the products of this tensor. What is computed in f64 stays on the CPU.
    pub(super) fn takes(&self, output: &Output) -> bool {
        let rank: usize = output.terms.iter().map(Term::rank).sum();
        output.source.dtype() != Dtype::F64 && rank >= smallest_rank()
    }

    /// Brings factors to the GPU, which takes f32 only.
    pub(super) fn upload<T: Real>(&self, deltas: &[(usize, LowRank<T>)]) -> Result<Uploaded<'_>> {
        let matrix = |values: &Array2<T>| {
            let values = values.as_standard_layout();
            let (rows, columns) = values.dim();
            self.0.upload(rows, columns, bytemuck::cast_slice(values.as_slice().unwrap_or_default()))
        };
        let delta = |(first, delta): &(usize, LowRank<T>)| {
            let (left, right) = (matrix(&delta.left)?, matrix(&delta.right)?);
            Ok(Delta { first: *first, left, right, scaling: delta.scaling.to_f32(), rows: delta.shape().0 })
        };
        Ok(Uploaded { gpu: self, deltas: deltas.iter().map(delta).collect::<Result<_>>()? })
    }
}

/// The smallest rank whose products a GPU takes, with the threads of this program.
pub(super) fn smallest_rank() -> usize {
    smallest_rank_with(threads::count())
}

fn smallest_rank_with(threads: usize) -> usize {
    (4.0 / READ_BACK * PRODUCTS * threads as f64 / 2.0) as usize + 1
}

impl Uploaded<'_> {
    /// Overwrites `out` (`[rows.len(), columns]`) with rows `rows` of the sum of all products.
    pub(super) fn rows(&self, rows: &Range<usize>, columns: usize, out: &mut [f32]) -> Result<()> {
        let products = &self.gpu.0;
        let mut sum = products.zeros(rows.len(), columns)?;
        for d in &self.deltas {
            let (from, to) = (rows.start.max(d.first), rows.end.min(d.first + d.rows));
            if from < to {
                let own = from - d.first..to - d.first;
                products.add(d.scaling, &d.left, own, &d.right, &mut sum, from - rows.start)?;
            }
        }
        products.read(&sum, out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_takes_what_costs_more_than_reading_it_back() {
        assert_eq!([1, 2, 4, 16].map(smallest_rank_with), [24, 47, 94, 374]);
    }
}
