//! Products in cuBLAS, which stores matrices by columns: a row-major product is the column-major product of the
//! transposes, `cᵀ = bᵀ aᵀ`, and a row-major matrix is its own transpose there.

use super::driver::Gpu;
use crate::{
    error::{Error, Result},
    ops::{Mat, MatMut},
};
use cudarc::cublas::sys::{self, cublasMath_t, cublasOperation_t, cublasStatus_t};
use std::{
    ffi::c_int,
    ptr,
    sync::{Mutex, PoisonError},
};

/// A handle, on the GPU's stream.
pub struct Blas(pub(super) Mutex<Handle>);

pub(super) struct Handle(pub(super) sys::cublasHandle_t);

// SAFETY: a handle may be used from any thread, by one at a time: it is behind a mutex.
unsafe impl Send for Handle {}

impl Blas {
    /// For this GPU.
    pub fn open(gpu: &Gpu) -> Result<Blas> {
        gpu.enter()?;
        let mut handle = ptr::null_mut();
        // SAFETY: the pointer is to a variable of the type that cuBLAS writes; the stream lives as long as the GPU.
        unsafe {
            check(gpu, "cublasCreate", sys::cublasCreate_v2(&mut handle))?;
            check(gpu, "cublasSetStream", sys::cublasSetStream_v2(handle, gpu.stream().cast()))?;
        }
        Ok(Blas(Mutex::new(Handle(handle))))
    }

    /// Whether products may round their factors to TF32: faster, with 10 instead of 23 bits.
    pub fn allow_tf32(&self, gpu: &Gpu, allow: bool) -> Result<()> {
        let mode = if allow { cublasMath_t::CUBLAS_TF32_TENSOR_OP_MATH } else { cublasMath_t::CUBLAS_DEFAULT_MATH };
        let handle = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the handle is open.
        check(gpu, "cublasSetMathMode", unsafe { sys::cublasSetMathMode(handle.0, mode) })
    }

    /// `c = alpha · a · b + beta · c`; the buffers are addresses of their first elements.
    pub fn matmul(
        &self,
        gpu: &Gpu,
        alpha: f32,
        a: Mat<'_, u64>,
        b: Mat<'_, u64>,
        beta: f32,
        c: MatMut<'_, u64>,
    ) -> Result<()> {
        let int = |extent: usize| {
            c_int::try_from(extent).map_err(|_| Error::world(format!("cuBLAS cannot take a matrix of extent {extent}")))
        };
        let inner = if a.transposed { a.rows } else { a.cols };
        let operation = |transposed| match transposed {
            true => cublasOperation_t::CUBLAS_OP_T,
            false => cublasOperation_t::CUBLAS_OP_N,
        };
        let at = |address: u64, offset: usize| (address + 4 * offset as u64) as *mut f32;
        let (m, n, k) = (int(c.cols)?, int(c.rows)?, int(inner)?);
        let (lda, ldb) = (int(b.cols)?, int(a.cols)?);
        gpu.enter()?;
        let handle = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the caller has checked that the matrices lie in their buffers.
        let status = unsafe {
            sys::cublasSgemm_v2(
                handle.0,
                operation(b.transposed),
                operation(a.transposed),
                m,
                n,
                k,
                &alpha,
                at(*b.data, b.offset),
                lda,
                at(*a.data, a.offset),
                ldb,
                &beta,
                at(*c.data, c.offset),
                m,
            )
        };
        check(gpu, "cublasSgemm", status)
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: the handle is open, and nobody else has it.
        unsafe { sys::cublasDestroy_v2(self.0) };
    }
}

pub(super) fn check(gpu: &Gpu, what: &str, status: cublasStatus_t) -> Result<()> {
    match status {
        cublasStatus_t::CUBLAS_STATUS_SUCCESS => Ok(()),
        error => Err(gpu.failed(&format!("{what}: {error:?}"))),
    }
}
