//! Outputs that are whole or absent: the one way in which this crate writes.
//!
//! A command first makes a [`Target`] from the path and from everything it reads; what may not be written is refused there,
//! before any work. Then everything goes to a temporary sibling under a random name, is synced, and renamed. A process that
//! dies leaves the old output (or none) and at most a hidden sibling `.NAME.tmp-RANDOM`, which the next one that writes the
//! same output removes. Dropping a staged output without committing it removes the sibling.

mod sibling;
mod target;

pub(crate) use sibling::abandon_all;
pub use target::{Holds, Target};

use crate::{
    error::{Error, Result},
    inputs::Inputs,
};
use sibling::{Sibling, parent};
use std::{
    fs::{self, File},
    io::Write,
    path::Path,
};
use target::Stream;

/// A folder that appears under its final name only when [`StagedDir::commit`] succeeds.
pub struct StagedDir {
    sibling: Sibling,
    target: Target,
}

impl StagedDir {
    /// Creates the temporary sibling of `target` (its parents too).
    pub fn create(target: Target) -> Result<Self> {
        debug_assert!(target.is_folder());
        Ok(StagedDir { sibling: Sibling::create(target.path(), true)?, target })
    }

    /// A folder inside one that this process owns, such as a checkpoint of a locked run. An old one is replaced.
    pub fn own(path: &Path) -> Result<Self> {
        Self::create(Target::own(path, Holds::Own)?)
    }

    /// Where files go until the commit.
    pub fn path(&self) -> &Path {
        self.sibling.path()
    }

    /// Syncs every file in it, then renames it to its final name. An old output is swapped out atomically. Refused if an
    /// input has changed meanwhile, or if something else has appeared under the final name.
    pub fn commit(self) -> Result<()> {
        sync_tree(self.sibling.path())?;
        self.target.inputs().check_unchanged()?;
        let replace = self.target.check()?;
        self.sibling.publish(self.target.path(), replace)?;
        sync(parent(self.target.path()))
    }
}

/// A file that appears under its final name only when [`StagedFile::commit`] succeeds.
pub struct StagedFile {
    sibling: Sibling,
    target: Target,
}

impl StagedFile {
    /// Creates the temporary sibling of `target` (its parents too), open for reading and writing.
    pub fn create(target: Target) -> Result<Self> {
        debug_assert!(!target.is_folder());
        Ok(StagedFile { sibling: Sibling::create(target.path(), false)?, target })
    }

    /// The open temporary file.
    pub fn file(&self) -> &File {
        self.sibling.file()
    }

    /// Where it is until the commit.
    pub fn path(&self) -> &Path {
        self.sibling.path()
    }

    /// The final name.
    pub fn target(&self) -> &Path {
        self.target.path()
    }

    /// Syncs the file and renames it to its final name, as [`StagedDir::commit`] does.
    pub fn commit(self) -> Result<()> {
        self.sibling.file().sync_all().map_err(|e| Error::io("sync", self.target.path(), e))?;
        self.target.inputs().check_unchanged()?;
        let replace = self.target.check()?;
        self.sibling.publish(self.target.path(), replace)?;
        sync(parent(self.target.path()))
    }
}

/// Writes a small file whole or not at all.
pub fn write_file(target: Target, bytes: &[u8]) -> Result<()> {
    let staged = StagedFile::create(target)?;
    staged.file().write_all(bytes).map_err(|e| Error::io("write", staged.target(), e))?;
    staged.commit()
}

/// Writes a text where it belongs: a file, whole or not at all, or stdout, a device or a pipe, which are written to.
/// A closed pipe (`| head`) is not an error.
pub fn write_text(target: Target, text: &str) -> Result<()> {
    let path = target.path();
    let written = match target.stream() {
        None => return write_file(target, text.as_bytes()),
        Some(Stream::Stdout) => {
            target.inputs().check_unchanged()?;
            let mut stdout = std::io::stdout().lock();
            stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush())
        }
        Some(Stream::Device) => {
            target.inputs().check_unchanged()?;
            // Neither created nor cut: it exists, and it is not a file.
            File::options().write(true).open(path).and_then(|mut device| device.write_all(text.as_bytes()))
        }
    };
    match written {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(Error::io("write", path, e)),
        _ => Ok(()),
    }
}

/// Writes a small file that is the program's own, in a folder that it owns (a run, a cache): an old one is replaced.
pub fn write_own(path: &Path, bytes: &[u8]) -> Result<()> {
    write_file(Target::own(path, Holds::File)?, bytes)
}

/// Removes a folder that this program wrote, if it holds nothing else.
pub fn remove_folder(folder: &Path, holds: Holds) -> Result<()> {
    if let Some(name) = target::foreign_entry(folder, holds, &Inputs::none())? {
        return Err(Error::request(format!(
            "'{}' holds '{}', which this command did not write; the folder is not removed",
            folder.display(),
            name.to_string_lossy()
        ))
        .help("move it away"));
    }
    fs::remove_dir_all(folder).map_err(|e| Error::io("remove", folder, e))
}

fn sync_tree(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir).map_err(|e| Error::io("read", dir, e))? {
        let path = entry.map_err(|e| Error::io("read", dir, e))?.path();
        if path.is_dir() {
            sync_tree(&path)?;
        } else {
            sync(&path)?;
        }
    }
    sync(dir)
}

fn sync(path: &Path) -> Result<()> {
    File::open(path).and_then(|f| f.sync_all()).map_err(|e| Error::io("sync", path, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_uncommitted_folder_leaves_nothing() {
        let root = tempfile::tempdir().unwrap();
        let target = Target::folder(&root.path().join("out"), Holds::Checkpoint, false, &Inputs::none()).unwrap();
        let staged = StagedDir::create(target).unwrap();
        fs::write(staged.path().join("a"), "x").unwrap();
        drop(staged);
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_forced_commit_replaces_the_old_folder_and_leaves_no_sibling() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("out");
        fs::create_dir(&path).unwrap();
        fs::write(path.join("model.safetensors"), "old").unwrap();
        let target = |force| Target::folder(&path, Holds::Checkpoint, force, &Inputs::none());
        assert!(target(false).is_err());
        let staged = StagedDir::create(target(true).unwrap()).unwrap();
        fs::write(staged.path().join("config.json"), "new").unwrap();
        staged.commit().unwrap();
        assert!(path.join("config.json").exists() && !path.join("model.safetensors").exists());
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_appears_in_the_old_folder_while_the_command_runs_is_not_removed() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("out");
        fs::create_dir(&path).unwrap();
        let target = Target::folder(&path, Holds::Checkpoint, true, &Inputs::none()).unwrap();
        let staged = StagedDir::create(target).unwrap();
        fs::write(path.join("notes"), "precious").unwrap();
        assert!(staged.commit().unwrap_err().message.contains("holds 'notes'"));
        assert_eq!(fs::read_to_string(path.join("notes")).unwrap(), "precious");
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
    }
}
