//! Signals.
//!
//! Ctrl-C, SIGTERM and SIGHUP: a command that has something to save (training, or work together with other processes)
//! declares it with [`defer`], and the first signal asks it to stop at the next safe point. Every other command ends at the
//! first signal; the second ends every command. SIGXFSZ (a file reached the limit of its size) is an error of that write
//! instead of the end. SIGBUS (a mapped input was cut short, or its disk failed) ends the command with a sentence.
//!
//! However the process ends here, temporary siblings of its outputs are removed first, and exit code 3 is given.

use crate::{error::Result, escape, inputs, progress::Cancellation, staged};
use std::{
    os::fd::IntoRawFd,
    path::{Path, PathBuf},
    sync::{
        LazyLock, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicI32, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

/// Cancelled by the first signal.
static SIGNALLED: LazyLock<Cancellation> = LazyLock::new(Cancellation::new);
/// Commands, or parts of them, that stop at a safe point of their own.
static DEFERRED: AtomicUsize = AtomicUsize::new(0);
/// Of these, how many may take as long as they like.
static UNLIMITED: AtomicUsize = AtomicUsize::new(0);

/// Time for work together with other processes to come to its safe point.
const GRACE: Duration = Duration::from_secs(10);

/// Installs the handlers. Call once, at start. What it returns is cancelled by the first signal.
pub fn install() -> Cancellation {
    // SAFETY: ignoring a signal runs no code of ours in a handler.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    // A second handler cannot be installed; then the default one (the process ends) stays, which is safe.
    let _ = ctrlc::set_handler(|| {
        if SIGNALLED.cancel() || DEFERRED.load(Ordering::SeqCst) == 0 {
            end("error: interrupted\n", 3);
        }
        if UNLIMITED.load(Ordering::SeqCst) == 0 {
            std::thread::spawn(|| {
                std::thread::sleep(GRACE);
                end("error: interrupted; no safe point was reached in time\n", 3);
            });
        }
    });
    let _ = std::thread::Builder::new().name("time-limits".into()).spawn(watch_limits);
    bus_error::install();
    SIGNALLED.clone()
}

/// Removes temporary siblings and ends the process. Other threads may be anywhere: nothing of theirs is waited for.
fn end(message: &str, code: i32) -> ! {
    say(message);
    staged::abandon_all();
    // SAFETY: `_exit` takes no pointer and runs nothing of the process.
    unsafe { libc::_exit(code) }
}

/// Past the buffers and locks of the standard library.
fn say(message: &str) {
    // SAFETY: the pointer and length are of one live string. What cannot be written is lost, as it must be.
    unsafe { libc::write(2, message.as_ptr().cast(), message.len()) };
}

/// Declares, as long as it lives, that the command comes to a safe point of its own after the first signal.
#[must_use]
pub struct Deferred {
    unlimited: bool,
}

/// See [`Deferred`]. `unlimited`: saving may take any time; otherwise the process ends some seconds after the signal.
pub fn defer(unlimited: bool) -> Deferred {
    DEFERRED.fetch_add(1, Ordering::SeqCst);
    UNLIMITED.fetch_add(usize::from(unlimited), Ordering::SeqCst);
    Deferred { unlimited }
}

impl Drop for Deferred {
    fn drop(&mut self) {
        UNLIMITED.fetch_sub(usize::from(self.unlimited), Ordering::SeqCst);
        DEFERRED.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Whether the user asked to stop.
pub fn requested() -> bool {
    SIGNALLED.is_cancelled()
}

/// An error if the user asked to stop. Call between pieces of work; staged outputs clean up as they are dropped.
pub fn check() -> Result<()> {
    SIGNALLED.check()
}

/// A piece of work in a library that may never come back, such as the search for a pattern that a file brings.
pub struct TimeLimit(u64);

/// Work in progress: number, deadline, the file at fault.
static LIMITED: Mutex<Vec<(u64, Instant, PathBuf)>> = Mutex::new(Vec::new());

/// Ends the process (exit code 2, hidden files removed) if the returned value is not dropped within `limit`; `path` is the
/// file whose content the work follows. Where [`install`] was not called, as in a library, it only waits.
pub fn time_limit(limit: Duration, path: &Path) -> TimeLimit {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    limited().push((number, Instant::now() + limit, path.to_owned()));
    TimeLimit(number)
}

impl Drop for TimeLimit {
    fn drop(&mut self) {
        limited().retain(|(number, ..)| *number != self.0);
    }
}

fn limited() -> std::sync::MutexGuard<'static, Vec<(u64, Instant, PathBuf)>> {
    LIMITED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Looks at the deadlines once a second.
fn watch_limits() {
    loop {
        std::thread::sleep(Duration::from_secs(1));
        let late = limited().iter().find(|(_, deadline, _)| *deadline < Instant::now()).map(|late| late.2.clone());
        if let Some(path) = late {
            let message = format!(
                "error: '{}' takes too long for one document: a pattern in it may never end\n\
                 help: use another tokenizer, or split the documents\n",
                escape::path(&path)
            );
            end(&message, 2);
        }
    }
}

/// SIGBUS: the handler only hands the address to a thread and waits; the thread finds the file, reports it and ends the
/// process. An address in no mapped input gets the system's default action, as without a handler.
mod bus_error {
    use super::*;

    /// The writing end of the pipe to the thread.
    static PIPE: AtomicI32 = AtomicI32::new(-1);
    /// Set by the thread when the fault was none of ours and the default action stands again.
    static DEFAULT: AtomicBool = AtomicBool::new(false);

    pub(super) fn install() {
        let Ok((mut reader, writer)) = std::io::pipe() else { return };
        PIPE.store(writer.into_raw_fd(), Ordering::SeqCst);
        let watch = move || {
            let mut address = [0; size_of::<usize>()];
            while std::io::Read::read_exact(&mut reader, &mut address).is_ok() {
                if let Some(path) = inputs::mapped_at(usize::from_ne_bytes(address)) {
                    let message = format!(
                        "error: '{}' was cut short, or its disk failed, while it was read; nothing was written\n\
                         help: run again when nothing writes to the inputs, and check the disk\n",
                        escape::path(&path)
                    );
                    super::end(&message, 3);
                }
                // SAFETY: the default action runs no code of ours.
                unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
                DEFAULT.store(true, Ordering::SeqCst);
            }
        };
        if std::thread::Builder::new().name("bus-error".into()).spawn(watch).is_err() {
            return;
        }
        // SAFETY: the structure is initialised as sigaction(2) asks; the handler does only what signal-safety(7) allows.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_bus_error as extern "C" fn(_, _, _) as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigemptyset(&mut action.sa_mask);
            libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut());
        }
    }

    /// Returns only to meet the default action: the faulting instruction runs again.
    extern "C" fn on_bus_error(_signal: i32, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
        // SAFETY: the kernel passes a valid structure to a handler with SA_SIGINFO; `write` and `poll` may be called in
        // one, on a descriptor that is never closed and on no descriptors.
        unsafe {
            let address = ((*info).si_addr() as usize).to_ne_bytes();
            libc::write(PIPE.load(Ordering::SeqCst), address.as_ptr().cast(), address.len());
            while !DEFAULT.load(Ordering::SeqCst) {
                libc::poll(std::ptr::null_mut(), 0, 10);
            }
        }
    }
}
