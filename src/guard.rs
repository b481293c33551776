//! Libraries that panic on damaged input are called here: what they say becomes an error of ours.

use crate::error::{Error, Result};
use std::{
    any::Any,
    cell::Cell,
    panic::{self, AssertUnwindSafe},
    path::Path,
    sync::Once,
};

thread_local! {
    static GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// Runs `work`, which reads `path` through a library. A panic in it is an error of the file (exit code 2); nothing is
/// printed. What `work` changed before is dropped or thrown away by the caller.
pub fn caught<T>(path: &Path, what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    silence();
    let before = GUARDED.replace(true);
    let result = panic::catch_unwind(AssertUnwindSafe(work));
    GUARDED.set(before);
    result.unwrap_or_else(|payload| {
        Err(Error::request(format!("'{}' is not a valid {what}: {}", path.display(), words(&*payload)))
            .help("download or write it again"))
    })
}

/// What a panic said.
pub fn words(payload: &(dyn Any + Send)) -> &str {
    let text = payload.downcast_ref::<&str>().copied();
    text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("it cannot be read")
}

/// Keeps the usual message from stderr where the panic becomes an error.
fn silence() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let usual = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !GUARDED.get() {
                usual(info);
            }
        }));
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_of_a_library_is_an_error_that_names_the_file() {
        let numbers: Vec<u8> = Vec::new();
        let error =
            caught(Path::new("a.parquet"), "Parquet file", || Ok(numbers[std::hint::black_box(3)])).unwrap_err();
        assert!(error.message.starts_with("'a.parquet' is not a valid Parquet file: index out of bounds"), "{error}");
        assert_eq!(error.exit_code(), 2);
        assert_eq!(caught(Path::new("a"), "file", || Ok(7)).unwrap(), 7);
    }
}
