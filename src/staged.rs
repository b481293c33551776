//! Outputs that are whole or absent: everything is written to a temporary sibling, synced, then renamed.
//!
//! A process that dies leaves the old output (or none) and at most a hidden sibling `.NAME.tmp-PID`, which the next one
//! that writes the same output removes. Dropping a staged output without committing it removes the sibling.

use crate::error::{Error, Result};
use rustix::fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with};
use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
};

/// Refuses an output that exists, unless `force`. Call it before any heavy work.
pub fn refuse_existing(path: &Path, force: bool) -> Result<()> {
    if !force && path.symlink_metadata().is_ok() {
        return Err(Error::request(format!("output '{}' exists already", path.display()))
            .help("choose another output, or pass --force to replace it"));
    }
    Ok(())
}

/// A folder that appears under its final name only when [`StagedDir::commit`] succeeds.
pub struct StagedDir {
    temporary: PathBuf,
    target: PathBuf,
    force: bool,
    // Says that its owner lives.
    _lock: File,
}

impl StagedDir {
    /// Creates the temporary sibling of `target` (its parents too).
    pub fn create(target: &Path, force: bool) -> Result<Self> {
        refuse_existing(target, force)?;
        let temporary = sibling(target)?;
        if temporary.exists() {
            fs::remove_dir_all(&temporary).map_err(|e| Error::io("remove", &temporary, e))?;
        }
        remove_stale(target);
        create_dirs(&temporary)?;
        let lock = File::open(&temporary).map_err(|e| Error::io("open", &temporary, e))?;
        lock_for_life(&lock);
        Ok(StagedDir { temporary, target: target.to_owned(), force, _lock: lock })
    }

    /// Where files go until the commit.
    pub fn path(&self) -> &Path {
        &self.temporary
    }

    /// Syncs every file in it, then renames it to its final name. An old output is swapped out atomically.
    pub fn commit(self) -> Result<()> {
        sync_tree(&self.temporary)?;
        swap_in(&self.temporary, &self.target, self.force)?;
        sync_dir(parent(&self.target))
    }
}

impl Drop for StagedDir {
    fn drop(&mut self) {
        // After a commit this is the replaced output, or nothing.
        let _ = fs::remove_dir_all(&self.temporary).or_else(|_| fs::remove_file(&self.temporary));
    }
}

/// A file that appears under its final name only when [`StagedFile::commit`] succeeds.
pub struct StagedFile {
    temporary: PathBuf,
    target: PathBuf,
    force: bool,
    file: File,
}

impl StagedFile {
    /// Creates the temporary sibling of `target` (its parents too), open for reading and writing.
    pub fn create(target: &Path, force: bool) -> Result<Self> {
        refuse_existing(target, force)?;
        create_dirs(parent(target))?;
        let temporary = sibling(target)?;
        remove_stale(target);
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&temporary);
        let file = file.map_err(|e| Error::io("create", &temporary, e))?;
        lock_for_life(&file);
        Ok(StagedFile { temporary, target: target.to_owned(), force, file })
    }

    /// The open temporary file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Where it is until the commit.
    pub fn path(&self) -> &Path {
        &self.temporary
    }

    /// The final name.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Syncs the file and renames it to its final name.
    pub fn commit(self) -> Result<()> {
        self.file.sync_all().map_err(|e| Error::io("sync", &self.target, e))?;
        swap_in(&self.temporary, &self.target, self.force)?;
        sync_dir(parent(&self.target))
    }
}

impl Drop for StagedFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.temporary).or_else(|_| fs::remove_dir_all(&self.temporary));
    }
}

/// Writes a small file whole or not at all.
pub fn write_file(target: &Path, bytes: &[u8], force: bool) -> Result<()> {
    let staged = StagedFile::create(target, force)?;
    staged.file().write_all(bytes).map_err(|e| Error::io("write", target, e))?;
    staged.commit()
}

fn sibling(target: &Path) -> Result<PathBuf> {
    let prefix = sibling_prefix(target).ok_or_else(|| {
        Error::request(format!("'{}' does not name an output", target.display())).help("give a file or folder name")
    })?;
    Ok(target.with_file_name(format!("{prefix}{}", std::process::id())))
}

fn sibling_prefix(target: &Path) -> Option<String> {
    Some(format!(".{}.tmp-", target.file_name()?.to_string_lossy()))
}

/// The kernel holds the lock until the file is closed, by us or by our death. Where it cannot lock, nothing is stale.
fn lock_for_life(file: &File) {
    let _ = flock(file, FlockOperation::NonBlockingLockExclusive);
}

/// Removes what killed processes left of the same output. What cannot be removed is not in the way of a new one.
fn remove_stale(target: &Path) {
    let (Some(prefix), Ok(entries)) = (sibling_prefix(target), fs::read_dir(parent(target))) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let pid = name.strip_prefix(&prefix).and_then(|pid| pid.parse::<u32>().ok());
        // Links are not ours: we make files and folders.
        let ours = entry.file_type().is_ok_and(|t| t.is_dir() || t.is_file());
        if !ours || pid.is_none_or(|pid| pid == std::process::id()) {
            continue;
        }
        let path = entry.path();
        let abandoned = File::open(&path).is_ok_and(|f| flock(&f, FlockOperation::NonBlockingLockExclusive).is_ok());
        if abandoned {
            let _ = fs::remove_dir_all(&path).or_else(|_| fs::remove_file(&path));
        }
    }
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    }
}

fn create_dirs(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(|e| Error::io("create", path, e))
}

fn swap_in(temporary: &Path, target: &Path, force: bool) -> Result<()> {
    let flags = if force && target.symlink_metadata().is_ok() { RenameFlags::EXCHANGE } else { RenameFlags::NOREPLACE };
    match renameat_with(CWD, temporary, CWD, target, flags) {
        Ok(()) => Ok(()),
        // Some file systems know no flags: fall back to the plain rename, checked just before.
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => {
            refuse_existing(target, force)?;
            if target.is_dir() {
                fs::remove_dir_all(target).map_err(|e| Error::io("replace", target, e))?;
            }
            fs::rename(temporary, target).map_err(|e| Error::io("create", target, e))
        }
        Err(e) => Err(Error::io("create", target, e.into())),
    }
}

fn sync_tree(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir).map_err(|e| Error::io("read", dir, e))? {
        let path = entry.map_err(|e| Error::io("read", dir, e))?.path();
        if path.is_dir() {
            sync_tree(&path)?;
        } else {
            sync_dir(&path)?;
        }
    }
    sync_dir(dir)
}

fn sync_dir(path: &Path) -> Result<()> {
    File::open(path).and_then(|f| f.sync_all()).map_err(|e| Error::io("sync", path, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_uncommitted_folder_leaves_nothing() {
        let root = tempfile::tempdir().unwrap();
        let staged = StagedDir::create(&root.path().join("out"), false).unwrap();
        fs::write(staged.path().join("a"), "x").unwrap();
        drop(staged);
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_a_killed_process_left_is_removed_and_what_a_living_one_holds_is_not() {
        let root = tempfile::tempdir().unwrap();
        let place = |name: &str| root.path().join(name);
        for folder in [".out.tmp-1", ".out.tmp-2", ".other.tmp-1", ".out.tmp-x"] {
            fs::create_dir(place(folder)).unwrap();
            fs::write(place(folder).join("model.safetensors"), "half").unwrap();
        }
        fs::write(place(".out.tmp-3"), "a half file").unwrap();
        let living = File::open(place(".out.tmp-2")).unwrap();
        lock_for_life(&living);
        let staged = StagedDir::create(&place("out"), false).unwrap();
        let left = |name: &str| place(name).exists();
        assert!(!left(".out.tmp-1") && !left(".out.tmp-3"), "abandoned");
        assert!(left(".out.tmp-2") && left(".other.tmp-1") && left(".out.tmp-x"), "not ours to remove");
        drop(staged);
        drop(living);
        drop(StagedFile::create(&place("out"), false).unwrap());
        assert!(!left(".out.tmp-2"));
    }

    #[test]
    fn a_forced_commit_replaces_the_old_folder_and_leaves_no_sibling() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("out");
        fs::create_dir(&target).unwrap();
        fs::write(target.join("old"), "x").unwrap();
        assert!(StagedDir::create(&target, false).is_err());
        let staged = StagedDir::create(&target, true).unwrap();
        fs::write(staged.path().join("new"), "y").unwrap();
        staged.commit().unwrap();
        assert!(target.join("new").exists() && !target.join("old").exists());
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
    }
}
