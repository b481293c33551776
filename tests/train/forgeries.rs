//! `relora-kit verify` against forgers who make the hashes fit: mode, cycles, base, metrics, configuration and manifest must
//! tell one story. Each forgery is caught and named.

use crate::common::{
    run,
    synthetic_run::{Spec, read_manifest, write_manifest, write_metrics, write_run},
};
use relora_kit::run::{Manifest, sha256_folder};
use std::{
    fs,
    path::{Path, PathBuf},
};

const LAST: &str = "checkpoints/step-35";

fn honest() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = write_run(folder.path(), Spec::default());
    (folder, path)
}

fn verify(path: &Path) -> (i32, String) {
    let (code, stdout, stderr) = run(["verify", path.to_str().unwrap()]);
    (code, stdout + &stderr)
}

/// Changes the manifest, renews the checkpoint's hashes, and expects the forgery to be named.
#[track_caller]
fn caught(path: &Path, forge: impl FnOnce(&mut Manifest), named: &str) {
    let mut manifest = read_manifest(path);
    let checkpoint = manifest.checkpoint.as_mut().unwrap();
    checkpoint.files = sha256_folder(&path.join(&checkpoint.folder)).unwrap();
    forge(&mut manifest);
    write_manifest(path, &manifest);
    let (code, text) = verify(path);
    assert_eq!(code, 1, "{text}");
    assert!(text.contains(named) && text.contains("is not what it claims"), "expected '{named}' in:\n{text}");
}

fn alter_weights(path: &Path) {
    let file = path.join(LAST).join("model.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    let end = bytes.len();
    bytes[end - 400..].iter_mut().step_by(4).for_each(|b| *b ^= 0x40);
    fs::write(file, bytes).unwrap();
}

/// The case that the checks of version 0.1.0 let pass: altered weights, no cycles, no base, hashes renewed.
#[test]
fn a_stripped_run_is_caught() {
    let (_root, path) = honest();
    alter_weights(&path);
    let strip = |m: &mut Manifest| {
        m.cycles.clear();
        m.base = None;
    };
    caught(&path, strip, "base: the run is finished and of mode relora, but the manifest lists no base");
    caught(&path, strip, "cycles: the run is finished and of mode relora, but the manifest lists no cycle");
    caught(&path, strip, "update 6 is of cycle 1, the manifest says 0");
}

#[test]
fn a_stripped_run_that_claims_another_mode_is_caught() {
    let (_root, path) = honest();
    let strip = |m: &mut Manifest| {
        m.mode = "full".into();
        m.cycles.clear();
        m.base = None;
    };
    caught(&path, strip, "config.toml: train.mode is relora, the manifest says full");
    caught(&path, |m| m.mode = "none".into(), "mode: it is 'none', expected full, lora or relora");
}

#[test]
fn a_stripped_run_that_claims_to_be_unfinished_is_caught() {
    let (_root, path) = honest();
    let strip = |m: &mut Manifest| {
        m.finished = false;
        m.cycles.clear();
    };
    caught(&path, strip, "update 16 is of cycle 2, the manifest says 1");
}

#[test]
fn cycles_that_the_log_does_not_tell_of_are_caught() {
    let (_root, path) = honest();
    let rows = |cycle: u64| (1..=35).map(|s| format!("{{\"step\":{s},\"cycle\":{cycle}}}\n")).collect::<String>();
    fs::write(path.join("metrics.jsonl"), rows(0)).unwrap();
    caught(&path, |_| (), "update 6 is of cycle 0, the manifest says 1");
    fs::remove_file(path.join("metrics.jsonl")).unwrap();
    caught(&path, |_| (), "metrics.jsonl: the file is missing");
}

#[test]
fn a_log_that_ends_elsewhere_than_the_finished_run_is_caught() {
    let (_root, path) = honest();
    write_metrics(&path, Spec::default(), 36);
    caught(&path, |_| (), "metrics.jsonl: it ends at update 36, the finished run's checkpoint is of step 35");
}

#[test]
fn restarts_and_merges_of_another_run_are_caught() {
    let (_root, path) = honest();
    let log = fs::read_to_string(path.join("metrics.jsonl")).unwrap();
    fs::write(path.join("metrics.jsonl"), log.replace("\"cycle\":2}", "\"cycle\":2,\"restarts\":2}")).unwrap();
    caught(&path, |_| (), "line 16: it counts 2 restarts in cycle 2");
    let merge = |retention: f64| {
        let row = format!("{{\"step\":15,\"merged_cycle\":1,\"retention\":{retention}}}\n");
        let end = log.find("{\"step\":16").unwrap();
        fs::write(path.join("metrics.jsonl"), format!("{}{row}{}", &log[..end], &log[end..])).unwrap();
    };
    merge(0.5);
    caught(&path, |m| m.cycles[0].retention = Some(0.99), "line 16: cycle 1 kept 0.5 of its delta");
    let mut manifest = read_manifest(&path);
    manifest.cycles[0].retention = Some(0.5);
    write_manifest(&path, &manifest);
    assert_eq!(verify(&path).0, 0);
}

#[test]
fn paths_that_leave_the_run_are_caught_and_not_read() {
    let (root, path) = honest();
    fs::write(root.path().join("secret"), "x").unwrap();
    for folder in ["../../etc", "/etc", "checkpoints/../../"] {
        let mut manifest = read_manifest(&path);
        manifest.checkpoint.as_mut().unwrap().folder = folder.into();
        write_manifest(&path, &manifest);
        let (code, text) = verify(&path);
        assert_eq!(code, 1, "{text}");
        assert!(text.contains("the manifest names a path that leaves the run"), "{text}");
    }
    let (_root, path) = honest();
    let forge = |m: &mut Manifest| {
        m.checkpoint.as_mut().unwrap().files.insert("../../../secret".into(), "00".into());
    };
    caught(&path, forge, "mismatch: ../../../secret: the manifest names a path that leaves the run");
}

#[test]
fn a_link_out_of_the_run_is_refused() {
    let (root, path) = honest();
    fs::rename(path.join(LAST), root.path().join("elsewhere")).unwrap();
    std::os::unix::fs::symlink(root.path().join("elsewhere"), path.join(LAST)).unwrap();
    let (code, text) = verify(&path);
    assert_eq!(code, 2, "{text}");
    assert!(text.contains("is a symbolic link, which verify does not follow"), "{text}");
}

#[test]
fn the_hash_of_a_file_outside_the_run_is_not_told() {
    let (root, path) = honest();
    fs::write(root.path().join("data.safetensors"), "a secret").unwrap();
    let (code, text) = verify(&path);
    let hash = relora_kit::run::sha256_file(&root.path().join("data.safetensors")).unwrap();
    assert!(code == 1 && text.contains("its sha256 is not the one in the manifest") && !text.contains(&hash), "{text}");
}

/// What is loaded is not what was hashed: an index wins over `model.safetensors`.
#[test]
fn files_that_the_manifest_does_not_list_are_caught() {
    let (_root, path) = honest();
    let folder = path.join(LAST);
    let manifest = read_manifest(&path);
    fs::copy(folder.join("model.safetensors"), folder.join("model-00001-of-00001.safetensors")).unwrap();
    write_manifest(&path, &manifest);
    let (code, text) = verify(&path);
    assert_eq!(code, 1, "{text}");
    assert!(
        text.contains(
            "checkpoints/step-35/model-00001-of-00001.safetensors: the file is there but the manifest does not"
        ),
        "{text}"
    );
}

#[test]
fn weights_that_nothing_vouches_for_are_caught() {
    let (_root, path) = honest();
    alter_weights(&path);
    let named = "checkpoints/step-35/model.safetensors: the file is there but the manifest does not list it";
    caught(&path, |m| m.checkpoint.as_mut().unwrap().files.clear(), named);
}

#[test]
fn a_base_of_another_step_is_caught() {
    let (_root, path) = honest();
    caught(
        &path,
        |m| m.base.as_mut().unwrap().step = 4,
        "cycle 1: it starts after step 5, the one before it ends at 4",
    );
}

#[test]
fn a_claim_that_widens_what_rounding_explains_is_caught() {
    let (_root, path) = honest();
    let named = "the rounding of merged weights is to nearest, the manifest says to nearest, int8";
    caught(&path, |m| m.quantised = Some("int8".into()), named);
    let named = "the rounding of merged weights is to nearest, the manifest says stochastic";
    caught(&path, |m| (m.quantised, m.stochastic_rounding) = (None, true), named);
}

#[test]
fn another_seed_and_other_steps_than_configured_are_caught() {
    let (_root, path) = honest();
    caught(&path, |m| m.seed = 7, "config.toml: train.seed is 0, the manifest says 7");
    let config = fs::read_to_string(path.join("config.toml")).unwrap();
    fs::write(path.join("config.toml"), config.replace("= 35", "= 350")).unwrap();
    caught(&path, |m| m.seed = 0, "config.toml: train.num_training_steps is 350, the manifest says 35");
}

#[test]
fn a_first_step_beyond_all_numbers_is_caught() {
    let (_root, path) = honest();
    caught(&path, |m| m.first_step = u64::MAX, "metrics.jsonl line 1: the number of the update overflows");
}
