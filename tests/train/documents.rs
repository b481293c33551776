//! `tokenize` on files as people have them, and `train`, `eval` and `generate` on what it and others wrote.

use crate::common::{refused, run, small_run::SmallRun};
use serde_json::{Value, json};
use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)
}

/// Tokenizes and returns the summary and the ids.
#[track_caller]
fn tokenize(input: &Path, flags: &[&str]) -> (Value, Vec<u32>) {
    let shard = tempfile::tempdir().unwrap();
    let shard = shard.path().join("shard.safetensors");
    let mut args = vec!["tokenize", input.to_str().unwrap(), "-o", shard.to_str().unwrap(), "--format", "json"];
    args.extend(flags);
    let (code, stdout, stderr) = run(args);
    assert_eq!(code, 0, "{stderr}");
    (serde_json::from_str(&stdout).unwrap(), ids(&shard))
}

/// The ids of a shard.
fn ids(shard: &Path) -> Vec<u32> {
    let bytes = fs::read(shard).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let json: Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let data = &bytes[8 + header..];
    match json["tokens"]["dtype"].as_str().unwrap() {
        "U16" => data.as_chunks::<2>().0.iter().map(|b| u16::from_le_bytes(*b).into()).collect(),
        _ => data.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect(),
    }
}

/// The documents of a shard of bytes.
fn documents(ids: &[u32]) -> Vec<String> {
    let pieces = ids.split(|&id| id == 256).filter(|piece| !piece.is_empty());
    pieces.map(|piece| String::from_utf8(piece.iter().map(|&id| id as u8).collect()).unwrap()).collect()
}

#[track_caller]
fn tokenize_refused(input: &Path, flags: &[&str], parts: &[&str]) {
    let shard = tempfile::tempdir().unwrap();
    let output = shard.path().join("shard.safetensors");
    let mut args = vec!["tokenize", input.to_str().unwrap(), "-o", output.to_str().unwrap()];
    args.extend(flags);
    let mut parts = parts.to_vec();
    parts.push("help: ");
    let stderr = refused(args, 2, &parts);
    assert!(!stderr.contains("panicked"), "{stderr}");
    assert_eq!(fs::read_dir(shard.path()).unwrap().count(), 0, "nothing is left behind");
}

#[test]
fn json_is_recognised_by_its_content() {
    let root = tempfile::tempdir().unwrap();
    let records = [json!({"text": "one", "url": "http://x"}), json!({"url": "y", "text": "zw\u{f6}lf\nlines"})];
    let lines = format!("{}\n{}\n", records[0], records[1]);
    let gzipped = {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        std::io::Write::write_all(&mut encoder, lines.as_bytes()).unwrap();
        encoder.finish().unwrap()
    };
    for (name, bytes) in [
        ("a.jsonl", lines.clone().into_bytes()),
        ("a.json", lines.into_bytes()),
        ("c4-train.00000-of-01024.json.gz", gzipped),
        ("list.json", serde_json::to_vec(&records).unwrap()),
        ("pretty.json", serde_json::to_vec_pretty(&records).unwrap()),
    ] {
        let path = root.path().join(name);
        fs::write(&path, bytes).unwrap();
        let (summary, ids) = tokenize(&path, &[]);
        assert_eq!(documents(&ids), ["one", "zw\u{f6}lf\nlines"], "{name}");
        assert_eq!((summary["documents"].as_u64(), summary["skipped"].as_u64()), (Some(2), Some(0)));
        tokenize_refused(&path, &["--field", "body"], &["line ", "no text in the field 'body'", "--field"]);
    }
}

#[test]
fn a_line_that_is_no_object_is_an_error_or_counted() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("a.jsonl");
    for line in ["[1]", "\"text\"", "5", "true", "null", "{\"text\": 1}", "{\"text\"", "caf\u{e9}"] {
        fs::write(&path, format!("{{\"text\":\"first\"}}\n{line}\n{{\"text\":\"last\"}}\n")).unwrap();
        tokenize_refused(&path, &[], &["a.jsonl' line 2: "]);
        let (summary, ids) = tokenize(&path, &["--skip-unreadable"]);
        assert_eq!(documents(&ids), ["first", "last"], "{line}");
        assert_eq!((summary["unreadable"].as_u64(), summary["skipped"].as_u64()), (Some(1), Some(1)));
    }
}

#[test]
fn a_folder_of_links_and_hidden_files_gives_its_data_alone() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("snapshot");
    fs::create_dir_all(folder.join(".cache/huggingface")).unwrap();
    fs::create_dir(folder.join("data")).unwrap();
    fs::write(root.path().join("blob"), "{\"text\":\"linked\"}\n").unwrap();
    fs::write(folder.join(".gitattributes"), "hidden").unwrap();
    fs::write(folder.join(".cache/huggingface/x"), "hidden").unwrap();
    fs::write(folder.join("data/b.jsonl"), "{\"text\":\"plain\"}\n").unwrap();
    symlink("../../blob", folder.join("data/a.jsonl")).unwrap();
    let (summary, ids) = tokenize(&folder, &[]);
    assert_eq!(documents(&ids), ["linked", "plain"]);
    assert_eq!(summary["left_out"]["hidden"].as_u64(), Some(2));
    fs::write(folder.join("notes.txt"), "text").unwrap();
    tokenize_refused(&folder, &[], &["data/a.jsonl", "notes.txt", "not clear which are the text", "--include"]);
}

#[test]
fn a_truncated_tokenizer_reads_the_whole_text() {
    let root = tempfile::tempdir().unwrap();
    let text = root.path().join("a.txt");
    fs::write(&text, "Licensed under the Apache License").unwrap();
    let plain = tokenize(&text, &["--tokenizer", fixture("tokenizer").to_str().unwrap()]).1;
    let mut json: Value = serde_json::from_slice(&fs::read(fixture("tokenizer/tokenizer.json")).unwrap()).unwrap();
    json["truncation"] = json!({"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0});
    let path = root.path().join("tokenizer.json");
    fs::write(&path, json.to_string()).unwrap();
    let cut = tokenize(&text, &["--tokenizer", path.to_str().unwrap(), "--end-of-document", "<|endoftext|>"]).1;
    assert_eq!(cut, plain);
    assert!(plain.len() > 5);
}

#[test]
fn special_tokens_go_around_each_document_when_they_are_wanted() {
    let root = tempfile::tempdir().unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(fixture("tokenizer").join(name), root.path().join(name)).unwrap();
    }
    let config = json!({"eos_token": "<|endoftext|>", "bos_token": "e", "add_bos_token": true, "add_eos_token": true});
    fs::write(root.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    let lines = root.path().join("a.jsonl");
    fs::write(&lines, "{\"text\":\"ab\"}\n{\"text\":\"ab\"}\n").unwrap();
    let tokenizer = root.path().display().to_string();
    let plain = tokenize(&lines, &["--tokenizer", &tokenizer]).1;
    let around = tokenize(&lines, &["--tokenizer", &tokenizer, "--add-special-tokens"]).1;
    let document = plain.split(|&id| id == 0).next().unwrap();
    let bos = around[0];
    assert_ne!(bos, document[0]);
    let expected = [&[bos], document, &[0]].concat();
    assert_eq!(around, expected.repeat(2), "the end of a document stands there once");
}

#[test]
fn ids_of_other_widths_are_told_apart_and_made_a_shard() {
    let small = SmallRun::new(1);
    let expected = ids(&small.path("tokens.safetensors"));
    let config = small.path("run.toml").display().to_string();
    for (kind, bytes) in [
        ("u32", expected.iter().flat_map(|id| id.to_le_bytes()).collect::<Vec<u8>>()),
        ("i64", expected.iter().flat_map(|&id| i64::from(id).to_le_bytes()).collect()),
    ] {
        let bin = small.path("x.bin");
        fs::write(&bin, bytes).unwrap();
        let (set, output) = (format!("data.train={}", bin.display()), small.path("run").display().to_string());
        let args = ["train", "--config", &config, "--set", &set, "-o", &output];
        refused(
            args,
            2,
            &["x.bin' has no header", &format!("ids of {kind}"), "as well as of u16", &format!("--ids {kind}")],
        );
        let (summary, found) = tokenize(&bin, &["--ids", kind]);
        assert_eq!(found, expected, "{kind}");
        assert_eq!(summary["tokens"].as_u64(), Some(expected.len() as u64));
    }
    let bin = small.path("x.bin");
    fs::write(&bin, [5i64, -100].map(i64::to_le_bytes).concat()).unwrap();
    tokenize_refused(&bin, &["--ids", "i64"], &["token 1 is -100"]);
}

/// A trained tiny model of 257 ids, and its shard.
fn trained(small: &SmallRun) -> String {
    small.train().join("checkpoints/step-20").display().to_string()
}

#[test]
fn a_vocabulary_larger_than_the_model_is_judged_by_the_ids_that_occur() {
    let small = SmallRun::new(1);
    let model = trained(&small);
    // As with an added token for padding that no text contains.
    let shard = small.path("tokens.safetensors");
    let bytes = fs::read(&shard).unwrap();
    let text = |n: &str| format!("\"vocab_size\":\"{n}\"").into_bytes();
    let at = bytes.windows(18).position(|w| w == text("257")).unwrap();
    let larger = small.path("larger.safetensors");
    fs::write(&larger, [&bytes[..at], &text("258"), &bytes[at + 18..]].concat()).unwrap();
    let eval = |data: &Path| {
        let data = data.display().to_string();
        run([
            "eval",
            "--model",
            &model,
            "--data",
            &data,
            "--max-length",
            "16",
            "--max-predictions",
            "30",
            "--format",
            "json",
        ])
    };
    let (code, stdout, stderr) = eval(&larger);
    assert_eq!((code, &stdout), (0, &eval(&shard).1), "{stderr}");
    let mut other = fs::read(&larger).unwrap();
    let end = other.len();
    other[end - 2..].copy_from_slice(&257u16.to_le_bytes());
    fs::write(&larger, other).unwrap();
    let (code, _, stderr) = eval(&larger);
    assert_eq!(code, 2, "{stderr}");
    assert!(stderr.contains("has id 257, the model's vocabulary has 257 ids"), "{stderr}");
}

#[test]
fn data_that_are_no_shard_are_refused_at_once() {
    let small = SmallRun::new(1);
    let model = trained(&small);
    let text = small.path("text.txt");
    fs::write(&text, "just some text, and more of it\n").unwrap();
    let data = text.display().to_string();
    refused(
        ["eval", "--model", &model, "--data", &data],
        2,
        &["text.txt' is not a token shard", "relora-kit tokenize"],
    );
    let pipe = small.path("pipe");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let begin = std::time::Instant::now();
    for path in [pipe, "/dev/zero".into()] {
        let path = path.display().to_string();
        refused(["eval", "--model", &model, "--data", &path], 2, &["expected a regular file"]);
        let set = format!("data.train={path}");
        let (config, output) = (small.path("run.toml").display().to_string(), small.path("r").display().to_string());
        refused(["train", "--config", &config, "--set", &set, "-o", &output], 2, &["expected a regular file"]);
    }
    assert!(begin.elapsed().as_secs() < 20);
}

#[test]
fn a_prompt_gets_the_special_tokens_of_its_tokenizer() {
    let small = SmallRun::new(1);
    let model = trained(&small);
    // Ids of the model are those of bytes; this vocabulary has letters, a space in front of words, and `<s>`.
    let mut vocabulary: serde_json::Map<String, Value> = (0..254).map(|i| (format!("<{i}>"), i.into())).collect();
    vocabulary.insert("<s>".into(), 254.into());
    vocabulary.insert("</s>".into(), 255.into());
    vocabulary.insert("a".into(), 256.into());
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            "special": true})
    };
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "pre_tokenizer": null,
        "post_processor": null, "decoder": null, "added_tokens": [special(254, "<s>"), special(255, "</s>")],
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocabulary, "merges": []},
    });
    let folder = Path::new(&model);
    fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let generate = |config: Value, flags: &[&str]| -> Value {
        fs::write(folder.join("tokenizer_config.json"), config.to_string()).unwrap();
        let mut args = vec!["generate", "--model", &model, "--prompt", "aa", "--max-new-tokens", "2", "--json"];
        args.extend(flags);
        let (code, stdout, stderr) = run(args);
        assert_eq!(code, 0, "{stderr}");
        serde_json::from_str::<Value>(&stdout).unwrap()["prompt_tokens"].clone()
    };
    let config = json!({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": true});
    assert_eq!(generate(config.clone(), &[]), json!([254, 256, 256]));
    assert_eq!(generate(config, &["--no-special-tokens"]), json!([256, 256]));
    assert_eq!(generate(json!({"bos_token": "<s>", "eos_token": "</s>"}), &[]), json!([256, 256]));
}
