//! Progress on stderr: what is being done, how far it is, how long it will take. Hidden when nobody looks.

use crate::{
    error::{Error, Result},
    escape,
};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

/// A request to stop, shared by its clones: [`Cancellation::cancel`] may be called from any thread.
///
/// A call that was given it by [`Progress::with_cancellation`] stops at its next safe point and returns an error of the kind
/// [`ErrorKind::Interrupted`](crate::ErrorKind::Interrupted); outputs that are not finished are removed. A training saves a
/// checkpoint first.
#[derive(Clone, Debug, Default)]
pub struct Cancellation(Arc<AtomicBool>);

impl Cancellation {
    /// Nothing is cancelled yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks the calls that observe this to stop. Returns whether it was cancelled before.
    pub fn cancel(&self) -> bool {
        self.0.swap(true, Ordering::SeqCst)
    }

    /// Whether [`Cancellation::cancel`] was called.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// An error if [`Cancellation::cancel`] was called. Long work calls this between its pieces.
    pub fn check(&self) -> Result<()> {
        if self.is_cancelled() { Err(Error::interrupted()) } else { Ok(()) }
    }
}

/// Where a call reports its progress and its warnings, and where it learns that it should stop.
///
/// Cheap to clone; all clones draw on the same terminal lines and observe the same [`Cancellation`].
#[derive(Clone)]
pub struct Progress {
    bars: MultiProgress,
    verbosity: i8,
    visible: bool,
    cancellation: Cancellation,
}

impl Progress {
    /// Bars on stderr if it is a terminal and `visible`; log lines by `verbosity` (-1 quiet, 0 warnings, 1 and more details).
    pub fn stderr(visible: bool, verbosity: i8) -> Self {
        let target = if visible { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        Progress {
            bars: MultiProgress::with_draw_target(target),
            verbosity,
            visible: visible && console_is_terminal(),
            cancellation: Cancellation::new(),
        }
    }

    /// Shows nothing: for tests and for programs that have a display of their own.
    pub fn hidden() -> Self {
        Progress {
            bars: MultiProgress::with_draw_target(ProgressDrawTarget::hidden()),
            verbosity: -1,
            visible: false,
            cancellation: Cancellation::new(),
        }
    }

    /// The same, for calls that stop when `cancellation` is cancelled.
    pub fn with_cancellation(self, cancellation: &Cancellation) -> Self {
        Progress { cancellation: cancellation.clone(), ..self }
    }

    /// What the calls with this observe.
    pub fn cancellation(&self) -> &Cancellation {
        &self.cancellation
    }

    /// An error if the call should stop: [`Cancellation::check`].
    pub fn check(&self) -> Result<()> {
        self.cancellation.check()
    }

    /// Whether bars are drawn.
    pub fn is_visible(&self) -> bool {
        self.visible
    }

    /// A bar that counts bytes.
    pub fn bytes(&self, what: &str, total: u64) -> ProgressBar {
        self.bar(what, total, "{msg} {wide_bar} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta} left")
    }

    /// A bar that counts things.
    pub fn count(&self, what: &str, total: u64) -> ProgressBar {
        self.bar(what, total, "{msg} {wide_bar} {pos}/{len} {eta} left")
    }

    /// A bar with a template of `indicatif`.
    pub fn bar(&self, what: &str, total: u64, template: &str) -> ProgressBar {
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = self.bars.add(ProgressBar::new(total).with_style(style).with_message(what.to_owned()));
        if self.visible {
            bar.enable_steady_tick(Duration::from_millis(250));
        }
        bar
    }

    /// The same bars, and no lines.
    pub fn bars_only(&self) -> Progress {
        Progress { verbosity: -1, ..self.clone() }
    }

    /// A line that the user should not miss. Silent with `-q`.
    pub fn warn(&self, message: &str) {
        self.log(0, &format!("warning: {message}"));
    }

    /// A line for those who asked with `-v`.
    pub fn detail(&self, message: &str) {
        self.log(1, message);
    }

    /// A line about what happens next. Silent with `-q`.
    pub fn info(&self, message: &str) {
        self.log(0, message);
    }

    fn log(&self, level: i8, message: &str) {
        if self.verbosity >= level {
            let message = escape::lines(message);
            self.bars.suspend(|| eprintln!("{message}"));
        }
    }
}

fn console_is_terminal() -> bool {
    std::io::IsTerminal::is_terminal(&std::io::stderr())
}
