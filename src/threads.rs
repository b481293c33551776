//! How many threads compute: rayon's pool and OpenBLAS's own.

use crate::error::{Error, Result};
use std::sync::{Mutex, MutexGuard, PoisonError};

// Links the system OpenBLAS, which ndarray and ndarray-linalg call, too.
use openblas_src as _;

unsafe extern "C" {
    fn openblas_set_num_threads(threads: i32);
}

/// OpenBLAS's number of threads outside [`with_serial_blas`] (0: its own default), and how many calls of that are open.
static BLAS: Mutex<(usize, usize)> = Mutex::new((0, 0));

/// Sets the number of threads of both pools; `None` takes all cores. Call once, at start.
pub fn set(threads: Option<usize>) -> Result<()> {
    let mut builder = rayon::ThreadPoolBuilder::new();
    if let Some(n) = threads {
        builder = builder.num_threads(n);
    }
    builder.build_global().map_err(|e| Error::environment(format!("cannot start the worker threads: {e}")))?;
    set_blas(rayon::current_num_threads());
    Ok(())
}

/// The number of threads that computing may use.
pub fn count() -> usize {
    rayon::current_num_threads()
}

/// Runs `work` with single-threaded BLAS, for callers that give each of rayon's threads whole matrices. Calls may nest
/// and overlap; the last one to end restores the number of threads.
pub fn with_serial_blas<T>(work: impl FnOnce() -> T) -> T {
    let _serial = SerialBlas::enter();
    work()
}

/// Single-threaded BLAS for as long as it exists; restores the number of threads when dropped, also in a panic.
struct SerialBlas;

impl SerialBlas {
    fn enter() -> Self {
        let mut blas = blas();
        if blas.1 == 0 {
            apply(1);
        }
        blas.1 += 1;
        SerialBlas
    }
}

impl Drop for SerialBlas {
    fn drop(&mut self) {
        let mut blas = blas();
        blas.1 -= 1;
        if blas.1 == 0 {
            apply(if blas.0 == 0 { count() } else { blas.0 });
        }
    }
}

fn set_blas(threads: usize) {
    let mut blas = blas();
    blas.0 = threads;
    if blas.1 == 0 {
        apply(threads);
    }
}

fn blas() -> MutexGuard<'static, (usize, usize)> {
    BLAS.lock().unwrap_or_else(PoisonError::into_inner)
}

fn apply(threads: usize) {
    // SAFETY: OpenBLAS takes any positive number; a product in flight has read the number already and keeps it.
    unsafe { openblas_set_num_threads(threads as i32) }
}
