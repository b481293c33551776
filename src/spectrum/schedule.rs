//! Many matrices over the worker threads: the most costly first, one per thread.

use crate::{error::Result, interrupt, threads};
use std::sync::{
    Mutex,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

/// Runs `work` on every job and returns the results in the order of the jobs. Threads take the most costly job that is
/// left; a single job gets all threads inside BLAS. After a failure no new job starts; of several failures the one of
/// the earliest job is returned. `done` is called after each job.
pub fn run<J: Sync, T: Send>(
    jobs: &[J],
    cost: impl Fn(&J) -> f64,
    work: impl Fn(&J) -> Result<T> + Sync,
    done: impl Fn(&J) + Sync,
) -> Result<Vec<T>> {
    let mut order: Vec<usize> = (0..jobs.len()).collect();
    order.sort_by(|&a, &b| cost(&jobs[b]).total_cmp(&cost(&jobs[a])).then(a.cmp(&b)));
    let results: Mutex<Vec<Option<Result<T>>>> = Mutex::new(jobs.iter().map(|_| None).collect());
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let worker = || {
        while !failed.load(Ordering::Relaxed) {
            let Some(&i) = order.get(next.fetch_add(1, Ordering::Relaxed)) else { break };
            let result = interrupt::check().and_then(|()| work(&jobs[i]));
            failed.fetch_or(result.is_err(), Ordering::Relaxed);
            results.lock().unwrap_or_else(|e| e.into_inner())[i] = Some(result);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    #[test]
    fn results_keep_the_order_of_the_jobs() {
        let jobs: Vec<usize> = (0..50).collect();
        let results = run(&jobs, |j| (*j * 7 % 13) as f64, |j| Ok(j * 2), |_| ()).unwrap();
        assert_eq!(results, (0..50).map(|j| j * 2).collect::<Vec<_>>());
    }

    #[test]
    fn a_failure_stops_the_rest_and_is_returned() {
        let jobs: Vec<usize> = (0..50).collect();
        let work = |j: &usize| if *j >= 10 { Err(Error::request(format!("job {j}"))) } else { Ok(()) };
        assert!(run(&jobs, |j| -(*j as f64), work, |_| ()).unwrap_err().message.starts_with("job 1"));
    }
}
