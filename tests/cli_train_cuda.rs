//! The tests of `train`, `eval` and `generate` again, on the double's GPU: what they ask for, with the same tolerances.
#![allow(missing_docs)]
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod common;

use common::cuda_double::{folder, program};
use relora_kit::ops::FOLDERS_VARIABLE;
use std::process::Command;

/// Runs a test program on `devices` GPUs of the double, with these arguments; whether it passed, and what it said.
fn run(name: &str, devices: &str, args: &[&str]) -> (bool, String) {
    let mut command = Command::new(program(name));
    command.env("RELORA_KIT_DEVICE", "cuda").env("CUDA_DOUBLE_DEVICES", devices);
    command.env(FOLDERS_VARIABLE, folder()).env("XDG_CACHE_HOME", folder());
    let output = command.args(args).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&text).into_owned())
}

/// At least `least` tests run, and all of them pass.
#[track_caller]
fn passes(name: &str, least: usize, args: &[&str]) {
    let (passed, text) = run(name, "1", args);
    assert!(passed, "{name}:\n{text}");
    let count = text.split_once("test result: ok. ").and_then(|(_, rest)| rest.split_once(' ')).unwrap().0;
    assert!(count.parse::<usize>().unwrap() >= least, "only {count} tests of {name} ran:\n{text}");
}

#[test]
fn training_and_evaluation() {
    passes("cli_train", 8, &[]);
}

#[test]
fn the_options_of_the_official_trainer() {
    // It measures the memory of the process; what a GPU's plan reserves is tested in `cuda_train.rs`.
    passes("cli_train_options", 11, &["--skip", "the_planned_memory_is_what_the_run_takes"]);
}

#[test]
fn generation() {
    passes("cli_generate", 2, &[]);
}

#[test]
fn runs_that_verify() {
    // The other tests of `verify` train nothing.
    passes("cli_verify", 2, &["a_run_of_a_tied_model", "a_cycle_that_stores_other_values"]);
}

#[test]
fn without_a_gpu_they_fail() {
    let (passed, text) = run("cli_generate", "0", &["the_same_seed_gives_the_same_text"]);
    assert!(!passed && text.contains("1 failed") && text.contains("device 'cuda:0' is unavailable"), "{text}");
}
