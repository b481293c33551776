//! The stand-ins for CUDA's libraries of `tests/cuda_emulator`: built once with g++, kept under the hash of their sources.

use relora_kit::ops::{Cuda, CudaOptions, FOLDERS_VARIABLE};
use sha2::{Digest, Sha256};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

const LIBRARIES: [(&str, &str, &str); 5] = [
    ("driver.cpp", "libcuda.so", "libcuda.so.1"),
    ("nvrtc.cpp", "libnvrtc.so", "libnvrtc.so.12"),
    ("cublas.cpp", "libcublas.so", "libcublas.so.12"),
    ("cusolver.cpp", "libcusolver.so", "libcusolver.so.11"),
    ("nccl.cpp", "libnccl.so.2", "libnccl.so.2"),
];

/// What the emulator replaces in which file before it compiles: file, text, other text (see nvrtc.cpp).
pub const MUTATION: [&str; 3] = ["CUDA_EMULATOR_MUTATE_FILE", "CUDA_EMULATOR_MUTATE_FROM", "CUDA_EMULATOR_MUTATE_TO"];

/// The folder with the libraries; compiled kernels are kept there, too.
pub fn folder() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(build)
}

fn build() -> PathBuf {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cuda_emulator");
    let mut hash = Sha256::new().chain_update(include_str!("cuda_emulator.rs"));
    for name in LIBRARIES.iter().map(|l| l.0).chain(["device.h"]) {
        hash.update(fs::read(sources.join(name)).unwrap());
    }
    let hash: String = hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    let root = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let folder = root.join(format!("cuda-emulator-{hash}"));
    if !folder.exists() {
        let staged = tempfile::tempdir_in(root).unwrap();
        for (source, soname, file) in LIBRARIES {
            let mut compiler = Command::new("g++");
            // The name without a version is what the program tries first: no other library can come before.
            compiler.args(["-std=c++17", "-O3", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"]);
            compiler.arg(format!("-DCUDA_EMULATOR_HEADER=\"{}\"", sources.join("device.h").display()));
            compiler.arg(sources.join(source)).arg("-o").arg(staged.path().join(file));
            let status = compiler.arg(format!("-Wl,-soname,{soname}")).arg("-ldl").status();
            let status = status.expect("g++ builds the CUDA emulator: install it (tools/test does)");
            assert!(status.success(), "{source} does not compile");
        }
        // Another test may have been faster.
        if fs::rename(staged.path(), &folder).is_err() {
            assert!(folder.exists());
        }
    }
    folder
}

/// The emulated GPU, the same for all tests of this process.
pub fn cuda() -> &'static Cuda {
    static CUDA: OnceLock<Cuda> = OnceLock::new();
    CUDA.get_or_init(open)
}

/// Set where a real GPU takes the place of the emulator.
const REAL: &str = "RELORA_KIT_TEST_GPU";

/// The emulated GPU, opened anew; a real one where RELORA_KIT_TEST_GPU is set.
pub fn open() -> Cuda {
    if std::env::var_os(REAL).is_some() {
        return Cuda::open(&CudaOptions::from_env(0)).unwrap_or_else(|e| panic!("{e}"));
    }
    // A mutated kernel must not come from the cache.
    let cache = std::env::var_os(MUTATION[0]).is_none().then(|| folder().join("cache"));
    Cuda::open(&CudaOptions { cache, ..options() }).unwrap_or_else(|e| panic!("{e}"))
}

/// The emulated GPU, without a cache.
pub fn options() -> CudaOptions {
    CudaOptions { ordinal: 0, libraries: vec![folder().into()], cache: None }
}

/// Lets a process find the emulator, and no other cache.
pub fn set_environment(command: &mut assert_cmd::Command) {
    command.env(FOLDERS_VARIABLE, folder()).env("XDG_CACHE_HOME", folder());
}

/// The newest test program of this name beside this one: cargo builds all before it runs any.
pub fn program(name: &str) -> PathBuf {
    let own = std::env::current_exe().unwrap();
    let prefix = format!("{name}-");
    let files = own.parent().unwrap().read_dir().unwrap().map(|e| e.unwrap().path());
    let programs = files.filter(|f| {
        f.extension().is_none() && f.file_name().unwrap().to_str().is_some_and(|name| name.starts_with(&prefix))
    });
    let newest = programs.max_by_key(|f| fs::metadata(f).unwrap().modified().unwrap());
    newest.unwrap_or_else(|| {
        panic!("the test program {name} is not built: run `cargo test --no-run --test {name}` first")
    })
}

/// A test for any device, run on the CPU and on the emulated GPU: `name::cpu` and `name::cuda`.
#[allow(unused_macros)]
macro_rules! on_both_devices {
    ($(#[$meta:meta])* fn $name:ident($device:ident) $body:block) => {
        mod $name {
            use super::*;

            $(#[$meta])*
            fn check<D: relora_kit::ops::Device + Clone>($device: D) $body

            #[test]
            fn cpu() {
                check(relora_kit::ops::Cpu);
            }

            #[test]
            #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
            fn cuda() {
                check($crate::common::cuda_emulator::cuda().clone());
            }
        }
    };
}
#[allow(unused_imports)]
pub(crate) use on_both_devices;
