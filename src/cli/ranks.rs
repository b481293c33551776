//! A command in several processes: they meet, do their parts, and end together.

use super::{DeviceChoice, Outcome, report_error};
#[cfg(feature = "cuda")]
use crate::ops::Cuda;
use crate::{
    collective::{Ending, JOIN_VARIABLE, Job, Ranks, join_limit},
    error::{Error, Result},
    interrupt,
    progress::Progress,
    staged,
};
use std::{
    io::{self, Write},
    sync::Arc,
};

/// Runs a command in this process, or with the others that a launcher started: all end with the same error, which the first
/// prints. `after` says what to do when one of them is lost.
pub(super) fn run(
    after: Option<String>,
    progress: &Progress,
    work: impl FnOnce(Option<&Arc<Job>>, &Progress) -> Result<Outcome>,
) -> Result<Outcome> {
    let Some(job) = join(after, progress)? else { return work(None, progress) };
    // The others must hear of it before this one ends.
    let _deferred = interrupt::defer(false);
    let shown =
        if job.is_leader() { progress.clone() } else { Progress::hidden().with_cancellation(progress.cancellation()) };
    let error = match work(Some(&job), &shown).and_then(|outcome| job.finish().map(|()| outcome)) {
        Ok(outcome) => return Ok(outcome),
        Err(e) => e,
    };
    if !job.fail(&error) {
        report_error(&match job.is_leader() {
            true => error.clone(),
            false => Error { message: format!("{}: {}", job.name(job.ranks().rank), error.message), ..error.clone() },
        });
    }
    leave(error.exit_code());
}

/// The other processes, where a launcher started several; `None` where this one is alone. `after` says what to do when one of
/// them is lost.
fn join(after: Option<String>, progress: &Progress) -> Result<Option<Arc<Job>>> {
    let Some(ranks) = Ranks::from_env()? else { return Ok(None) };
    if ranks.is_leader() {
        progress.detail(&format!("waiting for {} processes of {}", ranks.world_size, ranks.launcher));
    }
    let limit = join_limit()?;
    let alone = format!("to run alone: unset the variables of {}, such as WORLD_SIZE", ranks.launcher);
    let on_ending = Arc::new(move |ending: Ending| {
        let help = ending.error.help.clone().or(after.clone());
        let error = Error { help, ..ending.error };
        if !ending.told {
            report_error(&error);
        }
        leave(error.exit_code());
    });
    match Job::join(ranks, limit, on_ending) {
        Ok(job) => Ok(Some(Arc::new(job))),
        Err(e) if e.help.is_none() => Err(e.help(format!("{alone}; {JOIN_VARIABLE} sets how long to wait"))),
        Err(e) => Err(e),
    }
}

/// Ends this process at once: what waits in a library for the other processes would keep it.
fn leave(code: u8) -> ! {
    let _ = io::stdout().flush();
    staged::abandon_all();
    // SAFETY: nothing runs after it.
    unsafe { libc::_exit(code.into()) }
}

/// The number of the GPU that was chosen, if one was: of several processes on a machine, `cuda` is another one in each. A
/// launcher may let each see its own only.
pub(super) fn own_gpu(choice: DeviceChoice, job: Option<&Arc<Job>>) -> Option<usize> {
    let own = || {
        let visible = std::env::var("CUDA_VISIBLE_DEVICES").unwrap_or_default();
        let one = !visible.is_empty() && !visible.contains(',');
        job.filter(|_| !one).map_or(0, |job| job.ranks().local_rank)
    };
    match choice {
        DeviceChoice::Cpu => None,
        DeviceChoice::Cuda(ordinal) => Some(ordinal.unwrap_or_else(own)),
    }
}

/// How many threads this process takes where nobody says; `None`: all that it may.
pub(super) fn threads() -> Result<Option<usize>> {
    let Some(ranks) = Ranks::from_env()? else { return Ok(None) };
    let allowed = std::thread::available_parallelism().map_or(1, usize::from);
    // SAFETY: the call reads nothing of ours.
    let cores = unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) }.max(1) as usize;
    Ok(Some(ranks.threads(allowed, cores)))
}

/// Warns where two processes of a machine have the same GPU: each is slower, and NCCL refuses it.
#[cfg(feature = "cuda")]
pub(super) fn warn_of_shared_gpus(job: &Job, device: &Cuda, progress: &Progress) -> Result<()> {
    let ranks = job.ranks();
    let all = job.gather(device.bus_id().as_bytes())?;
    let places: Vec<(String, &Vec<u8>)> = all.iter().enumerate().map(|(rank, gpu)| (job.host(rank), gpu)).collect();
    for (rank, place) in places.iter().enumerate() {
        if let Some(first) = places[..rank].iter().position(|other| other == place) {
            progress.warn(&format!(
                "{} and {} have the same GPU ({}): start as many processes as a machine has GPUs, with --device cuda",
                job.name(first),
                job.name(rank),
                String::from_utf8_lossy(place.1)
            ));
        }
    }
    progress.detail(&format!("{} processes, started by {}", ranks.world_size, ranks.launcher));
    Ok(())
}
