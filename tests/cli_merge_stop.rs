//! A merge that is stopped: by Ctrl-C, by a kill, by a full disk. The output is whole or absent.
#![allow(missing_docs)]

mod common;

use common::{entries, f32_bytes, small_merge::Small, write_tensors};
use relora_kit::{
    adapter::{AdapterConfig, NewModule, save},
    checkpoint::Checkpoint,
};
use std::{
    fs,
    path::PathBuf,
    process::{Command, Stdio},
    time::Duration,
};

/// A base that takes long enough to be interrupted: 192 MiB in many tensors, and a rank 64 adapter for each.
fn large() -> Small {
    let small = Small(tempfile::tempdir().unwrap());
    let (m, tensors, r) = (1024, 48, 64);
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
fn a_killed_merge_leaves_no_output_or_a_complete_one() {
    let small = large();
    let whole = fs::metadata(small.path("base").join("model.safetensors")).unwrap().len();
    for milliseconds in (0..200).step_by(20) {
        let mut child = Command::new(program())
            .args(small.args(&["--force"]))
            .stderr(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(milliseconds));
        child.kill().unwrap();
        child.wait().unwrap();
        let output = small.path("out");
        if output.exists() {
            let model = Checkpoint::open(&output).unwrap();
            assert_eq!(model.len(), 48);
            assert!(fs::metadata(output.join("model.safetensors")).unwrap().len() >= whole);
        }
    }
}

#[test]
fn a_full_disk_exits_with_3_and_leaves_nothing() {
    let small = large();
    let mount = small.path("disk");
    fs::create_dir(&mount).unwrap();
    // A mount namespace of its own: the disk is gone when the shell ends, whatever happens.
    let script = format!(
        "mount -t tmpfs -o size=1m tmpfs {mount:?} || exit 77
         {program:?} merge --base {base:?} --adapter {adapter:?} -o {mount:?}/out
         echo exit code $?
         find {mount:?} -mindepth 1",
        program = program(),
        base = small.path("base"),
        adapter = small.path("adapter"),
    );
    let output = Command::new("unshare").args(["--map-root-user", "--mount", "sh", "-c", &script]).output();
    let Some(output) = output.ok().filter(|o| o.status.success()) else {
        println!("skipped: mounting a tmpfs in a namespace is not permitted here");
        return;
    };
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(stderr.contains("No space left on device") && stderr.contains("help: "), "{stderr}");
    assert_eq!(stdout.trim(), "exit code 3", "{stdout}{stderr}");
}
