//! `relora-kit merge`: what it writes, what it refuses, and what it leaves behind.

use crate::common::{
    entries, f32_bytes, refused, run,
    small_merge::{Q, Small, values},
    small_run::SmallRun,
    write_raw, write_tensors,
};
use relora_kit::{
    adapter::{AdapterConfig, CYCLE_KEY, FullTensor, NewModule, save_with},
    checkpoint::{Checkpoint, Dtype, dtype},
};
use std::fs;

#[test]
fn merge_adds_the_scaled_delta_and_copies_the_rest() {
    let small = Small::new();
    let (code, stdout, stderr) = run(small.args(&["--format", "json"]));
    assert_eq!(code, 0, "{stderr}");
    // 1 + 2 * (2 * 0.25 * 0.5)
    assert_eq!(values(&small.path("out"), &format!("{Q}.weight")), [1.5; 12]);
    assert_eq!(values(&small.path("out"), "model.norm.weight"), [1.0, 2.0, 3.0]);
    let config = |folder| fs::read(small.path(folder).join("config.json")).unwrap();
    assert_eq!(config("out"), config("base"));
    let report: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(report["totals"]["merged"], 1);
    assert_eq!(report["totals"]["copied"], 1);
    assert_eq!(report["tensors"][0]["retention"], 1.0);
    assert_eq!(entries(small.0.path()), ["adapter", "base", "out"]);
}

#[test]
fn every_format_names_the_merged_tensor() {
    let small = Small::new();
    for format in ["table", "csv", "markdown"] {
        let (code, stdout, stderr) = run(small.args(&["--force", "--format", format]));
        assert_eq!(code, 0, "{stderr}");
        assert!(stdout.contains(&format!("{Q}.weight")) && stdout.contains("100.00%"), "{stdout}");
    }
}

#[test]
fn a_negative_weight_takes_a_merge_back() {
    let small = Small::new();
    assert_eq!(run(small.args(&[])).0, 0);
    let (merged, adapter, back) = (small.path("out"), small.path("adapter"), small.path("back"));
    let adapter = format!("{}=-1", adapter.display());
    let args = ["merge", "--base", merged.to_str().unwrap(), "--adapter", &adapter, "-o", back.to_str().unwrap()];
    let (code, _, stderr) = run(args);
    assert_eq!(code, 0, "{stderr}");
    assert_eq!(values(&back, &format!("{Q}.weight")), [1.0; 12]);
}

#[test]
fn without_an_adapter_the_checkpoint_is_recast_and_resharded() {
    let small = Small::new();
    let (base, out) = (small.path("base"), small.path("out"));
    let args = ["merge", "--base", base.to_str().unwrap(), "-o", out.to_str().unwrap()];
    let (code, stdout, stderr) = run(args.iter().chain(&["--dtype", "bf16", "--max-shard-size", "24B"]));
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.contains("2 recast"), "{stdout}");
    assert!(entries(&out).contains(&"model-00002-of-00002.safetensors".to_owned()), "{:?}", entries(&out));
    assert_eq!(values(&out, "model.norm.weight"), [1.0, 2.0, 3.0]);
}

#[test]
fn a_missing_base_is_refused() {
    let small = Small::new();
    fs::remove_dir_all(small.path("base")).unwrap();
    small.refuses(&["base", "No such file", "help: "]);
}

#[test]
fn a_truncated_file_is_refused_with_the_first_tensor_affected() {
    let small = Small::new();
    let file = small.path("base").join("model.safetensors");
    let bytes = fs::read(&file).unwrap();
    fs::write(&file, &bytes[..bytes.len() - 4]).unwrap();
    small.refuses(&["model.safetensors", "cut short", "model.norm.weight", "help: "]);
}

#[test]
fn a_header_longer_than_the_file_is_refused() {
    let small = Small::new();
    fs::write(small.path("base").join("model.safetensors"), (1u64 << 20).to_le_bytes()).unwrap();
    small.refuses(&["model.safetensors", "claims 1048576 bytes", "holds 0 after it"]);
}

#[test]
fn overlapping_tensors_and_wrong_sizes_are_refused() {
    let small = Small::new();
    let file = small.path("base").join("model.safetensors");
    let entry = |shape: &str, at: &str| format!(r#"{{"dtype":"F32","shape":{shape},"data_offsets":{at}}}"#);
    write_raw(&file, &format!(r#"{{"a":{},"b":{}}}"#, entry("[2]", "[0,8]"), entry("[2]", "[4,12]")), &[0; 12]);
    small.refuses(&["'b'", "overlaps 'a'"]);
    write_raw(&file, &format!(r#"{{"a":{}}}"#, entry("[3]", "[0,8]")), &[0; 8]);
    small.refuses(&["'a'", "needs 12 bytes, its offsets span 8"]);
}

#[test]
fn an_index_that_names_a_missing_shard_is_refused() {
    let small = Small::new();
    let index = r#"{"weight_map": {"w": "model-00001-of-00002.safetensors"}}"#;
    fs::write(small.path("base").join("model.safetensors.index.json"), index).unwrap();
    small.refuses(&["model-00001-of-00002.safetensors", "does not exist", "help: "]);
}

#[test]
fn an_adapter_for_another_model_is_refused_with_its_orphans() {
    let small = Small::new();
    small.write_adapter("transformer.h.0.attn.c_attn", 2, 4, 3, &[0.5; 6], &[0.25; 8]);
    let orphan = "transformer.h.0.attn.c_attn.lora_A.weight";
    small.refuses(&["2 of 2 tensors", "match nothing", orphan, "trained on 'some/other-model'"]);
}

#[test]
fn a_wrong_shape_is_refused_with_both_shapes() {
    let small = Small::new();
    small.write_adapter(Q, 2, 5, 3, &[0.5; 6], &[0.25; 10]);
    small.refuses(&[Q, "[4, 3]", "[5, 3]", "adapter_model.safetensors"]);
}

#[test]
fn rank_zero_is_refused() {
    let small = Small::new();
    let adapter = small.path("adapter");
    AdapterConfig::new(0, 1.0, &["q_proj"]).write(&adapter.join("adapter_config.json")).unwrap();
    small.refuses(&[Q, "rank 0"]);
}

#[test]
fn nan_is_named_with_its_place_wherever_it_is() {
    let small = Small::new();
    let mut q = [1.0; 12];
    q[7] = f32::NAN;
    small.write_base(&q);
    small.refuses(&[Q, "base", "NaN at [2, 1]", "help: "]);
    small.write_base(&[1.0; 12]);
    let mut a = [0.5; 6];
    a[4] = f32::NAN;
    small.write_adapter(Q, 2, 4, 3, &a, &[0.25; 8]);
    small.refuses(&["lora_A.weight", "NaN at [1, 1]", "help: "]);
}

#[test]
fn an_existing_output_is_refused_without_force() {
    let small = Small::new();
    fs::create_dir(small.path("out")).unwrap();
    small.refuses(&["out", "exists already", "--force"]);
    assert_eq!(run(small.args(&["--force"])).0, 0);
    assert_eq!(entries(small.0.path()), ["adapter", "base", "out"]);
}

#[test]
fn wrong_weights_and_globs_without_a_match_are_refused() {
    let small = Small::new();
    let base = small.path("base").display().to_string();
    let out = small.path("out").display().to_string();
    for (adapter, part) in [("adapter=heavy", "'heavy' is not a number"), ("nowhere/*", "matches nothing")] {
        refused(["merge", "--base", &base, "--adapter", adapter, "-o", &out], 2, &[part, "help: "]);
    }
    let weightless = format!("{}=0", small.path("adapter").display());
    refused(["merge", "--base", &base, "--adapter", &weightless, "-o", &out], 2, &["weight 0"]);
}

/// Writes an adapter with q_proj's factors, the norm in full, and its place among a run's cycles.
fn write_cycle(small: &Small, name: &str, norm: &[f32; 3], cycle: Option<u64>) {
    let folder = small.path(name);
    fs::create_dir_all(&folder).unwrap();
    let module = NewModule { name: Q, r: 2, out_features: 4, in_features: 3, a: &[0.5; 6], b: &[0.25; 8] };
    let full = FullTensor { name: "model.norm.weight", shape: &[3], values: norm };
    let metadata = cycle.map(|cycle| (CYCLE_KEY.to_owned(), cycle.to_string())).into_iter().collect();
    save_with(&folder, &AdapterConfig::new(2, 4.0, &["q_proj"]), &[module], &[full], &metadata).unwrap();
}

fn merge_two(small: &Small) -> (i32, String, String) {
    let path = |name| small.path(name).display().to_string();
    run(["merge", "--base", &path("base"), "--adapter", &path("c1"), &path("c2"), "-o", &path("out")])
}

#[test]
fn the_latest_cycle_of_a_run_decides_what_was_trained_in_full() {
    let small = Small::new();
    write_cycle(&small, "c1", &[5.0, 6.0, 7.0], Some(1));
    write_cycle(&small, "c2", &[8.0, 9.0, 10.0], Some(2));
    let (code, stdout, stderr) = merge_two(&small);
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.contains("1 replaced"), "{stdout}");
    assert_eq!(values(&small.path("out"), "model.norm.weight"), [8.0, 9.0, 10.0]);
    assert_eq!(values(&small.path("out"), &format!("{Q}.weight")), [2.0; 12]);
}

#[test]
fn two_adapters_that_replace_a_tensor_differently_are_refused() {
    let small = Small::new();
    for (first, second) in [(None, None), (Some(2), Some(1)), (Some(1), None)] {
        write_cycle(&small, "c1", &[5.0, 6.0, 7.0], first);
        write_cycle(&small, "c2", &[8.0, 9.0, 10.0], second);
        let (code, _, stderr) = merge_two(&small);
        assert_eq!(code, 2, "{stderr}");
        assert!(stderr.contains("both replace 'model.norm.weight'"), "{stderr}");
    }
    // Equal values are no conflict.
    write_cycle(&small, "c2", &[5.0, 6.0, 7.0], None);
    assert_eq!(merge_two(&small).0, 0);
}

#[test]
fn base_and_cycles_of_a_run_are_its_final_checkpoint() {
    let small = SmallRun::new(3);
    let trained = small.train();
    let (base, cycles, out) = (trained.join("base"), trained.join("cycles/*"), small.path("merged"));
    let args = ["merge".as_ref(), "--base".as_ref(), base.as_os_str(), "--adapter".as_ref(), cycles.as_os_str()];
    let (code, stdout, stderr) = run(args.into_iter().chain(["-o".as_ref(), out.as_os_str()]));
    assert_eq!(code, 0, "{stderr}");
    assert!(!stdout.contains(" 0 replaced"), "{stdout}");
    let merged = Checkpoint::open(&out).unwrap();
    let last = Checkpoint::open(&trained.join("checkpoints/step-40")).unwrap();
    let base = Checkpoint::open(&base).unwrap();
    assert_eq!(merged.len(), last.len());
    for tensor in last.tensors() {
        let name = tensor.name();
        let read = |c: &Checkpoint| c.tensor(name).unwrap().to_f32().unwrap().into_owned();
        let (ours, trained, before) = (read(&merged), read(&last), read(&base));
        // Between the cycles a weight may be larger than before and after all of them: the largest gives the unit.
        let largest = trained.iter().chain(&before).fold(0.0, |m: f32, x| m.max(x.abs()));
        let limit = 4.0 * dtype::ulp(Dtype::F32, f64::from(largest));
        for (x, y) in ours.into_iter().zip(trained) {
            assert!(f64::from((x - y).abs()) <= limit, "{name}: merged {x}, trained {y}, limit {limit:e}");
        }
        if !name.contains("_proj") {
            assert_eq!(merged.tensor(name).unwrap().bytes(), tensor.bytes(), "{name} is trained in full");
        }
    }
}

#[test]
fn a_checkpoint_of_the_official_code_merges_its_own_factors() {
    let small = Small::new();
    let base = small.path("base");
    let tensors = |scaling: f32| {
        write_tensors(
            &base.join("model.safetensors"),
            &[
                (&format!("{Q}.weight"), "F32", &[4, 3], f32_bytes(&[1.0; 12])),
                (&format!("{Q}.lora_A.weight"), "F32", &[2, 3], f32_bytes(&[0.5; 6])),
                (&format!("{Q}.lora_B.weight"), "F32", &[4, 2], f32_bytes(&[0.25; 8])),
                (&format!("{Q}.scaling"), "F32", &[1], f32_bytes(&[scaling])),
            ],
        );
    };
    let (base_name, out) = (base.display().to_string(), small.path("out"));
    let merge = || run(["merge", "--base", &base_name, "-o", out.to_str().unwrap(), "--force"]);
    tensors(0.5);
    let (code, _, stderr) = merge();
    assert_eq!(code, 2, "{stderr}");
    assert!(stderr.contains("relora_config.json") && stderr.contains("help: "), "{stderr}");
    let config = r#"{"r": 2, "lora_alpha": 32, "trainable_scaling": true}"#;
    fs::write(base.join("relora_config.json"), config).unwrap();
    let (code, _, stderr) = merge();
    assert_eq!(code, 0, "{stderr}");
    let merged = Checkpoint::open(&out).unwrap();
    assert_eq!(merged.len(), 1, "the factors are gone");
    let expected = 1.0 + 0.25 * 0.5f32.tanh();
    for value in values(&out, &format!("{Q}.weight")) {
        assert!((value - expected).abs() < 1e-6, "{value} and {expected}");
    }
}

/// A base without a head, an embedding [4, 3] that is tied to it, and an adapter for what `key` names.
fn tied(key: &str, values: &[f32], config: serde_json::Value) -> (Small, (i32, String, String)) {
    let small = Small::new();
    let base = small.path("base");
    fs::write(base.join("config.json"), r#"{"tie_word_embeddings": true}"#).unwrap();
    let embedding = ("model.embed_tokens.weight", "F32", &[4, 3][..], f32_bytes(&[1.0; 12]));
    write_tensors(&base.join("model.safetensors"), &[embedding]);
    let adapter = small.path("adapter");
    fs::write(adapter.join("adapter_config.json"), config.to_string()).unwrap();
    let key = format!("base_model.model.{key}");
    write_tensors(&adapter.join("adapter_model.safetensors"), &[(&key, "F32", &[4, 3], f32_bytes(values))]);
    let result = run(small.args(&[]));
    (small, result)
}

#[test]
fn a_saved_head_or_embedding_of_a_tied_model_unties_it() {
    for (key, head, embedding) in [("lm_head.weight", 2.0, 1.0), ("model.embed_tokens.weight", 1.0, 2.0)] {
        let module = key.rsplit('.').nth(1).unwrap();
        let config = serde_json::json!({"peft_type": "LORA", "modules_to_save": [module]});
        let (small, (code, _, stderr)) = tied(key, &[2.0; 12], config);
        assert_eq!(code, 0, "{stderr}");
        let out = small.path("out");
        assert_eq!(values(&out, "lm_head.weight"), [head; 12], "{key}");
        assert_eq!(values(&out, "model.embed_tokens.weight"), [embedding; 12], "{key}");
        let config = fs::read_to_string(out.join("config.json")).unwrap();
        assert!(config.contains("\"tie_word_embeddings\": false"), "{config}");
    }
}

#[test]
fn low_rank_factors_of_a_tied_head_alone_untie_it() {
    let small = Small::new();
    let base = small.path("base");
    fs::write(base.join("config.json"), r#"{"tie_word_embeddings": true}"#).unwrap();
    let embedding = ("model.embed_tokens.weight", "F32", &[4, 3][..], f32_bytes(&[1.0; 12]));
    write_tensors(&base.join("model.safetensors"), &[embedding]);
    small.write_adapter("lm_head", 2, 4, 3, &[0.5; 6], &[0.25; 8]);
    let (code, _, stderr) = run(small.args(&[]));
    assert_eq!(code, 0, "{stderr}");
    assert!(stderr.contains("changes the head of a tied model"), "{stderr}");
    let out = small.path("out");
    // 1 + 2 * (2 * 0.25 * 0.5)
    assert_eq!(values(&out, "lm_head.weight"), [1.5; 12]);
    assert_eq!(values(&out, "model.embed_tokens.weight"), [1.0; 12]);
    let config = fs::read_to_string(out.join("config.json")).unwrap();
    assert!(config.contains("\"tie_word_embeddings\": false"), "{config}");
}

#[test]
fn factors_of_a_convolution_without_its_layer_are_refused_by_name() {
    let small = Small::new();
    let key = |factor: &str| format!("base_model.model.conv1.lora_{factor}.weight");
    write_tensors(
        &small.path("adapter").join("adapter_model.safetensors"),
        &[
            (&key("A"), "F32", &[2, 3, 3, 3], f32_bytes(&[0.5; 54])),
            (&key("B"), "F32", &[4, 2, 1, 1], f32_bytes(&[0.25; 8])),
        ],
    );
    small.refuses(&["2 of 2 tensors", "conv1.lora_A.weight", "match nothing in the base"]);
}

#[test]
fn an_embedding_that_stays_tied_is_stored_once() {
    let config =
        serde_json::json!({"peft_type": "LORA", "modules_to_save": ["embed_tokens"], "ensure_weight_tying": true});
    let (small, (code, _, stderr)) = tied("model.embed_tokens.weight", &[2.0; 12], config);
    assert_eq!(code, 0, "{stderr}");
    assert_eq!(Checkpoint::open(&small.path("out")).unwrap().len(), 1);
}

#[test]
fn what_peft_cannot_merge_is_refused_by_name() {
    for (key, value, part) in [
        ("init_lora_weights", serde_json::json!("pissa_niter_4"), "pissa changed the base's weights"),
        ("layer_replication", serde_json::json!([[0, 2]]), "layer_replication is set"),
        ("use_dora", serde_json::json!(true), "has no magnitude"),
        ("peft_type", serde_json::json!("POLY"), "is a POLY adapter, which cannot be merged"),
    ] {
        let small = Small::new();
        let path = small.path("adapter").join("adapter_config.json");
        let mut config: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        config[key] = value;
        fs::write(&path, config.to_string()).unwrap();
        small.refuses(&[part, "adapter"]);
    }
}
