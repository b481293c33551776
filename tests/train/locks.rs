//! One writer per run: a second training of the same run is refused and told who trains.

use crate::common::{relora_kit, run, small_run::SmallRun};
use std::{
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// Starts a training that takes long enough to be met.
fn start(small: &SmallRun, output: &Path) -> Child {
    let config = std::fs::read_to_string(small.path("run.toml")).unwrap();
    std::fs::write(small.path("run.toml"), config.replace("num_training_steps = 20", "num_training_steps = 100000"))
        .unwrap();
    let mut command = Command::new(relora_kit().get_program());
    command.args(["train", "--threads", "1", "--config"]).arg(small.path("run.toml")).arg("-o").arg(output);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let began = Instant::now();
    while !output.join("metrics.jsonl").exists() {
        assert!(child.try_wait().unwrap().is_none() && began.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(10));
    }
    child
}

#[test]
fn a_second_training_of_a_run_is_refused_and_told_who_trains() {
    let small = SmallRun::new(1);
    let (config, output) = (small.path("run.toml"), small.path("run"));
    let first = start(&small, &output);
    let pid = first.id();
    let (config, folder) = (config.to_str().unwrap(), output.to_str().unwrap());
    for args in [&["train", "--resume", folder][..], &["train", "--config", config, "--autoresume", "-o", folder]] {
        let (code, _, stderr) = run(args);
        assert_eq!(code, 3, "{args:?}: {stderr}");
        let owner = format!("another process trains in '{folder}': process {pid} on ");
        assert!(stderr.contains(&owner) && stderr.contains(", since 20"), "{stderr}");
    }
    // The first signal saves a checkpoint, and the lock is free again: after kill -9, too.
    assert!(Command::new("kill").args(["-TERM", &pid.to_string()]).status().unwrap().success());
    let output = first.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(3) && stderr.contains("a checkpoint was saved"), "{stderr}");
    let mut second = Command::new(relora_kit().get_program())
        .args(["train", "--resume", folder, "--threads", "1"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    std::thread::sleep(Duration::from_millis(1500));
    assert!(second.try_wait().unwrap().is_none(), "it trains");
    second.kill().unwrap();
    second.wait().unwrap();
    let (code, text, stderr) = run(["verify", folder]);
    assert_eq!(code, 0, "{text}{stderr}");
}
