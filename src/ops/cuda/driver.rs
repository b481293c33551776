//! The calls into the driver: one GPU, its primary context, one stream, memory. Everything runs on the one stream, so that
//! operations happen in the order in which they were asked for.

use crate::error::{Error, Result};
use cudarc::driver::sys::{self, CUdevice_attribute, CUresult};
use std::{
    collections::HashMap,
    ffi::{CStr, c_char, c_int, c_void},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// A GPU, ready to work.
pub struct Gpu {
    /// `cuda:N`.
    pub name: String,
    /// As NVIDIA sells it.
    pub model: String,
    /// Compute capability, 80 for 8.0.
    pub capability: u32,
    handle: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    /// Memory that nothing uses, by its size: buffers come and go in the same sizes, and the driver waits for the GPU
    /// whenever it frees.
    unused: Mutex<HashMap<usize, Vec<u64>>>,
}

// SAFETY: the handles are the driver's, which may be used from any thread; each use first makes the context current.
unsafe impl Send for Gpu {}
// SAFETY: as above.
unsafe impl Sync for Gpu {}

/// The oldest driver: the first with every function that is called, and with which the libraries of CUDA 12 work.
const OLDEST_DRIVER: c_int = 12_000;

impl Gpu {
    /// Opens the GPU with this number. The libraries are loaded.
    pub fn open(ordinal: usize) -> Result<Gpu> {
        let name = format!("cuda:{ordinal}");
        let unavailable = |why: String| Error::world(format!("device '{name}' is unavailable: {why}"));
        let call = |what: &str, result: CUresult| match result {
            CUresult::CUDA_SUCCESS => Ok(()),
            error => Err(unavailable(format!("{what} failed with {}", describe(error)))
                .help("check the driver with nvidia-smi, or pass --device cpu")),
        };
        let (mut version, mut count, mut handle) = (0, 0, 0);
        // SAFETY: the pointers are to variables of the types that the driver writes.
        unsafe {
            call("cuDriverGetVersion", sys::cuDriverGetVersion(&mut version))?;
            if version < OLDEST_DRIVER {
                return Err(unavailable(format!(
                    "the NVIDIA driver supports CUDA {}, expected {} or newer",
                    dotted(version),
                    dotted(OLDEST_DRIVER)
                ))
                .help("update the NVIDIA driver, or pass --device cpu"));
            }
            let begun = sys::cuInit(0);
            if begun != CUresult::CUDA_ERROR_NO_DEVICE {
                call("cuInit", begun)?;
                call("cuDeviceGetCount", sys::cuDeviceGetCount(&mut count))?;
            }
            if ordinal >= count as usize {
                let there = match count {
                    0 => "the NVIDIA driver finds no GPU".to_owned(),
                    1 => "there is one GPU, cuda:0".to_owned(),
                    n => format!("there are {n} GPUs, cuda:0 to cuda:{}", n - 1),
                };
                return Err(unavailable(there).help("choose one that is there (CUDA_VISIBLE_DEVICES hides others)"));
            }
            call("cuDeviceGet", sys::cuDeviceGet(&mut handle, ordinal as c_int))?;
            let mut model = [0 as c_char; 256];
            call("cuDeviceGetName", sys::cuDeviceGetName(model.as_mut_ptr(), 255, handle))?;
            let attribute = |which| {
                let mut value = 0;
                call("cuDeviceGetAttribute", sys::cuDeviceGetAttribute(&mut value, which, handle))?;
                Ok(value as u32)
            };
            let major = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
            let minor = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
            let (mut context, mut stream) = (std::ptr::null_mut(), std::ptr::null_mut());
            call("cuDevicePrimaryCtxRetain", sys::cuDevicePrimaryCtxRetain(&mut context, handle))?;
            call("cuCtxSetCurrent", sys::cuCtxSetCurrent(context))?;
            call("cuStreamCreate", sys::cuStreamCreate(&mut stream, 1))?;
            Ok(Gpu {
                name,
                model: CStr::from_ptr(model.as_ptr()).to_string_lossy().into_owned(),
                capability: 10 * major + minor,
                handle,
                context,
                stream,
                unused: Mutex::default(),
            })
        }
    }

    /// The CUDA version of the driver, 12040 for 12.4.
    pub fn driver_version(&self) -> c_int {
        let mut version = 0;
        // SAFETY: the pointer is to a variable of the type that the driver writes.
        unsafe { sys::cuDriverGetVersion(&mut version) };
        version
    }

    /// Makes the context current on this thread. Stands before every other call.
    pub fn enter(&self) -> Result<()> {
        // SAFETY: the context lives as long as `self`.
        self.check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.context) })
    }

    /// The one stream.
    pub fn stream(&self) -> sys::CUstream {
        self.stream
    }

    /// An error, if the call was refused, or something failed on the GPU before it.
    pub fn check(&self, what: &str, result: CUresult) -> Result<()> {
        match result {
            CUresult::CUDA_SUCCESS => Ok(()),
            error => Err(self.failed(&format!("{what}: {}", describe(error)))),
        }
    }

    /// The error for work that failed in the middle.
    pub fn failed(&self, why: &str) -> Error {
        Error::world(format!("device '{}' ({}) failed while it worked: {why}", self.name, self.model)).help(
            "a run goes on from its last checkpoint with --resume, on this GPU once it works again (see dmesg and nvidia-smi) or with --device cpu",
        )
    }

    /// Waits for all that was asked for.
    pub fn synchronize(&self) -> Result<()> {
        self.enter()?;
        // SAFETY: the stream lives as long as `self`.
        self.check("waiting for the GPU", unsafe { sys::cuStreamSynchronize(self.stream) })
    }

    /// Bytes that are free, and bytes in all.
    pub fn memory(&self) -> Result<(u64, u64)> {
        self.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: the pointers are to variables of the type that the driver writes.
        self.check("cuMemGetInfo", unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) })?;
        let unused: usize = self.unused().iter().map(|(bytes, blocks)| bytes * blocks.len()).sum();
        Ok(((free + unused) as u64, total as u64))
    }

    fn unused(&self) -> MutexGuard<'_, HashMap<usize, Vec<u64>>> {
        self.unused.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives everything that nothing uses back to the driver.
    fn release_unused(&self) {
        for address in self.unused().drain().flat_map(|(_, blocks)| blocks) {
            // SAFETY: nothing points to unused memory; the driver waits for kernels that still use it.
            unsafe { sys::cuMemFree_v2(address) };
        }
    }

    fn allocate(&self, bytes: usize) -> Result<u64> {
        if let Some(address) = self.unused().get_mut(&bytes).and_then(Vec::pop) {
            return Ok(address);
        }
        self.enter()?;
        let mut address = 0;
        // SAFETY: the pointer is to a variable of the type that the driver writes.
        let mut attempt = || unsafe { sys::cuMemAlloc_v2(&mut address, bytes) };
        let mut result = attempt();
        if result == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            self.release_unused();
            result = attempt();
        }
        if result == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            let (free, total) = self.memory()?;
            let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
            return Err(Error::world(format!(
                "device '{}' ({}) is out of memory: {} were asked for, {} of {} are free",
                self.name,
                self.model,
                mib(bytes as u64),
                mib(free),
                mib(total)
            ))
            .help("lower train.batch_size or data.max_length, set train.activation_checkpointing = true, or end other programs on the GPU; train --plan tells what a run needs"));
        }
        self.check("cuMemAlloc", result)?;
        Ok(address)
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        if self.enter().is_ok() {
            self.release_unused();
            // SAFETY: every buffer holds the GPU, so nothing uses stream and context any more.
            unsafe { sys::cuStreamDestroy_v2(self.stream) };
        }
        // SAFETY: as above.
        unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.handle) };
    }
}

/// Memory on the GPU. What is dropped is used again: all work is in the order of the one stream.
pub struct Memory {
    gpu: Arc<Gpu>,
    address: u64,
    bytes: usize,
}

impl Memory {
    /// Memory with anything in it; none at all for 0 bytes.
    pub fn new(gpu: &Arc<Gpu>, bytes: usize) -> Result<Memory> {
        let address = if bytes == 0 { 0 } else { gpu.allocate(bytes)? };
        Ok(Memory { gpu: gpu.clone(), address, bytes })
    }

    /// Where nothing could be had. No operation may be given it.
    pub fn none(gpu: &Arc<Gpu>) -> Memory {
        Memory { gpu: gpu.clone(), address: 0, bytes: 0 }
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Of its first byte, as the GPU counts.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Every 4 bytes to `value`.
    pub fn fill(&mut self, value: u32) -> Result<()> {
        if self.bytes == 0 {
            return Ok(());
        }
        self.gpu.enter()?;
        // SAFETY: the memory has this size.
        let result = unsafe { sys::cuMemsetD32Async(self.address, value, self.bytes / 4, self.gpu.stream) };
        self.gpu.check("cuMemsetD32", result)
    }

    /// Replaces its beginning. The driver has read `values` when this returns: they are no page-locked memory.
    pub fn write<T: bytemuck::Pod>(&mut self, values: &[T]) -> Result<()> {
        let bytes = size_of_val(values);
        assert!(bytes <= self.bytes, "cuda: {bytes} bytes written to a buffer of {}", self.bytes);
        if bytes == 0 {
            return Ok(());
        }
        self.gpu.enter()?;
        let source = values.as_ptr().cast::<c_void>();
        // SAFETY: both sides have this size.
        let result = unsafe { sys::cuMemcpyHtoDAsync_v2(self.address, source, bytes, self.gpu.stream) };
        self.gpu.check("copying to the GPU", result)
    }

    /// Its first `values.len()` elements, after all that was asked for before.
    pub fn read<T: bytemuck::Pod>(&self, values: &mut [T]) -> Result<()> {
        let bytes = size_of_val(values);
        assert!(bytes <= self.bytes, "cuda: {bytes} bytes read from a buffer of {}", self.bytes);
        if bytes == 0 {
            return Ok(());
        }
        self.gpu.enter()?;
        let target = values.as_mut_ptr().cast::<c_void>();
        // SAFETY: both sides have this size, and `values` is there until the stream is done.
        let result = unsafe { sys::cuMemcpyDtoHAsync_v2(target, self.address, bytes, self.gpu.stream) };
        self.gpu.check("copying from the GPU", result)?;
        self.gpu.synchronize()
    }

    /// Replaces its first `bytes` by those of `source`.
    pub fn copy_from(&mut self, source: &Memory, bytes: usize) -> Result<()> {
        assert!(bytes <= self.bytes.min(source.bytes), "cuda: {bytes} bytes of {} to {}", source.bytes, self.bytes);
        if bytes == 0 {
            return Ok(());
        }
        self.gpu.enter()?;
        // SAFETY: both sides have this size.
        let result = unsafe { sys::cuMemcpyDtoDAsync_v2(self.address, source.address, bytes, self.gpu.stream) };
        self.gpu.check("copying on the GPU", result)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.address != 0 {
            self.gpu.unused().entry(self.bytes).or_default().push(self.address);
        }
    }
}

/// 12040 -> 12.4
pub fn dotted(version: c_int) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

/// The driver's name for an error, and what it says about it.
fn describe(error: CUresult) -> String {
    let text = |get: unsafe fn(CUresult, *mut *const c_char) -> CUresult| {
        let mut text = std::ptr::null();
        // SAFETY: the driver points `text` to a string of its own, or leaves it.
        unsafe {
            get(error, &mut text);
            (!text.is_null()).then(|| CStr::from_ptr(text).to_string_lossy().into_owned())
        }
    };
    let name = text(sys::cuGetErrorName).unwrap_or_else(|| format!("error {}", error as u32));
    match text(sys::cuGetErrorString) {
        Some(meaning) => format!("{name} ({meaning})"),
        None => name,
    }
}
