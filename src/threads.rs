//! How many threads compute: rayon's pool and OpenBLAS's own.

use crate::error::{Error, Result};
use rayon::prelude::*;
use std::sync::{
    Mutex, MutexGuard, PoisonError,
    atomic::{AtomicUsize, Ordering},
};

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

/// Runs `work` with single-threaded BLAS, for callers that spread whole matrices over rayon's threads. Calls may nest
/// and overlap; the last one to end restores the number of threads.
pub fn with_serial_blas<T>(work: impl FnOnce() -> T) -> T {
    let _serial = SerialBlas::enter();
    work()
}

/// Does `work` for every index below `count`, the next free thread the next index, and returns the results in their order.
/// `new` makes what a thread keeps from one to the next. The first error ends the others early.
pub fn spread<S, R: Send>(
    count: usize,
    new: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, usize) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    let next = AtomicUsize::new(0);
    let thread = |_| {
        let (mut state, mut done) = (new(), Vec::new());
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= count {
                return Ok(done);
            }
            let result = work(&mut state, i).inspect_err(|_| next.store(count, Ordering::Relaxed))?;
            done.push((i, result));
        }
    };
    let threads = (0..self::count()).into_par_iter().with_max_len(1).map(thread);
    let mut results = threads.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect::<Vec<_>>();
    results.sort_unstable_by_key(|(i, _)| *i);
    Ok(results.into_iter().map(|(_, result)| result).collect())
}

/// Open while single-threaded BLAS is asked for; restores when dropped, also in a panic.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_come_in_order_and_the_first_error_ends_the_work() {
        let squares = spread(1000, || (), |(), i| Ok(i * i)).unwrap();
        assert_eq!(squares, (0..1000).map(|i| i * i).collect::<Vec<_>>());
        let done = AtomicUsize::new(0);
        let failed = spread(
            1_000_000,
            || (),
            |(), i| {
                done.fetch_add(1, Ordering::Relaxed);
                if i == 10 { Err(Error::environment("no")) } else { Ok(()) }
            },
        );
        assert_eq!(failed.unwrap_err().message, "no");
        assert!(done.into_inner() < 1_000_000);
    }
}
