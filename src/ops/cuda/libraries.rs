//! Where CUDA's libraries are. They are loaded when a GPU is asked for, never before: the program starts without them.

use crate::error::{Error, Result};
use cudarc::{cublas, cusolver, driver, nvrtc};
use libloading::Library;
use std::{
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

/// Names the folders that are looked in first, separated as in PATH.
pub const FOLDERS_VARIABLE: &str = "RELORA_KIT_CUDA_LIBRARIES";

/// A library and the entry points that are called.
struct Needed {
    name: &'static str,
    file: &'static str,
    what: &'static str,
    install: &'static str,
    is_present: unsafe fn() -> bool,
    loaded: unsafe fn() -> &'static Library,
    symbols: &'static [&'static str],
    /// Libraries of NVIDIA's that it loads itself, in their order.
    needs: &'static [&'static str],
}

const NEEDED: [Needed; 3] = [
    Needed {
        name: "cuda",
        file: "libcuda.so.1",
        what: "the NVIDIA driver library",
        install: "install the NVIDIA driver, or pass --device cpu",
        is_present: driver::sys::is_culib_present,
        loaded: driver::sys::culib,
        symbols: &[
            "cuCtxSetCurrent",
            "cuDeviceGet",
            "cuDeviceGetAttribute",
            "cuDeviceGetCount",
            "cuDeviceGetName",
            "cuDeviceGetPCIBusId",
            "cuDevicePrimaryCtxRelease_v2",
            "cuDevicePrimaryCtxRetain",
            "cuDriverGetVersion",
            "cuGetErrorName",
            "cuGetErrorString",
            "cuInit",
            "cuLaunchKernel",
            "cuMemAllocFromPoolAsync",
            "cuMemFreeAsync",
            "cuMemFreeHost",
            "cuMemGetInfo_v2",
            "cuMemHostAlloc",
            "cuMemPoolCreate",
            "cuMemPoolDestroy",
            "cuMemPoolGetAttribute",
            "cuMemPoolSetAttribute",
            "cuMemcpyDtoDAsync_v2",
            "cuMemcpyDtoHAsync_v2",
            "cuMemcpyHtoDAsync_v2",
            "cuMemsetD32Async",
            "cuModuleGetFunction",
            "cuModuleLoadData",
            "cuStreamCreate",
            "cuStreamDestroy_v2",
            "cuStreamSynchronize",
        ],
        needs: &[],
    },
    Needed {
        name: "nvrtc",
        file: "libnvrtc.so.12 or .13",
        what: "CUDA's run-time compiler",
        install: "install it (pip install nvidia-cuda-nvrtc-cu12, or the CUDA toolkit), name its folder in RELORA_KIT_CUDA_LIBRARIES, or pass --device cpu",
        is_present: nvrtc::sys::is_culib_present,
        loaded: nvrtc::sys::culib,
        symbols: &[
            "nvrtcCompileProgram",
            "nvrtcCreateProgram",
            "nvrtcDestroyProgram",
            "nvrtcGetCUBIN",
            "nvrtcGetCUBINSize",
            "nvrtcGetNumSupportedArchs",
            "nvrtcGetPTX",
            "nvrtcGetPTXSize",
            "nvrtcGetProgramLog",
            "nvrtcGetProgramLogSize",
            "nvrtcGetSupportedArchs",
            "nvrtcVersion",
        ],
        needs: &[],
    },
    Needed {
        name: "cublas",
        file: "libcublas.so.12 or .13",
        what: "CUDA's matrix library",
        install: "install it (pip install nvidia-cublas-cu12, or the CUDA toolkit), name its folder in RELORA_KIT_CUDA_LIBRARIES, or pass --device cpu",
        is_present: cublas::sys::is_culib_present,
        loaded: cublas::sys::culib,
        symbols: &[
            "cublasCreate_v2",
            "cublasDestroy_v2",
            "cublasGemmBatchedEx",
            "cublasGemmEx",
            "cublasGemmStridedBatchedEx",
            "cublasSetMathMode",
            "cublasSetPointerMode_v2",
            "cublasSetStream_v2",
            "cublasSetWorkspace_v2",
            "cublasSgemm_v2",
        ],
        needs: &["cublasLt"],
    },
];

const DRIVER: &Needed = &NEEDED[0];
const CUBLAS: &Needed = &NEEDED[2];

/// What sums over processes call of the driver besides.
const DRIVER_EVENTS: &Needed = &Needed {
    symbols: &["cuEventCreate", "cuEventDestroy_v2", "cuEventRecord", "cuEventSynchronize", "cuStreamWaitEvent"],
    ..NEEDED[0]
};

/// What graphs call of the driver besides: since CUDA 12.3.
const DRIVER_GRAPHS: &Needed = &Needed {
    symbols: &[
        "cuGraphDestroy",
        "cuGraphExecDestroy",
        "cuGraphExecKernelNodeSetParams_v2",
        "cuGraphInstantiateWithFlags",
        "cuGraphLaunch",
        "cuStreamBeginCapture_v2",
        "cuStreamEndCapture",
        "cuStreamGetCaptureInfo_v3",
    ],
    ..NEEDED[0]
};

/// What spectra call of cuBLAS besides.
const CUBLAS_F64: &Needed = &Needed { symbols: &["cublasDasum_v2", "cublasDsyrk_v2"], ..NEEDED[2] };

const CUSOLVER: &Needed = &Needed {
    name: "cusolver",
    file: "libcusolver.so.11 or .12",
    what: "CUDA's eigenvalue library",
    install: "install it (pip install nvidia-cusolver-cu12, or the CUDA toolkit), name its folder in RELORA_KIT_CUDA_LIBRARIES, or pass --device cpu",
    is_present: cusolver::sys::is_culib_present,
    loaded: cusolver::sys::culib,
    symbols: &[
        "cusolverDnCreate",
        "cusolverDnDestroy",
        "cusolverDnDsyevd",
        "cusolverDnDsyevd_bufferSize",
        "cusolverDnSetStream",
    ],
    needs: &["nvJitLink", "cusparse"],
};

/// Libraries found in the user's folders: they stay loaded, and are found by their names from then on.
static PRELOADED: Mutex<Vec<Library>> = Mutex::new(Vec::new());

/// Loads what training needs.
pub fn load(device: &str, folders: &[PathBuf]) -> Result<()> {
    load_these(device, folders, &NEEDED.each_ref())
}

/// Loads what spectra need: no kernels, but eigenvalues.
pub fn load_solver(device: &str, folders: &[PathBuf]) -> Result<()> {
    load_these(device, folders, &[DRIVER, CUBLAS, CUBLAS_F64, CUSOLVER])
}

/// Loads what merges need: no kernels either.
pub fn load_products(device: &str, folders: &[PathBuf]) -> Result<()> {
    load_these(device, folders, &[DRIVER, CUBLAS])
}

/// NCCL's file.
pub const NCCL: &str = "libnccl.so.2";

/// Makes sure of what streams beside that of the kernels call of the driver, which is loaded.
pub fn check_events(device: &str) -> Result<()> {
    load_these(device, &[], &[DRIVER_EVENTS])
}

/// Makes sure of what graphs call of the driver, which is loaded.
pub fn check_graphs(device: &str) -> Result<()> {
    load_these(device, &[], &[DRIVER_GRAPHS])
}

/// Loads NCCL, and makes sure of the driver's functions that it is used with.
pub fn load_nccl(device: &str, folders: &[PathBuf]) -> Result<Library> {
    check_events(device)?;
    let own = folders.iter().find_map(|folder| version(folder, "nccl")).unwrap_or_else(|| NCCL.into());
    // SAFETY: NVIDIA's library has no other effect than being loaded.
    unsafe { Library::new(&own) }.map_err(|e| {
        let listed: String = folders.iter().map(|f| format!("'{}', ", f.display())).collect();
        Error::environment(format!(
            "device '{device}' is unavailable to several processes: NVIDIA's library of collectives {NCCL} was not found (looked in {listed}LD_LIBRARY_PATH and the system's folders): {e}"
        ))
        .help("install it (pip install nvidia-nccl-cu12, or your distribution's libnccl2), and name its folder in RELORA_KIT_CUDA_LIBRARIES")
    })
}

/// Loads the libraries, those in `folders` before the system's. The error says which is missing and where it was looked
/// for. Asks before every first call, since cudarc panics where a library or a symbol is missing.
fn load_these(device: &str, folders: &[PathBuf], needed: &[&Needed]) -> Result<()> {
    preload(device, folders, needed)?;
    for needed in needed {
        // SAFETY: both only load a shared library by name; NVIDIA's have no other effect than being loaded.
        let library = unsafe {
            if !(needed.is_present)() {
                let listed: String = folders.iter().map(|f| format!("'{}', ", f.display())).collect();
                return Err(Error::environment(format!(
                    "device '{device}' is unavailable: {} {} was not found (looked in {listed}LD_LIBRARY_PATH and the system's folders)",
                    needed.what, needed.file
                ))
                .help(needed.install));
            }
            (needed.loaded)()
        };
        for symbol in needed.symbols {
            // SAFETY: the symbol is only looked up, not called.
            if unsafe { library.get::<unsafe extern "C" fn()>(symbol.as_bytes()) }.is_err() {
                return Err(Error::environment(format!(
                    "device '{device}' is unavailable: {} ({}) has no function {symbol}",
                    needed.what, needed.file
                ))
                .help("it is too old, or not what its name says; update the NVIDIA driver and the CUDA libraries"));
            }
        }
    }
    Ok(())
}

/// Loads the libraries in these folders by their paths; a later search by name finds what is loaded already. What a
/// library needs comes before it, whichever folder it is in.
fn preload(device: &str, folders: &[PathBuf], needed: &[&Needed]) -> Result<()> {
    let mut loaded = PRELOADED.lock().unwrap_or_else(PoisonError::into_inner);
    for name in needed.iter().flat_map(|n| n.needs.iter().chain([&n.name])) {
        let Some(path) = folders.iter().find_map(|folder| version(folder, name)) else { continue };
        // SAFETY: the user named this folder as one of CUDA libraries.
        let library = unsafe { Library::new(&path) }.map_err(|e| {
            Error::environment(format!("device '{device}' is unavailable: cannot load '{}': {e}", path.display()))
                .help(format!("the folder comes from {FOLDERS_VARIABLE}"))
        })?;
        loaded.push(library);
    }
    Ok(())
}

/// `libNAME.so`, `libNAME.so.12` and the like in `folder`; the shortest name, if there are several.
fn version(folder: &Path, name: &str) -> Option<PathBuf> {
    let prefix = format!("lib{name}.so");
    let is_version = |rest: &str| rest.chars().all(|c| c == '.' || c.is_ascii_digit());
    let files = folder.read_dir().ok()?.filter_map(|e| e.ok()?.file_name().into_string().ok());
    let file = files.filter(|f| f.strip_prefix(&prefix).is_some_and(is_version)).min_by_key(String::len)?;
    Some(folder.join(file))
}
