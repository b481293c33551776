//! What a command reads: regular files only, watched from the moment they are opened.
//!
//! A pipe or a device would be waited for without end, or read without end; both are refused before they are opened. A file
//! that is mapped stays open, and its length and time of modification are compared before anything that depends on it is
//! published ([`check_unchanged`]).

use crate::error::{Error, Result};
use std::{
    fs::{self, File, Metadata},
    io::Read,
    ops::Range,
    os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

/// Opens a regular file for reading. Pipes, devices, sockets and folders are refused (exit code 2) without waiting.
pub fn open(path: &Path) -> Result<File> {
    // Not even the opening of a pipe waits; for regular files the flag means nothing.
    let opened = File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path);
    let refused = |meta: &Metadata| {
        Error::request(format!("'{}' is {}, expected a regular file", path.display(), kind(meta)))
            .help("write its content to a file first")
    };
    let file = match opened {
        Ok(file) => file,
        Err(e) => match path.metadata() {
            Ok(meta) if !meta.is_file() => return Err(refused(&meta)),
            _ => return Err(Error::io("open", path, e)),
        },
    };
    let meta = file.metadata().map_err(|e| Error::io("open", path, e))?;
    match meta.is_file() {
        true => Ok(file),
        false => Err(refused(&meta)),
    }
}

/// Reads a regular file of at most `limit` bytes whole.
pub fn read(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let file = open(path)?;
    let len = file.metadata().map_err(|e| Error::io("read", path, e))?.len();
    let too_large = || {
        Error::request(format!(
            "'{}' is larger than {limit} bytes, more than a file of its kind may have",
            path.display()
        ))
    };
    if len > limit {
        return Err(too_large());
    }
    let mut bytes = Vec::with_capacity(len as usize);
    file.take(limit + 1).read_to_end(&mut bytes).map_err(|e| Error::io("read", path, e))?;
    if bytes.len() as u64 > limit {
        return Err(too_large());
    }
    Ok(bytes)
}

/// What a file that is not regular is, with its article.
pub fn kind(meta: &Metadata) -> &'static str {
    let kind = meta.file_type();
    match () {
        () if kind.is_dir() => "a folder",
        () if kind.is_fifo() => "a pipe",
        () if kind.is_socket() => "a socket",
        () if kind.is_symlink() => "a symbolic link",
        () if kind.is_block_device() || kind.is_char_device() => "a device",
        () => "a regular file",
    }
}

/// The files and folders that a command reads, resolved: what its outputs must not replace.
#[derive(Clone, Debug, Default)]
pub struct Inputs {
    paths: Vec<(PathBuf, PathBuf)>,
}

impl Inputs {
    /// These files and folders. One that cannot be found is left to the command to report.
    pub fn of<P: AsRef<Path>>(paths: impl IntoIterator<Item = P>) -> Inputs {
        let mut inputs = Inputs::default();
        inputs.extend(paths);
        inputs
    }

    /// For a command that reads no file.
    pub fn none() -> Inputs {
        Inputs::default()
    }

    /// Adds these files and folders.
    pub fn extend<P: AsRef<Path>>(&mut self, paths: impl IntoIterator<Item = P>) {
        for path in paths {
            let path = path.as_ref();
            if let Ok(resolved) = path.canonicalize() {
                self.paths.push((path.to_owned(), resolved));
            }
        }
    }

    /// As given, and resolved.
    pub(crate) fn resolved(&self) -> impl Iterator<Item = (&Path, &Path)> {
        self.paths.iter().map(|(given, resolved)| (given.as_path(), resolved.as_path()))
    }

    /// Whether one of the folders has an entry of this name.
    pub(crate) fn have_entry(&self, name: &std::ffi::OsStr) -> bool {
        self.paths.iter().any(|(_, resolved)| resolved.join(name).symlink_metadata().is_ok())
    }

    /// The input, or the file in one of the input folders, that is the same file as `meta` under another name.
    pub(crate) fn same_file(&self, meta: &Metadata) -> Option<PathBuf> {
        let is_it = |other: &Metadata| (other.dev(), other.ino()) == (meta.dev(), meta.ino());
        let mut waiting: Vec<PathBuf> = self.paths.iter().map(|(_, resolved)| resolved.clone()).collect();
        while let Some(path) = waiting.pop() {
            let Ok(found) = path.symlink_metadata() else { continue };
            if is_it(&found) || (found.is_symlink() && path.metadata().is_ok_and(|m| is_it(&m))) {
                return Some(path);
            }
            if found.is_dir() {
                waiting.extend(fs::read_dir(&path).into_iter().flatten().flatten().map(|entry| entry.path()));
            }
        }
        None
    }
}

/// A file that is read through a mapping, from its opening to the end of the mapping.
pub struct Watched {
    entry: Arc<Entry>,
}

struct Entry {
    path: PathBuf,
    // Shared: a model of hundreds of shards would run out of descriptors.
    file: Arc<File>,
    len: u64,
    modified: (i64, i64),
    span: Mutex<Range<usize>>,
}

/// All that are mapped now, and the first that was found changed when its mapping ended.
static WATCHED: Mutex<Watch> = Mutex::new((Vec::new(), None));

type Watch = (Vec<Arc<Entry>>, Option<(PathBuf, Error)>);

impl Watched {
    /// Remembers what `file` is like now.
    pub fn new(file: Arc<File>, path: &Path) -> Result<Watched> {
        let io = |e| Error::io("read", path, e);
        let meta = file.metadata().map_err(io)?;
        let entry = Arc::new(Entry {
            path: path.to_owned(),
            file,
            len: meta.len(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            span: Mutex::new(0..0),
        });
        lock(&WATCHED).0.push(entry.clone());
        Ok(Watched { entry })
    }

    /// Says where in memory the file is mapped.
    pub fn mapped(&self, bytes: &[u8]) {
        let begin = bytes.as_ptr() as usize;
        *lock(&self.entry.span) = begin..begin + bytes.len();
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        let changed = self.entry.check().err();
        let mut watched = lock(&WATCHED);
        watched.0.retain(|entry| !Arc::ptr_eq(entry, &self.entry));
        watched.1 = watched.1.take().or(changed.map(|e| (self.entry.path.clone(), e)));
    }
}

impl Entry {
    fn check(&self) -> Result<()> {
        let meta = self.file.metadata().map_err(|e| Error::io("read", &self.path, e))?;
        let path = self.path.display();
        let what = match meta.len() == self.len {
            false => format!("'{path}' changed while it was read: it had {} bytes and has {}", self.len, meta.len()),
            true if (meta.mtime(), meta.mtime_nsec()) != self.modified => {
                format!("'{path}' changed while it was read: it was written to")
            }
            true => return Ok(()),
        };
        Err(Error::environment(what).help("the output was withheld; run again when nothing writes to the inputs"))
    }
}

/// An error (exit code 3) if a file that was read through a mapping is not what it was when it was opened. Results that may
/// hold parts of two files are withheld by it.
pub fn check_unchanged() -> Result<()> {
    let mut watched = lock(&WATCHED);
    // Reported once: a program that goes on after the error is told about later changes only.
    watched.1.take().map_or(Ok(()), |(_, e)| Err(e))?;
    watched.0.iter().try_for_each(|entry| entry.check())
}

impl Inputs {
    /// [`check_unchanged`], of these files and those in these folders: what else a library's caller reads or writes meanwhile does not
    /// matter to them.
    pub fn check_unchanged(&self) -> Result<()> {
        let ours = |path: &Path| {
            let resolved = path.canonicalize().unwrap_or_else(|_| path.to_owned());
            self.paths.iter().any(|(given, input)| path.starts_with(given) || resolved.starts_with(input))
        };
        let mut watched = lock(&WATCHED);
        if let Some((_, e)) = watched.1.take_if(|(path, _)| ours(path)) {
            return Err(e);
        }
        watched.0.iter().filter(|entry| ours(&entry.path)).try_for_each(|entry| entry.check())
    }
}

/// The mapped file that this address belongs to.
pub fn mapped_at(address: usize) -> Option<PathBuf> {
    lock(&WATCHED).0.iter().find(|entry| lock(&entry.span).contains(&address)).map(|entry| entry.path.clone())
}

/// A thread that panicked has left nothing half done here.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn pipes_devices_and_folders_are_refused_at_once() {
        let root = tempfile::tempdir().unwrap();
        let pipe = root.path().join("pipe");
        rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR).unwrap();
        for (path, what) in [(&*pipe, "a pipe"), (Path::new("/dev/zero"), "a device"), (root.path(), "a folder")] {
            let error = open(path).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            assert!(error.message.ends_with(&format!("is {what}, expected a regular file")), "{error}");
        }
        assert!(open(&root.path().join("none")).unwrap_err().message.contains("No such file"));
    }

    #[test]
    fn a_file_above_the_limit_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().write_all(b"12345").unwrap();
        assert_eq!(read(file.path(), 5).unwrap(), b"12345");
        assert!(read(file.path(), 4).unwrap_err().message.contains("larger than 4 bytes"));
    }
}
