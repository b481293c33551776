//! One error type for the whole crate: a sentence, a hint, and who must act.

use crate::escape;
use std::{fmt, io, path::Path};

/// Shorthand used by every module.
pub type Result<T> = std::result::Result<T, Error>;

/// Who can mend it. Decides the exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind {
    /// The request is wrong: bad flag, bad config, malformed or mismatched input. Exit code 2.
    Request,
    /// The environment failed: I/O, out of memory, no such device. Exit code 3.
    Environment,
    /// The call was cancelled, by a signal or by a [`Cancellation`](crate::Cancellation). Exit code 3.
    Interrupted,
}

/// What failed, in one sentence that names the file, the tensor, what was expected and what was found;
/// and, if there is something to do about it, a hint.
#[derive(Clone, Debug)]
pub struct Error {
    /// Who can mend it.
    pub kind: Kind,
    /// One sentence, lower case, without a full stop.
    pub message: String,
    /// What to do, printed on a line of its own after `help:`.
    pub help: Option<String>,
}

impl Error {
    /// The user's input or request is wrong (exit code 2).
    pub fn request(message: impl Into<String>) -> Self {
        Error { kind: Kind::Request, message: message.into(), help: None }
    }

    /// An environment error: something outside the request failed (exit code 3).
    pub fn environment(message: impl Into<String>) -> Self {
        Error { kind: Kind::Environment, message: message.into(), help: None }
    }

    /// The former name of [`Error::environment`].
    #[doc(hidden)]
    pub fn world(message: impl Into<String>) -> Self {
        Error::environment(message)
    }

    /// An I/O failure on `path`; `action` reads as in "cannot {action} '{path}'".
    /// A missing input is an error of the request, everything else an environment error.
    pub fn io(action: &str, path: &Path, source: io::Error) -> Self {
        // One of ours that came through a reader of the standard library.
        if let Some(inner) = source.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) {
            return inner.clone();
        }
        let message = format!("cannot {action} '{}': {source}", path.display());
        // The kernel could not read what was to be written: the mapping of an input.
        if source.raw_os_error() == Some(libc::EFAULT) {
            return Error::environment(format!(
                "cannot {action} '{}': an input was cut short, or its disk failed, while it was read",
                path.display()
            ))
            .help("run again when nothing writes to the inputs, and check the disk");
        }
        match source.kind() {
            io::ErrorKind::UnexpectedEof => {
                let message = format!("cannot {action} '{}': it ends too early; it was cut short", path.display());
                Error::environment(message).help("run again when nothing writes to it, or download it again")
            }
            io::ErrorKind::NotFound => Error::request(message).help("check the path"),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
                Error::environment(message)
                    .help("free some space or choose another output folder; nothing was left behind")
            }
            io::ErrorKind::PermissionDenied => {
                Error::environment(message).help("check the permissions of the file and its folder")
            }
            _ => Error::environment(message),
        }
    }

    /// The user stopped the program (exit code 3).
    pub fn interrupted() -> Self {
        Error { kind: Kind::Interrupted, ..Error::environment("interrupted") }
    }

    /// Adds the hint that is printed after `help:`.
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// The process exit code of the contract.
    pub fn exit_code(&self) -> u8 {
        match self.kind {
            Kind::Request => 2,
            Kind::Environment | Kind::Interrupted => 3,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Names in it come from files: they must not control a terminal or forge lines.
        f.write_str(&escape::line(&self.message))
    }
}

impl std::error::Error for Error {}
