//! Opening what is read once from front to back: a file or a pipe.

use crate::error::{Error, Result};
use std::{
    cell::Cell,
    fs::File,
    io::{self, IsTerminal, Read},
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
    rc::Rc,
};

/// Opens a file, a pipe or a terminal. Other devices are refused: most never end.
pub fn open(path: &Path) -> Result<Box<dyn Read>> {
    let kind = path.metadata().map_err(|e| Error::io("open", path, e))?.file_type();
    let refused = || {
        Error::request(format!("'{}' is neither a file nor a pipe, expected text or records", path.display()))
            .help("name a file, a folder or a pipe")
    };
    if kind.is_block_device() || kind.is_dir() || kind.is_socket() {
        return Err(refused());
    }
    let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
    if kind.is_char_device() && !file.is_terminal() {
        return Err(refused());
    }
    Ok(Box::new(file))
}

/// `source`, which fails with an error of ours once it has given more than `limit` bytes since the returned count was last
/// set to 0.
pub fn limited(source: Box<dyn Read>, path: &Path, limit: u64) -> (Box<dyn Read>, Rc<Cell<u64>>) {
    let spent = Rc::new(Cell::new(0));
    (Box::new(Limited { source, path: path.to_owned(), limit, spent: spent.clone() }), spent)
}

struct Limited {
    source: Box<dyn Read>,
    path: PathBuf,
    limit: u64,
    spent: Rc<Cell<u64>>,
}

impl Read for Limited {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.source.read(buffer)?;
        self.spent.set(self.spent.get() + read as u64);
        if self.spent.get() > self.limit {
            let what = format!("'{}' holds a document of more than {} bytes", self.path.display(), self.limit);
            return Err(io::Error::other(
                Error::request(what).help("split it, or let --max-bytes be as large as it is"),
            ));
        }
        Ok(read)
    }
}

/// The error of a read of `path`. What a decompressor refuses is the file's fault, not the machine's.
pub fn read_error(path: &Path, e: io::Error) -> Error {
    use io::ErrorKind::{InvalidData, InvalidInput, Other, UnexpectedEof};
    match e.kind() {
        _ if e.get_ref().is_some_and(|inner| inner.is::<Error>()) => Error::io("read", path, e),
        InvalidData | InvalidInput | Other | UnexpectedEof => {
            Error::request(format!("'{}' is damaged or cut short: {e}", path.display()))
                .help("write or download it again")
        }
        _ => Error::io("read", path, e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_and_folders_are_refused() {
        for path in ["/dev/zero", "/dev/null", "/"] {
            let error = open(Path::new(path)).err().unwrap();
            assert!(error.message.contains("is neither a file nor a pipe"), "{error}");
        }
    }
}
