//! Deltas of adapters against what PEFT's `merge_and_unload` adds to the base.

use crate::common::fixtures::{assert_close, fixture, values};
use relora_kit::{
    adapter::Adapter,
    checkpoint::{Checkpoint, Dtype, dtype::ulp},
};

fn base_plus_delta_is_merged(adapter: &str, base: &str, dtype: Dtype, merged: &str) {
    let adapter = Adapter::open(&fixture(adapter)).unwrap();
    let base = Checkpoint::open(&fixture(base)).unwrap();
    let merged = Checkpoint::open(&fixture(&format!("merged/{merged}.safetensors"))).unwrap();
    let mut modules = 0;
    for module in adapter.lora_modules() {
        let module = module.unwrap();
        let name = module.tensor_name();
        let delta = module.low_rank::<f64>(false).unwrap();
        let (m, n) = delta.shape();
        let terms = delta.left.abs().dot(&delta.right.abs()) * delta.scaling;
        let (w, delta) = (values(&base, &name), delta.dense().into_raw_vec_and_offset().0);
        let found: Vec<f64> = w.iter().zip(&delta).map(|(w, d)| w + d).collect();
        // PEFT adds in f32 and rounds once; here nothing is rounded. f32: 4 units in the last place of the larger of base
        // and terms of the sum over r, which may cancel; bf16: half a unit of the result, and the f32 sum that was rounded.
        let allowed = |i: usize| match dtype {
            Dtype::F32 => 4.0 * ulp(Dtype::F32, w[i].abs().max(terms[[i / n, i % n]])),
            _ => 0.501 * ulp(dtype, found[i]),
        };
        assert_close(&name, &[m, n], &values(&merged, &name), &found, allowed);
        modules += 1;
    }
    assert_eq!(modules, merged.len(), "PEFT changes as many tensors as the adapter has modules");
}

#[test]
fn plain_lora_in_f32() {
    base_plus_delta_is_merged("tiny_adapter", "tiny_llama", Dtype::F32, "tiny_adapter_f32");
}

#[test]
fn plain_lora_on_a_sharded_bf16_base() {
    base_plus_delta_is_merged("tiny_adapter", "tiny_llama_bf16", Dtype::BF16, "tiny_adapter_bf16");
}

#[test]
fn rank_stabilised_lora_with_patterns_in_f32() {
    base_plus_delta_is_merged("patterns_adapter", "tiny_llama", Dtype::F32, "patterns_adapter_f32");
}

#[test]
fn rank_stabilised_lora_with_patterns_on_a_sharded_bf16_base() {
    base_plus_delta_is_merged("patterns_adapter", "tiny_llama_bf16", Dtype::BF16, "patterns_adapter_bf16");
}
