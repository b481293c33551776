//! Where bytes of others come in. Whatever they are, the answer is a value that keeps its promises or an error: the tests
//! mutate valid files, the fuzz targets in `fuzz/` search on.

use relora_kit::{
    adapter::Adapter,
    checkpoint::{Checkpoint, INDEX_NAME, Tensor, header::Header},
    convert,
    progress::Progress,
};
use std::{
    fs,
    path::{Path, PathBuf},
};

type EntryPoint = (&'static str, fn(&[u8]));

/// Every entry point by its name, which is that of the fuzz target.
pub const ALL: [EntryPoint; 6] = [
    ("header", header),
    ("index", index),
    ("adapter_config", adapter_config),
    ("adapter_bin", adapter_bin),
    ("pytorch", pytorch),
    ("gguf", gguf),
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
        other => panic!("no fixture for '{other}'"),
    };
    fs::read(fixture(path)).unwrap()
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

fn convert(bytes: &[u8], name: &str) {
    let dir = folder();
    let (input, output) = (dir.path().join(name), dir.path().join("out"));
    fs::write(&input, bytes).unwrap();
    let options = convert::Options { input, output, dtype: None, max_shard_size: 1 << 20, force: false };
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
