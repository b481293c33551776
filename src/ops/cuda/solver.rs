//! What spectra need of a GPU, in f64: Gram matrices, added up panel by panel in cuBLAS, and their eigenvalues in
//! cuSOLVER. No kernel of this project is involved, and none is compiled.

use super::{
    CudaOptions,
    blas::{self, Blas, int},
    driver::Gpu,
    libraries,
    memory::Memory,
};
use crate::error::{Error, Result};
use cudarc::{
    cublas::sys::{self as cublas, cublasFillMode_t as BlasFill, cublasOperation_t as Operation},
    cusolver::sys::{
        self as cusolver, cublasFillMode_t as Fill, cusolverEigMode_t as Mode, cusolverStatus_t as Status,
    },
};
use std::{
    ffi::c_int,
    ptr,
    sync::{Arc, Mutex, PoisonError},
};

/// A GPU that computes eigenvalues.
pub struct Solver {
    gpu: Arc<Gpu>,
    blas: Blas,
    handle: Mutex<Handle>,
}

struct Handle(cusolver::cusolverDnHandle_t);

// SAFETY: a handle may be used from any thread, by one at a time: it is behind a mutex.
unsafe impl Send for Handle {}

impl Solver {
    /// Finds the libraries and opens the GPU.
    pub fn open(options: &CudaOptions) -> Result<Solver> {
        libraries::load_solver(&format!("cuda:{}", options.ordinal), &options.libraries)?;
        let gpu = Arc::new(Gpu::open(options.ordinal)?);
        let blas = Blas::open(&gpu).map_err(advise)?;
        let mut handle = ptr::null_mut();
        // SAFETY: the pointer is to a variable of the type that cuSOLVER writes; the stream lives as long as the GPU.
        let handle = unsafe {
            check(&gpu, "cusolverDnCreate", cusolver::cusolverDnCreate(&mut handle)).map_err(advise)?;
            let handle = Handle(handle);
            let set = cusolver::cusolverDnSetStream(handle.0, gpu.stream().cast());
            check(&gpu, "cusolverDnSetStream", set).map_err(advise)?;
            handle
        };
        Ok(Solver { gpu, blas, handle: Mutex::new(handle) })
    }

    /// `cuda:N`.
    pub fn name(&self) -> &str {
        &self.gpu.name
    }

    /// As NVIDIA sells it.
    pub fn model(&self) -> &str {
        &self.gpu.model
    }

    /// Bytes that are free.
    pub fn free_memory(&self) -> Result<u64> {
        Ok(self.gpu.memory().map_err(advise)?.0)
    }

    /// The Gram matrix of nothing yet, `n x n`.
    pub fn gram(&self, n: usize) -> Result<GpuGram<'_>> {
        let entries = Memory::new(&self.gpu, 8 * n * n).map_err(advise)?;
        Ok(GpuGram { solver: self, n, entries, panel: Memory::none(&self.gpu), empty: true })
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: the handle is open, and this is its only owner.
        unsafe { cusolver::cusolverDnDestroy(self.0) };
    }
}

/// A symmetric matrix on the GPU, of which one triangle is kept.
pub struct GpuGram<'a> {
    solver: &'a Solver,
    n: usize,
    entries: Memory,
    panel: Memory,
    empty: bool,
}

impl GpuGram<'_> {
    /// Adds `PᵀP` of a row-major `rows x columns` panel P; `P Pᵀ` if `by_rows`. The extent that stays is the matrix's.
    pub fn add(&mut self, by_rows: bool, panel: &[f64], rows: usize, columns: usize) -> Result<()> {
        assert!(panel.len() >= rows * columns && self.n == if by_rows { rows } else { columns });
        if rows == 0 || columns == 0 {
            return Ok(());
        }
        self.add_panel(by_rows, &panel[..rows * columns], rows, columns).map_err(advise)
    }

    fn add_panel(&mut self, by_rows: bool, panel: &[f64], rows: usize, columns: usize) -> Result<()> {
        let gpu = &self.solver.gpu;
        if self.panel.bytes() < size_of_val(panel) {
            self.panel = Memory::new(gpu, size_of_val(panel))?;
        }
        self.panel.write(panel)?;
        // By columns, as cuBLAS has it, a row-major panel is Pᵀ.
        let (operation, length) = match by_rows {
            true => (Operation::CUBLAS_OP_T, columns),
            false => (Operation::CUBLAS_OP_N, rows),
        };
        let (n, k, lda) = (int(self.n)?, int(length)?, int(columns)?);
        let beta = if self.empty { 0.0 } else { 1.0 };
        gpu.enter()?;
        let handle = self.solver.blas.handle.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the panel is rows x columns, as asserted and written above, the matrix n x n; with beta 0 it is not read.
        let status = unsafe {
            cublas::cublasDsyrk_v2(
                handle.0,
                BlasFill::CUBLAS_FILL_MODE_LOWER,
                operation,
                n,
                k,
                &1.0,
                self.panel.address() as *const f64,
                lda,
                &beta,
                self.entries.address() as *mut f64,
                n,
            )
        };
        self.empty = false;
        blas::check(gpu, "cublasDsyrk", status)
    }

    /// Sum of the sizes of the diagonal: the trace, since no entry of it is negative.
    pub fn trace(&self) -> Result<f64> {
        if self.empty || self.n == 0 {
            return Ok(0.0);
        }
        let gpu = &self.solver.gpu;
        let mut sum = 0.0;
        gpu.enter()?;
        let handle = self.solver.blas.handle.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: n steps of n + 1 stay within n x n; the host waits for the sum.
        let status = unsafe {
            let diagonal = self.entries.address() as *const f64;
            cublas::cublasDasum_v2(handle.0, int(self.n)?, diagonal, int(self.n + 1)?, &mut sum)
        };
        blas::check(gpu, "cublasDasum", status).map_err(advise)?;
        Ok(sum)
    }

    /// Eigenvalues, smallest first (`cusolverDnDsyevd`); `None` where they were not found.
    pub fn eigenvalues(self) -> Result<Option<Vec<f64>>> {
        if self.empty {
            return Ok(Some(vec![0.0; self.n]));
        }
        self.solve().map_err(advise)
    }

    fn solve(self) -> Result<Option<Vec<f64>>> {
        let gpu = &self.solver.gpu;
        // The panel's memory is free for the workspace.
        drop(self.panel);
        let (n, mut size) = (int(self.n)?, 0);
        let values = Memory::new(gpu, 8 * self.n)?;
        let (matrix, sorted) = (self.entries.address() as *mut f64, values.address() as *mut f64);
        let (none, fill) = (Mode::CUSOLVER_EIG_MODE_NOVECTOR, Fill::CUBLAS_FILL_MODE_LOWER);
        gpu.enter()?;
        let handle = self.solver.handle.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the matrix is n x n, values has n elements, and the size is written to a variable of its type.
        let status =
            unsafe { cusolver::cusolverDnDsyevd_bufferSize(handle.0, none, fill, n, matrix, n, sorted, &mut size) };
        check(gpu, "cusolverDnDsyevd_bufferSize", status)?;
        let work = Memory::new(gpu, 8 * size.max(1) as usize)?;
        let info = Memory::new(gpu, 4)?;
        // SAFETY: the matrix is n x n, values has n elements, the workspace has the size that cuSOLVER returned, and info is one integer.
        let status = unsafe {
            let (work, info) = (work.address() as *mut f64, info.address() as *mut c_int);
            cusolver::cusolverDnDsyevd(handle.0, none, fill, n, matrix, n, sorted, work, size, info)
        };
        check(gpu, "cusolverDnDsyevd", status)?;
        drop(handle);
        let (mut result, mut unconverged) = (vec![0.0f64; self.n], [0i32]);
        info.read(&mut unconverged)?;
        values.read(&mut result)?;
        Ok((unconverged[0] == 0).then_some(result))
    }
}

fn check(gpu: &Gpu, what: &str, status: Status) -> Result<()> {
    match status {
        Status::CUSOLVER_STATUS_SUCCESS => Ok(()),
        error => Err(gpu.failed(&format!("{what}: {error:?}"))),
    }
}

/// What to do is not what a training run is told.
fn advise(error: Error) -> Error {
    error.help("end other programs on the GPU and check it with nvidia-smi, or pass --device cpu")
}
