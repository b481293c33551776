//! The delta of one weight in row blocks: `scaling * B @ A`, in f32 for merging and in f64 for measuring.

use crate::{
    adapter::{Module, ModuleKind},
    error::{Error, Result},
};
use ndarray::{Array2, ArrayView2, ArrayViewMut2, linalg::general_mat_mul, s};
use std::ops::Range;

/// A low-rank delta in the layout of the stored weight, `[rows, columns] = scaling * left @ right`.
#[derive(Clone, Debug)]
pub struct LowRank<T> {
    /// `[rows, r]`: B, or Aᵀ where the weight is stored transposed.
    pub left: Array2<T>,
    /// `[r, columns]`: A, or Bᵀ.
    pub right: Array2<T>,
    /// What the product is multiplied with.
    pub scaling: T,
}

impl LowRank<f32> {
    /// Reads the factors of `module` as f32. `fan_in_fan_out`: its linear weight is stored `[in, out]`.
    pub fn read_f32(module: &Module, fan_in_fan_out: bool) -> Result<Self> {
        let a = module.a.to_f32()?.into_owned();
        let b = module.b.to_f32()?.into_owned();
        Self::new(module, fan_in_fan_out, a, b, module.scaling as f32)
    }

    /// Rows `rows` of the delta, `scaling * (left @ right)`, overwriting `out` (`[rows.len(), columns]`).
    pub fn rows(&self, rows: Range<usize>, out: ArrayViewMut2<f32>) {
        product(self, rows, out)
    }
}

impl LowRank<f64> {
    /// Reads the factors of `module` as f64, exactly. `fan_in_fan_out`: its linear weight is stored `[in, out]`.
    pub fn read_f64(module: &Module, fan_in_fan_out: bool) -> Result<Self> {
        let mut a = vec![0.0; module.a.elements()];
        let mut b = vec![0.0; module.b.elements()];
        module.a.read_f64(0, &mut a)?;
        module.b.read_f64(0, &mut b)?;
        Self::new(module, fan_in_fan_out, a, b, module.scaling)
    }

    /// Rows `rows` of the delta, overwriting `out` (`[rows.len(), columns]`).
    pub fn rows(&self, rows: Range<usize>, out: ArrayViewMut2<f64>) {
        product(self, rows, out)
    }

    /// The whole delta.
    pub fn dense(&self) -> Array2<f64> {
        let (m, n) = self.shape();
        let mut out = Array2::zeros((m, n));
        product(self, 0..m, out.view_mut());
        out
    }
}

impl<T: Finite> LowRank<T> {
    fn new(module: &Module, fan_in_fan_out: bool, a: Vec<T>, b: Vec<T>, scaling: T) -> Result<Self> {
        for (what, tensor, values) in [("A", &module.a, &a), ("B", &module.b, &b)] {
            if let Some(i) = values.iter().position(|v| !v.is_finite()) {
                return Err(Error::request(format!(
                    "factor {what} of '{}' is not finite: '{}' in '{}' holds {} at {:?}",
                    module.name,
                    tensor.name(),
                    tensor.file().path().display(),
                    values[i],
                    unravel(i, tensor.shape())
                ))
                .help("the adapter's training diverged or its file is damaged"));
            }
        }
        let shape_error = |e| Error::world(format!("factors of '{}': {e}", module.name));
        let a = Array2::from_shape_vec((module.r * module.experts, module.in_features), a).map_err(shape_error)?;
        let b = Array2::from_shape_vec((module.out_features, module.r * module.experts), b).map_err(shape_error)?;
        let transposed = fan_in_fan_out || module.kind == ModuleKind::Embedding;
        let (left, right) = if transposed { (a.reversed_axes(), b.reversed_axes()) } else { (b, a) };
        Ok(LowRank { left, right, scaling })
    }
}

impl<T> LowRank<T> {
    /// `(rows, columns)` of the stored weight.
    pub fn shape(&self) -> (usize, usize) {
        (self.left.nrows(), self.right.ncols())
    }

    /// Inner extent.
    pub fn r(&self) -> usize {
        self.right.nrows()
    }
}

/// Position of the flat index `i` in a tensor of the given shape, row-major.
pub fn unravel(mut i: usize, shape: &[usize]) -> Vec<usize> {
    let mut index = vec![0; shape.len()];
    for (place, &extent) in index.iter_mut().zip(shape).rev() {
        *place = i % extent.max(1);
        i /= extent.max(1);
    }
    index
}

/// The little that f32 and f64 share here.
pub trait Finite: ndarray::LinalgScalar + std::fmt::Display {
    /// Neither infinite nor NaN.
    fn is_finite(&self) -> bool;
}

impl Finite for f32 {
    fn is_finite(&self) -> bool {
        f32::is_finite(*self)
    }
}

impl Finite for f64 {
    fn is_finite(&self) -> bool {
        f64::is_finite(*self)
    }
}

fn product<T: Finite>(delta: &LowRank<T>, rows: Range<usize>, mut out: ArrayViewMut2<T>) {
    let left: ArrayView2<T> = delta.left.slice(s![rows, ..]);
    general_mat_mul(delta.scaling, &left, &delta.right, T::zero(), &mut out);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::{Adapter, AdapterConfig, NewModule, save};

    fn adapter(b0: f32) -> (tempfile::TempDir, Adapter) {
        let dir = tempfile::tempdir().unwrap();
        let a = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        let b = [b0, 0.0, 0.0, 1.0, 1.0, 1.0, 2.0, -1.0];
        let module = NewModule { name: "m", r: 2, out_features: 4, in_features: 3, a: &a, b: &b };
        save(dir.path(), &AdapterConfig::new(2, 4.0, &["m"]), &[module]).unwrap();
        let adapter = Adapter::open(dir.path()).unwrap();
        (dir, adapter)
    }

    #[test]
    fn row_blocks_and_both_precisions_agree_with_the_formula() {
        let (_dir, adapter) = adapter(1.0);
        let module = adapter.modules().next().unwrap().unwrap();
        let exact = LowRank::read_f64(&module, false).unwrap().dense();
        assert_eq!(exact, ndarray::arr2(&[[2., 4., 6.], [8., 10., 12.], [10., 14., 18.], [-4., -2., 0.]]));
        let mut block = Array2::zeros((2, 3));
        LowRank::read_f32(&module, false).unwrap().rows(1..3, block.view_mut());
        assert_eq!(block.mapv(f64::from), exact.slice(s![1..3, ..]));
        assert_eq!(LowRank::read_f64(&module, true).unwrap().dense(), exact.reversed_axes());
    }

    #[test]
    fn a_factor_that_is_not_finite_is_named_with_its_place() {
        let (_dir, adapter) = adapter(f32::NAN);
        let module = adapter.modules().next().unwrap().unwrap();
        let message = LowRank::read_f32(&module, false).unwrap_err().message;
        assert!(message.contains("lora_B.weight") && message.contains("NaN at [0, 0]"), "{message}");
    }
}
