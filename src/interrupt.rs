//! Signals. Ctrl-C and SIGTERM: the first asks the running command to stop at the next safe point, the second ends the
//! process. SIGXFSZ (a file reached the limit of its size) is an error of that write instead of the end.

use crate::error::{Error, Result};
use std::sync::atomic::{AtomicBool, Ordering};

static REQUESTED: AtomicBool = AtomicBool::new(false);

/// Installs the handlers. Call once, at start.
pub fn install() {
    // SAFETY: ignoring a signal runs no code of ours in a handler.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    // A second handler cannot be installed; then the default one (the process ends) stays, which is safe.
    let _ = ctrlc::set_handler(|| {
        if REQUESTED.swap(true, Ordering::SeqCst) {
            std::process::exit(3);
        }
    });
}

/// Whether the user asked to stop.
pub fn requested() -> bool {
    REQUESTED.load(Ordering::Relaxed)
}

/// An error if the user asked to stop. Call between pieces of work; staged outputs clean up as they are dropped.
pub fn check() -> Result<()> {
    if requested() { Err(Error::interrupted()) } else { Ok(()) }
}
