//! `train --resume`: it goes on with the run that was begun, or refuses by name; and what evaluations count.

use crate::common::{refused, run, small_run::SmallRun};
use serde_json::Value;
use std::{fs, path::Path};

const HELD_OUT: [&str; 4] =
    ["train.eval_every=10", "train.save_every=10", "data.validation_fraction=0.1", "train.eval_tokens=100"];

fn train(small: &SmallRun, output: &str, set: &[&str]) -> (i32, String, String) {
    let (config, output) = (small.path("run.toml"), small.path(output));
    let mut args = vec!["train".to_owned(), "--config".into(), config.display().to_string()];
    args.extend(["-o".to_owned(), output.display().to_string()]);
    args.extend(set.iter().flat_map(|s| ["--set".to_owned(), (*s).to_owned()]));
    run(args)
}

fn resume(run_dir: &Path) -> (i32, String, String) {
    run(["train".as_ref(), "--resume".as_ref(), run_dir.as_os_str()])
}

fn edit(path: &Path, from: &str, to: &str) {
    let text = fs::read_to_string(path).unwrap();
    assert!(text.contains(from), "{from} is not in {text}");
    fs::write(path, text.replace(from, to)).unwrap();
}

fn manifest(run_dir: &Path) -> Value {
    serde_json::from_slice(&fs::read(run_dir.join("manifest.json")).unwrap()).unwrap()
}

/// As if the process had died after the checkpoint of `step`.
fn die_after(run_dir: &Path, step: u64) {
    for entry in fs::read_dir(run_dir.join("checkpoints")).unwrap() {
        let path = entry.unwrap().path();
        let at: u64 = path.file_name().unwrap().to_str().unwrap().trim_start_matches("step-").parse().unwrap();
        if at > step {
            fs::remove_dir_all(path).unwrap();
        }
    }
    edit(&run_dir.join("manifest.json"), "\"finished\": true", "\"finished\": false");
}

fn evaluations(run_dir: &Path) -> Vec<String> {
    let text = fs::read_to_string(run_dir.join("metrics.jsonl")).unwrap();
    text.lines().filter(|line| line.contains("eval_loss")).map(str::to_owned).collect()
}

#[test]
fn a_configuration_that_makes_another_run_is_refused_by_its_key() {
    let small = SmallRun::new(3);
    assert_eq!(train(&small, "run", &["train.save_every=10"]).0, 0);
    let run_dir = small.path("run");
    die_after(&run_dir, 20);
    let config = run_dir.join("config.toml");
    let original = fs::read_to_string(&config).unwrap();
    for (from, to, key) in [
        ("batch_size = 4", "batch_size = 8", "batch_size"),
        ("max_length = 32", "max_length = 16", "data.max_length"),
        ("seed = 3", "seed = 5", "train.seed"),
        ("validation_fraction = 0.0", "validation_fraction = 0.5", "data.validation_fraction"),
        ("shuffle = true", "shuffle = false", "data.shuffle"),
        ("lora_r = 2", "lora_r = 4", "relora.lora_r"),
        ("adam_beta2 = 0.999", "adam_beta2 = 0.95", "train.adam_beta2"),
    ] {
        edit(&config, from, to);
        refused(["train".as_ref(), "--resume".as_ref(), run_dir.as_os_str()], 2, &[key, "another run"]);
        fs::write(&config, &original).unwrap();
    }
    // A run of 0.1.0 has no configuration in its manifest: its checkpoints still count the tokens, its manifest the seed.
    let mut old = manifest(&run_dir);
    old.as_object_mut().unwrap().remove("configuration");
    fs::write(run_dir.join("manifest.json"), old.to_string()).unwrap();
    for (from, to, part) in [
        ("batch_size = 4", "batch_size = 8", "had seen 2560 tokens after update 20"),
        ("max_length = 32", "max_length = 16", "had seen 2560 tokens"),
        ("seed = 3", "seed = 5", "train.seed was 3"),
    ] {
        edit(&config, from, to);
        refused(["train".as_ref(), "--resume".as_ref(), run_dir.as_os_str()], 2, &[part]);
        fs::write(&config, &original).unwrap();
    }
    assert_eq!(resume(&run_dir).0, 0);
}

#[test]
fn what_may_change_is_said_and_recorded() {
    let small = SmallRun::new(3);
    assert_eq!(train(&small, "run", &["train.save_every=10"]).0, 0);
    let run_dir = small.path("run");
    let whole = fs::read(run_dir.join("checkpoints/step-40/model.safetensors")).unwrap();
    die_after(&run_dir, 20);
    // The same data elsewhere, and the same updates in smaller passes: another way to the same run.
    let moved = small.path("moved.safetensors");
    fs::rename(small.path("tokens.safetensors"), &moved).unwrap();
    let config = run_dir.join("config.toml");
    edit(&config, "tokens.safetensors", "moved.safetensors");
    let (code, _, stderr) = resume(&run_dir);
    assert_eq!(code, 0, "{stderr}");
    assert!(stderr.contains("data.train changes from"), "{stderr}");
    assert!(fs::read(run_dir.join("checkpoints/step-40/model.safetensors")).unwrap() == whole);
    assert_eq!(manifest(&run_dir)["changes"][0]["key"], "data.train");
    die_after(&run_dir, 30);
    edit(&config, "lr = 0.01", "lr = 0.001");
    let (code, _, stderr) = resume(&run_dir);
    assert_eq!(code, 0, "{stderr}");
    assert!(stderr.contains("train.lr changes from 0.01 to 0.001 after update 30"), "{stderr}");
    let change = manifest(&run_dir)["changes"][1].clone();
    assert_eq!((change["step"].as_u64(), change["key"].as_str()), (Some(30), Some("train.lr")));
    assert_eq!(manifest(&run_dir)["configuration"]["train.lr"], 0.001);
}

#[test]
fn an_evaluation_that_an_interruption_prevented_is_made_up_for() {
    let small = SmallRun::new(3);
    let (code, _, stderr) = train(&small, "run", &HELD_OUT);
    assert_eq!(code, 0, "{stderr}");
    let run_dir = small.path("run");
    let whole = evaluations(&run_dir);
    assert_eq!(whole.len(), 4, "{whole:?}");
    die_after(&run_dir, 10);
    edit(&run_dir.join("metrics.jsonl"), &format!("{}\n", whole[0]), "");
    assert_eq!(resume(&run_dir).0, 0);
    assert_eq!(evaluations(&run_dir), whole);
    // One that was made is not made again.
    die_after(&run_dir, 20);
    assert_eq!(resume(&run_dir).0, 0);
    assert_eq!(evaluations(&run_dir), whole);
}

#[test]
fn a_run_is_finished_only_with_its_final_evaluation_and_has_one() {
    let small = SmallRun::new(1);
    assert_eq!(train(&small, "run", &HELD_OUT).0, 0);
    let run_dir = small.path("run");
    let whole = evaluations(&run_dir);
    // Died after the evaluation, before the manifest said so.
    die_after(&run_dir, 20);
    let (code, stdout, stderr) = resume(&run_dir);
    assert_eq!(code, 0, "{stderr}");
    assert_eq!(evaluations(&run_dir), whole);
    assert!(stdout.contains("validation loss"), "{stdout}");
    assert!(!stdout.contains("training loss") && !stdout.contains("NaN"), "{stdout}");
    // Died, or was interrupted, before the evaluation.
    die_after(&run_dir, 20);
    edit(&run_dir.join("metrics.jsonl"), &format!("{}\n", whole[1]), "");
    assert_eq!(resume(&run_dir).0, 0);
    assert_eq!(evaluations(&run_dir), whole);
    assert_eq!(manifest(&run_dir)["finished"], true);
}

#[test]
fn a_run_that_asks_for_evaluations_holds_something_out() {
    let small = SmallRun::new(1);
    let sequences = fs::metadata(concat!(env!("CARGO_MANIFEST_DIR"), "/LICENSE")).unwrap().len() / 32;
    let (code, _, stderr) = train(&small, "none", &["data.validation_fraction=0.0005"]);
    assert_eq!(code, 2, "{stderr}");
    assert!(
        stderr.contains(&format!("validation_fraction 0.0005 of {sequences} sequences holds out none")),
        "{stderr}"
    );
    let (code, _, stderr) = train(&small, "none", &["train.eval_every=5"]);
    assert!(code == 2 && stderr.contains("train.eval_every is 5, but no data are held out"), "{stderr}");
    let text = small.path("short.txt");
    fs::write(&text, "too short").unwrap();
    let short = small.path("short.safetensors");
    assert_eq!(run(["tokenize".as_ref(), text.as_os_str(), "-o".as_ref(), short.as_os_str()]).0, 0);
    let (code, _, stderr) = train(&small, "none", &[&format!("data.validation={:?}", short.display())]);
    assert!(code == 2 && stderr.contains("fewer than one sequence of data.max_length 32"), "{stderr}");
    assert!(!small.path("none").exists());
}

#[test]
fn an_evaluation_of_n_predictions_counts_n_whatever_the_batch() {
    let small = SmallRun::new(1);
    let run_dir = small.train();
    let (model, data) = (run_dir.join("checkpoints/step-20"), small.path("tokens.safetensors"));
    let eval = |n: &str, batch: &str, data: &Path| -> (u64, f64) {
        let (code, stdout, stderr) = run([
            "eval".as_ref(),
            "--model".as_ref(),
            model.as_os_str(),
            "--data".as_ref(),
            data.as_os_str(),
            "--format".as_ref(),
            "json".as_ref(),
            "--max-predictions".as_ref(),
            n.as_ref(),
            "--batch-size".as_ref(),
            batch.as_ref(),
        ]);
        assert_eq!(code, 0, "{stderr}");
        let json: Value = serde_json::from_str(&stdout).unwrap();
        (json["predictions"].as_u64().unwrap(), json["loss"].as_f64().unwrap())
    };
    // 31 predictions a sequence: three sequences and 7 predictions of the fourth.
    let results: Vec<_> = ["1", "3", "8"].map(|batch| eval("100", batch, &data)).into();
    for (predictions, loss) in &results {
        assert_eq!(*predictions, 100);
        assert!((loss - results[0].1).abs() < 1e-6, "{results:?}");
    }
    // The last 7 are those of the fourth sequence, cut after 8 tokens.
    let text = fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/LICENSE")).unwrap();
    let (fourth, shard) = (small.path("fourth.txt"), small.path("fourth.safetensors"));
    fs::write(&fourth, &text[96..128]).unwrap();
    assert_eq!(run(["tokenize".as_ref(), fourth.as_os_str(), "-o".as_ref(), shard.as_os_str()]).0, 0);
    let (whole, rest) = (eval("93", "2", &data), eval("7", "2", &shard));
    assert_eq!((whole.0, rest.0), (93, 7));
    let mean = (93.0 * whole.1 + 7.0 * rest.1) / 100.0;
    assert!((mean - results[0].1).abs() < 1e-6, "{mean} {results:?}");
    assert_eq!(eval("1", "8", &data).0, 1);
}

#[test]
fn a_token_budget_counts_what_a_warmed_up_model_has_seen_and_the_data_go_on_there() {
    let small = SmallRun::new(1);
    let first = fs::read_to_string(small.path("run.toml")).unwrap();
    let full = first[..first.find("[warm_start]").unwrap()]
        .replace("\"relora\"", "\"full\"")
        .replace("cosine_restarts", "constant")
        .replace("restart_warmup_steps = 2", "restart_warmup_steps = 0");
    fs::write(small.path("run.toml"), &full).unwrap();
    let plain = ["data.shuffle=false", "train.num_training_steps=10", "train.batch_size=2"];
    let (code, _, stderr) = train(&small, "first", &plain);
    assert_eq!(code, 0, "{stderr}");
    let warmed = small.path("first/checkpoints/step-10");
    let origin = full[..full.find("[data]").unwrap()].to_owned();
    let then = full.replace(&origin, &format!("[model]\nwarmed_up_model = {:?}\n", warmed.display()));
    fs::write(small.path("run.toml"), then).unwrap();
    // 640 tokens were seen; 1408 remain, 11 updates of 128.
    let set = ["data.shuffle=false", "train.max_train_tokens=2048", "train.batch_size=4"];
    let (code, stdout, stderr) = train(&small, "then", &set);
    assert_eq!(code, 0, "{stderr}");
    let config = fs::read_to_string(small.path("then/config.toml")).unwrap();
    assert!(config.contains("num_training_steps = 21"), "{config}");
    assert!(stdout.contains("2048"), "{stdout}");
    // Its first update reads sequences 20 to 23.
    let metrics = fs::read_to_string(small.path("then/metrics.jsonl")).unwrap();
    let row: Value = serde_json::from_str(metrics.lines().next().unwrap()).unwrap();
    let text = fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/LICENSE")).unwrap();
    let (next, shard) = (small.path("next.txt"), small.path("next.safetensors"));
    fs::write(&next, &text[20 * 32..24 * 32]).unwrap();
    assert_eq!(run(["tokenize".as_ref(), next.as_os_str(), "-o".as_ref(), shard.as_os_str()]).0, 0);
    let (code, stdout, stderr) = run([
        "eval".as_ref(),
        "--model".as_ref(),
        warmed.as_os_str(),
        "--data".as_ref(),
        shard.as_os_str(),
        "--format".as_ref(),
        "json".as_ref(),
    ]);
    assert_eq!(code, 0, "{stderr}");
    let loss = serde_json::from_str::<Value>(&stdout).unwrap()["loss"].as_f64().unwrap();
    assert!((row["loss"].as_f64().unwrap() - loss).abs() < 1e-6, "{row} {loss}");
    let (code, _, stderr) = train(&small, "less", &["train.max_train_tokens=700"]);
    assert!(code == 2 && stderr.contains("of which the model has seen 640"), "{stderr}");
}

#[test]
fn eval_says_what_is_wrong_with_its_inputs() {
    let small = SmallRun::new(1);
    let run_dir = small.train();
    let model = run_dir.join("checkpoints/step-20");
    let (text, shard) = (small.path("short.txt"), small.path("short.safetensors"));
    fs::write(&text, "twelve bytes").unwrap();
    assert_eq!(run(["tokenize".as_ref(), text.as_os_str(), "-o".as_ref(), shard.as_os_str()]).0, 0);
    let eval = |model: &Path, data: &Path, parts: &[&str]| {
        let args = ["eval".as_ref(), "--model".as_ref(), model.as_os_str(), "--data".as_ref(), data.as_os_str()];
        refused(args, 2, parts)
    };
    let message = eval(&model, &shard, &["fewer than one sequence of --max-length 32", "lower --max-length"]);
    assert!(!message.contains("validation_fraction") && !message.contains("to train on"), "{message}");
    eval(&model, &text, &["is not a token shard", "relora-kit tokenize"]);
    eval(&run_dir.join("cycles/cycle-001"), &shard, &["holds an adapter", "relora-kit merge --base"]);
}
