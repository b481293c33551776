//! Operations of the kernels' stream as values: submitted at once, or deferred and recognised ([`super::launch_queue`]).

use super::{Cuda, THREADS, blas::Product, memory::Memory};
use crate::error::Result;
use cudarc::driver::sys;
use std::ffi::c_void;

/// One operation on the stream, with everything that determines its effect: equal operations do the same to the memory at their
/// addresses.
#[derive(Clone, PartialEq)]
pub(super) enum StreamOp {
    Kernel(KernelLaunch),
    Product(Product),
    /// Sets each of `words` 32-bit words to `value`.
    Fill {
        address: u64,
        value: u32,
        words: usize,
    },
    Copy {
        from: u64,
        to: u64,
        bytes: usize,
    },
}

/// A kernel launch: kernel, grid and arguments.
#[derive(Clone, PartialEq)]
pub(super) struct KernelLaunch {
    pub kernel: &'static str,
    pub grid: [u32; 3],
    /// Dynamic shared memory in bytes.
    pub shared: u32,
    pub args: Vec<Arg>,
}

/// An argument of a kernel. Floats are their bits, so that equality is exact.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Arg {
    Word(u32),
    Long(u64),
    /// `struct Extents` of attention.cu.
    Extents(Extents),
}

/// As attention.cu has it; the scale is an f32.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Extents {
    pub len: u32,
    pub heads: u32,
    pub kv_heads: u32,
    pub dim: u32,
    pub scale_bits: u32,
}

impl Arg {
    fn pointer(&self) -> *mut c_void {
        let pointer: *const c_void = match self {
            Arg::Word(x) => std::ptr::from_ref(x).cast(),
            Arg::Long(x) => std::ptr::from_ref(x).cast(),
            Arg::Extents(x) => std::ptr::from_ref(x).cast(),
        };
        pointer.cast_mut()
    }
}

impl From<u32> for Arg {
    fn from(x: u32) -> Arg {
        Arg::Word(x)
    }
}

impl From<u64> for Arg {
    fn from(x: u64) -> Arg {
        Arg::Long(x)
    }
}

/// u64 in the kernels.
impl From<usize> for Arg {
    fn from(x: usize) -> Arg {
        Arg::Long(x as u64)
    }
}

impl From<f32> for Arg {
    fn from(x: f32) -> Arg {
        Arg::Word(x.to_bits())
    }
}

impl From<f64> for Arg {
    fn from(x: f64) -> Arg {
        Arg::Long(x.to_bits())
    }
}

impl From<&Memory> for Arg {
    fn from(x: &Memory) -> Arg {
        Arg::Long(x.address())
    }
}

impl KernelLaunch {
    /// Pointers to the arguments, as the driver takes them.
    pub fn pointers(&self) -> Vec<*mut c_void> {
        self.args.iter().map(Arg::pointer).collect()
    }
}

impl StreamOp {
    /// Whether a graph of the other operation can replay this one: a kernel's launch can be replaced, all else is fixed.
    pub fn is_like(&self, other: &StreamOp) -> bool {
        match (self, other) {
            (StreamOp::Kernel(one), StreamOp::Kernel(other)) => one.kernel == other.kernel,
            _ => self == other,
        }
    }
}

impl Cuda {
    /// Submits an operation to the stream.
    pub(super) fn submit(&self, op: &StreamOp) -> Result<()> {
        let gpu = &self.0.gpu;
        match op {
            StreamOp::Kernel(launch) => self.launch_on(gpu.stream(), launch),
            StreamOp::Product(product) => self.0.blas.multiply(gpu, product),
            // SAFETY: only `Cuda::fill_words` makes this, of a whole `Memory`, whose freeing the allocator orders after it.
            StreamOp::Fill { address, value, words } => unsafe { gpu.fill(*address, *value, *words) },
            // SAFETY: only `Cuda::convert` makes this, of buffers whose lengths were compared and whose freeing the allocator
            // orders after it.
            StreamOp::Copy { from, to, bytes } => unsafe { gpu.copy(*from, *to, *bytes) },
        }
    }

    /// Launches a kernel on a stream.
    pub(super) fn launch_on(&self, stream: sys::CUstream, launch: &KernelLaunch) -> Result<()> {
        let gpu = &self.0.gpu;
        gpu.enter()?;
        let (mut pointers, [x, y, z]) = (launch.pointers(), launch.grid);
        // SAFETY: the arguments are those of the kernel, in its order and types; tests run every kernel against its
        // CPU reference on memory whose bounds are watched.
        let result = unsafe {
            sys::cuLaunchKernel(
                self.0.kernels.get(launch.kernel),
                x,
                y,
                z,
                THREADS,
                1,
                1,
                launch.shared,
                stream,
                pointers.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        gpu.check(&format!("kernel {}", launch.kernel), result)
    }
}
