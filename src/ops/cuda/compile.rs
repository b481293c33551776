//! From the kernels' sources to code for the GPU at hand: compiled by NVRTC, and kept on disk under a hash of everything
//! that decides about it.

use super::driver::{Gpu, dotted};
use crate::{
    error::{Error, Result},
    staged,
};
use cudarc::{
    driver::sys::{self as driver},
    nvrtc::sys::{self as nvrtc, nvrtcResult},
};
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use std::{
    collections::HashMap,
    ffi::{CString, c_char, c_int},
    fs,
    path::{Path, PathBuf},
    ptr,
};

/// Besides the architecture.
const OPTIONS: &[&str] = &["--std=c++17"];

/// What stands before every source.
const COMMON: &str = include_str!("../common.cu");

/// One file beside the CPU code of the same operation.
struct Source {
    name: &'static str,
    text: &'static str,
    kernels: &'static [&'static str],
    /// Kernels that exist for f32 and for bf16, without these endings.
    typed: &'static [&'static str],
}

macro_rules! source {
    ($name:literal: $($kernel:literal),* ; $($typed:literal),*) => {
        Source {
            name: $name,
            text: include_str!(concat!("../", $name)),
            kernels: &[$($kernel),*],
            typed: &[$($typed),*],
        }
    };
}

const SOURCES: [Source; 14] = [
    source!("adamw.cu": "adamw";),
    source!("attention.cu": ; "attention_forward_32", "attention_forward_16", "attention_delta",
        "attention_backward_q_32", "attention_backward_q_16", "attention_backward_q_8",
        "attention_backward_kv_32", "attention_backward_kv_16", "attention_backward_kv_8"),
    source!("cross_entropy.cu": ; "cross_entropy"),
    source!("dropout.cu": ; "dropout_forward", "dropout_backward"),
    source!("elementwise.cu": "scale", "axpy", "to_bf16", "to_f32", "sum_parts", "add_parts", "places",
        "tanh_factors", "tanh_backward"; "dot_parts"),
    source!("embedding.cu": ; "embedding_forward", "embedding_backward"),
    source!("prune.cu": "prune_random", "select_count", "select_digit", "select_above", "prune_below";),
    source!("quantise.cu": "quantise_scales", "quantise_nf4", "quantise_int8", "quantise_nested", "dequantise_nested";
        "dequantise_nf4", "dequantise_int8"),
    source!("rms_norm.cu": "rms_norm_dweight"; "rms_norm_forward", "add_rms_norm_forward", "rms_norm_backward",
        "rms_norm_dweight_parts"),
    source!("rope.cu": ; "rope"),
    source!("round.cu": "round_nearest", "round_stochastic";),
    source!("softmax.cu": ; "softmax_forward", "softmax_backward"),
    source!("swiglu.cu": ; "swiglu_forward", "swiglu_backward"),
    source!("step_stats.cu": "clip", "pack_step_stats", "reduce_step_stats";),
];

/// The kernels by name, loaded. Modules stay loaded as long as the context.
pub struct Kernels(HashMap<String, driver::CUfunction>);

// SAFETY: the handles are the driver's, which may be used from any thread.
unsafe impl Send for Kernels {}
// SAFETY: the handles are only read.
unsafe impl Sync for Kernels {}

impl Kernels {
    /// Compiles, or takes from `cache`, every kernel, and loads it. A cache that cannot be used is none.
    pub fn load(gpu: &Gpu, cache: Option<&Path>) -> Result<Kernels> {
        let compiler = Compiler::new(gpu)?;
        let codes: Vec<Vec<u8>> = SOURCES.par_iter().map(|s| compiler.code(s, cache)).collect::<Result<_>>()?;
        gpu.enter()?;
        let mut kernels = HashMap::new();
        for (source, code) in SOURCES.iter().zip(codes) {
            let mut module = ptr::null_mut();
            // SAFETY: the code is a whole image, as the compiler made it.
            let result = unsafe { driver::cuModuleLoadData(&mut module, code.as_ptr().cast()) };
            gpu.check(&format!("loading the kernels of {}", source.name), result)?;
            let typed = source.typed.iter().flat_map(|name| ["f32", "bf16"].map(|element| format!("{name}_{element}")));
            for name in source.kernels.iter().map(|name| (*name).to_owned()).chain(typed) {
                let (mut function, c_name) = (ptr::null_mut(), c_string(&name));
                // SAFETY: the module is loaded, the name ends with a zero byte.
                let result = unsafe { driver::cuModuleGetFunction(&mut function, module, c_name.as_ptr()) };
                gpu.check(&format!("finding the kernel {name}"), result)?;
                kernels.insert(name, function);
            }
        }
        Ok(Kernels(kernels))
    }

    /// The kernel called `name`.
    pub fn get(&self, name: &str) -> driver::CUfunction {
        *self.0.get(name).unwrap_or_else(|| panic!("cuda: there is no kernel {name}"))
    }
}

/// `$XDG_CACHE_HOME/relora-kit/kernels` or `~/.cache/relora-kit/kernels`.
pub fn cache_folder() -> Option<PathBuf> {
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    let cache = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")))?;
    Some(cache.join("relora-kit").join("kernels"))
}

struct Compiler {
    version: [c_int; 2],
    architecture: String,
}

impl Compiler {
    /// For this GPU: its own machine code where the compiler knows it, else what the driver can translate.
    fn new(gpu: &Gpu) -> Result<Compiler> {
        let mut version = [0; 2];
        let [major, minor] = &mut version;
        // SAFETY: the pointers are to variables of the type that NVRTC writes.
        check("nvrtcVersion", unsafe { nvrtc::nvrtcVersion(major, minor) })?;
        let driver = gpu.driver_version();
        if driver / 1000 < version[0] {
            return Err(Error::environment(format!(
                "device '{}' is unavailable: the NVIDIA driver supports CUDA {}, but the run-time compiler that was found is of CUDA {}.{}",
                gpu.name,
                dotted(driver),
                version[0],
                version[1]
            ))
            .help("update the NVIDIA driver, or install the CUDA libraries of its own major version"));
        }
        let mut count = 0;
        // SAFETY: the pointer is to a variable of the type that NVRTC writes; the list has as many elements as NVRTC said.
        let known = unsafe {
            check("nvrtcGetNumSupportedArchs", nvrtc::nvrtcGetNumSupportedArchs(&mut count))?;
            let mut known = vec![0; count.max(0) as usize];
            check("nvrtcGetSupportedArchs", nvrtc::nvrtcGetSupportedArchs(known.as_mut_ptr()))?;
            known
        };
        let own = gpu.capability as c_int;
        let architecture = match known.iter().copied().filter(|&k| k <= own).max() {
            Some(known) if known == own => format!("sm_{known}"),
            Some(older) => format!("compute_{older}"),
            None => {
                return Err(Error::environment(format!(
                    "device '{}' ({}) is unavailable: its compute capability {}.{} is older than what CUDA {}.{} compiles for",
                    gpu.name,
                    gpu.model,
                    own / 10,
                    own % 10,
                    version[0],
                    version[1]
                ))
                .help("install older CUDA libraries, or pass --device cpu"));
            }
        };
        Ok(Compiler { version, architecture })
    }

    fn options(&self) -> Vec<String> {
        let architecture = format!("--gpu-architecture={}", self.architecture);
        OPTIONS.iter().map(|o| (*o).to_owned()).chain([architecture]).collect()
    }

    /// The code of one source: from the cache, if it is there and whole.
    fn code(&self, source: &Source, cache: Option<&Path>) -> Result<Vec<u8>> {
        let text = format!("{COMMON}\n#line 1 \"{}\"\n{}", source.name, source.text);
        let key = Sha256::new().chain_update(format!("{:?} {:?}\n", self.version, self.options())).chain_update(&text);
        let key: String = key.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        let file = cache.map(|folder| folder.join(format!("{}-{key}", source.name.trim_end_matches(".cu"))));
        if let Some(code) = file.as_ref().and_then(|file| unsealed(fs::read(file).ok()?)) {
            return Ok(code);
        }
        let code = self.compile(source.name, &text)?;
        if let (Some(folder), Some(file)) = (cache, &file) {
            // Without a cache it takes longer, and that is all.
            let _ = fs::create_dir_all(folder).map(|()| staged::write_own(file, &sealed(&code)));
        }
        Ok(code)
    }

    fn compile(&self, name: &str, text: &str) -> Result<Vec<u8>> {
        let (text, c_name) = (c_string(text), c_string(name));
        let options: Vec<CString> = self.options().iter().map(|o| c_string(o)).collect();
        let options: Vec<*const c_char> = options.iter().map(|o| o.as_ptr()).collect();
        let mut program = ptr::null_mut();
        // SAFETY: all strings end with a zero byte and outlive the program, which is destroyed below.
        let (result, log, code) = unsafe {
            let made =
                nvrtc::nvrtcCreateProgram(&mut program, text.as_ptr(), c_name.as_ptr(), 0, ptr::null(), ptr::null());
            check("nvrtcCreateProgram", made)?;
            let result = nvrtc::nvrtcCompileProgram(program, options.len() as c_int, options.as_ptr());
            let log = output(program, nvrtc::nvrtcGetProgramLogSize, nvrtc::nvrtcGetProgramLog);
            let code = if self.architecture.starts_with("sm_") {
                output(program, nvrtc::nvrtcGetCUBINSize, nvrtc::nvrtcGetCUBIN)
            } else {
                output(program, nvrtc::nvrtcGetPTXSize, nvrtc::nvrtcGetPTX)
            };
            nvrtc::nvrtcDestroyProgram(&mut program);
            (result, log, code)
        };
        if result != nvrtcResult::NVRTC_SUCCESS || code.is_empty() {
            let log = String::from_utf8_lossy(&log).trim_end_matches('\0').trim().to_owned();
            return Err(Error::environment(format!(
                "the kernels of {name} do not compile for {} with CUDA {}.{} ({result:?}): {log}",
                self.architecture, self.version[0], self.version[1]
            ))
            .help("another version of the CUDA libraries may do; please report this"));
        }
        Ok(code)
    }
}

/// The code and its hash: the driver believes whatever it is given.
fn sealed(code: &[u8]) -> Vec<u8> {
    [code, &Sha256::digest(code)].concat()
}

/// The code, if its hash is right.
fn unsealed(mut bytes: Vec<u8>) -> Option<Vec<u8>> {
    let hash = bytes.split_off(bytes.len().checked_sub(32)?);
    (Sha256::digest(&bytes)[..] == hash[..]).then_some(bytes)
}

/// A result of a program: first its size is asked for, then it itself. Empty where there is none.
///
/// # Safety
///
/// `program` must be a program of NVRTC, and both functions belong to one result.
unsafe fn output(
    program: nvrtc::nvrtcProgram,
    size: unsafe fn(nvrtc::nvrtcProgram, *mut usize) -> nvrtcResult,
    get: unsafe fn(nvrtc::nvrtcProgram, *mut c_char) -> nvrtcResult,
) -> Vec<u8> {
    let mut bytes = 0;
    // SAFETY: the caller's promise; the buffer has the size that NVRTC asked for.
    unsafe {
        if size(program, &mut bytes) != nvrtcResult::NVRTC_SUCCESS {
            return Vec::new();
        }
        let mut result = vec![0u8; bytes];
        if get(program, result.as_mut_ptr().cast()) != nvrtcResult::NVRTC_SUCCESS {
            result.clear();
        }
        result
    }
}

fn check(what: &str, result: nvrtcResult) -> Result<()> {
    match result {
        nvrtcResult::NVRTC_SUCCESS => Ok(()),
        error => Err(Error::environment(format!("CUDA's run-time compiler failed: {what}: {error:?}"))
            .help("check the installation of the CUDA libraries, or pass --device cpu")),
    }
}

fn c_string(text: &str) -> CString {
    CString::new(text).expect("sources and options hold no zero byte")
}
