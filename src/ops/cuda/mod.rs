//! NVIDIA GPUs: the same operations as kernels of CUDA C++ (`*.cu`, beside the CPU's code of the same operation) and as
//! products in cuBLAS. Nothing of CUDA is needed to build or to start the program: its libraries are loaded when a GPU is
//! opened, and the kernels are compiled for the GPU at hand.
//!
//! All work is on one stream and in order ([`stream_op`], [`launch_queue`]); the host waits only where a number or a buffer is read.
//! After the first failure nothing more is done: it is remembered for [`super::Device::status`], and what is read is NaN.

mod attention;
mod blas;
mod buffer;
mod caching_allocator;
mod compile;
mod device;
mod driver;
mod graph;
mod launch_queue;
mod libraries;
mod memory;
mod nccl;
mod products;
mod quantise;
mod reduction_staging;
mod solver;
mod stream;
mod stream_op;

use crate::{
    error::{Error, Result},
    ops::Element,
};
use blas::{Blas, Product};
use buffer::CudaBuffer;
use compile::Kernels;
use driver::Gpu;
use launch_queue::DeferredOps;
use memory::Memory;
use std::{
    path::PathBuf,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};
use stream_op::{Arg, Extents, KernelLaunch, StreamOp};

pub use libraries::FOLDERS_VARIABLE;
pub use nccl::{Communicator, Nccl as NcclLibrary, NcclId, Sum};
pub use products::{GpuMatrix, Products};
pub use reduction_staging::{DeviceSpan, ReductionStaging};
pub use solver::{GpuGram, Solver};

/// Threads of a block, for every kernel: `THREADS` of common.cu.
const THREADS: u32 = 256;

/// Warps of a block: `WARPS` of common.cu.
const WARPS: u32 = THREADS / 32;

/// The name of a kernel that exists for every kind of elements.
macro_rules! typed {
    ($name:literal, $element:expr) => {
        match $element {
            crate::ops::Element::F32 => concat!($name, "_f32"),
            crate::ops::Element::Bf16 => concat!($name, "_bf16"),
        }
    };
}
use typed;

/// A GPU. Clones are the same one.
#[derive(Clone)]
pub struct Cuda(Arc<Inner>);

struct Inner {
    gpu: Arc<Gpu>,
    kernels: Kernels,
    blas: Blas,
    failure: Mutex<Option<Error>>,
    queue: Mutex<DeferredOps>,
    /// Numbers that quantised weights may be, once they are needed.
    tables: OnceLock<CudaBuffer>,
}

/// Which GPU, and where its things are.
#[derive(Clone, Debug, Default)]
pub struct CudaOptions {
    /// Its number, from 0.
    pub ordinal: usize,
    /// Folders that are looked in for CUDA's libraries before the system's.
    pub libraries: Vec<PathBuf>,
    /// Keeps compiled kernels.
    pub cache: Option<PathBuf>,
}

impl CudaOptions {
    /// GPU number `ordinal`, folders from the variable [`FOLDERS_VARIABLE`], and the user's cache.
    pub fn from_env(ordinal: usize) -> CudaOptions {
        let folders = std::env::var_os(FOLDERS_VARIABLE).unwrap_or_default();
        let libraries = std::env::split_paths(&folders).filter(|f| !f.as_os_str().is_empty()).collect();
        CudaOptions { ordinal, libraries, cache: compile::cache_folder() }
    }
}

impl Cuda {
    /// Finds the libraries, opens the GPU, compiles the kernels.
    pub fn open(options: &CudaOptions) -> Result<Cuda> {
        libraries::load(&format!("cuda:{}", options.ordinal), &options.libraries)?;
        let gpu = Arc::new(Gpu::open(options.ordinal)?);
        let kernels = Kernels::load(&gpu, options.cache.as_deref())?;
        let mut blas = Blas::open(&gpu)?;
        blas.own_workspace(&gpu)?;
        let (failure, queue, tables) = (Mutex::new(None), Mutex::default(), OnceLock::new());
        Ok(Cuda(Arc::new(Inner { gpu, kernels, blas, failure, queue, tables })))
    }

    /// The GPU's name, as NVIDIA sells it.
    pub fn model(&self) -> &str {
        &self.0.gpu.model
    }

    /// Where the GPU is on its machine's PCI bus.
    pub fn bus_id(&self) -> &str {
        &self.0.gpu.bus_id
    }

    /// Runs `work`, guarded by the sticky error: nothing runs after the first failure, which is remembered.
    fn guarded<T>(&self, work: impl FnOnce(&Arc<Gpu>) -> Result<T>) -> Option<T> {
        let mut failure = self.0.failure.lock().unwrap_or_else(PoisonError::into_inner);
        if failure.is_some() {
            return None;
        }
        work(&self.0.gpu).map_err(|error| *failure = Some(error)).ok()
    }

    fn first_failure(&self) -> Option<Error> {
        self.0.failure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A block for `len` f32 or u32 elements, with unspecified contents; an empty one after a failure, as for want of memory.
    fn allocate(&self, len: usize) -> Memory {
        self.allocate_bytes(4 * len)
    }

    /// Whole words of memory for so many bytes, as [`Cuda::allocate`].
    fn allocate_bytes(&self, bytes: usize) -> Memory {
        self.memory(bytes.next_multiple_of(4), false)
    }

    /// A new block with these values.
    fn uploaded<T: bytemuck::Pod>(&self, values: &[T]) -> Memory {
        let mut memory = self.memory(size_of_val(values).next_multiple_of(4), true);
        // Precedes all deferred operations, none of which uses it.
        self.guarded(|_| memory.write(values));
        memory
    }

    fn memory(&self, bytes: usize, upload: bool) -> Memory {
        let found = self.guarded(|gpu| {
            if let Some(memory) = Memory::find(gpu, bytes, upload)? {
                return Ok(memory);
            }
            self.stop_deferring()?;
            Memory::new(gpu, bytes)
        });
        found.unwrap_or_else(|| Memory::none(&self.0.gpu))
    }

    /// Copies `n` elements from one address to another, rounding to the nearest where they become bf16.
    fn convert(&self, (from, source): (u64, Element), (to, target): (u64, Element), n: usize) {
        if source == target {
            self.enqueue(StreamOp::Copy { from, to, bytes: buffer::width(source) * n });
            return;
        }
        let kernel = if target == Element::Bf16 { "to_bf16" } else { "to_f32" };
        self.launch_each(kernel, n, &[from.into(), to.into(), n.into()]);
    }

    /// Every 4 bytes to `value`.
    fn fill_words(&self, memory: &Memory, value: u32) {
        self.enqueue(StreamOp::Fill { address: memory.address(), value, words: memory.bytes() / 4 });
    }

    /// A product, or one for each of several matrices. One step from each matrix to the next is a number that cuBLAS takes; for
    /// two, it wants to read where every matrix is.
    fn multiply(&self, mut product: Product) {
        let [rows, columns] = product.count;
        if rows == 1 {
            return self.enqueue(StreamOp::Product(product));
        }
        let places = self.allocate(6 * rows * columns);
        let mut args = vec![(&places).into(), (rows as u32).into(), (columns as u32).into()];
        for matrix in [&product.a, &product.b, &product.c] {
            let [row, column] = matrix.steps();
            args.extend([matrix.address, row, column].map(Arg::from));
        }
        self.launch("places", [blocks(rows * columns), 1, 1], 0, &args);
        product.places = Some(places.address());
        self.enqueue(StreamOp::Product(product));
    }

    /// Enqueues a kernel on `grid` blocks, with `shared` bytes of dynamic shared memory.
    fn launch(&self, kernel: &'static str, grid: [u32; 3], shared: u32, args: &[Arg]) {
        if !grid.contains(&0) {
            self.enqueue(StreamOp::Kernel(KernelLaunch { kernel, grid, shared, args: args.to_vec() }));
        }
    }

    /// As [`Cuda::launch`], for a kernel that goes through `n` elements by `FOR_EACH`.
    fn launch_each(&self, kernel: &'static str, n: usize, args: &[Arg]) {
        self.launch(kernel, [blocks(n), 1, 1], 0, args);
    }
}

/// Blocks for `n` elements: enough for any GPU, and depending on n alone.
fn blocks(n: usize) -> u32 {
    n.div_ceil(THREADS as usize).min(4096) as u32
}
