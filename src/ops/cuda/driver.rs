//! One GPU through CUDA's driver API: its primary context, and one stream on which everything runs in the order of enqueueing.

use super::caching_allocator::CachingAllocator;
use crate::error::{Error, Result};
use cudarc::driver::sys::{self, CUdevice_attribute, CUresult};
use std::ffi::{CStr, c_char, c_int};

/// A GPU, ready to work.
pub struct Gpu {
    /// `cuda:N`.
    pub name: String,
    /// As NVIDIA sells it.
    pub model: String,
    /// Where it is on the machine's PCI bus.
    pub bus_id: String,
    /// Compute capability, 80 for 8.0.
    pub capability: u32,
    handle: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    allocator: CachingAllocator,
}

// SAFETY: the handles are the driver's, which may be used from any thread; each use first makes the context current.
unsafe impl Send for Gpu {}
// SAFETY: the driver synchronises calls from several threads; each use first makes the context current.
unsafe impl Sync for Gpu {}

/// The oldest driver: the first with every function that is called, and with which the libraries of CUDA 12 work.
const OLDEST_DRIVER: c_int = 12_000;

impl Gpu {
    /// Opens the GPU with this number. The libraries are loaded.
    pub fn open(ordinal: usize) -> Result<Gpu> {
        let name = format!("cuda:{ordinal}");
        let unavailable = |why: String| Error::environment(format!("device '{name}' is unavailable: {why}"));
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
            let mut bus_id = [0 as c_char; 64];
            call("cuDeviceGetPCIBusId", sys::cuDeviceGetPCIBusId(bus_id.as_mut_ptr(), 63, handle))?;
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
            if attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED)? == 0 {
                return Err(unavailable("its driver has no memory pools (some virtual GPUs)".into())
                    .help("use a GPU of its own, or pass --device cpu"));
            }
            let allocator = CachingAllocator::create(ordinal).map_err(|error| {
                unavailable(format!("cuMemPoolCreate failed with {}", describe(error)))
                    .help("check the driver with nvidia-smi, or pass --device cpu")
            })?;
            Ok(Gpu {
                name,
                model: CStr::from_ptr(model.as_ptr()).to_string_lossy().into_owned(),
                bus_id: CStr::from_ptr(bus_id.as_ptr()).to_string_lossy().into_owned(),
                capability: 10 * major + minor,
                handle,
                context,
                stream,
                allocator,
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
        Error::environment(format!("device '{}' ({}) failed while it worked: {why}", self.name, self.model)).help(
            "a run goes on from its last checkpoint with --resume, on this GPU once it works again (see dmesg and nvidia-smi) or with --device cpu",
        )
    }

    /// Its memory.
    pub(super) fn allocator(&self) -> &CachingAllocator {
        &self.allocator
    }

    /// Waits for everything that was enqueued on the stream.
    pub fn synchronize(&self) -> Result<()> {
        self.enter()?;
        let mut staging = self.allocator.staging();
        // SAFETY: the stream lives as long as `self`.
        self.check("waiting for the GPU", unsafe { sys::cuStreamSynchronize(self.stream) })?;
        staging.idle();
        Ok(())
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        if self.enter().is_ok() {
            let _ = self.synchronize();
            // SAFETY: every buffer owns a reference to the GPU, so nothing uses allocator and stream any more; the stream is idle.
            unsafe {
                self.allocator.destroy(self.stream);
                sys::cuStreamDestroy_v2(self.stream);
            }
        }
        // SAFETY: it was retained in `open`, and every buffer owns a reference to the GPU, so nothing uses it any more.
        unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.handle) };
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
