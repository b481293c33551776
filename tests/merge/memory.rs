//! `relora-kit merge`: memory does not grow with the model.

use crate::common;
use crate::common::small_merge::Small;
use relora_kit::adapter::{AdapterConfig, NewModule, save};
use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

/// A file of zeros that takes no space: a header, and a hole of `[n, n]` in F32 for each name.
fn sparse(path: &Path, names: &[String], n: u64) {
    let bytes = n * n * 4;
    let entries: Vec<String> = (0u64..)
        .zip(names)
        .map(|(i, name)| {
            let at = [i * bytes, (i + 1) * bytes];
            format!(r#""{name}.weight":{{"dtype":"F32","shape":[{n},{n}],"data_offsets":{at:?}}}"#)
        })
        .collect();
    common::write_raw(path, &format!("{{{}}}", entries.join(",")), &[]);
    let file = fs::File::options().write(true).open(path).unwrap();
    file.set_len(file.metadata().unwrap().len() + bytes * names.len() as u64).unwrap();
}

/// Bytes that belong to no file, now.
fn anonymous(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? * 1024)
}

#[test]
fn memory_stays_below_one_tensor_while_a_model_of_four_is_merged() {
    const N: usize = 4096;
    let small = Small(tempfile::tempdir().unwrap());
    let names: Vec<String> = (0..4).map(|i| format!("model.layers.{i}.mlp.up_proj")).collect();
    for folder in ["base", "adapter"] {
        fs::create_dir(small.path(folder)).unwrap();
    }
    sparse(&small.path("base").join("model.safetensors"), &names, N as u64);
    let factor = vec![0.01; 8 * N];
    let modules: Vec<_> = names
        .iter()
        .map(|name| NewModule { name, r: 8, out_features: N, in_features: N, a: &factor, b: &factor })
        .collect();
    save(&small.path("adapter"), &AdapterConfig::new(8, 8.0, &["up_proj"]), &modules).unwrap();
    let mut child = Command::new(assert_cmd::cargo::cargo_bin("relora-kit"))
        .args(["--threads", "2"])
        .args(small.args(&[]))
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let (mut peak, mut samples) = (0, 0);
    while child.try_wait().unwrap().is_none() {
        if let Some(bytes) = anonymous(child.id()).filter(|bytes| *bytes > 0) {
            (peak, samples) = (peak.max(bytes), samples + 1);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(child.wait().unwrap().success());
    if samples < 10 {
        println!("skipped: the kernel tells nothing about anonymous memory, or the merge was too fast");
        return;
    }
    let tensor = (N * N * 4) as u64;
    assert!(peak < tensor, "{} MiB for tensors of {} MiB", peak >> 20, tensor >> 20);
}
