//! The tests of `train`, `eval`, `generate` and `verify` once more, on the CUDA emulator, with the same tolerances.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

use crate::common::cuda_emulator::folder;
use relora_kit::ops::FOLDERS_VARIABLE;
use std::process::Command;

/// Runs tests of this program on `devices` GPUs of the emulator; whether they passed, and what they said.
fn run(devices: &str, args: &[&str]) -> (bool, String) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.env("RELORA_KIT_DEVICE", "cuda").env("CUDA_EMULATOR_DEVICES", devices);
    command.env(FOLDERS_VARIABLE, folder()).env("XDG_CACHE_HOME", folder());
    let output = command.args(args).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&text).into_owned())
}

/// At least `least` tests match the filters, and all of them pass.
#[track_caller]
fn passes(least: usize, filters: &[&str]) {
    let (passed, text) = run("1", filters);
    assert!(passed, "{filters:?}:\n{text}");
    let count = text.split_once("test result: ok. ").and_then(|(_, rest)| rest.split_once(' ')).unwrap().0;
    assert!(count.parse::<usize>().unwrap() >= least, "only {count} tests of {filters:?} ran:\n{text}");
}

#[test]
fn training_and_evaluation() {
    passes(8, &["cli::"]);
}

#[test]
fn the_options_of_the_official_trainer() {
    // It measures the memory of the process; what a GPU's plan reserves is tested in `tests/cuda/train.rs`.
    passes(11, &["options::", "--skip", "the_planned_memory_is_what_the_run_takes"]);
}

#[test]
fn generation() {
    passes(2, &["generate::"]);
}

#[test]
fn runs_that_verify() {
    // The other tests of `verify` train nothing.
    passes(2, &["verify::a_run_of_a_tied_model", "verify::a_cycle_that_stores_other_values"]);
}

#[test]
fn without_a_gpu_they_fail() {
    let (passed, text) = run("0", &["generate::the_same_seed_gives_the_same_text"]);
    assert!(!passed && text.contains("1 failed") && text.contains("device 'cuda:0' is unavailable"), "{text}");
}
