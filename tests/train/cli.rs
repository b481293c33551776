//! `tokenize`, `train`, `eval`: the program on a tiny model.

use crate::common;
use crate::common::{
    entries, refused, run,
    workshop::{Workshop, losses},
};
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

#[test]
fn a_relora_run_leaves_a_base_its_cycles_and_a_checkpoint() {
    let workshop = Workshop::new();
    let (code, stdout, stderr) = workshop.train("run", &[]);
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.contains("cycles merged") && stdout.contains("validation perplexity"), "{stdout}");
    let run_dir = PathBuf::from(workshop.path("run"));
    let expected =
        [".lock", "base", "checkpoints", "config.toml", "cycles", "manifest.json", "metrics.jsonl", "tensorboard"];
    assert_eq!(entries(&run_dir), expected);
    assert_eq!(entries(&run_dir.join("cycles")), ["cycle-001", "cycle-002", "cycle-003", "cycle-004"]);
    assert_eq!(entries(&run_dir.join("checkpoints")), ["step-49", "step-50"]);
    let losses = losses(&run_dir);
    assert_eq!(losses.len(), 50);
    let number = |row: &String| row.split(' ').nth(1).unwrap().parse::<f64>().unwrap();
    assert!(number(&losses[49]) < number(&losses[0]) - 0.5, "{} then {}", losses[0], losses[49]);

    let (code, stdout, _) = run([
        "eval",
        "--model",
        &workshop.path("run/checkpoints/step-50"),
        "--data",
        &workshop.path("tokens.safetensors"),
        "--max-length",
        "32",
        "--format",
        "json",
    ]);
    let loss = serde_json::from_str::<serde_json::Value>(&stdout).unwrap()["loss"].as_f64().unwrap();
    assert_eq!(code, 0);
    assert!(loss > 0.0 && loss < number(&losses[0]), "{loss}");
}

#[test]
fn a_run_that_is_killed_at_thirty_random_moments_resumes_to_the_same_bits() {
    let workshop = Workshop::new();
    let began = Instant::now();
    let (code, _, stderr) = workshop.train("whole", &[]);
    assert_eq!(code, 0, "{stderr}");
    let longest = began.elapsed().as_micros() as u64 / 3;
    let (whole, killed) = (PathBuf::from(workshop.path("whole")), PathBuf::from(workshop.path("killed")));
    let program = assert_cmd::cargo::cargo_bin("relora-kit");
    let (mut kills, mut random) = (0, 1u64);
    loop {
        let mut command = Command::new(&program);
        if killed.join("manifest.json").exists() {
            command.args(["train", "--resume"]).arg(&killed);
        } else {
            command.args(["train", "--config", &workshop.path("run.toml"), "-o"]).arg(&killed);
        }
        let log = fs::File::create(workshop.path("log")).unwrap();
        let mut child = command.stdout(Stdio::null()).stderr(log).spawn().unwrap();
        if kills < 30 {
            random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            std::thread::sleep(Duration::from_micros((random >> 33) % longest));
        } else {
            child.wait().unwrap();
        }
        match child.try_wait().unwrap() {
            Some(status) => assert!(status.success(), "{}", fs::read_to_string(workshop.path("log")).unwrap()),
            None => {
                child.kill().unwrap();
                child.wait().unwrap();
                kills += 1;
            }
        }
        let finished = fs::read_to_string(killed.join("manifest.json")).is_ok_and(|m| m.contains("\"finished\": true"));
        if !finished {
            continue;
        }
        assert_eq!(losses(&killed), losses(&whole));
        for file in [
            "checkpoints/step-50/model.safetensors",
            "cycles/cycle-003/adapter_model.safetensors",
            "base/model.safetensors",
        ] {
            assert!(fs::read(killed.join(file)).unwrap() == fs::read(whole.join(file)).unwrap(), "{file}");
        }
        if kills >= 30 {
            break;
        }
        // Not all kills fit into one run.
        fs::remove_dir_all(&killed).unwrap();
    }
}

#[test]
fn full_and_lora_runs_work_without_cycles_of_their_own() {
    let workshop = Workshop::new();
    let text = fs::read_to_string(workshop.path("run.toml")).unwrap();
    let head = text.split("[warm_start]").next().unwrap().to_owned();
    fs::write(workshop.path("full.toml"), head.replace("\"relora\"", "\"full\"")).unwrap();
    let (code, stdout, stderr) = run(["train", "--config", &workshop.path("full.toml"), "-o", &workshop.path("full")]);
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.lines().any(|l| l.split_whitespace().eq(["cycles", "merged", "0"])), "{stdout}");

    fs::write(
        workshop.path("lora.toml"),
        head.replace("\"relora\"", "\"lora\"")
            .replace("config = \"model.json\"", "checkpoint = \"full/checkpoints/step-50\"")
            + "[relora]\nlora_r = 2\nlora_alpha = 4.0\n",
    )
    .unwrap();
    let (code, stdout, stderr) = run(["train", "--config", &workshop.path("lora.toml"), "-o", &workshop.path("lora")]);
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.lines().any(|l| l.split_whitespace().eq(["cycles", "merged", "1"])), "{stdout}");
}

#[test]
fn a_run_started_with_relative_paths_resumes_from_another_folder() {
    let workshop = Workshop::new();
    let mut command = common::relora_kit();
    command.current_dir(workshop.0.path()).args(["train", "--config", "run.toml", "-o", "run"]);
    command.args(["--set", "train.num_training_steps=20", "--set", "train.save_every=5"]);
    assert!(command.output().unwrap().status.success());
    refused(["train", "--resume", &workshop.path("run")], 2, &["is finished"]);
    unfinish(&workshop);
    let model = fs::read(workshop.path("run/checkpoints/step-20/model.safetensors")).unwrap();
    let (code, _, stderr) = run(["train", "--resume", &workshop.path("run")]);
    assert_eq!(code, 0, "died between the final checkpoint and the manifest: {stderr}");
    unfinish(&workshop);
    fs::remove_dir_all(workshop.path("run/checkpoints/step-20")).unwrap();
    let (code, _, stderr) = run(["train", "--resume", &workshop.path("run")]);
    assert_eq!(code, 0, "{stderr}");
    assert!(stderr.contains("after update 15"), "{stderr}");
    assert!(fs::read(workshop.path("run/checkpoints/step-20/model.safetensors")).unwrap() == model);
}

/// As if the process had died before it was done.
fn unfinish(workshop: &Workshop) {
    let manifest = workshop.path("run/manifest.json");
    let text = fs::read_to_string(&manifest).unwrap();
    fs::write(&manifest, text.replace("\"finished\": true", "\"finished\": false")).unwrap();
}

#[test]
fn a_damaged_checkpoint_is_noticed_and_the_one_before_it_used() {
    let workshop = Workshop::new();
    let (code, _, stderr) = workshop.train("run", &["train.num_training_steps=20", "train.save_every=5"]);
    assert_eq!(code, 0, "{stderr}");
    let whole = losses(Path::new(&workshop.path("run")));
    unfinish(&workshop);
    fs::remove_dir_all(workshop.path("run/checkpoints/step-20")).unwrap();
    let damaged = workshop.path("run/checkpoints/step-15/training_state/state.safetensors");
    let mut bytes = fs::read(&damaged).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&damaged, bytes).unwrap();
    refused(["train", "--resume", &workshop.path("run")], 2, &["is damaged", "none of the 1 checkpoints"]);
    let (code, _, stderr) =
        workshop.train("other", &["train.num_training_steps=20", "train.save_every=5", "train.keep_checkpoints=0"]);
    assert_eq!(code, 0, "{stderr}");
    fs::rename(workshop.path("other/checkpoints/step-10"), workshop.path("run/checkpoints/step-10")).unwrap();
    let (code, _, stderr) = run(["train", "--resume", &workshop.path("run")]);
    assert_eq!(code, 0, "{stderr}");
    assert!(stderr.contains("is damaged") && stderr.contains("after update 10"), "{stderr}");
    assert_eq!(losses(Path::new(&workshop.path("run"))), whole);
}

#[test]
fn a_run_directory_that_exists_is_not_touched() {
    let workshop = Workshop::new();
    fs::create_dir(workshop.path("run")).unwrap();
    let args = ["train", "--config", &workshop.path("run.toml"), "-o", &workshop.path("run")];
    refused(args, 2, &["run directory", "exists already", "help: ", "--resume"]);
    assert!(entries(Path::new(&workshop.path("run"))).is_empty());
}

#[test]
fn a_shard_that_changed_is_refused_at_resume() {
    let workshop = Workshop::new();
    let program = assert_cmd::cargo::cargo_bin("relora-kit");
    let mut child = Command::new(program)
        .args(["train", "--config", &workshop.path("run.toml"), "-o", &workshop.path("run")])
        .args(["--set", "train.num_training_steps=10010", "--set", "train.save_every=1"])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    while !Path::new(&workshop.path("run/checkpoints/step-1")).exists() {
        assert!(child.try_wait().unwrap().is_none());
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    fs::write(workshop.path("text.txt"), "another text ".repeat(500)).unwrap();
    let args = ["tokenize", &workshop.path("text.txt"), "-o", &workshop.path("tokens.safetensors"), "--force"];
    assert_eq!(run(args).0, 0);
    refused(["train", "--resume", &workshop.path("run")], 2, &["train data differ"]);
}

#[test]
fn bad_requests_are_refused_before_anything_is_written() {
    let workshop = Workshop::new();
    for (set, expected) in [
        ("data.train=nowhere.safetensors", "nowhere.safetensors"),
        ("data.train=model.json", "is not a token shard"),
        ("data.max_length=128", "max_position_embeddings 64"),
        ("data.validation_fraction=0.9999", "expected at least one window"),
        ("model.overrides.vocab_size=100", "the model's vocabulary has 100 ids"),
        ("model.overrides.colour=1", "overrides.colour is no key"),
        ("model.overrides.hidden_size=15", "15"),
        ("relora.lora_r=100", "more than the model's hidden_size 16"),
        ("train.unknown=1", "unknown field `unknown`"),
    ] {
        let (code, _, stderr) = workshop.train(
            "run",
            &[&set
                .replace("=nowhere", &format!("={}", workshop.path("nowhere")))
                .replace("=model.json", &format!("={}", workshop.path("model.json")))],
        );
        assert_eq!(code, 2, "{set}: {stderr}");
        assert!(stderr.contains(expected), "{set}: {stderr}");
        assert!(!Path::new(&workshop.path("run")).exists());
    }
}
