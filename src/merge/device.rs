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

use super::plan::Output;
use crate::{
    delta::{LowRank, Real, Update},
    error::{Error, Result},
    ops::{GpuMatrix, Products},
    threads,
};
use ndarray::{Array2, ArrayView2, ArrayViewMut2};
use std::{ops::Range, sync::Arc};

/// Operations per second of one thread: what PyTorch's products of rank 128 reached on the machine of docs/benchmarks.md.
const PRODUCTS: f64 = 70e9;

/// Bytes per second from the GPU to memory that is not page-locked. An assumption: PCIe 4.0 with a copy on the way.
const READ_BACK: f64 = 6e9;

/// The GPU of a merge.
pub(super) struct Gpu(Arc<Products>);

/// The sum of one tensor's low-rank products, on the GPU.
struct OnGpu {
    gpu: Arc<Products>,
    deltas: Vec<Delta>,
    shape: (usize, usize),
    bytes: usize,
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
        Gpu(Arc::new(products))
    }

    /// `cuda:N`.
    pub(super) fn name(&self) -> &str {
        self.0.name()
    }

    /// Whether it takes the products of this tensor. What is computed in f64 stays on the CPU.
    pub(super) fn takes(&self, output: &Output) -> bool {
        let products = output.updates.iter().all(|update| update.rank > 0);
        !output.in_double() && products && output.rank() >= smallest_rank()
    }

    /// Lets the GPU compute the products of `updates`, which [`Gpu::takes`] has seen: of all that are added at once, or of the
    /// only one, which is added or rewrites the weight.
    pub(super) fn take_products<T: Real>(&self, updates: &mut Vec<Box<dyn Update<T>>>) -> Result<()> {
        let shape = updates.first().map_or((0, 0), |update| update.shape());
        let Some(parts) = updates.iter().map(|update| update.factors()).collect::<Option<Vec<_>>>() else {
            return Ok(());
        };
        let sum = Box::new(self.upload(shape, parts.into_iter().flatten())?);
        if let [only] = &mut updates[..]
            && let Some(product) = only.product_mut()
        {
            *product = sum;
        } else {
            *updates = vec![sum];
        }
        Ok(())
    }

    /// Brings factors to the GPU, which takes f32 only.
    fn upload<'l, T: Real>(
        &self,
        shape: (usize, usize),
        deltas: impl Iterator<Item = &'l (usize, LowRank<T>)>,
    ) -> Result<OnGpu> {
        let mut bytes = 0;
        let matrix = |values: &Array2<T>| {
            let values = values.as_standard_layout();
            let (rows, columns) = values.dim();
            self.0.upload(rows, columns, bytemuck::cast_slice(values.as_slice().unwrap_or_default()))
        };
        let delta = |(first, delta): &(usize, LowRank<T>)| {
            bytes += (delta.left.len() + delta.right.len()) * size_of::<f32>();
            let (left, right) = (matrix(&delta.left)?, matrix(&delta.right)?);
            Ok(Delta { first: *first, left, right, scaling: delta.scaling.to_f32(), rows: delta.shape().0 })
        };
        let deltas = deltas.map(delta).collect::<Result<_>>()?;
        Ok(OnGpu { gpu: self.0.clone(), deltas, shape, bytes })
    }
}

/// The smallest rank whose products a GPU takes, with the threads of this program.
pub(super) fn smallest_rank() -> usize {
    smallest_rank_with(threads::count())
}

fn smallest_rank_with(threads: usize) -> usize {
    (4.0 / READ_BACK * PRODUCTS * threads as f64 / 2.0) as usize + 1
}

impl<T: Real> Update<T> for OnGpu {
    fn shape(&self) -> (usize, usize) {
        self.shape
    }

    fn bytes(&self) -> usize {
        self.bytes
    }

    fn rows(&self, rows: Range<usize>, _: ArrayView2<T>, mut out: ArrayViewMut2<T>) -> Result<()> {
        let (products, columns) = (&self.gpu, out.ncols());
        // `Gpu::takes` refuses what is computed in f64: here T is f32. Blocks are whole rows of a buffer.
        let out =
            out.as_slice_mut().ok_or_else(|| Error::environment("a block of rows for the GPU is not contiguous"))?;
        let mut sum = products.zeros(rows.len(), columns)?;
        for d in &self.deltas {
            let (from, to) = (rows.start.max(d.first), rows.end.min(d.first + d.rows));
            if from < to {
                let own = from - d.first..to - d.first;
                products.add(d.scaling, &d.left, own, &d.right, &mut sum, from - rows.start)?;
            }
        }
        products.read(&sum, bytemuck::cast_slice_mut(out))
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
