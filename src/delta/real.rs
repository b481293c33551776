//! The number types that updates are computed in.

use crate::{
    checkpoint::{Dtype, Tensor, dtype},
    error::Result,
};

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
