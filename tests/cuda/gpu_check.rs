//! `tools/gpu-check` from packing to the table, on the CUDA emulator of CUDA's libraries and a stand-in for nvidia-smi.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

use crate::common;
use crate::common::cuda_emulator::{folder, program};
use relora_kit::ops::FOLDERS_VARIABLE;
use serde_json::Value;
use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::{Command, Output},
};

/// Two GPUs of 2 GiB, of which 17 MiB are taken, and 517 while something runs.
const NVIDIA_SMI: &str = r#"#!/bin/sh
case "$*" in
    *index,name*) for i in 0 1; do echo "$i, NVIDIA A100-SXM4-40GB, 550.54, 2048, GPU-$i"; done ;;
    *index,memory.used*) echo "0, 17"; echo "1, 17" ;;
    *-lms*) echo 517; exec sleep 60 ;;
esac
"#;

struct Workshop(tempfile::TempDir);

impl Workshop {
    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn check(&self, script: &Path, args: &[&str]) -> Output {
        let path = format!("{}:{}", self.path("bin").display(), std::env::var("PATH").unwrap());
        let mut command = Command::new(script);
        command.args(args).env("PATH", path).env(FOLDERS_VARIABLE, self.path("libraries"));
        command.env("XDG_CACHE_HOME", folder()).env_remove("LD_LIBRARY_PATH").env_remove("CUDA_VISIBLE_DEVICES");
        command.env("CUDA_EMULATOR_DEVICES", "2");
        command.output().unwrap()
    }

    /// All rows, the smallest there are; the table.
    #[track_caller]
    fn measure(&self) -> String {
        let small = "--models llama_9m --steps 2 --length 32 --batch 1 --matrix 270 --no-install --no-torch";
        let args: Vec<&str> = small.split(' ').chain(["--tests-filter", "rope", "loops"]).collect();
        let output = self.check(&self.path("pack/gpu-check"), &args);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let table = fs::read_to_string(self.path("pack/gpu-check.md")).unwrap();
        assert!(String::from_utf8(output.stdout).unwrap().contains(&table));
        table
    }

    fn rows(&self) -> Value {
        let text = fs::read(self.path("pack/gpu-check.json")).unwrap();
        serde_json::from_slice::<Value>(&text).unwrap()["rows"].take()
    }
}

fn assert_has(table: &str, parts: &[&str]) {
    for part in parts {
        assert!(table.contains(part), "expected '{part}' in:\n{table}");
    }
}

#[test]
fn half_an_hour_on_a_gpu_in_small() {
    if Command::new("python3").arg("--version").output().is_err() {
        println!("skipped: python3 is not installed");
        return;
    }
    let workshop = Workshop(tempfile::tempdir().unwrap());
    for name in ["bin", "libraries"] {
        fs::create_dir(workshop.path(name)).unwrap();
    }
    let smi = workshop.path("bin/nvidia-smi");
    fs::write(&smi, NVIDIA_SMI).unwrap();
    fs::set_permissions(&smi, fs::Permissions::from_mode(0o755)).unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/gpu-check");
    let (pack, own, tests) = (workshop.path("pack"), env!("CARGO_BIN_EXE_relora-kit"), program("cuda_ops"));
    let args = ["--pack", pack.to_str().unwrap(), "--program", own, "--tests", tests.to_str().unwrap()];
    let output = workshop.check(&script, &args);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(common::entries(&pack), ["cuda_ops", "gpu-check", "libraries.tar.gz", "relora-kit"]);
    // A folder that holds something is not packed into.
    assert!(String::from_utf8(workshop.check(&script, &args).stderr).unwrap().contains("is not empty"));

    // Without cuSOLVER and NCCL all rows are there but two.
    for name in ["libcuda.so.1", "libnvrtc.so.12", "libcublas.so.12"] {
        symlink(folder().join(name), workshop.path("libraries").join(name)).unwrap();
    }
    let table = workshop.measure();
    assert_has(
        &table,
        &[
            "- GPU: 2 x NVIDIA A100-SXM4-40GB (2.00 GiB), driver 550.54",
            "| kernels | against their CPU twins |  |  |  |  | 2 passed |",
            "| losses | 2 updates, f32, GPU against CPU |",
            "| relora-kit, llama_9m | full rank, tf32, 1 x 32 |",
            "| relora-kit, llama_9m | low rank, r = 128, tf32, 1 x 32 |",
            "% | 0.49 GiB | 0.16 GiB |",
            "paper: 9 to 40%",
            "paper: up to 5.5",
            "| merge | rank 128, bf16, 2 threads, 8 products on the GPU |",
            "| spectrum |  |  |  |  |  | none: error: device 'cuda:0' is unavailable",
            "| several llama_9m | bf16, relora |  |  |  |  | none: error: ",
            "libnccl.so.2",
        ],
    );
    let before = workshop.rows();
    assert!(before["losses"]["difference"].as_f64().unwrap() < 1e-5);
    assert_eq!(before["train llama_9m tf32 full"]["updates"], 2);
    assert!(!pack.join("train").exists(), "the trainings left something behind");

    // The next start measures what failed and keeps the rest.
    for name in ["libcusolver.so.11", "libnccl.so.2"] {
        symlink(folder().join(name), workshop.path("libraries").join(name)).unwrap();
    }
    let table = workshop.measure();
    let after = workshop.rows();
    let (one, two) = (&after["train llama_9m bf16 relora"], &after["several llama_9m bf16 relora"]);
    let speed = |row: &Value| row["tokens_per_s"].as_f64().unwrap();
    let (efficiency, waited) = (100.0 * speed(two) / (2.0 * speed(one)), 100.0 * two["host_wait"].as_f64().unwrap());
    let efficiency = format!(
        "{efficiency:.0}% of 2 times the speed of one GPU; the host waits for the GPU {waited:.0}% of the time |"
    );
    assert_has(
        &table,
        &[
            "| spectrum | 8 of 8 matrices on the GPU |",
            "| relora-kit, llama_9m | 2 GPUs, low rank, r = 128, bf16, 1 x 32 each |",
            &efficiency,
        ],
    );
    assert!(two["gpus"] == 2 && two["updates"] == 2 && two["first_loss"] != one["first_loss"], "{two}");
    assert!(after["spectrum"]["difference"].as_f64().unwrap() < 1e-6);
    for key in ["tests", "losses", "train llama_9m tf32 full", "train llama_9m tf32 relora"] {
        assert_eq!(after[key], before[key], "{key}");
    }
}
