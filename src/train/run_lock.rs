//! One writer per run: a lock on `run/.lock` from the first byte that training writes to the last.
//!
//! The kernel holds the lock (flock(2)) until the process ends, however it ends, and whatever its number: processes in
//! several containers on one machine see each other, and on NFS (version 4, or version 3 with its lock service) those of
//! several machines. Lustre mounted with `localflock`, NFS mounted with `nolock` and some FUSE file systems lock within one
//! machine only.

use crate::{
    error::{Error, Result},
    progress::Progress,
};
use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};
use std::{
    fs::{self, File},
    io::{Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

/// In the run directory.
const NAME: &str = ".lock";
/// More than an owner takes.
const MAX_OWNER: u64 = 1000;

/// The lock of a run; dropped, it is free again.
pub(super) struct RunLock {
    _file: File,
}

impl RunLock {
    /// Locks the run in `dir`, which errors call `shown`. Where another process holds the lock, the error (exit code 3)
    /// says which.
    pub(super) fn acquire(dir: &Path, shown: &Path, progress: &Progress) -> Result<RunLock> {
        let path = dir.join(NAME);
        // For NFS an exclusive lock needs a file that is open for writing.
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false).custom_flags(libc::O_NOFOLLOW);
        let mut file = options.open(&path).map_err(|e| Error::io("lock", &path, e))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Err(busy(&file, shown)),
            Err(e) => progress.warn(&format!(
                "the file system of '{}' does not lock files ({e}): take care that no other process trains there",
                shown.display()
            )),
        }
        let owner = format!("process {} on {}, since {}\n", std::process::id(), host(), now());
        let written = file.set_len(0).and_then(|()| file.write_all(owner.as_bytes()));
        written.map_err(|e| Error::io("write", &path, e))?;
        Ok(RunLock { _file: file })
    }
}

fn busy(file: &File, run: &Path) -> Error {
    let mut owner = String::new();
    let read = file.take(MAX_OWNER).read_to_string(&mut owner);
    let owner = if read.is_ok() && !owner.trim().is_empty() { owner.trim() } else { "it has not said which yet" };
    Error::environment(format!("another process trains in '{}': {owner}", run.display()))
        .help("wait until it has ended, or stop it: on SIGTERM it saves a checkpoint first")
}

fn host() -> String {
    fs::read_to_string("/proc/sys/kernel/hostname").map_or_else(|_| "this host".into(), |name| name.trim().to_owned())
}

/// The time in UTC, as RFC 3339 writes it.
fn now() -> String {
    rfc3339(SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()))
}

/// Days to dates as in Howard Hinnant, "chrono-compatible low-level date algorithms", `civil_from_days`.
fn rfc3339(seconds: u64) -> String {
    let (days, second) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_owner_is_told_who_the_first_is() {
        let dir = tempfile::tempdir().unwrap();
        let lock = || RunLock::acquire(dir.path(), Path::new("run"), &Progress::hidden());
        let first = lock().unwrap();
        let error = lock().err().unwrap();
        assert_eq!(error.exit_code(), 3);
        let owner = format!("another process trains in 'run': process {} on {}, since 20", std::process::id(), host());
        assert!(error.message.starts_with(&owner), "{error}");
        drop(first);
        lock().unwrap();
    }

    #[test]
    fn seconds_become_dates() {
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00Z");
        assert_eq!(rfc3339(951_827_696), "2000-02-29T12:34:56Z");
        assert_eq!(rfc3339(1_798_761_599), "2026-12-31T23:59:59Z");
    }
}
