//! Products in cuBLAS, which stores matrices by columns: a row-major product is the column-major product of the
//! transposes, `cᵀ = bᵀ aᵀ`, and a row-major matrix is its own transpose there.

use super::{buffer::width, driver::Gpu, memory::Memory};
use crate::{
    error::{Error, Result},
    ops::Element,
};
use cudarc::cublas::sys::{
    self, cublasComputeType_t as Compute, cublasGemmAlgo_t as Algorithm, cublasMath_t as Math,
    cublasOperation_t as Operation, cublasPointerMode_t as PointerMode, cublasStatus_t as Status, cudaDataType,
};
use std::{
    ffi::{c_int, c_longlong, c_void},
    ptr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

/// A handle, on the GPU's stream.
pub struct Blas {
    pub(super) handle: Mutex<Handle>,
    tf32: AtomicBool,
}

pub(super) struct Handle(pub(super) sys::cublasHandle_t);

// SAFETY: a handle may be used from any thread, by one at a time: it is behind a mutex.
unsafe impl Send for Handle {}

/// A matrix by columns, or the first of several.
pub(super) struct Matrix {
    /// Of its first element.
    pub address: u64,
    pub element: Element,
    /// Elements from one column to the next.
    pub leading: usize,
    /// Elements from one matrix to the next, and from one row of matrices to the next.
    pub strides: [usize; 2],
    pub transposed: bool,
}

/// `c = alpha · a · b + beta · c` for `count` rows of `count` matrices each; a is m x k, b k x n, after they have been transposed.
pub(super) struct Product<'a> {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub count: [usize; 2],
    pub alpha: Alpha<'a>,
    pub a: Matrix,
    pub b: Matrix,
    pub beta: f32,
    pub c: Matrix,
}

/// A factor: a number, or one that only the GPU knows yet.
pub(super) enum Alpha<'a> {
    Number(f32),
    /// f32: the factor, and beta.
    OnGpu(&'a Memory),
}

impl Blas {
    /// For this GPU.
    pub fn open(gpu: &Arc<Gpu>) -> Result<Blas> {
        gpu.enter()?;
        let mut handle = ptr::null_mut();
        // SAFETY: the pointer is to a variable of the type that cuBLAS writes; the stream lives as long as the GPU.
        unsafe {
            check(gpu, "cublasCreate", sys::cublasCreate_v2(&mut handle))?;
            check(gpu, "cublasSetStream", sys::cublasSetStream_v2(handle, gpu.stream().cast()))?;
        }
        Ok(Blas { handle: Mutex::new(Handle(handle)), tf32: AtomicBool::new(false) })
    }

    /// Whether products of f32 may round their factors to TF32: faster, with 10 instead of 23 bits.
    pub fn allow_tf32(&self, gpu: &Gpu, allow: bool) -> Result<()> {
        let mode = if allow { Math::CUBLAS_TF32_TENSOR_OP_MATH } else { Math::CUBLAS_DEFAULT_MATH };
        let handle = self.handle.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the handle is open.
        check(gpu, "cublasSetMathMode", unsafe { sys::cublasSetMathMode(handle.0, mode) })?;
        self.tf32.store(allow, Ordering::Relaxed);
        Ok(())
    }

    /// What [`Blas::allow_tf32`] has last said.
    pub fn allows_tf32(&self) -> bool {
        self.tf32.load(Ordering::Relaxed)
    }

    /// Sums are f32, whatever the elements. a and b have the same, c those or f32. `places`: where on the GPU the addresses of all
    /// matrices a lie, then those of b and c; for several rows of them.
    pub(super) fn multiply(&self, gpu: &Gpu, product: &Product, places: Option<&Memory>) -> Result<()> {
        let Product { m, n, k, count, alpha, a, b, beta, c } = product;
        assert!(a.element == b.element && [a.element, Element::F32].contains(&c.element), "matmul: elements");
        let operation = |x: &Matrix| if x.transposed { Operation::CUBLAS_OP_T } else { Operation::CUBLAS_OP_N };
        let (m, n, k, count) = (int(*m)?, int(*n)?, int(*k)?, int(count[0] * count[1])?);
        let leading = [int(a.leading)?, int(b.leading)?, int(c.leading)?];
        gpu.enter()?;
        let handle = self.handle.lock().unwrap_or_else(PoisonError::into_inner);
        let (alpha, beta, mode) = match alpha {
            Alpha::Number(x) => {
                (ptr::from_ref(x).cast(), ptr::from_ref(beta).cast(), PointerMode::CUBLAS_POINTER_MODE_HOST)
            }
            Alpha::OnGpu(x) => {
                let alpha = x.address() as *const c_void;
                (alpha, (x.address() + 4) as *const c_void, PointerMode::CUBLAS_POINTER_MODE_DEVICE)
            }
        };
        let (default, single) = (Algorithm::CUBLAS_GEMM_DEFAULT, Compute::CUBLAS_COMPUTE_32F);
        // SAFETY: the caller has checked that the matrices lie in their buffers; alpha and beta are f32, here or on the GPU.
        unsafe {
            check(gpu, "cublasSetPointerMode", sys::cublasSetPointerMode_v2(handle.0, mode))?;
            let (at, bt, ct) = (kind(a.element), kind(b.element), kind(c.element));
            let (ap, bp, cp) = (a.address as *const c_void, b.address as *const c_void, c.address as *mut c_void);
            let (ta, tb, [lda, ldb, ldc]) = (operation(a), operation(b), leading);
            let status = if count == 1 {
                sys::cublasGemmEx(
                    handle.0, ta, tb, m, n, k, alpha, ap, at, lda, bp, bt, ldb, beta, cp, ct, ldc, single, default,
                )
            } else if let Some(places) = places {
                let [ap, bp, cp] = [0, 1, 2].map(|i| (places.address() + 8 * i * count as u64) as *mut *mut c_void);
                let (ap, bp) = (ap.cast_const().cast(), bp.cast_const().cast());
                sys::cublasGemmBatchedEx(
                    handle.0, ta, tb, m, n, k, alpha, ap, at, lda, bp, bt, ldb, beta, cp, ct, ldc, count, single,
                    default,
                )
            } else {
                let [sa, sb, sc] = [a, b, c].map(|x| x.strides[1] as c_longlong);
                sys::cublasGemmStridedBatchedEx(
                    handle.0, ta, tb, m, n, k, alpha, ap, at, lda, sa, bp, bt, ldb, sb, beta, cp, ct, ldc, sc, count,
                    single, default,
                )
            };
            check(gpu, "a product in cuBLAS", status)
        }
    }
}

fn kind(element: Element) -> cudaDataType {
    match element {
        Element::F32 => cudaDataType::CUDA_R_32F,
        Element::Bf16 => cudaDataType::CUDA_R_16BF,
    }
}

impl Matrix {
    /// From element `offset` on of what lies at `address`, with `leading` elements from one column to the next.
    pub fn new(address: u64, element: Element, offset: usize, leading: usize) -> Matrix {
        Matrix {
            address: address + (width(element) * offset) as u64,
            element,
            leading,
            strides: [0, 0],
            transposed: false,
        }
    }

    /// The first of several, with so many elements from one to the next.
    pub fn every(self, stride: usize) -> Matrix {
        Matrix { strides: [self.strides[0], stride], ..self }
    }

    /// The first row of several, with so many elements from one to the next.
    pub fn again(self, stride: usize) -> Matrix {
        Matrix { strides: [stride, self.strides[1]], ..self }
    }

    /// Bytes from one row to the next, and from one matrix of a row to the next.
    pub fn steps(&self) -> [u64; 2] {
        self.strides.map(|elements| (width(self.element) * elements) as u64)
    }

    /// The transpose.
    pub fn t(self) -> Matrix {
        Matrix { transposed: !self.transposed, ..self }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: the handle is open, and nobody else has it.
        unsafe { sys::cublasDestroy_v2(self.0) };
    }
}

pub(super) fn int(extent: usize) -> Result<c_int> {
    c_int::try_from(extent).map_err(|_| Error::world(format!("cuBLAS cannot take a matrix of extent {extent}")))
}

pub(super) fn check(gpu: &Gpu, what: &str, status: Status) -> Result<()> {
    match status {
        Status::CUBLAS_STATUS_SUCCESS => Ok(()),
        error => Err(gpu.failed(&format!("{what}: {error:?}"))),
    }
}
