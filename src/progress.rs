//! Progress on stderr: what is being done, how far it is, how long it will take. Hidden when nobody looks.

use crate::escape;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::time::Duration;

/// Where progress and warnings go. Cheap to clone; all clones draw on the same terminal lines.
#[derive(Clone)]
pub struct Progress {
    bars: MultiProgress,
    verbosity: i8,
    visible: bool,
}

impl Progress {
    /// Bars on stderr if it is a terminal and `visible`; log lines by `verbosity` (-1 quiet, 0 warnings, 1 and more details).
    pub fn stderr(visible: bool, verbosity: i8) -> Self {
        let target = if visible { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        Progress { bars: MultiProgress::with_draw_target(target), verbosity, visible: visible && console_is_terminal() }
    }

    /// Shows nothing: for tests and library users.
    pub fn hidden() -> Self {
        Progress { bars: MultiProgress::with_draw_target(ProgressDrawTarget::hidden()), verbosity: -1, visible: false }
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
