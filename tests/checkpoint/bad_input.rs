//! What a command line meets: typing errors, empty files, Ctrl-C, a full disk.

use crate::common::{entries, on_small_disk, refused, run, small_run::SmallRun};
use std::{
    fs,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

fn program() -> std::path::PathBuf {
    assert_cmd::cargo::cargo_bin("relora-kit")
}

#[test]
fn a_config_with_an_unknown_key_is_refused_with_its_place() {
    let small = SmallRun::new(1);
    let text = fs::read_to_string(small.path("run.toml")).unwrap();
    fs::write(small.path("typo.toml"), text.replace("batch_size", "batchsize")).unwrap();
    let (config, output) = (small.path("typo.toml"), small.path("run"));
    let args = ["train".as_ref(), "--config".as_ref(), config.as_os_str(), "-o".as_ref(), output.as_os_str()];
    let stderr = refused(args, 2, &["typo.toml", "unknown field `batchsize`", "batch_size", "help: "]);
    assert_eq!(stderr.lines().count(), 2, "one sentence and a hint: {stderr}");
    assert!(!output.exists());
}

#[test]
fn a_config_that_is_no_toml_is_refused() {
    let small = SmallRun::new(1);
    fs::write(small.path("broken.toml"), "[train\nlr = 1").unwrap();
    let (config, output) = (small.path("broken.toml"), small.path("run"));
    let args = ["train".as_ref(), "--config".as_ref(), config.as_os_str(), "-o".as_ref(), output.as_os_str()];
    refused(args, 2, &["broken.toml", "line 1"]);
    assert!(!output.exists());
}

#[test]
fn text_of_zero_length_is_refused_and_leaves_no_shard() {
    let dir = tempfile::tempdir().unwrap();
    let (text, shard) = (dir.path().join("empty.txt"), dir.path().join("tokens.safetensors"));
    fs::write(&text, "").unwrap();
    let args = ["tokenize".as_ref(), text.as_os_str(), "-o".as_ref(), shard.as_os_str()];
    refused(args, 2, &["empty.txt", "no text", "help: "]);
    assert_eq!(entries(dir.path()), ["empty.txt"]);
}

#[test]
fn a_missing_file_is_named_by_every_command_that_reads_one() {
    for args in [
        &["train", "--config", "nowhere.toml", "-o", "out"][..],
        &["train", "--resume", "nowhere"],
        &["tokenize", "nowhere.txt", "-o", "out"],
        &["eval", "--model", "nowhere", "--data", "nowhere"],
    ] {
        refused(args, 2, &["nowhere", "No such file", "help: "]);
    }
}

#[test]
fn unknown_flags_and_commands_exit_with_2() {
    for args in [&["train", "--colour"][..], &["trian"], &["tokenize"]] {
        let (code, _, stderr) = run(args);
        assert_eq!(code, 2, "{stderr}");
    }
}

#[test]
fn ctrl_c_saves_a_checkpoint_exits_with_3_and_the_run_resumes_to_the_same_bits() {
    let small = SmallRun::new(3);
    let whole = small.train();
    let stopped = small.path("stopped");
    let mut child = Command::new(program())
        .args(["train", "--config"])
        .arg(small.path("run.toml"))
        .arg("-o")
        .arg(&stopped)
        .stderr(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    // Somewhere inside a cycle, where A, B and their moments have to survive.
    wait_for(|| fs::read_to_string(stopped.join("metrics.jsonl")).unwrap_or_default().lines().count() >= 13);
    let status = Command::new("sh").args(["-c", &format!("kill -INT {}", child.id())]).status().unwrap();
    assert!(status.success());
    let code = child.wait().unwrap().code();
    let mut stderr = String::new();
    std::io::Read::read_to_string(&mut child.stderr.take().unwrap(), &mut stderr).unwrap();
    assert_eq!(code, Some(3), "{stderr}");
    assert!(stderr.contains("error: interrupted after update") && stderr.contains("--resume"), "{stderr}");
    assert_eq!(entries(&stopped.join("checkpoints")).len(), 1, "one checkpoint");

    let (code, _, stderr) = run(["train".as_ref(), "--resume".as_ref(), stopped.as_os_str()]);
    assert_eq!(code, 0, "{stderr}");
    let final_model = "checkpoints/step-40/model.safetensors";
    assert!(fs::read(stopped.join(final_model)).unwrap() == fs::read(whole.join(final_model)).unwrap());
}

#[track_caller]
fn wait_for(condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(60), "nothing happened for a minute");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_full_disk_during_training_exits_with_3_and_leaves_no_half_file() {
    let small = SmallRun::new(1);
    let mount = small.path("disk");
    let script = format!(
        "{program:?} train --config {config:?} -o {mount:?}/run --set train.save_every=1
         echo exit code $?
         find {mount:?} -name '.*' ! -name .lock -o -name '*.safetensors' -size 0",
        program = program(),
        config = small.path("run.toml"),
    );
    let Some((stdout, stderr)) = on_small_disk(&mount, "300k", &script) else { return };
    assert!(stderr.contains("No space left on device") && stderr.contains("help: "), "{stderr}");
    assert_eq!(stdout.trim(), "exit code 3", "{stdout}{stderr}");
}

#[test]
fn results_that_cannot_be_printed_exit_with_3() {
    let Ok(full) = fs::File::options().write(true).open("/dev/full") else {
        println!("skipped: there is no /dev/full here");
        return;
    };
    let output = Command::new(program()).args(["completions", "bash"]).stdout(full).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{stderr}");
    assert!(stderr.contains("No space left on device"), "{stderr}");
}
