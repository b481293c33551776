//! How many threads compute: rayon's pool and OpenBLAS's own.

use crate::error::{Error, Result};
use std::sync::atomic::{AtomicI32, Ordering};

// Links the system OpenBLAS, which ndarray and ndarray-linalg call, too.
use openblas_src as _;

unsafe extern "C" {
    fn openblas_set_num_threads(threads: i32);
}

static BLAS_THREADS: AtomicI32 = AtomicI32::new(1);

/// Sets the number of threads of both pools; `None` takes all cores. Call once, at start.
pub fn set(threads: Option<usize>) -> Result<()> {
    let mut builder = rayon::ThreadPoolBuilder::new();
    if let Some(n) = threads {
        builder = builder.num_threads(n);
    }
    builder.build_global().map_err(|e| Error::world(format!("cannot start the worker threads: {e}")))?;
    set_blas(rayon::current_num_threads());
    Ok(())
}

/// The number of threads that computing may use.
pub fn count() -> usize {
    rayon::current_num_threads()
}

/// Runs `work` with single-threaded BLAS, for callers that spread whole matrices over rayon's threads.
pub fn with_serial_blas<T>(work: impl FnOnce() -> T) -> T {
    let before = BLAS_THREADS.load(Ordering::Relaxed);
    set_blas(1);
    let result = work();
    set_blas(before as usize);
    result
}

fn set_blas(threads: usize) {
    let threads = threads as i32;
    BLAS_THREADS.store(threads, Ordering::Relaxed);
    // SAFETY: OpenBLAS takes any positive number; no BLAS call is in flight here, since both callers run outside
    // parallel sections.
    unsafe { openblas_set_num_threads(threads) }
}
