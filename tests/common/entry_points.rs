//! Where bytes of others come in. Whatever they are, the answer is a value that keeps its promises or an error: the tests
//! mutate valid files, the fuzz targets in `fuzz/` search on.

use relora_kit::{
    adapter::Adapter,
    checkpoint::{Checkpoint, INDEX_NAME, Tensor, header::Header},
    convert,
    model::LlamaConfig,
    progress::Progress,
    spectrum::{self, Gate},
    tokenize::{self, Tokenizer},
    train::{config::Config, tokens::TokenShard},
    verify,
};
use std::{
    fs,
    path::{Path, PathBuf},
};

// The fuzz program has no other way to it.
#[allow(clippy::duplicate_mod, reason = "the fuzz program includes this file alone")]
#[path = "synthetic_run.rs"]
mod synthetic_run;

type EntryPoint = (&'static str, fn(&[u8]));

/// Every entry point by its name, which is that of the fuzz target.
pub const ALL: [EntryPoint; 15] = [
    ("header", header),
    ("index", index),
    ("adapter_config", adapter_config),
    ("adapter_bin", adapter_bin),
    ("pytorch", pytorch),
    ("gguf", gguf),
    ("records", records),
    ("tables", tables),
    ("tokenizer", tokenizer),
    ("token_shard", token_shard),
    ("gate", gate),
    ("model_config", model_config),
    ("train_config", train_config),
    ("part", part),
    ("manifest", manifest),
];

fn fixture(name: &str) -> PathBuf {
    // The fuzz crate lies one folder below.
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = if here.join("fixtures").is_dir() { here } else { here.parent().unwrap() };
    root.join("fixtures").join(name)
}

/// Valid bytes of an entry point.
pub fn valid(entry_point: &str) -> Vec<u8> {
    let path = match entry_point {
        "header" => "tiny_adapter/adapter_model.safetensors",
        "index" => "tiny_llama_bf16/model.safetensors.index.json",
        "adapter_config" => "patterns_adapter/adapter_config.json",
        "adapter_bin" => "tiny_adapter_bin/adapter_model.bin",
        "pytorch" => "pickles/odd_legacy.bin",
        "gguf" => "gguf/types.gguf",
        "records" | "tokenizer" => "tokenizer/tokenizer.json",
        "token_shard" => return shard(),
        "model_config" => "tiny_llama/config.json",
        "train_config" => "../examples/tiny.toml",
        "manifest" => return fs::read(made_run().join("manifest.json")).unwrap(),
        "gate" | "part" | "tables" => return seeds(entry_point).remove(0).1,
        other => panic!("no fixture for '{other}'"),
    };
    fs::read(fixture(path)).unwrap()
}

/// What was found once, and where a search begins: name and bytes, in the order of the names.
pub fn seeds(entry_point: &str) -> Vec<(String, Vec<u8>)> {
    let folder = fixture("..").join("fuzz/seeds").join(entry_point);
    let mut seeds: Vec<(String, Vec<u8>)> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), fs::read(&path).unwrap()))
        .collect();
    seeds.sort();
    seeds
}

/// A small run that verifies, made once.
fn made_run() -> &'static Path {
    static RUN: std::sync::OnceLock<PathBuf> = std::sync::OnceLock::new();
    RUN.get_or_init(|| {
        // Statics are not dropped: where the build keeps its own temporary files, it disturbs nothing.
        let place = option_env!("CARGO_TARGET_TMPDIR").map_or_else(std::env::temp_dir, PathBuf::from);
        let folder = tempfile::tempdir_in(place).unwrap().keep();
        synthetic_run::write_run(&folder, synthetic_run::Spec { cycles: 1, ..synthetic_run::Spec::default() })
    })
}

/// In memory where that exists: a fuzzer writes many.
fn folder() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap()
}

fn check(tensor: Tensor) {
    assert_eq!(tensor.elements() * tensor.dtype().bitsize() / 8, tensor.bytes().len());
}

/// A safetensors file.
pub fn header(bytes: &[u8]) {
    let Ok(header) = Header::parse(Path::new("fuzz.safetensors"), bytes) else { return };
    let mut end = header.tensors.first().map_or(bytes.len() as u64, |t| t.begin);
    for t in &header.tensors {
        assert_eq!(t.begin, end, "tensors lie one after the other");
        let elements = t.shape.iter().try_fold(1u64, |n, &extent| n.checked_mul(extent as u64)).unwrap();
        assert_eq!(elements * t.dtype.bitsize() as u64 / 8, t.end - t.begin);
        end = t.end;
    }
    assert_eq!(end, bytes.len() as u64, "up to the end of the file");
}

/// A shard index beside the shards of a valid checkpoint.
pub fn index(bytes: &[u8]) {
    let dir = folder();
    for i in 1..=3 {
        let name = format!("model-{i:05}-of-00003.safetensors");
        std::os::unix::fs::symlink(fixture("tiny_llama_bf16").join(&name), dir.path().join(&name)).unwrap();
    }
    fs::write(dir.path().join(INDEX_NAME), bytes).unwrap();
    if let Ok(checkpoint) = Checkpoint::open(dir.path()) {
        checkpoint.tensors().for_each(check);
    }
}

/// The text of a gate.
pub fn gate(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes) {
        let _ = Gate::parse(text);
    }
}

/// A model's `config.json`.
pub fn model_config(bytes: &[u8]) {
    let Ok(value) = serde_json::from_slice(bytes) else { return };
    if let Ok(config) = LlamaConfig::from_value(&value) {
        LlamaConfig::from_value(&config.to_json()).unwrap();
    }
}

/// The configuration of a run.
pub fn train_config(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes)
        && let Ok(config) = Config::parse(text, Path::new("fuzz.toml"), &[])
    {
        config.to_toml().unwrap();
    }
}

/// A part of a spectrum of several jobs.
pub fn part(bytes: &[u8]) {
    let dir = folder();
    let path = dir.path().join("part.json");
    fs::write(&path, bytes).unwrap();
    if let Ok(spectrum) = spectrum::join(&[path], &spectrum::Options::default()) {
        assert!(spectrum.matrices.iter().all(|m| m.measures.spectral_norm >= 0.0));
    }
}

/// The manifest of a run whose files are sound.
pub fn manifest(bytes: &[u8]) {
    let run = made_run();
    let honest = fs::read(run.join("manifest.json")).unwrap();
    let dir = folder();
    for name in ["base", "cycles", "checkpoints", "config.toml", "metrics.jsonl"] {
        copy_tree(&run.join(name), &dir.path().join(name));
    }
    fs::write(dir.path().join("manifest.json"), bytes).unwrap();
    if let Ok(found) = verify::run(dir.path(), &Progress::hidden()) {
        assert_eq!(found.verified, found.mismatches.is_empty());
        assert!(!found.verified || serde_json::from_slice::<serde_json::Value>(bytes).is_ok());
    }
    assert_eq!(honest, fs::read(run.join("manifest.json")).unwrap());
}

fn copy_tree(from: &Path, to: &Path) {
    if from.is_dir() {
        fs::create_dir(to).unwrap();
        for entry in fs::read_dir(from).unwrap().flatten() {
            copy_tree(&entry.path(), &to.join(entry.file_name()));
        }
    } else {
        fs::copy(from, to).unwrap();
    }
}

/// The configuration of a valid adapter.
pub fn adapter_config(bytes: &[u8]) {
    adapter(bytes, &fixture("patterns_adapter/adapter_model.safetensors"), None);
}

/// The pickled tensors of an adapter with a valid configuration.
pub fn adapter_bin(bytes: &[u8]) {
    let config = fs::read(fixture("tiny_adapter_bin/adapter_config.json")).unwrap();
    adapter(&config, Path::new("adapter_model.bin"), Some(bytes));
}

/// A pickled checkpoint of an old PyTorch, to be converted.
pub fn pytorch(bytes: &[u8]) {
    convert(bytes, "pytorch_model.bin");
}

/// A GGUF file, to be converted.
pub fn gguf(bytes: &[u8]) {
    convert(bytes, "model.gguf");
}

/// Records of JSON, in any arrangement.
pub fn records(bytes: &[u8]) {
    tokenize(bytes, &["a.json", "a.jsonl"]);
}

/// A table, or a compressed file: what its first bytes say.
pub fn tables(bytes: &[u8]) {
    tokenize(bytes, &["a.parquet", "a.arrow", "a"]);
}

fn tokenize(bytes: &[u8], names: &[&str]) {
    let dir = folder();
    for (name, skip_unreadable) in names.iter().flat_map(|name| [(name, false), (name, true)]) {
        let input = dir.path().join(name);
        fs::write(&input, bytes).unwrap();
        let options = tokenize::Options {
            inputs: vec![input],
            include: None,
            layout: tokenize::Layout { field: "text".into(), ..Default::default() },
            max_bytes: None,
            skip_unreadable,
            special_tokens: false,
            output: dir.path().join("shard.safetensors"),
            force: true,
        };
        match tokenize::run(&options, &Tokenizer::Bytes, &Progress::hidden()) {
            Ok(summary) => assert_eq!(TokenShard::open(&options.output).unwrap().len() as u64, summary.tokens),
            Err(error) => assert!(error.message.contains("a"), "{error}"),
        }
    }
}

/// A `tokenizer.json`.
pub fn tokenizer(bytes: &[u8]) {
    let dir = folder();
    let path = dir.path().join("tokenizer.json");
    fs::write(&path, bytes).unwrap();
    let Ok(tokenizer) = Tokenizer::load(&path, Some("e")) else { return };
    let Ok(ids) = tokenizer.encode_with_special_tokens("the text") else { return };
    let _ = tokenizer.decode_after(&ids, &ids);
}

/// Token ids: a shard, plain numbers, an index of Megatron.
pub fn token_shard(bytes: &[u8]) {
    let dir = folder();
    for name in ["a.safetensors", "a.bin"] {
        let path = dir.path().join(name);
        fs::write(&path, bytes).unwrap();
        let Ok(shard) = TokenShard::open(&path) else { continue };
        let mut ids = Vec::new();
        if shard.read(0, shard.len(), &mut ids).is_ok() {
            assert!(ids.len() == shard.len() && ids.iter().all(|&id| (id as usize) < shard.vocab_size()));
        }
    }
    fs::write(dir.path().join("a.idx"), bytes).unwrap();
    let options = tokenize::Options {
        inputs: vec![dir.path().join("a.bin")],
        include: None,
        layout: tokenize::Layout::default(),
        max_bytes: None,
        skip_unreadable: false,
        special_tokens: false,
        output: dir.path().join("out.safetensors"),
        force: true,
    };
    let _ = tokenize::run_ids(&options, tokenize::IdType::Megatron, None, &Progress::hidden());
}

/// A shard of four ids.
fn shard() -> Vec<u8> {
    let header = r#"{"__metadata__":{"tokenizer":"x","vocab_size":"9"},"tokens":{"dtype":"U16","shape":[4],"data_offsets":[0,8]}}"#;
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &[1, 0, 2, 0, 8, 0, 0, 0]].concat()
}

fn convert(bytes: &[u8], name: &str) {
    let dir = folder();
    let (input, output) = (dir.path().join(name), dir.path().join("out"));
    fs::write(&input, bytes).unwrap();
    let options =
        convert::Options { input, output, dtype: None, max_shard_size: 1 << 20, force: false, leave_out: vec![] };
    match convert::run(&options, &Progress::hidden()) {
        Ok(_) => Checkpoint::open(&options.output).unwrap().tensors().for_each(check),
        Err(_) => assert!(!options.output.exists()),
    }
}

fn adapter(config: &[u8], tensors: &Path, bytes: Option<&[u8]>) {
    let dir = folder();
    fs::write(dir.path().join("adapter_config.json"), config).unwrap();
    let place = dir.path().join(tensors.file_name().unwrap());
    match bytes {
        Some(bytes) => fs::write(place, bytes).unwrap(),
        None => std::os::unix::fs::symlink(tensors, place).unwrap(),
    }
    if let Ok(adapter) = Adapter::open(dir.path()) {
        adapter.file().tensors().for_each(check);
        for module in adapter.lora_modules() {
            let module = module.unwrap();
            assert_eq!(module.a.shape(), [module.r * module.experts, module.in_features]);
            assert_eq!(module.b.shape(), [module.out_features, module.r * module.experts]);
        }
    }
}
