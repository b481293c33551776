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
    /// cuBLAS's own: it asks for no other while a stream takes notes, and chooses the same ways as ever.
    workspace: Option<Memory>,
}

pub(super) struct Handle(pub(super) sys::cublasHandle_t);

// SAFETY: a handle may be used from any thread, by one at a time: it is behind a mutex.
unsafe impl Send for Handle {}

/// A matrix by columns, or the first of several.
#[derive(Clone, Copy, PartialEq, Eq)]
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
#[derive(Clone, PartialEq)]
pub(super) struct Product {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub count: [usize; 2],
    pub factors: Factors,
    pub a: Matrix,
    pub b: Matrix,
    pub c: Matrix,
    /// Where on the GPU the addresses of all matrices a lie, then those of b and c; for several rows of them.
    pub places: Option<u64>,
}

/// alpha and beta: numbers, or the address of two f32 that only the GPU knows yet.
#[derive(Clone, Copy)]
pub(super) enum Factors {
    Numbers { alpha: f32, beta: f32 },
    OnGpu(u64),
}

/// To the bit: -0 is not 0.
impl PartialEq for Factors {
    fn eq(&self, other: &Factors) -> bool {
        let bits = |factors: &Factors| match *factors {
            Factors::Numbers { alpha, beta } => (true, u64::from(alpha.to_bits()), beta.to_bits()),
            Factors::OnGpu(address) => (false, address, 0),
        };
        bits(self) == bits(other)
    }
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
        Ok(Blas { handle: Mutex::new(Handle(handle)), tf32: AtomicBool::new(false), workspace: None })
    }

    /// Gives cuBLAS memory of its own.
    pub fn own_workspace(&mut self, gpu: &Arc<Gpu>) -> Result<()> {
        let memory = Memory::new(gpu, workspace_bytes(gpu.capability))?;
        let handle = self.handle.lock().unwrap_or_else(PoisonError::into_inner);
        let address = memory.address() as *mut c_void;
        // SAFETY: the handle is open, and the memory lives as long as it.
        let status = unsafe { sys::cublasSetWorkspace_v2(handle.0, address, memory.bytes()) };
        check(gpu, "cublasSetWorkspace", status)?;
        drop(handle);
        self.workspace = Some(memory);
        Ok(())
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

    /// Sums are f32, whatever the elements. a and b have the same, c those or f32.
    pub(super) fn multiply(&self, gpu: &Gpu, product: &Product) -> Result<()> {
        let Product { m, n, k, count, factors, a, b, c, places } = product;
        assert!(a.element == b.element && [a.element, Element::F32].contains(&c.element), "matmul: elements");
        let operation = |x: &Matrix| if x.transposed { Operation::CUBLAS_OP_T } else { Operation::CUBLAS_OP_N };
        let (m, n, k, count) = (int(*m)?, int(*n)?, int(*k)?, int(count[0] * count[1])?);
        let leading = [int(a.leading)?, int(b.leading)?, int(c.leading)?];
        gpu.enter()?;
        let handle = self.handle.lock().unwrap_or_else(PoisonError::into_inner);
        let (alpha, beta, mode) = match factors {
            Factors::Numbers { alpha, beta } => {
                (ptr::from_ref(alpha).cast(), ptr::from_ref(beta).cast(), PointerMode::CUBLAS_POINTER_MODE_HOST)
            }
            Factors::OnGpu(address) => {
                let alpha = *address as *const c_void;
                (alpha, (address + 4) as *const c_void, PointerMode::CUBLAS_POINTER_MODE_DEVICE)
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
                let [ap, bp, cp] = [0, 1, 2].map(|i| (places + 8 * i * count as u64) as *mut *mut c_void);
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

/// As many as cuBLAS takes by itself on such a GPU, by its documentation.
pub(super) fn workspace_bytes(capability: u32) -> usize {
    if capability >= 90 { 32 << 20 } else { 8 << 20 }
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
    c_int::try_from(extent).map_err(|_| Error::environment(format!("cuBLAS cannot take a matrix of extent {extent}")))
}

pub(super) fn check(gpu: &Gpu, what: &str, status: Status) -> Result<()> {
    match status {
        Status::CUBLAS_STATUS_SUCCESS => Ok(()),
        error => Err(gpu.failed(&format!("{what}: {error:?}"))),
    }
}
