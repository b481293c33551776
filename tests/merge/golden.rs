//! Merged checkpoints against PEFT's `merge_and_unload`.

use crate::common::fixtures::{assert_close, fixture, values};
use relora_kit::{
    checkpoint::{Checkpoint, Dtype, dtype::ulp},
    merge::{self, MAX_SHARD_SIZE, Options, Rounding},
    progress::Progress,
};

/// Changed tensors: within 4 units in the last place of the larger of base and delta in f32, 1 in bf16.
/// All others: byte for byte the base's.
fn merge_is_pefts(adapter: &str, base: &str, dtype: Dtype, merged: &str) {
    let dir = tempfile::tempdir().unwrap();
    let options = Options {
        base: fixture(base),
        adapters: vec![(fixture(adapter), 1.0)],
        output: dir.path().join("merged"),
        dtype: None,
        map: Vec::new(),
        rounding: Rounding::Nearest,
        max_shard_size: MAX_SHARD_SIZE,
        force: false,
        dry_run: false,
        gpu: None,
    };
    merge::run(&options, &Progress::hidden()).unwrap();
    let found = Checkpoint::open(&options.output).unwrap();
    let base = Checkpoint::open(&fixture(base)).unwrap();
    let expected = Checkpoint::open(&fixture(&format!("merged/{merged}.safetensors"))).unwrap();
    assert_eq!(found.len(), base.len(), "number of tensors");
    let mut changed = 0;
    for tensor in base.tensors() {
        let (name, shape) = (tensor.name(), tensor.shape());
        if expected.get(name).is_none() {
            assert!(found.tensor(name).unwrap().bytes() == tensor.bytes(), "{name}: it should be the base's");
            continue;
        }
        let (w, expected) = (values(&base, name), values(&expected, name));
        let units = if dtype == Dtype::F32 { 4.0 } else { 1.0 };
        let allowed = |i: usize| {
            let delta = (expected[i] - w[i]).abs();
            units * ulp(dtype, w[i].abs().max(delta))
        };
        assert_eq!(found.tensor(name).unwrap().dtype(), dtype, "{name}");
        assert_close(name, shape, &values(&found, name), &expected, allowed);
        changed += 1;
    }
    assert_eq!(changed, expected.len(), "number of changed tensors");
}

#[test]
fn plain_lora_in_f32() {
    merge_is_pefts("tiny_adapter", "tiny_llama", Dtype::F32, "tiny_adapter_f32");
}

#[test]
fn plain_lora_on_a_sharded_bf16_base() {
    merge_is_pefts("tiny_adapter", "tiny_llama_bf16", Dtype::BF16, "tiny_adapter_bf16");
}

#[test]
fn rank_stabilised_lora_with_patterns_in_f32() {
    merge_is_pefts("patterns_adapter", "tiny_llama", Dtype::F32, "patterns_adapter_f32");
}

#[test]
fn rank_stabilised_lora_with_patterns_on_a_sharded_bf16_base() {
    merge_is_pefts("patterns_adapter", "tiny_llama_bf16", Dtype::BF16, "patterns_adapter_bf16");
}
