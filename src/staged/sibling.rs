//! Temporary siblings of outputs: made new under a random name, locked while their owner lives, removed when it ends.

use crate::error::{Error, Result};
use rustix::fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with};
use std::{
    ffi::{OsStr, OsString},
    fs::{self, File, Metadata},
    io::Read,
    os::unix::{
        ffi::OsStrExt,
        fs::{MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

/// A hidden file or folder beside its target. Dropped before [`Sibling::publish`], it is removed.
pub(super) struct Sibling {
    path: PathBuf,
    identity: (u64, u64),
    // Open and locked: says that its owner lives.
    file: File,
    published: bool,
}

/// The siblings of this process; `None` once the process is ending, when nothing may be published any more.
static LIVE: Mutex<Option<Vec<PathBuf>>> = Mutex::new(Some(Vec::new()));

fn live() -> std::sync::MutexGuard<'static, Option<Vec<PathBuf>>> {
    LIVE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Removes all siblings of this process, for good: nothing is published after it. Called on the way out.
pub(crate) fn abandon_all() {
    for path in live().take().unwrap_or_default() {
        // Other threads may still be creating files in it.
        (0..3).any(|_| remove(&path).is_ok());
    }
}

impl Sibling {
    /// Creates a sibling of `target`, removing what processes that died left of the same target.
    pub(super) fn create(target: &Path, is_folder: bool) -> Result<Sibling> {
        let prefix = prefix(target)?;
        create_dirs(parent(target))?;
        remove_stale(target, &prefix);
        let mut lost = 0;
        loop {
            let path = target.with_file_name(with_suffix(&prefix));
            // Registered first: a signal between the two leaves nothing.
            let mut live_siblings = live();
            let Some(paths) = live_siblings.as_mut() else { return Err(Error::interrupted()) };
            let created = match is_folder {
                true => fs::create_dir(&path).and_then(|()| File::open(&path)),
                false => {
                    File::options().read(true).write(true).create_new(true).custom_flags(libc::O_NOFOLLOW).open(&path)
                }
            };
            match created {
                Ok(file) => {
                    paths.push(path.clone());
                    drop(live_siblings);
                    lock_for_life(&file);
                    let meta = file.metadata().map_err(|e| Error::io("create", &path, e))?;
                    let sibling = Sibling { path, identity: identity(&meta), file, published: false };
                    // Between its creation and its lock another process may have taken it for abandoned.
                    if sibling.is_in_place() {
                        return Ok(sibling);
                    }
                }
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(Error::io("create", &path, e)),
            }
            lost += 1;
            if lost == 100 {
                return Err(Error::environment(format!(
                    "cannot create a temporary file beside '{}': each is taken away at once",
                    target.display()
                )));
            }
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Whether its name still leads to what was created under it.
    fn is_in_place(&self) -> bool {
        self.path.symlink_metadata().is_ok_and(|meta| identity(&meta) == self.identity)
    }

    /// Renames it to `target`, swapping it with what is there if `replace`.
    pub(super) fn publish(mut self, target: &Path, replace: bool) -> Result<()> {
        // Held to the end: a process that is ending removes siblings or lets them be published, never both.
        let live_siblings = live();
        if live_siblings.is_none() {
            return Err(Error::interrupted());
        }
        let foreign = || {
            Error::environment(format!(
                "'{}' was replaced by another process while this one wrote it; '{}' was not made",
                self.path.display(),
                target.display()
            ))
            .help("run again; keep other programs from changing hidden files beside the output")
        };
        if !self.is_in_place() {
            return Err(foreign());
        }
        rename(&self.path, target, replace)?;
        if !target.symlink_metadata().is_ok_and(|meta| identity(&meta) == self.identity) {
            return Err(foreign());
        }
        self.published = true;
        Ok(())
    }
}

impl Drop for Sibling {
    fn drop(&mut self) {
        // After a publication this is the replaced output, or nothing. Before it, what another put there is not ours.
        if self.published || self.is_in_place() {
            let _ = remove(&self.path);
        }
        if let Some(paths) = live().as_mut() {
            paths.retain(|path| *path != self.path);
        }
    }
}

fn identity(meta: &Metadata) -> (u64, u64) {
    (meta.dev(), meta.ino())
}

/// Removes a file, a link itself, or a folder with what is in it; no link is followed.
fn remove(path: &Path) -> std::io::Result<()> {
    match path.symlink_metadata() {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
    }
}

/// `.NAME.tmp-`, or an error where the path has no last name.
pub(super) fn prefix(target: &Path) -> Result<OsString> {
    let name = target.file_name().ok_or_else(|| {
        Error::request(format!("'{}' does not name an output", target.display())).help("give a file or folder name")
    })?;
    // A name has at most 255 bytes; of a long one the front is enough.
    let front = OsStr::from_bytes(&name.as_bytes()[..name.len().min(200)]);
    Ok([OsStr::new("."), front, OsStr::new(".tmp-")].into_iter().collect())
}

/// 64 random bits in hexadecimal digits.
fn with_suffix(prefix: &OsStr) -> OsString {
    use std::hash::{BuildHasher, Hasher};
    let mut bytes = [0u8; 8];
    if File::open("/dev/urandom").and_then(|mut source| source.read_exact(&mut bytes)).is_err() {
        // The standard library's keys are random, too.
        bytes = std::hash::RandomState::new().build_hasher().finish().to_le_bytes();
    }
    let mut name = prefix.to_owned();
    name.push(format!("{:016x}", u64::from_le_bytes(bytes)));
    name
}

/// The kernel holds the lock until the file is closed, by its owner or by the owner's death. Where it cannot lock, nothing
/// counts as abandoned.
pub(super) fn lock_for_life(file: &File) {
    let _ = flock(file, FlockOperation::NonBlockingLockExclusive);
}

/// Removes what processes that died left of the same output. What cannot be removed is not in the way of a new one.
fn remove_stale(target: &Path, prefix: &OsStr) {
    let Ok(entries) = fs::read_dir(parent(target)) else { return };
    let user = Path::new("/proc/self").metadata().ok().map(|m| m.uid());
    for entry in entries.flatten() {
        let name = entry.file_name();
        let suffix = name.as_bytes().strip_prefix(prefix.as_bytes());
        // Earlier versions used the process's number.
        let by_us = suffix.is_some_and(|s| !s.is_empty() && s.len() <= 16 && s.iter().all(u8::is_ascii_hexdigit));
        // Links are not ours: we make files and folders. Nor is what another user made.
        let ours =
            entry.metadata().is_ok_and(|m| (m.is_dir() || m.is_file()) && user.is_none_or(|user| m.uid() == user));
        if !(by_us && ours) {
            continue;
        }
        let path = entry.path();
        let opened = File::options().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(&path);
        // Kept locked while it is removed.
        let Ok(file) = opened else { continue };
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
            let _ = remove(&path);
        }
    }
}

pub(super) fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    }
}

fn create_dirs(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(|e| Error::io("create", path, e))
}

fn rename(from: &Path, to: &Path, replace: bool) -> Result<()> {
    let flags = if replace { RenameFlags::EXCHANGE } else { RenameFlags::NOREPLACE };
    match renameat_with(CWD, from, CWD, to, flags) {
        Ok(()) => Ok(()),
        // Some file systems know no flags.
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS | rustix::io::Errno::NOTSUP) => {
            rename_without_flags(from, to, replace)
        }
        Err(rustix::io::Errno::EXIST) => Err(appeared(to)),
        Err(e) => Err(Error::io("create", to, e.into())),
    }
}

fn appeared(to: &Path) -> Error {
    Error::request(format!("output '{}' exists already: it appeared while this command ran", to.display()))
        .help("choose another output, or pass --force to replace it")
}

/// The old output goes aside first, so that there is no moment at which it is half removed.
fn rename_without_flags(from: &Path, to: &Path, replace: bool) -> Result<()> {
    let io = |e| Error::io("create", to, e);
    if to.symlink_metadata().is_ok() {
        if !replace {
            return Err(appeared(to));
        }
        let aside = to.with_file_name(with_suffix(&prefix(to)?));
        fs::rename(to, &aside).map_err(io)?;
        if let Err(e) = fs::rename(from, to) {
            let _ = fs::rename(&aside, to);
            return Err(io(e));
        }
        let _ = remove(&aside);
        return Ok(());
    }
    fs::rename(from, to).map_err(io)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_killed_process_left_is_removed_and_what_a_living_one_holds_is_not() {
        let root = tempfile::tempdir().unwrap();
        let place = |name: &str| root.path().join(name);
        for folder in [".out.tmp-1", ".out.tmp-2", ".other.tmp-1", ".out.tmp-x", ".out.tmp-0123456789abcdef"] {
            fs::create_dir(place(folder)).unwrap();
            fs::write(place(folder).join("model.safetensors"), "half").unwrap();
        }
        fs::write(place(".out.tmp-3"), "a half file").unwrap();
        fs::write(place("precious"), "x").unwrap();
        std::os::unix::fs::symlink("precious", place(".out.tmp-4")).unwrap();
        let living = File::open(place(".out.tmp-2")).unwrap();
        lock_for_life(&living);
        let sibling = Sibling::create(&place("out"), true).unwrap();
        let left = |name: &str| place(name).symlink_metadata().is_ok();
        assert!(!left(".out.tmp-1") && !left(".out.tmp-3") && !left(".out.tmp-0123456789abcdef"), "abandoned");
        assert!(left(".out.tmp-2") && left(".other.tmp-1") && left(".out.tmp-x"), "not ours to remove");
        assert!(left(".out.tmp-4") && left("precious"), "a link is not ours");
        drop(sibling);
        drop(living);
        drop(Sibling::create(&place("out"), false).unwrap());
        assert!(!left(".out.tmp-2"));
    }

    #[test]
    fn two_owners_of_one_target_never_share_a_sibling_even_under_one_pid() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("out");
        let (first, second) = (Sibling::create(&target, true).unwrap(), Sibling::create(&target, true).unwrap());
        fs::write(first.path().join("a"), "first").unwrap();
        fs::write(second.path().join("a"), "second").unwrap();
        first.publish(&target, false).unwrap();
        assert_eq!(fs::read_to_string(target.join("a")).unwrap(), "first");
        let error = second.publish(&target, false).unwrap_err();
        assert!(error.message.contains("appeared while this command ran"), "{error}");
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_sibling_that_another_process_replaced_is_not_published() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("out");
        let sibling = Sibling::create(&target, true).unwrap();
        fs::rename(sibling.path(), root.path().join("stolen")).unwrap();
        fs::create_dir(sibling.path()).unwrap();
        fs::write(sibling.path().join("model.safetensors"), "half of another").unwrap();
        let error = sibling.publish(&target, false).unwrap_err();
        assert!(error.message.contains("was replaced by another process"), "{error}");
        assert_eq!((error.exit_code(), target.exists()), (3, false));
    }

    #[test]
    fn file_systems_without_flags_keep_the_old_output_until_the_new_one_is_there() {
        let root = tempfile::tempdir().unwrap();
        let (from, to) = (root.path().join("new"), root.path().join("out"));
        for (folder, text) in [(&from, "new"), (&to, "old")] {
            fs::create_dir(folder).unwrap();
            fs::write(folder.join("a"), text).unwrap();
        }
        assert!(rename_without_flags(&from, &to, false).is_err());
        rename_without_flags(&from, &to, true).unwrap();
        assert_eq!(fs::read_to_string(to.join("a")).unwrap(), "new");
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
    }
}
