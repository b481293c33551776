//! `train`: the options of the official trainer, on the tiny run.

use crate::common::{refused, run, small_run::SmallRun};
use serde_json::Value;
use std::{fs, path::Path};

/// Starts `run.toml` with these keys set into the folder `output`.
fn train(small: &SmallRun, output: &str, set: &[&str], more: &[&str]) -> (i32, String, String) {
    let (config, output) = (small.path("run.toml"), small.path(output));
    let mut args = vec!["train".to_owned(), "--config".into(), config.display().to_string()];
    args.extend(["-o".to_owned(), output.display().to_string()]);
    args.extend(set.iter().flat_map(|s| ["--set".to_owned(), (*s).to_owned()]));
    args.extend(more.iter().map(|s| (*s).to_owned()));
    run(args)
}

#[track_caller]
fn trained(small: &SmallRun, output: &str, set: &[&str], more: &[&str]) -> String {
    let (code, stdout, stderr) = train(small, output, set, more);
    assert_eq!(code, 0, "{stderr}");
    stdout
}

fn rows(run: &Path) -> Vec<Value> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// What must repeat bit for bit.
fn losses(run: &Path) -> Vec<String> {
    rows(run).iter().filter(|r| r.get("loss").is_some()).map(|r| format!("{} {}", r["step"], r["loss"])).collect()
}

fn model(run: &Path, step: u64) -> Vec<u8> {
    fs::read(run.join(format!("checkpoints/step-{step}/model.safetensors"))).unwrap()
}

/// As if the process had died after the checkpoint of `step`.
fn die_after(run: &Path, step: u64) {
    for entry in fs::read_dir(run.join("checkpoints")).unwrap() {
        let path = entry.unwrap().path();
        let at: u64 = path.file_name().unwrap().to_str().unwrap().trim_start_matches("step-").parse().unwrap();
        if at > step {
            fs::remove_dir_all(path).unwrap();
        }
    }
    let manifest = run.join("manifest.json");
    let text = fs::read_to_string(&manifest).unwrap();
    fs::write(&manifest, text.replace("\"finished\": true", "\"finished\": false")).unwrap();
}

const EVERYTHING: [&str; 4] = [
    "relora.lora_dropout=0.2",
    "relora.train_scaling=true",
    "train.activation_checkpointing=true",
    "train.save_every=7",
];

#[test]
fn dropout_and_trained_scalings_resume_bit_for_bit_and_verify() {
    let small = SmallRun::new(3);
    trained(&small, "whole", &EVERYTHING, &[]);
    let whole = small.path("whole");
    let (expected, final_model) = (losses(&whole), model(&whole, 40));
    die_after(&whole, 21);
    let (code, _, stderr) = run(["train".as_ref(), "--resume".as_ref(), whole.as_os_str()]);
    assert_eq!(code, 0, "{stderr}");
    assert!(stderr.contains("after update 21"), "{stderr}");
    assert_eq!(losses(&whole), expected);
    assert!(model(&whole, 40) == final_model);
    // The stored cycles hold the trained scalings: base and cycles add up.
    let (code, stdout, stderr) = run(["verify".as_ref(), whole.as_os_str()]);
    assert_eq!(code, 0, "{stdout}{stderr}");
}

#[test]
fn activation_checkpointing_and_threads_change_no_bit() {
    let small = SmallRun::new(1);
    trained(&small, "plain", &["relora.lora_dropout=0.2"], &["--threads", "1"]);
    let checkpointing = ["relora.lora_dropout=0.2", "train.activation_checkpointing=true"];
    trained(&small, "checkpointing", &checkpointing, &["--threads", "2"]);
    assert_eq!(losses(&small.path("plain")), losses(&small.path("checkpointing")));
}

#[test]
fn a_scaling_of_zero_after_a_restart_leaves_the_second_cycle_dead() {
    let small = SmallRun::new(2);
    let zero = ["relora.train_scaling=true", "relora.zero_restart_scaling=true"];
    trained(&small, "run", &zero, &[]);
    let tensors = |cycle: &str| {
        let path = small.path(&format!("run/cycles/{cycle}/adapter_model.safetensors"));
        let file = relora_kit::checkpoint::TensorFile::open(&path).unwrap();
        let b = file.tensors().filter(|t| t.name().contains("lora_B"));
        b.flat_map(|t| t.to_f32().unwrap().into_owned()).collect::<Vec<f32>>()
    };
    assert!(tensors("cycle-001").iter().any(|b| *b != 0.0));
    assert!(tensors("cycle-002").iter().all(|b| *b == 0.0), "B = 0 and tanh(0) = 0 have no gradient");
}

#[test]
fn a_model_warmed_up_before_goes_on_with_its_counters() {
    let small = SmallRun::new(3);
    trained(&small, "one", &["train.save_every=10"], &[]);
    let text = fs::read_to_string(small.path("run.toml")).unwrap();
    let (head, tail) = (text.split("[warm_start]").next().unwrap(), text.split("[relora]").nth(1).unwrap());
    let origin = text.split("[data]").next().unwrap();
    let warmed = small.path("one/checkpoints/step-10");
    let head = head.replace(origin, &format!("[model]\nwarmed_up_model = {:?}\n", warmed.display()));
    fs::write(small.path("run.toml"), format!("{head}[relora]{tail}")).unwrap();
    trained(&small, "two", &[], &[]);
    // The moments of the warm start are gone, so losses differ from the second update on.
    let (one, two) = (rows(&small.path("one")), rows(&small.path("two")));
    assert_eq!(two.len(), 30);
    for key in ["step", "tokens", "lr", "loss", "cycle"] {
        assert_eq!(two[0][key], one[10][key], "{key}");
    }
    assert_eq!(two[29]["lr"], one[39]["lr"]);
    let (code, stdout, stderr) = run(["verify".as_ref(), small.path("two").as_os_str()]);
    assert_eq!(code, 0, "{stdout}{stderr}");

    // 30 of the 40 updates are left for the schedule: known only once the model's training state has been read.
    trained(&small, "cosine", &["train.scheduler=cosine", "train.cycle_length=30"], &[]);
    let (code, _, stderr) = train(&small, "no", &["train.scheduler=cosine", "train.cycle_length=20"], &[]);
    assert!(code == 2 && stderr.contains("the schedule spans 30 updates"), "{stderr}");

    fs::remove_dir_all(warmed.join("training_state")).unwrap();
    let (code, _, stderr) = train(&small, "three", &["train.num_training_steps=20"], &[]);
    assert_eq!(code, 0, "{stderr}");
    assert!(stderr.contains("count from 0"), "{stderr}");
    assert_eq!(rows(&small.path("three"))[0]["step"], 1);
    let steps = "model.warmed_up_steps=40";
    let (code, _, stderr) = train(&small, "four", &[steps], &[]);
    assert!(code == 2 && stderr.contains("model.warmed_up_steps 40 leaves nothing"), "{stderr}");
}

#[test]
fn skipped_batches_change_nothing_and_are_marked() {
    let small = SmallRun::new(1);
    trained(&small, "run", &["train.skip_batches=[3, 4]"], &[]);
    let rows = rows(&small.path("run"));
    let skipped: Vec<u64> = rows.iter().filter(|r| r["skipped"] == true).map(|r| r["step"].as_u64().unwrap()).collect();
    assert_eq!(skipped, [3, 4]);
    assert!(rows[2]["loss"].is_null());
}

#[test]
fn updates_that_are_not_finite_are_skipped_and_too_many_stop_the_run() {
    let small = SmallRun::new(1);
    let (code, _, stderr) = train(&small, "run", &["train.lr=1e30", "warm_start.lr=1e30"], &[]);
    assert_eq!(code, 3, "{stderr}");
    assert!(stderr.contains("the update was skipped") && stderr.contains("more than 5% of 20"), "{stderr}");
    let rows = rows(&small.path("run"));
    let skipped = rows.iter().filter(|r| r["skipped"] == true).count();
    assert!(skipped >= 1 && rows.len() < 20, "{skipped} of {}", rows.len());
}

#[test]
fn autoresume_starts_goes_on_or_has_nothing_to_do() {
    let small = SmallRun::new(2);
    let set = ["train.save_every=8"];
    trained(&small, "run", &set, &["--autoresume"]);
    let run_dir = small.path("run");
    let expected = losses(&run_dir);
    die_after(&run_dir, 16);
    let (code, _, stderr) = train(&small, "run", &set, &["--autoresume"]);
    assert!(code == 0 && stderr.contains("after update 16"), "{stderr}");
    assert_eq!(losses(&run_dir), expected);
    let (code, _, stderr) = train(&small, "run", &set, &["--autoresume"]);
    assert!(code == 0 && stderr.contains("is finished"), "{stderr}");
    let args = ["train", "--config", &small.path("run.toml").display().to_string(), "--autoresume"].map(str::to_owned);
    let more = ["-o".to_owned(), run_dir.display().to_string(), "--set".into(), "train.lr=0.5".into()];
    refused(args.into_iter().chain(more), 2, &["another configuration", "lr = 0.5", "--resume"]);
}

#[test]
fn a_profile_shows_operations_and_leaves_a_trace() {
    let small = SmallRun::new(1);
    let stdout = trained(&small, "run", &[], &["--profile", "--format", "json"]);
    let summary: Value = serde_json::from_str(&stdout).unwrap();
    let operations = summary["operations"].as_array().unwrap();
    let adamw = operations.iter().find(|o| o["operation"] == "adamw").unwrap();
    assert!(adamw["calls"].as_u64().unwrap() > 20);
    assert!(operations.iter().any(|o| o["gflops"].as_f64().is_some_and(|g| g > 0.0)));
    let trace: Value = serde_json::from_slice(&fs::read(small.path("run/profile.json")).unwrap()).unwrap();
    assert!(trace["traceEvents"].as_array().unwrap().len() > 1000);
}

#[test]
fn bf16_weights_resume_verify_and_say_what_survived() {
    let small = SmallRun::new(3);
    for rounding in ["stochastic", "nearest"] {
        let rounding_key = format!("train.rounding={rounding}");
        let set = ["train.dtype=bf16", &rounding_key, "train.save_every=7"];
        trained(&small, rounding, &set, &[]);
        let run_dir = small.path(rounding);
        let (expected, final_model) = (losses(&run_dir), model(&run_dir, 40));
        let merges: Vec<Value> = rows(&run_dir).into_iter().filter(|r| r.get("retention").is_some()).collect();
        assert_eq!(merges.iter().map(|m| m["step"].as_u64().unwrap()).collect::<Vec<_>>(), [20, 30, 40]);
        for merge in merges {
            // Either way the rounding is as often up as down; nearest keeps what exceeds half a unit.
            assert!((merge["retention"].as_f64().unwrap() - 1.0).abs() < 0.2, "{merge}");
        }
        let verified = || run(["verify".as_ref(), run_dir.as_os_str()]);
        let (code, stdout, stderr) = verified();
        assert_eq!(code, 0, "{rounding}: {stdout}{stderr}");
        let file = relora_kit::checkpoint::Checkpoint::open(&run_dir.join("checkpoints/step-40")).unwrap();
        assert!(file.tensors().all(|t| t.dtype() == relora_kit::checkpoint::Dtype::BF16));

        die_after(&run_dir, 28);
        let (code, _, stderr) = run(["train".as_ref(), "--resume".as_ref(), run_dir.as_os_str()]);
        assert!(code == 0 && stderr.contains("after update 28"), "{stderr}");
        assert_eq!(losses(&run_dir), expected);
        assert!(model(&run_dir, 40) == final_model);
    }
    assert!(losses(&small.path("nearest")) != losses(&small.path("stochastic")));
}

#[test]
fn the_planned_memory_is_what_the_run_takes() {
    let small = SmallRun::new(1);
    let text = fs::read_to_string(small.path("run.toml")).unwrap();
    // The real llama_9m, so that its 140 MB outweigh the program itself.
    let (before, after) = text.split_once("[model.overrides]").unwrap();
    let text = format!("{before}[data]{}", after.split_once("[data]").unwrap().1);
    fs::write(small.path("run.toml"), text.replace("[warm_start]\nnum_training_steps = 10\n", "")).unwrap();
    for r in ["relora.lora_r=2", "relora.lora_r=64"] {
        let set = ["train.num_training_steps=6", "relora.relora=3", "train.restart_warmup_steps=1", r];
        let plan = trained(&small, "unused", &set, &["--plan", "--format", "json"]);
        let planned = serde_json::from_str::<Value>(&plan).unwrap()["configured_peak"].as_f64().unwrap();
        let _ = fs::remove_dir_all(small.path("run"));
        let summary = trained(&small, "run", &set, &["--format", "json", "--threads", "2"]);
        let taken = serde_json::from_str::<Value>(&summary).unwrap()["peak_memory"].as_f64().unwrap();
        assert!((planned / taken - 1.0).abs() < 0.15, "planned {planned}, taken {taken}");
    }
    assert!(!small.path("unused").exists());
}

#[test]
fn a_plan_of_presets_needs_no_configuration() {
    let (code, stdout, stderr) = run(["train", "--plan", "llama_1b,llama_7b", "--format", "json"]);
    assert_eq!(code, 0, "{stderr}");
    let plan: Value = serde_json::from_str(&stdout).unwrap();
    let total = |model: &str, mode: &str, dtype: &str| {
        let needs = plan["needs"].as_array().unwrap();
        let found = needs.iter().find(|n| n["model"] == model && n["mode"] == mode && n["dtype"] == dtype);
        found.unwrap()["total"].as_f64().unwrap()
    };
    // 6.74e9 parameters, 12 bytes each, gradients that lie where no activation was, and activations.
    assert!(total("llama_7b", "full", "f32") > 12.0 * 6.7e9);
    assert!(total("llama_7b", "relora", "f32") < 0.55 * total("llama_7b", "full", "f32"));
    assert!(total("llama_1b", "relora", "bf16") < total("llama_1b", "relora", "f32"));
    let all = run(["train", "--plan", "all"]);
    assert!(all.0 == 0 && all.1.contains("llama_250m_50K"), "{}", all.2);
    refused(["train", "--plan", "llama_2b"], 2, &["no preset 'llama_2b'"]);
    refused(["train", "--plan"], 2, &["--plan needs --config"]);
}

#[test]
fn factors_alone_train_without_the_weights() {
    let small = SmallRun::new(1);
    let text = fs::read_to_string(small.path("run.toml")).unwrap();
    let text = text.replace("mode = \"relora\"", "mode = \"lora\"").replace("relora = 10\n", "lora_only = true\n");
    fs::write(small.path("run.toml"), text).unwrap();
    trained(&small, "run", &[], &[]);
    let base = relora_kit::checkpoint::Checkpoint::open(&small.path("run/base")).unwrap();
    let q = base.tensor("model.layers.0.self_attn.q_proj.weight").unwrap().to_f32().unwrap().into_owned();
    assert!(q.iter().all(|x| *x == 0.0));
    let (code, stdout, stderr) = run(["verify".as_ref(), small.path("run").as_os_str()]);
    assert_eq!(code, 0, "{stdout}{stderr}");
}
