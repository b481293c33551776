//! `relora-kit convert`, driven as a user does.

use crate::common::{entries, f32_bytes, refused, run};
use relora_kit::{
    checkpoint::{Checkpoint, Dtype},
    model::Model,
    ops::Cpu,
};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::{
    fs,
    path::{Path, PathBuf},
};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// Converts into a new folder; returns the folder and the report.
#[track_caller]
fn convert(input: &Path, flags: &[&str]) -> (tempfile::TempDir, PathBuf, Value) {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("out");
    let mut args = vec!["convert", input.to_str().unwrap(), "-o", output.to_str().unwrap(), "--format", "json"];
    args.extend(flags);
    let (code, stdout, stderr) = run(args);
    assert_eq!(code, 0, "{stderr}");
    (dir, output, serde_json::from_str(&stdout).unwrap())
}

/// Expects a refusal that leaves nothing behind.
#[track_caller]
fn convert_refused(input: &Path, parts: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("out");
    refused(["convert".as_ref(), input.as_os_str(), "-o".as_ref(), output.as_os_str()], 2, parts);
    assert!(entries(dir.path()).is_empty(), "{:?}", entries(dir.path()));
}

fn f32_values(checkpoint: &Checkpoint, name: &str) -> Vec<f32> {
    checkpoint.tensor(name).unwrap().to_f32().unwrap().into_owned()
}

#[test]
fn every_type_of_gguf_is_unpacked_as_the_gguf_package_does() {
    let (_dir, output, report) = convert(&fixture("gguf/types.gguf"), &[]);
    let found = Checkpoint::open(&output).unwrap();
    let expected = read_json(&fixture("gguf/types.json"));
    let expected = expected.as_object().unwrap();
    assert_eq!(found.len(), expected.len());
    for (name, e) in expected {
        let values = f32_values(&found, name);
        let wanted = e["first"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32);
        assert_eq!(values[..4], wanted.collect::<Vec<_>>(), "{name}, stored as {}", e["stored_as"]);
        let hash = Sha256::digest(f32_bytes(&values)).iter().map(|b| format!("{b:02x}")).collect::<String>();
        assert_eq!(e["sha256_f32"], hash, "{name}, stored as {}", e["stored_as"]);
        let row = report["tensors"].as_array().unwrap().iter().find(|t| t["name"] == *name).unwrap();
        assert_eq!((&row["stored_as"], &row["shape"]), (&e["stored_as"], &e["shape"]), "{name}");
    }
}

#[test]
fn a_gguf_becomes_a_model_that_our_own_commands_take() {
    let (_dir, output, _) = convert(&fixture("gguf/types.gguf"), &["--dtype", "bf16", "--max-shard-size", "100KB"]);
    let config = read_json(&output.join("config.json"));
    for (key, value) in [
        ("hidden_size", 256.into()),
        ("num_key_value_heads", 1.into()),
        ("head_dim", 16.into()),
        ("rms_norm_eps", 1e-5.into()),
        ("tie_word_embeddings", false.into()),
        ("torch_dtype", Value::from("bfloat16")),
        ("bos_token_id", 0.into()),
    ] {
        assert_eq!(config[key], value, "{key}");
    }
    let model = Checkpoint::open(&output).unwrap();
    assert!(model.files().len() > 1 && model.tensors().all(|t| t.dtype() == Dtype::BF16));
    let trained = Model::load(Cpu, &model).unwrap();
    assert_eq!(trained.config().head_dim, 16);
}

#[test]
fn a_byte_level_vocabulary_becomes_a_tokenizer() {
    let (_dir, output, report) = convert(&fixture("gguf/types.gguf"), &[]);
    assert!(report["left_out"].as_array().unwrap().is_empty());
    let tokenizer = read_json(&output.join("tokenizer.json"));
    assert_eq!(tokenizer["model"]["type"], "BPE");
    assert_eq!(tokenizer["model"]["vocab"]["the"], 31);
    assert_eq!(tokenizer["model"]["merges"], serde_json::json!([["t", "h"], ["th", "e"]]));
    let added = tokenizer["added_tokens"].as_array().unwrap();
    let special: Vec<_> =
        added.iter().map(|t| (t["content"].as_str().unwrap(), t["special"].as_bool().unwrap())).collect();
    assert_eq!(special, [("<s>", true), ("</s>", true), ("<tool>", false)]);
    assert_eq!(tokenizer["pre_tokenizer"]["pretokenizers"][0]["type"], "Digits");
    assert_eq!(tokenizer["post_processor"]["single"][0]["SpecialToken"]["id"], "<s>");
    let config = read_json(&output.join("tokenizer_config.json"));
    assert_eq!((&config["eos_token"], &config["chat_template"]), (&"</s>".into(), &"{{ messages }}".into()));
}

/// The fixture with `with` written over the bytes that begin `offset` after the last `name`.
fn damaged(name: &str, offset: usize, with: &[u8]) -> tempfile::NamedTempFile {
    let mut bytes = fs::read(fixture("gguf/types.gguf")).unwrap();
    let at = bytes.windows(name.len()).rposition(|w| w == name.as_bytes()).unwrap() + offset;
    bytes[at..at + with.len()].copy_from_slice(with);
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), bytes).unwrap();
    file
}

#[test]
fn a_vocabulary_with_unknown_rules_is_left_out_with_the_reason() {
    let other = damaged("tokenizer.ggml.pre", 18 + 4 + 8, b"smolly");
    let (_dir, output, report) = convert(other.path(), &[]);
    let reason = report["left_out"][0].as_str().unwrap();
    assert!(reason.contains("no tokenizer was written") && reason.contains("'smolly'"), "{reason}");
    assert_eq!(entries(&output), ["config.json", "generation_config.json", "model.safetensors"]);
}

#[test]
fn a_gguf_that_is_no_llama_is_refused_by_name() {
    let other = damaged("general.architecture", 20 + 4 + 8, b"bloom");
    convert_refused(other.path(), &["general.architecture is 'bloom'", "supported: llama"]);
    let name = "blk.1.attn_k.weight";
    let unknown = damaged(name, name.len() + 4 + 16, &23u32.to_le_bytes());
    convert_refused(unknown.path(), &["tensor 'blk.1.attn_k.weight' has the type IQ4_XS", "supported: F32"]);
    let twice = damaged(name, 0, b"blk.0.attn_k.weight");
    convert_refused(twice.path(), &["tensor 'blk.0.attn_k.weight' is stored twice"]);
    let renamed = damaged(name, 0, b"blk.1.attn_x.weight");
    convert_refused(renamed.path(), &["it has no tensor 'blk.1.attn_k.weight', expected one of shape [16, 256]"]);
    let layers = damaged("llama.block_count", 17 + 4, &1u32.to_le_bytes());
    convert_refused(layers.path(), &["9 of its tensors have no place in the model, first: 'blk.1."]);
    let wide = damaged("llama.feed_forward_length", 25 + 4, &64u32.to_le_bytes());
    convert_refused(wide.path(), &["'blk.0.ffn_gate.weight' has shape [32, 256], its metadata ask for [64, 256]"]);
    let deep = damaged("llama.block_count", 17 + 4, &u32::MAX.to_le_bytes());
    convert_refused(deep.path(), &["claims 4294967295 layers"]);
}

#[test]
fn what_is_no_model_is_refused_and_an_existing_output_too() {
    let dir = tempfile::tempdir().unwrap();
    let text = dir.path().join("model.bin");
    fs::write(&text, "some text").unwrap();
    convert_refused(&text, &["model.bin'"]);
    convert_refused(&dir.path().join("nothing.gguf"), &["nothing.gguf'", "check the path"]);
    let bytes = fs::read(fixture("gguf/types.gguf")).unwrap();
    let short = dir.path().join("short.gguf");
    fs::write(&short, &bytes[..bytes.len() - 64]).unwrap();
    convert_refused(&short, &["short.gguf' is not a valid GGUF file: it is cut short: tensor '", "download"]);
    let input = fixture("gguf/types.gguf");
    let args = ["convert", input.to_str().unwrap(), "-o", dir.path().to_str().unwrap()];
    refused(args, 2, &["exists already", "--force"]);
}

#[test]
fn pickled_shards_become_the_model_that_was_saved() {
    let (_dir, output, report) = convert(&fixture("tiny_llama_bin"), &[]);
    let (found, expected) =
        (Checkpoint::open(&output).unwrap(), Checkpoint::open(&fixture("tiny_llama_bf16")).unwrap());
    assert_eq!((found.len(), &report["format"]), (expected.len(), &"pytorch".into()));
    for e in expected.tensors() {
        let t = found.tensor(e.name()).unwrap();
        assert_eq!((t.dtype(), t.shape()), (e.dtype(), e.shape()), "{}", e.name());
        assert!(t.bytes() == e.bytes(), "{}", e.name());
    }
    let copied = fs::read(output.join("config.json")).unwrap();
    assert_eq!(copied, fs::read(fixture("tiny_llama_bin/config.json")).unwrap());
    assert_eq!(entries(&output), ["config.json", "model.safetensors"]);
    let metadata = found.files()[0].metadata();
    assert_eq!(metadata["converted_from"], "tiny_llama_bin", "no path of this machine");
}

#[test]
fn one_pickled_file_of_any_shape_becomes_a_checkpoint() {
    let expected = Checkpoint::open(&fixture("pickles/odd.safetensors")).unwrap();
    for name in ["odd.bin", "odd_legacy.bin"] {
        let (_dir, output, _) = convert(&fixture("pickles").join(name), &["--dtype", "f32"]);
        let found = Checkpoint::open(&output).unwrap();
        assert_eq!(found.len(), expected.len());
        for e in expected.tensors() {
            let t = found.tensor(e.name()).unwrap();
            assert_eq!(t.shape(), e.shape(), "{}", e.name());
            if ["steps", "mask"].contains(&e.name()) {
                assert_eq!((t.dtype(), t.bytes()), (e.dtype(), e.bytes()), "{}", e.name());
            } else {
                assert_eq!(t.dtype(), Dtype::F32);
                assert_eq!(t.to_f32().unwrap(), e.to_f32().unwrap(), "{}", e.name());
            }
        }
    }
}

/// A folder with the pickled shards, their index changed by `change`.
fn changed_index(change: impl Fn(&mut Value)) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let from = fixture("tiny_llama_bin");
    for name in entries(&from) {
        fs::copy(from.join(&name), dir.path().join(&name)).unwrap();
    }
    let path = dir.path().join("pytorch_model.bin.index.json");
    let mut index = read_json(&path);
    change(&mut index);
    fs::write(path, index.to_string()).unwrap();
    dir
}

#[test]
fn pickled_shards_and_their_index_agree_or_are_refused() {
    let dir = changed_index(|index| {
        index["weight_map"].as_object_mut().unwrap().remove("lm_head.weight");
    });
    convert_refused(dir.path(), &["index.json' does not list 'lm_head.weight'"]);
    let dir = changed_index(|index| index["weight_map"]["more.weight"] = "pytorch_model-00001-of-00002.bin".into());
    convert_refused(dir.path(), &["'more.weight'", "pytorch_model-00001-of-00002.bin", "does not hold"]);
    let dir = changed_index(|index| index["weight_map"]["more.weight"] = "../pytorch_model.bin".into());
    convert_refused(dir.path(), &["'../pytorch_model.bin', which is not a plain file name"]);
    let dir = changed_index(|_| ());
    fs::remove_file(dir.path().join("pytorch_model-00002-of-00002.bin")).unwrap();
    convert_refused(dir.path(), &["pytorch_model-00002-of-00002.bin'", "check the path"]);
    let path = dir.path().join("pytorch_model-00001-of-00002.bin");
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    convert_refused(&path, &["00001-of-00002.bin' cannot be read as a PyTorch file"]);
}

#[test]
fn a_folder_of_safetensors_needs_no_conversion() {
    convert_refused(&fixture("tiny_llama"), &["holds safetensors already", "merge"]);
    convert_refused(&fixture("gguf"), &["holds no pytorch_model.bin"]);
}
