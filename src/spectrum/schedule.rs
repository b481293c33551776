//! Many matrices over the worker threads: the most costly first, one per thread, within a bound on memory.
//!
//! A symmetric eigenproblem gains little from a second thread, so several matrices are never sped up by giving each
//! more threads; a single one gets them all, inside BLAS, where products are large enough to gain from it.

use crate::{error::Result, interrupt, threads};
use std::sync::{
    Condvar, Mutex, MutexGuard,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

/// What a job needs.
#[derive(Clone, Copy, Debug, Default)]
pub struct Need {
    /// Work, in any unit: the costliest job starts first.
    pub cost: f64,
    /// Bytes that it holds while it runs.
    pub memory: f64,
    /// Bytes that it holds on a GPU.
    pub gpu_memory: f64,
}

/// Bytes that jobs may hold together.
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

/// Runs `work` on every job and returns the results in the order of the jobs. Jobs run together only while their
/// memory stays below the `budget`; one alone always runs. After a failure no new job starts; of several failures
/// the one of the earliest job is returned. `done` is called after each job.
pub fn run<J: Sync, T: Send>(
    jobs: &[J],
    budget: Budget,
    need: impl Fn(&J) -> Need + Sync,
    work: impl Fn(&J) -> Result<T> + Sync,
    done: impl Fn(&J) + Sync,
) -> Result<Vec<T>> {
    let mut order: Vec<usize> = (0..jobs.len()).collect();
    order.sort_by(|&a, &b| need(&jobs[b]).cost.total_cmp(&need(&jobs[a]).cost).then(a.cmp(&b)));
    let results: Mutex<Vec<Option<Result<T>>>> = Mutex::new(jobs.iter().map(|_| None).collect());
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let room = Room { used: Mutex::default(), freed: Condvar::new(), budget };
    let worker = || {
        while !failed.load(Ordering::Relaxed) {
            let Some(&i) = order.get(next.fetch_add(1, Ordering::Relaxed)) else { break };
            let need = need(&jobs[i]);
            room.enter(need);
            let result = interrupt::check().and_then(|()| work(&jobs[i]));
            room.leave(need);
            failed.fetch_or(result.is_err(), Ordering::Relaxed);
            lock(&results)[i] = Some(result);
            done(&jobs[i]);
        }
    };
    let workers = threads::count().min(jobs.len());
    if workers <= 1 {
        worker();
    } else {
        threads::with_serial_blas(|| rayon::scope(|scope| (0..workers).for_each(|_| scope.spawn(|_| worker()))));
    }
    // Jobs that never started come only together with a failure, which `collect` returns.
    let results = results.into_inner().unwrap_or_else(|e| e.into_inner());
    results.into_iter().flatten().collect()
}

/// Counts the jobs inside and the bytes they hold.
struct Room {
    used: Mutex<Used>,
    freed: Condvar,
    budget: Budget,
}

#[derive(Default)]
struct Used {
    jobs: usize,
    memory: f64,
    gpu_memory: f64,
}

impl Room {
    fn enter(&self, need: Need) {
        let full = |used: &Used| {
            used.memory + need.memory > self.budget.memory || used.gpu_memory + need.gpu_memory > self.budget.gpu_memory
        };
        let mut used = lock(&self.used);
        while used.jobs > 0 && full(&used) {
            used = self.freed.wait(used).unwrap_or_else(|e| e.into_inner());
        }
        used.jobs += 1;
        used.memory += need.memory;
        used.gpu_memory += need.gpu_memory;
    }

    fn leave(&self, need: Need) {
        let mut used = lock(&self.used);
        used.jobs -= 1;
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
    fn results_keep_the_order_of_the_jobs() {
        let jobs: Vec<usize> = (0..50).collect();
        let need = |j: &usize| Need { cost: (*j * 7 % 13) as f64, memory: 1.0, ..Need::default() };
        let results = run(&jobs, Budget { memory: 1.0, ..Budget::NONE }, need, |j| Ok(j * 2), |_| ()).unwrap();
        assert_eq!(results, (0..50).map(|j| j * 2).collect::<Vec<_>>());
    }

    #[test]
    fn a_failure_stops_the_rest_and_is_returned() {
        let jobs: Vec<usize> = (0..50).collect();
        let work = |j: &usize| if *j >= 10 { Err(Error::request(format!("job {j}"))) } else { Ok(()) };
        let need = |j: &usize| Need { cost: -(*j as f64), ..Need::default() };
        assert!(run(&jobs, Budget::NONE, need, work, |_| ()).unwrap_err().message.starts_with("job 1"));
    }

    #[test]
    fn jobs_together_stay_within_the_budget_and_a_larger_one_runs_alone() {
        let jobs: Vec<f64> = (0..40).map(|i| if i % 10 == 0 { 9.0 } else { 1.0 + (i % 3) as f64 }).collect();
        let host = Budget { memory: 4.0, ..Budget::NONE };
        let gpu = Budget { gpu_memory: 4.0, ..Budget::NONE };
        run_within(&jobs, host, |j| Need { cost: *j, memory: *j, gpu_memory: 0.0 });
        run_within(&jobs, gpu, |j| Need { cost: *j, memory: 0.0, gpu_memory: *j });
    }

    /// Jobs of the given sizes, and a budget of 4 for them.
    fn run_within(jobs: &[f64], budget: Budget, need: impl Fn(&f64) -> Need + Sync) {
        let held = Mutex::new((0.0, 0));
        let work = |j: &f64| {
            {
                let mut held = lock(&held);
                *held = (held.0 + j, held.1 + 1);
                assert!(held.0 <= 4.0 || held.1 == 1, "{held:?}");
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
            let mut held = lock(&held);
            *held = (held.0 - j, held.1 - 1);
            Ok(())
        };
        run(jobs, budget, need, work, |_| ()).unwrap();
    }
}
