//! `tokenize`, and what uses its shards, with a `tokenizer.json`.

use crate::common::{entries, refused, run};
use std::{
    fs,
    path::{Path, PathBuf},
};

fn fixture(name: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name).display().to_string()
}

/// A model with a vocabulary of 400 ids, which got its tokenizer from the data, and a shard of text.
fn workshop(root: &Path) -> (String, String) {
    let (model, shard) = (root.join("model"), root.join("text.safetensors").display().to_string());
    let lines = "{\"text\": \"Licensed under the Apache License\"}\n".repeat(40);
    fs::write(root.join("text.jsonl"), lines).unwrap();
    let input = root.join("text.jsonl").display().to_string();
    let (code, stdout, stderr) =
        run(["tokenize", &input, "--tokenizer", &fixture("tokenizer"), "-o", &shard, "--format", "json"]);
    assert_eq!(code, 0, "{stderr}");
    let summary: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!((summary["documents"].as_u64(), summary["vocab_size"].as_u64()), (Some(40), Some(400)));
    // 13 ids a line, and the end of the document.
    assert_eq!(summary["tokens"].as_u64(), Some(40 * 14));
    let config = root.join("train.toml");
    let toml = format!(
        "[model]\npreset = \"llama_9m\"\n[model.overrides]\nhidden_size = 16\nintermediate_size = 32\n\
         num_hidden_layers = 1\nnum_attention_heads = 2\nvocab_size = 400\n[data]\ntrain = \"{shard}\"\n\
         max_length = 14\n[train]\nmode = \"full\"\nbatch_size = 4\nnum_training_steps = 10\nlr = 0.01\n\
         scheduler = \"constant\"\n"
    );
    fs::write(&config, toml).unwrap();
    let run_folder = root.join("run").display().to_string();
    let (code, _, stderr) = run(["train", "--config", &config.display().to_string(), "-o", &run_folder]);
    assert_eq!(code, 0, "{stderr}");
    fs::rename(root.join("run/checkpoints/step-10"), &model).unwrap();
    (model.display().to_string(), shard)
}

#[test]
fn a_model_with_a_tokenizer_is_evaluated_and_speaks() {
    let root = tempfile::tempdir().unwrap();
    let (model, shard) = workshop(root.path());
    let (code, _, stderr) = run(["eval", "--model", &model, "--data", &shard, "--max-length", "14"]);
    assert_eq!(code, 0, "{stderr}");
    let (code, stdout, stderr) = run(["generate", "--model", &model, "--prompt", "Licensed", "--max-new-tokens", "5"]);
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.starts_with("Licensed"), "{stdout}");
}

/// A run of three updates of `[model] checkpoint`, or of the model of `train.toml` without one.
fn train_on(root: &Path, checkpoint: Option<&Path>, name: &str) -> (PathBuf, String) {
    let text = fs::read_to_string(root.join("train.toml")).unwrap();
    let (model, rest) = text.split_once("[data]").unwrap();
    let model = checkpoint.map_or(model.to_owned(), |path| format!("[model]\ncheckpoint = \"{}\"\n", path.display()));
    let (config, output) = (root.join("other.toml"), root.join(name));
    fs::write(&config, format!("{model}[data]{rest}save_every = 2\n").replace("steps = 10", "steps = 3")).unwrap();
    let (code, _, stderr) =
        run(["train".as_ref(), "--config".as_ref(), config.as_os_str(), "-o".as_ref(), output.as_os_str()]);
    assert_eq!(code, 0, "{stderr}");
    (output, stderr)
}

#[test]
fn every_checkpoint_has_the_tokenizer_of_the_data_even_when_that_is_gone() {
    let root = tempfile::tempdir().unwrap();
    let source = root.path().join("source");
    fs::create_dir(&source).unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(Path::new(&fixture("tokenizer")).join(name), source.join(name)).unwrap();
    }
    workshop(root.path());
    let shard = root.path().join("text.safetensors").display().to_string();
    let text = root.path().join("text.jsonl").display().to_string();
    let tokenizer = source.display().to_string();
    assert_eq!(run(["tokenize", &text, "--force", "-o", &shard, "--tokenizer", &tokenizer]).0, 0);
    let same = |a: &Path, b: &Path| fs::read(a).unwrap() == fs::read(b).unwrap();
    let (output, _) = train_on(root.path(), None, "new");
    for step in [2, 3] {
        let folder = output.join(format!("checkpoints/step-{step}"));
        for name in ["tokenizer.json", "tokenizer_config.json"] {
            assert!(same(&folder.join(name), &source.join(name)), "{step} {name}");
        }
    }

    // Going on needs the source no more.
    fs::remove_dir_all(&source).unwrap();
    fs::remove_dir_all(output.join("checkpoints/step-3")).unwrap();
    let manifest = fs::read_to_string(output.join("manifest.json")).unwrap();
    fs::write(output.join("manifest.json"), manifest.replace("\"finished\": true", "\"finished\": false")).unwrap();
    let (code, _, stderr) = run(["train".as_ref(), "--resume".as_ref(), output.as_os_str()]);
    assert_eq!(code, 0, "{stderr}");
    assert!(output.join("checkpoints/step-3/tokenizer.json").exists());

    // A new run does, and says so.
    let (output, stderr) = train_on(root.path(), None, "without");
    assert!(stderr.contains("source/tokenizer.json' is no longer the tokenizer that made the data"), "{stderr}");
    assert!(!output.join("checkpoints/step-3/tokenizer.json").exists());
}

#[test]
fn a_model_keeps_the_tokenizer_and_the_generation_settings_it_came_with() {
    let root = tempfile::tempdir().unwrap();
    let (model, _) = workshop(root.path());
    for name in ["generation_config.json", "special_tokens_map.json", "notes.json"] {
        fs::write(Path::new(&model).join(name), "{}").unwrap();
    }
    let (output, _) = train_on(root.path(), Some(Path::new(&model)), "more");
    let mut names = entries(&output.join("checkpoints/step-3"));
    names.retain(|name| name.ends_with(".json"));
    let expected =
        ["config.json", "generation_config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"];
    assert_eq!(names, expected);
}

#[test]
fn a_shard_of_another_tokenizer_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let (model, shard) = workshop(root.path());
    let path = Path::new(&model).join("tokenizer.json");
    let changed = fs::read_to_string(&path).unwrap() + " ";
    fs::write(&path, changed).unwrap();
    refused(["eval", "--model", &model, "--data", &shard], 2, &["was made with another tokenizer", "tokenizer.json"]);
    let config = root.path().join("train.toml");
    let toml = fs::read_to_string(&config).unwrap();
    let (_, rest) = toml.split_once("[data]").unwrap();
    fs::write(&config, format!("[model]\ncheckpoint = \"{model}\"\n[data]{rest}")).unwrap();
    let output = root.path().join("again").display().to_string();
    let args = ["train", "--config", &config.display().to_string(), "-o", &output];
    refused(args, 2, &["was made with another tokenizer"]);
}

#[test]
fn requests_that_make_no_sense_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let text = root.path().join("a.txt");
    fs::write(&text, "text").unwrap();
    let (text, shard) = (text.display().to_string(), root.path().join("s").display().to_string());
    refused(["tokenize", &text, "-o", &shard, "--tokenizer", "nowhere.json"], 2, &["nowhere.json"]);
    refused(["tokenize", &text, "-o", &shard, "--end-of-document", "x"], 2, &["id 256"]);
    refused(["tokenize", &text, "-o", &shard, "--split-on", ""], 2, &["--split-on"]);
    assert!(!Path::new(&shard).exists());
}
