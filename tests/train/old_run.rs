//! A run that relora-kit 0.1.0 left behind when it was killed: today's program resumes it and verifies it.

use crate::common::{fixtures::fixture, run};
use serde_json::Value;
use std::{fs, path::Path};

/// What a run's metrics say of each update: its number, loss, gradient norm and validation loss.
fn updates(metrics: &Path) -> Vec<(u64, [f64; 3])> {
    let rows = fs::read_to_string(metrics).unwrap();
    let rows = rows.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    rows.map(|row| {
        (row["step"].as_u64().unwrap(), ["loss", "grad_norm", "eval_loss"].map(|key| row[key].as_f64().unwrap_or(1.0)))
    })
    .collect()
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in from.read_dir().unwrap().map(|e| e.unwrap().path()) {
        let target = to.join(entry.file_name().unwrap());
        if entry.is_dir() { copy(&entry, &target) } else { fs::copy(&entry, &target).map(|_| ()).unwrap() }
    }
}

#[test]
fn a_run_of_0_1_0_resumes_and_verifies() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("fixture");
    copy(&fixture("run_0_1_0"), &root);
    for name in ["config.toml", "manifest.json"] {
        let file = root.join("run").join(name);
        let text = fs::read_to_string(&file).unwrap();
        assert!(text.contains("FOLDER/"), "{name} names the data");
        fs::write(&file, text.replace("FOLDER/", &format!("{}/", root.display()))).unwrap();
    }
    let folder = root.join("run");
    let verified = || {
        let (code, stdout, stderr) = run(["verify".as_ref(), folder.as_os_str()]);
        assert_eq!(code, 0, "{stdout}{stderr}");
    };
    verified();
    let resume = ["--threads".as_ref(), "1".as_ref(), "train".as_ref(), "--resume".as_ref(), folder.as_os_str()];
    let (code, stdout, stderr) = run(resume);
    assert_eq!(code, 0, "{stdout}{stderr}");
    verified();

    // The updates after the kill are those that 0.1.0 made without one, up to the order of sums on another processor.
    let (found, expected) =
        (updates(&folder.join("metrics.jsonl")), updates(&root.join("metrics_of_the_whole_run.jsonl")));
    assert_eq!(found.len(), expected.len());
    for ((step, found), (expected_step, expected)) in found.into_iter().zip(expected) {
        assert_eq!(step, expected_step);
        for (found, expected) in found.into_iter().zip(expected) {
            assert!((found / expected - 1.0).abs() < 1e-5, "step {step}: {found}, expected {expected}");
        }
    }
    assert!(folder.join("checkpoints/step-14/model.safetensors").exists());
}
