//! `relora-kit verify`: an honest run passes, and each way of tampering is caught and named.

use crate::common;
use crate::common::synthetic_run::{
    Spec, read_manifest, rounded, write_checkpoint, write_manifest, write_metrics, write_run,
};
use crate::common::{refused, run, small_run::SmallRun};
use relora_kit::{
    adapter::AdapterConfig,
    checkpoint::{Checkpoint, Dtype},
    run::{Manifest, sha256_folder},
};
use serde_json::Value;
use std::{fs, path::Path};

fn verify(path: &Path) -> (i32, String) {
    let (code, stdout, stderr) = run(["verify", path.to_str().unwrap()]);
    (code, stdout + &stderr)
}

#[track_caller]
fn caught(path: &Path, parts: &[&str]) {
    let (code, text) = verify(path);
    assert_eq!(code, 1, "{text}");
    for part in parts {
        assert!(text.contains(part), "expected '{part}' in:\n{text}");
    }
    assert!(text.contains("is not what it claims"), "{text}");
}

/// Makes the manifest vouch for the files as they are now: what a careful forger would do.
fn rehash(run: &Path, change: impl FnOnce(&mut Manifest)) {
    let mut manifest = read_manifest(run);
    for cycle in &mut manifest.cycles {
        cycle.files = sha256_folder(&run.join(&cycle.folder)).unwrap();
    }
    let checkpoint = manifest.checkpoint.as_mut().unwrap();
    checkpoint.files = sha256_folder(&run.join(&checkpoint.folder)).unwrap();
    change(&mut manifest);
    write_manifest(run, &manifest);
}

fn flip_byte(path: &Path, from_end: usize) {
    let mut bytes = fs::read(path).unwrap();
    let at = bytes.len() - from_end;
    bytes[at] ^= 0x40;
    fs::write(path, bytes).unwrap();
}

const LAST: &str = "checkpoints/step-35";

#[test]
fn an_honest_run_verifies_and_lists_what_was_trained_in_full() {
    for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16] {
        let folder = tempfile::tempdir().unwrap();
        let path = write_run(folder.path(), Spec { dtype, ..Spec::default() });
        let (code, text) = verify(&path);
        assert_eq!(code, 0, "{dtype:?}: {text}");
        assert!(text.contains("is what it claims"), "{text}");
        assert!(text.contains("trained in full: model.embed_tokens.weight, model.norm.weight"), "{text}");
    }
}

#[test]
fn the_json_tells_how_much_of_the_bound_was_used() {
    let folder = tempfile::tempdir().unwrap();
    let path = write_run(folder.path(), Spec::default());
    let (code, stdout, _) = run(["verify", path.to_str().unwrap(), "--format", "json"]);
    assert_eq!(code, 0);
    let result: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(result["verified"], true);
    let merged: Vec<f64> =
        result["weights"].as_array().unwrap().iter().filter_map(|w| w["share_of_bound"].as_f64()).collect();
    // Neither slack without end nor tight to failing: honest f32 merges use a good part of the bound.
    assert_eq!(merged.len(), 3);
    assert!(merged.iter().all(|&share| (0.05..=1.0).contains(&share)), "{merged:?}");
}

#[test]
fn a_tampered_cycle_is_caught_by_its_hash_and_after_rehashing_by_the_sum() {
    let folder = tempfile::tempdir().unwrap();
    let path = write_run(folder.path(), Spec::default());
    flip_byte(&path.join("cycles/cycle-002/adapter_model.safetensors"), 2);
    caught(&path, &["cycles/cycle-002/adapter_model.safetensors", "sha256 is"]);
    rehash(&path, |_| ());
    caught(&path, &["base + cycles = checkpoint", "rounding allows"]);
}

#[test]
fn swapped_cycles_are_caught() {
    let folder = tempfile::tempdir().unwrap();
    let path = write_run(folder.path(), Spec::default());
    let (one, two, spare) = (path.join("cycles/cycle-001"), path.join("cycles/cycle-002"), path.join("spare"));
    fs::rename(&one, &spare).unwrap();
    fs::rename(&two, &one).unwrap();
    fs::rename(&spare, &two).unwrap();
    caught(&path, &["cycles/cycle-001/adapter_model.safetensors", "sha256 is"]);
}

#[test]
fn a_manifest_with_its_cycles_in_another_order_is_caught() {
    let folder = tempfile::tempdir().unwrap();
    let path = write_run(folder.path(), Spec::default());
    rehash(&path, |m| m.cycles.swap(0, 1));
    caught(&path, &["mismatch: cycle 2: expected cycle 1 at this place", "it starts after step 15"]);
}

#[test]
fn a_gap_between_cycles_is_caught() {
    let folder = tempfile::tempdir().unwrap();
    let path = write_run(folder.path(), Spec::default());
    rehash(&path, |m| m.cycles[1].first_step += 1);
    caught(&path, &["mismatch: cycle 2: it starts after step 16, the one before it ends at 15"]);
}

#[test]
fn a_missing_file_is_caught() {
    let folder = tempfile::tempdir().unwrap();
    let path = write_run(folder.path(), Spec::default());
    fs::remove_file(path.join("cycles/cycle-003/adapter_config.json")).unwrap();
    caught(&path, &["cycles/cycle-003/adapter_config.json: the file is missing"]);
}

#[test]
fn a_dropped_cycle_is_caught() {
    let folder = tempfile::tempdir().unwrap();
    let path = write_run(folder.path(), Spec::default());
    rehash(&path, |m| {
        m.cycles.pop();
    });
    caught(&path, &["the final checkpoint is of step 35, the last cycle ends at 25"]);
}

#[test]
fn a_wrong_scale_is_caught_in_the_manifest_and_in_the_adapter() {
    let folder = tempfile::tempdir().unwrap();
    let path = write_run(folder.path(), Spec::default());
    rehash(&path, |m| m.cycles[0].scaling = 2.0);
    caught(&path, &["cycle 1, 'model.layers.0.mlp.down_proj'", "its scale is 1.5, the manifest says 2"]);
    let config = path.join("cycles/cycle-001/adapter_config.json");
    AdapterConfig { lora_alpha: 8.0, ..AdapterConfig::open(&config).unwrap() }.write(&config).unwrap();
    rehash(&path, |_| ());
    caught(&path, &["base + cycles = checkpoint", "rounding allows"]);
}

#[test]
fn a_rank_that_is_less_than_claimed_is_caught() {
    let folder = tempfile::tempdir().unwrap();
    let path = write_run(folder.path(), Spec::default());
    // B of the last module (q_proj) ends the file: its last rows all zero but one leave rank 1.
    let file = path.join("cycles/cycle-002/adapter_model.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    let b_bytes = 24 * 4 * 4;
    let adapter = relora_kit::adapter::Adapter::open(&path.join("cycles/cycle-002")).unwrap();
    let module = adapter.lora_modules().map(Result::unwrap).find(|m| m.name.ends_with("q_proj")).unwrap();
    let begin = module.b.offset() as usize + 16;
    drop(adapter);
    bytes[begin..begin + b_bytes - 16].fill(0);
    fs::write(&file, bytes).unwrap();
    rehash(&path, |_| ());
    caught(&path, &["cycle 2, 'model.layers.0.self_attn.q_proj': its delta has rank 1, the manifest claims 4"]);
    rehash(&path, |m| m.cycles[1].r = 5);
    caught(&path, &["config.toml: relora.lora_r is 4, the manifest says 5"]);
}

/// One entry of one final weight, moved by eight units in the last place, after the hashes were made to fit.
#[test]
fn a_slightly_altered_final_weight_is_caught_and_located() {
    let folder = tempfile::tempdir().unwrap();
    let path = write_run(folder.path(), Spec::default());
    let name = "model.layers.0.mlp.up_proj.weight";
    let (mut weights, target) = (std::collections::BTreeMap::new(), path.join(LAST));
    for tensor in Checkpoint::open(&target).unwrap().tensors() {
        weights.insert(tensor.name().to_owned(), (tensor.shape().to_vec(), tensor.to_f32().unwrap().into_owned()));
    }
    let value = &mut weights.get_mut(name).unwrap().1[5 * 24 + 7];
    *value = f32::from_bits(value.to_bits() + 24);
    write_checkpoint(&target, Dtype::F32, &weights);
    caught(&path, &["checkpoints/step-35/model.safetensors"]);
    rehash(&path, |_| ());
    caught(&path, &[name, "at [5, 7]"]);
}

#[test]
fn missing_and_surplus_tensors_of_the_checkpoint_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = write_run(folder.path(), Spec::default());
    let (mut weights, target) = (std::collections::BTreeMap::new(), path.join(LAST));
    for tensor in Checkpoint::open(&target).unwrap().tensors() {
        weights.insert(tensor.name().to_owned(), (tensor.shape().to_vec(), tensor.to_f32().unwrap().into_owned()));
    }
    let norm = weights.remove("model.norm.weight").unwrap();
    weights.insert("surplus".into(), norm);
    write_checkpoint(&target, Dtype::F32, &weights);
    rehash(&path, |_| ());
    caught(&path, &["surplus: it is in the checkpoint but not in the base", "model.norm.weight: it is in the base"]);
}

#[test]
fn missing_data_are_noted_and_changed_data_are_a_mismatch() {
    let folder = tempfile::tempdir().unwrap();
    let path = write_run(folder.path(), Spec { with_data: false, ..Spec::default() });
    let (code, text) = verify(&path);
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("note: train data") && text.contains("was not checked"), "{text}");
    fs::write(folder.path().join("data.safetensors"), "others").unwrap();
    caught(&path, &["train data", "sha256 is"]);
}

#[test]
fn metrics_that_skip_an_update_or_misplace_a_restart_are_caught() {
    let folder = tempfile::tempdir().unwrap();
    let path = write_run(folder.path(), Spec::default());
    let write = |row: &dyn Fn(u64) -> (u64, u64)| {
        let lines: Vec<String> = (1..=35).map(row).map(|(s, c)| format!("{{\"step\":{s},\"cycle\":{c}}}\n")).collect();
        fs::write(path.join("metrics.jsonl"), lines.concat()).unwrap();
    };
    let cycle = |step: u64| if step <= 5 { 0 } else { (step - 6) / 10 + 1 };
    write(&|s| (s, cycle(s)));
    assert_eq!(verify(&path).0, 0);
    write(&|s| (if s > 20 { s + 1 } else { s }, cycle(s)));
    caught(&path, &["metrics.jsonl line 21: expected update 21, found 22"]);
    write(&|s| (s, if s == 16 { 1 } else { cycle(s) }));
    caught(&path, &["update 16 is of cycle 1, the manifest says 2"]);
}

/// A checkpoint saved inside a cycle holds a delta that no cycle records yet; its frozen weights are what is verified.
#[test]
fn a_checkpoint_inside_a_cycle_is_verified_by_its_frozen_weights() {
    let folder = tempfile::tempdir().unwrap();
    let path = write_run(folder.path(), Spec::default());
    let (old, new) = (path.join(LAST), path.join("checkpoints/step-38"));
    let mut merged = std::collections::BTreeMap::new();
    let mut frozen = std::collections::BTreeMap::new();
    for tensor in Checkpoint::open(&old).unwrap().tensors() {
        let values = tensor.to_f32().unwrap().into_owned();
        let (name, shape) = (tensor.name().to_owned(), tensor.shape().to_vec());
        if name.contains("_proj") {
            frozen.insert(format!("param.{name}"), (shape.clone(), values.clone()));
        }
        merged.insert(name, (shape, rounded(Dtype::F32, &values.iter().map(|x| x + 0.1).collect::<Vec<_>>())));
    }
    write_checkpoint(&new, Dtype::F32, &merged);
    let write_state = |frozen: &std::collections::BTreeMap<_, _>| {
        write_checkpoint(&new.join("training_state"), Dtype::F32, frozen);
        let written = new.join("training_state/model.safetensors");
        fs::rename(written, new.join("training_state/state.safetensors")).unwrap();
        rehash(&path, |m| {
            m.finished = false;
            let checkpoint = m.checkpoint.as_mut().unwrap();
            checkpoint.step = 38;
            checkpoint.folder = "checkpoints/step-38".into();
            checkpoint.files = sha256_folder(&new).unwrap();
        });
    };
    write_state(&frozen);
    write_metrics(&path, Spec::default(), 38);
    let (code, text) = verify(&path);
    assert_eq!(code, 0, "{text}");
    frozen.values_mut().next().unwrap().1[0] += 1.0;
    write_state(&frozen);
    caught(&path, &["rounding allows", "at [0, 0]"]);
}

#[test]
fn a_run_of_a_tied_model_stores_the_head_twice_as_peft_expects_and_verifies() {
    let small = SmallRun::new(1);
    let config = fs::read_to_string(small.path("run.toml")).unwrap();
    fs::write(
        small.path("run.toml"),
        config.replace("vocab_size = 257", "vocab_size = 257\ntie_word_embeddings = true"),
    )
    .unwrap();
    let run = small.train();
    let adapter =
        relora_kit::checkpoint::TensorFile::open(&run.join("cycles/cycle-001/adapter_model.safetensors")).unwrap();
    let stored =
        |name: &str| adapter.tensor_named(&format!("base_model.model.{name}.weight")).unwrap().bytes().to_vec();
    assert_eq!(stored("lm_head"), stored("model.embed_tokens"));
    let config = fs::read_to_string(run.join("cycles/cycle-001/adapter_config.json")).unwrap();
    assert!(config.contains("\"ensure_weight_tying\": true") && !config.contains("lm_head"));
    let (code, text) = verify(&run);
    assert_eq!(code, 0, "{text}");
}

#[test]
fn a_folder_that_is_no_run_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    refused(["verify", folder.path().to_str().unwrap()], 2, &["manifest.json", "relora-kit train"]);
    fs::write(folder.path().join("manifest.json"), "{}").unwrap();
    refused(["verify", folder.path().to_str().unwrap()], 2, &["is not a run manifest"]);
}

#[test]
fn a_cycle_that_stores_other_values_in_full_than_the_checkpoint_is_caught() {
    let small = common::small_run::SmallRun::new(1);
    let path = small.train();
    assert_eq!(verify(&path).0, 0);
    // The first tensor of the file is the first trained in full: its last byte precedes those of the factors.
    let file = path.join("cycles/cycle-001/adapter_model.safetensors");
    let end = {
        let adapter = relora_kit::checkpoint::TensorFile::open(&file).unwrap();
        let norm = adapter.tensor_named("base_model.model.model.norm.weight").unwrap();
        adapter.len() as usize - norm.offset() as usize
    };
    flip_byte(&file, end - 2);
    rehash(&path, |_| ());
    caught(&path, &["model.norm.weight", "other values than the last cycle stores in full"]);
}
