//! What the tests of the commands share.
#![allow(dead_code, missing_docs)]

pub mod autograd;
pub mod cuda_emulator;
pub mod entry_points;
pub mod fixtures;
pub mod processes;
pub mod small_merge;
pub mod small_run;
pub mod synthetic_run;
pub mod workshop;

use assert_cmd::Command;
use std::path::{Path, PathBuf};

/// The folder with the reference values, if there is one.
pub fn oracles() -> Option<PathBuf> {
    let folder = std::env::var_os("RELORA_KIT_ORACLES").map(PathBuf::from);
    if folder.is_none() {
        println!("skipped: RELORA_KIT_ORACLES is not set");
    }
    folder
}

/// The program, not yet started.
pub fn relora_kit() -> Command {
    let mut command = Command::cargo_bin("relora-kit").unwrap();
    command.arg("--progress").arg("never");
    command
}

/// Runs the program and returns exit code, stdout and stderr.
pub fn run<S: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = S>) -> (i32, String, String) {
    let output = relora_kit().args(args).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap_or(-1), text(output.stdout), text(output.stderr))
}

/// Runs the program and expects it to refuse with `code` and a sentence that holds each of `parts`.
#[track_caller]
pub fn refused<S: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = S>, code: i32, parts: &[&str]) -> String {
    let (found, _, stderr) = run(args);
    assert_eq!(found, code, "{stderr}");
    assert!(stderr.contains("error: "), "{stderr}");
    for part in parts {
        assert!(stderr.contains(part), "expected '{part}' in: {stderr}");
    }
    stderr
}

/// Runs a shell script while a disk of `size` is mounted at `place`, which is created; returns stdout and stderr, or `None`
/// where that is not permitted.
pub fn on_small_disk(place: &Path, size: &str, script: &str) -> Option<(String, String)> {
    std::fs::create_dir(place).unwrap();
    // A mount namespace of its own: the disk is gone when the shell ends, whatever happens.
    let script = format!("mount -t tmpfs -o size={size} tmpfs {place:?} || exit 77\n{script}");
    let output =
        std::process::Command::new("unshare").args(["--map-root-user", "--mount", "sh", "-c", &script]).output();
    let Some(output) = output.ok().filter(|o| o.status.success()) else {
        println!("skipped: mounting a tmpfs in a namespace is not permitted here");
        return None;
    };
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Some((text(&output.stdout), text(&output.stderr)))
}

/// Names in a folder, sorted; what an interrupted command must not leave behind shows here.
pub fn entries(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        folder.read_dir().unwrap().map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// A safetensors file from `(name, dtype, shape, bytes)`.
pub fn write_tensors(path: &Path, tensors: &[(&str, &str, &[usize], Vec<u8>)]) {
    let mut header = serde_json::Map::new();
    let mut data = Vec::new();
    for (name, dtype, shape, bytes) in tensors {
        let begin = data.len();
        data.extend(bytes);
        let entry = serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": [begin, data.len()]});
        header.insert((*name).into(), entry);
    }
    write_raw(path, &serde_json::Value::Object(header).to_string(), &data);
}

/// A file in the layout of safetensors with any header and data.
pub fn write_raw(path: &Path, header: &str, data: &[u8]) {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    std::fs::write(path, bytes).unwrap();
}

/// Little-endian bytes of f32 values.
pub fn f32_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}
