//! Products of small factors on a GPU, f32, that are read back: what a merge needs. No kernel of this project is compiled.

use super::{
    CudaOptions,
    blas::{self, Blas, int},
    driver::Gpu,
    libraries,
    memory::Memory,
};
use crate::error::{Error, Result};
use cudarc::cublas::sys::{self, cublasOperation_t as Operation};
use std::{
    ops::Range,
    sync::{Arc, PoisonError},
};

/// A GPU that multiplies.
pub struct Products {
    gpu: Arc<Gpu>,
    blas: Blas,
}

/// A row-major matrix on the GPU.
pub struct GpuMatrix {
    memory: Memory,
    rows: usize,
    columns: usize,
}

impl Products {
    /// Finds the libraries and opens the GPU.
    pub fn open(options: &CudaOptions) -> Result<Products> {
        libraries::load_products(&format!("cuda:{}", options.ordinal), &options.libraries)?;
        let gpu = Arc::new(Gpu::open(options.ordinal)?);
        let blas = Blas::open(&gpu).map_err(advise)?;
        Ok(Products { gpu, blas })
    }

    /// `cuda:N`.
    pub fn name(&self) -> &str {
        &self.gpu.name
    }

    /// As NVIDIA sells it.
    pub fn model(&self) -> &str {
        &self.gpu.model
    }

    /// A matrix of zeros.
    pub fn zeros(&self, rows: usize, columns: usize) -> Result<GpuMatrix> {
        let mut memory = Memory::new(&self.gpu, 4 * rows * columns).map_err(advise)?;
        memory.fill(0).map_err(advise)?;
        Ok(GpuMatrix { memory, rows, columns })
    }

    /// A matrix with these values, row by row.
    pub fn upload(&self, rows: usize, columns: usize, values: &[f32]) -> Result<GpuMatrix> {
        assert_eq!(values.len(), rows * columns, "a matrix has as many values as rows times columns");
        let mut memory = Memory::new(&self.gpu, 4 * values.len()).map_err(advise)?;
        memory.write(values).map_err(advise)?;
        Ok(GpuMatrix { memory, rows, columns })
    }

    /// `sum[to..] += scale · left[rows] · right`, as many rows as there are in `rows`.
    pub fn add(
        &self,
        scale: f32,
        left: &GpuMatrix,
        rows: Range<usize>,
        right: &GpuMatrix,
        sum: &mut GpuMatrix,
        to: usize,
    ) -> Result<()> {
        let (m, n, k) = (rows.len(), right.columns, right.rows);
        assert!(rows.end <= left.rows && left.columns == k && to + m <= sum.rows && sum.columns == n);
        if m == 0 || n == 0 || k == 0 {
            return Ok(());
        }
        let at = |matrix: &GpuMatrix, row: usize| matrix.memory.address() + 4 * (row * matrix.columns) as u64;
        let (left, right, sum) = (at(left, rows.start), at(right, 0), at(sum, to));
        let (m, n, k) = (int(m)?, int(n)?, int(k)?);
        self.gpu.enter().map_err(advise)?;
        let handle = self.blas.handle.lock().unwrap_or_else(PoisonError::into_inner);
        // By columns, as cuBLAS has it, every matrix is its own transpose: sumᵀ += rightᵀ leftᵀ.
        // SAFETY: the assertion above makes all three as large as the arguments say.
        let status = unsafe {
            let none = Operation::CUBLAS_OP_N;
            let (left, right, sum) = (left as *const f32, right as *const f32, sum as *mut f32);
            sys::cublasSgemm_v2(handle.0, none, none, n, m, k, &scale, right, n, left, k, &1.0, sum, n)
        };
        blas::check(&self.gpu, "cublasSgemm", status).map_err(advise)
    }

    /// Its values, row by row, after all that was asked for before.
    pub fn read(&self, matrix: &GpuMatrix, values: &mut [f32]) -> Result<()> {
        assert_eq!(values.len(), matrix.rows * matrix.columns, "as many values as the matrix has");
        matrix.memory.read(values).map_err(advise)
    }
}

/// What to do is not what a training run is told.
fn advise(error: Error) -> Error {
    error.help("end other programs on the GPU and check it with nvidia-smi, or pass --device cpu")
}
