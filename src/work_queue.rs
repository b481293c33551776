//! A queue of tasks over the worker threads: the costliest first, within a bound on the memory that running tasks take.
//!
//! A symmetric eigenproblem gains little from a second thread, so several matrices are never sped up by giving each
//! more threads; a single one gets them all, inside BLAS, where products are large enough to gain from it.

use crate::{error::Result, threads};
use std::sync::{
    Condvar, Mutex, MutexGuard,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

/// What a task needs while it runs.
#[derive(Clone, Copy, Debug, Default)]
pub struct Need {
    /// Work, in any unit: the costliest task starts first, equal ones in their order.
    pub cost: f64,
    /// Bytes of the host's memory.
    pub memory: f64,
    /// Bytes of a GPU's memory.
    pub gpu_memory: f64,
}

/// Bytes that running tasks may take together.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// Of the host.
    pub memory: f64,
    /// Of the GPU.
    pub gpu_memory: f64,
}

impl Budget {
    /// No bound.
    pub const NONE: Budget = Budget { memory: f64::INFINITY, gpu_memory: f64::INFINITY };
}

/// Runs `work` once for each of `needs` and returns the results in that order.
///
/// Tasks run together only while their memory stays below the `budget`; one alone always runs. After a failure no new
/// task starts; of several failures the one of the earliest task is returned. `new_state` makes what a thread keeps
/// from one task to the next, such as buffers.
pub fn run<S, T: Send>(
    needs: &[Need],
    budget: Budget,
    new_state: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, usize) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    let mut order: Vec<usize> = (0..needs.len()).collect();
    order.sort_by(|&a, &b| needs[b].cost.total_cmp(&needs[a].cost).then(a.cmp(&b)));
    let results: Mutex<Vec<Option<Result<T>>>> = Mutex::new(needs.iter().map(|_| None).collect());
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let capacity = Capacity { used: Mutex::default(), freed: Condvar::new(), budget };
    let worker = || {
        let mut state = new_state();
        while !failed.load(Ordering::Relaxed) {
            let Some(&i) = order.get(next.fetch_add(1, Ordering::Relaxed)) else { break };
            capacity.acquire(needs[i]);
            let result = work(&mut state, i);
            capacity.release(needs[i]);
            failed.fetch_or(result.is_err(), Ordering::Relaxed);
            lock(&results)[i] = Some(result);
        }
    };
    let workers = threads::count().min(needs.len());
    if workers <= 1 {
        worker();
    } else {
        threads::with_serial_blas(|| rayon::scope(|scope| (0..workers).for_each(|_| scope.spawn(|_| worker()))));
    }
    // Tasks that never started come only together with a failure, which `collect` returns.
    let results = results.into_inner().unwrap_or_else(|e| e.into_inner());
    results.into_iter().flatten().collect()
}

/// [`run`] for `count` tasks that are alike: they start in their order, without a bound on memory.
pub fn run_in_order<S, T: Send>(
    count: usize,
    new_state: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, usize) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    run(&vec![Need::default(); count], Budget::NONE, new_state, work)
}

/// Counts the running tasks and the bytes they take.
struct Capacity {
    used: Mutex<Used>,
    freed: Condvar,
    budget: Budget,
}

#[derive(Default)]
struct Used {
    tasks: usize,
    memory: f64,
    gpu_memory: f64,
}

impl Capacity {
    fn acquire(&self, need: Need) {
        let full = |used: &Used| {
            used.memory + need.memory > self.budget.memory || used.gpu_memory + need.gpu_memory > self.budget.gpu_memory
        };
        let mut used = lock(&self.used);
        while used.tasks > 0 && full(&used) {
            used = self.freed.wait(used).unwrap_or_else(|e| e.into_inner());
        }
        used.tasks += 1;
        used.memory += need.memory;
        used.gpu_memory += need.gpu_memory;
    }

    fn release(&self, need: Need) {
        let mut used = lock(&self.used);
        used.tasks -= 1;
        used.memory -= need.memory;
        used.gpu_memory -= need.gpu_memory;
        self.freed.notify_all();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    #[test]
    fn results_keep_the_order_of_the_tasks() {
        let needs: Vec<Need> =
            (0..50).map(|i| Need { cost: (i * 7 % 13) as f64, memory: 1.0, ..Need::default() }).collect();
        let results = run(&needs, Budget { memory: 1.0, ..Budget::NONE }, || (), |(), i| Ok(i * 2)).unwrap();
        assert_eq!(results, (0..50).map(|i| i * 2).collect::<Vec<_>>());
    }

    #[test]
    fn a_failure_stops_the_rest_and_is_returned() {
        let needs: Vec<Need> = (0..50).map(|i| Need { cost: -f64::from(i), ..Need::default() }).collect();
        let work = |(): &mut (), i| if i >= 10 { Err(Error::request(format!("task {i}"))) } else { Ok(()) };
        assert!(run(&needs, Budget::NONE, || (), work).unwrap_err().message.starts_with("task 1"));
    }

    #[test]
    fn equal_tasks_start_in_their_order_and_the_first_error_ends_the_work() {
        let started = AtomicUsize::new(0);
        let failed = run_in_order(
            1_000_000,
            || (),
            |(), i| {
                started.fetch_add(1, Ordering::Relaxed);
                if i == 10 { Err(Error::environment("no")) } else { Ok(()) }
            },
        );
        assert_eq!(failed.unwrap_err().message, "no");
        assert!(started.into_inner() < 1_000_000);
    }

    #[test]
    fn a_thread_keeps_its_state() {
        let states = AtomicUsize::new(0);
        let new_state = || states.fetch_add(1, Ordering::Relaxed);
        let seen = run_in_order(200, new_state, |state, i| Ok((*state, i))).unwrap();
        assert!(seen.iter().enumerate().all(|(i, (state, task))| *task == i && *state < threads::count()));
        assert!(states.into_inner() <= threads::count());
    }

    #[test]
    fn running_tasks_stay_within_the_budget_and_a_larger_one_runs_alone() {
        let sizes: Vec<f64> = (0..40).map(|i| if i % 10 == 0 { 9.0 } else { 1.0 + (i % 3) as f64 }).collect();
        let host = Budget { memory: 4.0, ..Budget::NONE };
        let gpu = Budget { gpu_memory: 4.0, ..Budget::NONE };
        run_within(&sizes, host, |size| Need { cost: size, memory: size, gpu_memory: 0.0 });
        run_within(&sizes, gpu, |size| Need { cost: size, memory: 0.0, gpu_memory: size });
    }

    /// Tasks of the given sizes, and a budget of 4 for them.
    fn run_within(sizes: &[f64], budget: Budget, need: impl Fn(f64) -> Need) {
        let running = Mutex::new((0.0, 0));
        let work = |(): &mut (), i: usize| {
            {
                let mut running = lock(&running);
                *running = (running.0 + sizes[i], running.1 + 1);
                assert!(running.0 <= 4.0 || running.1 == 1, "{running:?}");
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
            let mut running = lock(&running);
            *running = (running.0 - sizes[i], running.1 - 1);
            Ok(())
        };
        let needs: Vec<Need> = sizes.iter().map(|&size| need(size)).collect();
        run(&needs, budget, || (), work).unwrap();
    }
}
