//! The delta of one weight in row blocks: `scaling * B @ A`, in f32 for merging and in f64 for measuring.

mod product;

use crate::{
    adapter::{Module, ModuleKind},
    checkpoint::{Dtype, Tensor, dtype},
    error::{Error, Result},
};
use ndarray::{Array2, ArrayViewMut2, s};
use product::multiply;
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
        Self::read(module, fan_in_fan_out)
    }
}

impl LowRank<f64> {
    /// Reads the factors of `module` as f64, exactly. `fan_in_fan_out`: its linear weight is stored `[in, out]`.
    pub fn read_f64(module: &Module, fan_in_fan_out: bool) -> Result<Self> {
        Self::read(module, fan_in_fan_out)
    }
}

impl<T: Real> LowRank<T> {
    /// Rows `rows` of the delta, `scaling * (left @ right)`, overwriting `out` (`[rows.len(), columns]`).
    pub fn rows(&self, rows: Range<usize>, out: ArrayViewMut2<T>) {
        multiply(self.scaling, self.left.slice(s![rows, ..]), self.right.view(), out);
    }

    /// Adds rows `rows` of the delta to `out` (`[rows.len(), columns]`), rounded before: so does PEFT.
    pub fn add_rows(&self, rows: Range<usize>, mut out: ArrayViewMut2<T>) {
        let mut own = Array2::zeros(out.dim());
        self.rows(rows, own.view_mut());
        out.zip_mut_with(&own, |out, &own| *out = *out + own);
    }

    /// The whole delta.
    pub fn dense(&self) -> Array2<T> {
        let (m, n) = self.shape();
        let mut out = Array2::zeros((m, n));
        self.rows(0..m, out.view_mut());
        out
    }

    /// Reads the factors of `module`. `fan_in_fan_out`: its linear weight is stored `[in, out]`.
    /// Expert parameters have one delta per expert, see [`Module::experts`]; they are refused here.
    pub fn read(module: &Module, fan_in_fan_out: bool) -> Result<Self> {
        let mut a = vec![T::zero(); module.a.elements()];
        let mut b = vec![T::zero(); module.b.elements()];
        T::read(&module.a, 0, &mut a)?;
        T::read(&module.b, 0, &mut b)?;
        let scaling = T::from_f64(module.scaling);
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
        let shape_error = |e| Error::environment(format!("factors of '{}': {e}", module.name));
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

/// The number types that deltas are computed in.
pub trait Real: ndarray::LinalgScalar + bytemuck::Pod + std::fmt::Display + Send + Sync + PartialOrd {
    /// Neither infinite nor NaN.
    fn is_finite(self) -> bool;
    /// Rounded to nearest.
    fn from_f64(x: f64) -> Self;
    /// Exact.
    fn to_f64(self) -> f64;
    /// Rounded to nearest.
    fn to_f32(self) -> f32;
    /// `self * a + b`, rounded once.
    fn mul_add(self, a: Self, b: Self) -> Self;
    /// Values `first .. first + out.len()` of the flat tensor.
    fn read(tensor: &Tensor, first: usize, out: &mut [Self]) -> Result<()>;
    /// Values from stored bytes.
    fn decode(dtype: Dtype, bytes: &[u8], out: &mut [Self]) -> Result<()>;
    /// Stored bytes from values, rounded once to nearest.
    fn encode(dtype: Dtype, values: &[Self], out: &mut [u8]) -> Result<()>;
}

impl Real for f32 {
    fn is_finite(self) -> bool {
        f32::is_finite(self)
    }
    fn from_f64(x: f64) -> f32 {
        x as f32
    }
    fn to_f64(self) -> f64 {
        self.into()
    }
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn mul_add(self, a: f32, b: f32) -> f32 {
        f32::mul_add(self, a, b)
    }
    fn read(tensor: &Tensor, first: usize, out: &mut [f32]) -> Result<()> {
        tensor.read_f32(first, out)
    }
    fn decode(dtype: Dtype, bytes: &[u8], out: &mut [f32]) -> Result<()> {
        dtype::decode_f32(dtype, bytes, out)
    }
    fn encode(dtype: Dtype, values: &[f32], out: &mut [u8]) -> Result<()> {
        dtype::encode_f32_into(dtype, values, out)
    }
}

impl Real for f64 {
    fn is_finite(self) -> bool {
        f64::is_finite(self)
    }
    fn from_f64(x: f64) -> f64 {
        x
    }
    fn to_f64(self) -> f64 {
        self
    }
    fn to_f32(self) -> f32 {
        self as f32
    }
    #[inline(always)]
    fn mul_add(self, a: f64, b: f64) -> f64 {
        f64::mul_add(self, a, b)
    }
    fn read(tensor: &Tensor, first: usize, out: &mut [f64]) -> Result<()> {
        tensor.read_f64(first, out)
    }
    fn decode(dtype: Dtype, bytes: &[u8], out: &mut [f64]) -> Result<()> {
        dtype::decode_f64(dtype, bytes, out)
    }
    fn encode(dtype: Dtype, values: &[f64], out: &mut [u8]) -> Result<()> {
        dtype::encode_f64_into(dtype, values, out)
    }
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
