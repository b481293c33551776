//! A merge that is stopped: by Ctrl-C, by a kill, by a full disk. The output is whole or absent.

use crate::common::{entries, f32_bytes, on_small_disk, small_merge::Small, write_tensors};
use relora_kit::adapter::{AdapterConfig, NewModule, save};
use std::{
    fs,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// A base of `tensors` matrices `[1024, 1024]`, and a rank 64 adapter for each.
fn base_of(tensors: usize) -> Small {
    let small = Small(tempfile::tempdir().unwrap());
    let (m, r) = (1024, 64);
    let names: Vec<String> = (0..tensors).map(|i| format!("model.layers.{i}.mlp.up_proj")).collect();
    let base = small.path("base");
    fs::create_dir_all(&base).unwrap();
    let weights: Vec<String> = names.iter().map(|n| format!("{n}.weight")).collect();
    let (shape, bytes) = ([m, m], f32_bytes(&vec![1.0; m * m]));
    let tensors: Vec<_> = weights.iter().map(|n| (n.as_str(), "F32", &shape[..], bytes.clone())).collect();
    write_tensors(&base.join("model.safetensors"), &tensors);
    let factor = vec![0.01; m * r];
    let modules: Vec<_> = names
        .iter()
        .map(|name| NewModule { name, r, out_features: m, in_features: m, a: &factor, b: &factor })
        .collect();
    fs::create_dir_all(small.path("adapter")).unwrap();
    save(&small.path("adapter"), &AdapterConfig::new(r, 1.0, &["up_proj"]), &modules).unwrap();
    small
}

/// 192 MiB: long enough to be interrupted.
fn large() -> Small {
    base_of(48)
}

fn program() -> PathBuf {
    assert_cmd::cargo::cargo_bin("relora-kit")
}

#[test]
fn ctrl_c_during_a_merge_exits_with_3_and_leaves_nothing() {
    let small = large();
    let mut child =
        Command::new(program()).args(small.args(&[])).stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    let start = std::time::Instant::now();
    // The temporary folder shows that writing has begun.
    while entries(small.0.path()).len() < 3 {
        assert!(start.elapsed() < Duration::from_secs(60), "nothing was written for a minute");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(Command::new("sh").args(["-c", &format!("kill -INT {}", child.id())]).status().unwrap().success());
    let code = child.wait().unwrap().code();
    let mut stderr = String::new();
    std::io::Read::read_to_string(&mut child.stderr.take().unwrap(), &mut stderr).unwrap();
    if code == Some(0) {
        println!("skipped: the merge was faster than the signal");
        return;
    }
    assert_eq!(code, Some(3), "{stderr}");
    assert!(stderr.contains("error: interrupted"), "{stderr}");
    assert_eq!(entries(small.0.path()), ["adapter", "base"]);
}

#[test]
fn a_merge_killed_at_any_moment_leaves_the_old_output_or_a_complete_one() {
    let small = base_of(12);
    let start = Instant::now();
    assert!(merge(&small, "whole").wait().unwrap().success());
    let duration = start.elapsed();
    let model = |name: &str| fs::read(small.path(name).join("model.safetensors"));
    let whole = model("whole").unwrap();
    let (mut midway, mut seed) = (0, 12345u32);
    for i in 0..50 {
        // Half of the merges replace an older output.
        let out = small.path("out");
        fs::remove_dir_all(&out).ok();
        if i % 2 == 0 {
            fs::create_dir(&out).unwrap();
            fs::write(out.join("model.safetensors"), "old").unwrap();
        }
        let mut child = merge(&small, "out");
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        std::thread::sleep(duration.mul_f64(1.1 * f64::from(seed) / f64::from(u32::MAX)));
        child.kill().unwrap();
        child.wait().unwrap();
        match model("out") {
            Ok(bytes) if i % 2 == 0 => assert!(bytes == b"old" || bytes == whole, "{} bytes", bytes.len()),
            Ok(bytes) => assert!(bytes == whole, "{} bytes", bytes.len()),
            Err(_) => assert!(i % 2 == 1, "the old output is gone"),
        }
        let left: Vec<_> = entries(small.0.path()).into_iter().filter(|name| name.starts_with('.')).collect();
        assert!(left.len() <= 1, "each merge removes what the one before left: {left:?}");
        midway += left.len();
    }
    assert!(midway >= 5, "only {midway} of 50 merges were killed while they wrote");
    assert!(merge(&small, "out").wait().unwrap().success());
    assert_eq!(entries(small.0.path()), ["adapter", "base", "out", "whole"]);
}

/// A started merge into `output`, replacing it.
fn merge(small: &Small, output: &str) -> Child {
    let path = |name| small.path(name);
    Command::new(program())
        .args(["merge", "--force", "--base"])
        .arg(path("base"))
        .arg("--adapter")
        .arg(path("adapter"))
        .arg("-o")
        .arg(path(output))
        .stderr(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

#[test]
fn a_file_size_limit_exits_with_3_and_leaves_nothing() {
    let small = base_of(2);
    // `ulimit -f` counts 512 or 1024 bytes: far less than the 8 MiB of the output either way. The signal that comes with
    // the limit ends programs that do not expect it.
    let script = format!("ulimit -f 1000; {:?} \"$@\"", program());
    let output = Command::new("sh").args(["-c", &script, "sh"]).args(small.args(&[])).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{stderr}");
    assert!(stderr.contains("File too large") && stderr.contains("help: "), "{stderr}");
    assert_eq!(entries(small.0.path()), ["adapter", "base"]);
}

#[test]
fn a_full_disk_exits_with_3_and_leaves_nothing() {
    let small = large();
    let mount = small.path("disk");
    let script = format!(
        "{program:?} merge --base {base:?} --adapter {adapter:?} -o {mount:?}/out
         echo exit code $?
         find {mount:?} -mindepth 1",
        program = program(),
        base = small.path("base"),
        adapter = small.path("adapter"),
    );
    let Some((stdout, stderr)) = on_small_disk(&mount, "1m", &script) else { return };
    assert!(stderr.contains("No space left on device") && stderr.contains("help: "), "{stderr}");
    assert_eq!(stdout.trim(), "exit code 3", "{stdout}{stderr}");
}
