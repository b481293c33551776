//! What takes the place of `ops/cuda` in a build without the feature `cuda`: opening a GPU is refused, and no value of a type
//! that needs one can exist.

use crate::error::{Error, Result};
use std::{convert::Infallible, marker::PhantomData, ops::Range, path::PathBuf};

/// The variable that names folders with CUDA's libraries.
pub const FOLDERS_VARIABLE: &str = "RELORA_KIT_CUDA_LIBRARIES";

/// Which GPU was chosen.
#[derive(Clone, Debug, Default)]
pub struct CudaOptions {
    /// Its number, from 0.
    pub ordinal: usize,
    /// Folders with CUDA's libraries.
    pub libraries: Vec<PathBuf>,
    /// The folder of compiled kernels.
    pub cache: Option<PathBuf>,
}

impl CudaOptions {
    /// GPU number `ordinal`.
    pub fn from_env(ordinal: usize) -> CudaOptions {
        CudaOptions { ordinal, ..CudaOptions::default() }
    }
}

/// The error of every attempt to open a GPU.
pub fn unavailable(ordinal: usize) -> Error {
    Error::environment(format!(
        "device 'cuda:{ordinal}' is unavailable: this relora-kit was built without the feature cuda"
    ))
    .help("build it with `--features cuda`, or pass --device cpu")
}

/// A GPU that multiplies.
pub struct Products(Infallible);

/// A matrix on a GPU.
pub struct GpuMatrix(Infallible);

#[allow(missing_docs, reason = "the same as in ops/cuda/products.rs")]
impl Products {
    pub fn open(options: &CudaOptions) -> Result<Products> {
        Err(unavailable(options.ordinal))
    }

    pub fn name(&self) -> &str {
        match self.0 {}
    }

    pub fn model(&self) -> &str {
        match self.0 {}
    }

    pub fn zeros(&self, _: usize, _: usize) -> Result<GpuMatrix> {
        match self.0 {}
    }

    pub fn upload(&self, _: usize, _: usize, _: &[f32]) -> Result<GpuMatrix> {
        match self.0 {}
    }

    pub fn add(
        &self,
        _: f32,
        _: &GpuMatrix,
        _: Range<usize>,
        _: &GpuMatrix,
        _: &mut GpuMatrix,
        _: usize,
    ) -> Result<()> {
        match self.0 {}
    }

    pub fn read(&self, matrix: &GpuMatrix, _: &mut [f32]) -> Result<()> {
        match matrix.0 {}
    }
}

/// A GPU that computes eigenvalues.
pub struct Solver(Infallible);

/// A Gram matrix on a GPU.
pub struct GpuGram<'a>(Infallible, PhantomData<&'a Solver>);

#[allow(missing_docs, reason = "the same as in ops/cuda/solver.rs")]
impl Solver {
    pub fn open(options: &CudaOptions) -> Result<Solver> {
        Err(unavailable(options.ordinal))
    }

    pub fn name(&self) -> &str {
        match self.0 {}
    }

    pub fn model(&self) -> &str {
        match self.0 {}
    }

    pub fn free_memory(&self) -> Result<u64> {
        match self.0 {}
    }

    pub fn gram(&self, _: usize) -> Result<GpuGram<'_>> {
        match self.0 {}
    }
}

#[allow(missing_docs, reason = "the same as in ops/cuda/solver.rs")]
impl GpuGram<'_> {
    pub fn add(&mut self, _: bool, _: &[f64], _: usize, _: usize) -> Result<()> {
        match self.0 {}
    }

    pub fn trace(&self) -> Result<f64> {
        match self.0 {}
    }

    pub fn eigenvalues(self) -> Result<Option<Vec<f64>>> {
        match self.0 {}
    }
}
