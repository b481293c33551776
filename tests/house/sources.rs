//! The files of the crate as text.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// Every file below src/: its path, its top-level module, its code without comments and unit tests.
pub fn sources() -> Vec<(PathBuf, String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let relative = path.strip_prefix(&root).unwrap();
                let module = Path::new(relative.components().next().unwrap().as_os_str()).with_extension("");
                let text = fs::read_to_string(&path).unwrap();
                let code = without_unit_tests(&text);
                let code: String =
                    code.lines().filter(|l| !l.trim_start().starts_with("//")).flat_map(|l| [l, "\n"]).collect();
                files.push((path, module.to_string_lossy().into_owned(), code));
            }
        }
    }
    assert!(files.len() > 15, "found only {} source files", files.len());
    files.sort();
    files
}

/// What stands before the module of unit tests, the last item of a file.
fn without_unit_tests(text: &str) -> &str {
    let is_tests = |at: usize| {
        let item = text[at..].lines().nth(1).unwrap_or("").trim_start();
        item.starts_with("mod ") || item.starts_with("pub mod ") || item.starts_with("pub(super) mod ")
    };
    let end = text.match_indices("#[cfg(test)]\n").map(|(at, _)| at).find(|&at| is_tests(at));
    &text[..end.unwrap_or(text.len())]
}
