//! The gate of tools/quickstart says yes to several cycles and no to one.

use crate::common::{run, small_run::SmallRun};
use std::{fs, path::Path};

/// What tools/quickstart requires.
fn gate() -> String {
    let script = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/quickstart")).unwrap();
    let (_, rest) = script.rsplit_once("--require '").unwrap();
    rest.split('\'').next().unwrap().to_owned()
}

/// Trains so many cycles and asks the gate.
fn spectrum_of(cycles: u64) -> (i32, String, String) {
    let small = SmallRun::new(cycles);
    let dir = small.train();
    run(["spectrum".as_ref(), "--run".as_ref(), dir.as_os_str(), "--require".as_ref(), gate().as_ref()])
}

#[test]
fn four_cycles_pass() {
    let (code, stdout, stderr) = spectrum_of(4);
    assert_eq!(code, 0, "{stdout}{stderr}");
}

#[test]
fn a_single_cycle_fails_with_exit_1_and_names_the_worst_offenders() {
    let (code, stdout, stderr) = spectrum_of(1);
    assert_eq!(code, 1, "{stdout}{stderr}");
    assert!(stdout.contains("q_proj") && stdout.contains(&gate()), "{stdout}{stderr}");
}
