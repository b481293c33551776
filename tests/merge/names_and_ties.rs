//! `merge`: names that can mean two things, tied weights, grown vocabularies, and refusals that name their cause.

use crate::common::{
    f32_bytes, run,
    small_merge::{Q, Small, values},
    write_tensors,
};
use std::fs;

const EMBEDDING: &str = "model.embed_tokens.weight";

fn config(small: &Small, text: &str) {
    fs::write(small.path("base").join("config.json"), text).unwrap();
}

fn base(small: &Small, tensors: &[(&str, &[usize])]) {
    let ones = |shape: &[usize]| f32_bytes(&vec![1.0; shape.iter().product()]);
    let tensors: Vec<_> = tensors.iter().map(|(name, shape)| (*name, "F32", *shape, ones(shape))).collect();
    write_tensors(&small.path("base").join("model.safetensors"), &tensors);
}

/// An adapter of rank 2 and alpha 4 whose tensors hold one value each.
fn adapter(small: &Small, settings: serde_json::Value, tensors: &[(&str, &[usize], f32)]) {
    let mut all = serde_json::json!({"peft_type": "LORA", "r": 2, "lora_alpha": 4});
    all.as_object_mut().unwrap().extend(settings.as_object().unwrap().clone());
    fs::write(small.path("adapter").join("adapter_config.json"), all.to_string()).unwrap();
    let keys: Vec<String> = tensors.iter().map(|(key, ..)| format!("base_model.model.{key}")).collect();
    let values = |shape: &[usize], value: f32| f32_bytes(&vec![value; shape.iter().product()]);
    let stored: Vec<_> =
        keys.iter().zip(tensors).map(|(key, (_, shape, v))| (key.as_str(), "F32", *shape, values(shape, *v))).collect();
    write_tensors(&small.path("adapter").join("adapter_model.safetensors"), &stored);
}

fn none() -> serde_json::Value {
    serde_json::json!({})
}

#[test]
fn factors_of_a_tied_embedding_leave_the_head_as_it_was_in_training() {
    let small = Small::new();
    config(&small, r#"{"tie_word_embeddings": true}"#);
    base(&small, &[(EMBEDDING, &[4, 3])]);
    let (a, b) = ("model.embed_tokens.lora_embedding_A", "model.embed_tokens.lora_embedding_B");
    adapter(&small, none(), &[(a, &[2, 4], 0.5), (b, &[3, 2], 0.25)]);
    let (code, _, stderr) = run(small.args(&[]));
    assert_eq!(code, 0, "{stderr}");
    assert!(stderr.contains("the output is untied"), "{stderr}");
    let out = small.path("out");
    // 1 + 2 * (2 * 0.25 * 0.5)
    assert_eq!(values(&out, EMBEDDING), [1.5; 12]);
    assert_eq!(values(&out, "lm_head.weight"), [1.0; 12]);
    assert!(fs::read_to_string(out.join("config.json")).unwrap().contains("\"tie_word_embeddings\": false"));
    // An adapter that ties them changes the one matrix.
    adapter(&small, serde_json::json!({"ensure_weight_tying": true}), &[(a, &[2, 4], 0.5), (b, &[3, 2], 0.25)]);
    assert_eq!(run(small.args(&["--force"])).0, 0);
    assert_eq!(values(&out, EMBEDDING), [1.5; 12]);
    assert!(!fs::read_to_string(out.join("config.json")).unwrap().contains("false"));
}

#[test]
fn a_stored_head_that_changes_is_not_called_tied() {
    let small = Small::new();
    config(&small, r#"{"tie_word_embeddings": true}"#);
    base(&small, &[(EMBEDDING, &[4, 3]), ("lm_head.weight", &[4, 3])]);
    adapter(&small, none(), &[("lm_head.lora_A.weight", &[2, 3], 0.5), ("lm_head.lora_B.weight", &[4, 2], 0.25)]);
    assert_eq!(run(small.args(&[])).0, 0);
    let written = fs::read_to_string(small.path("out").join("config.json")).unwrap();
    assert!(written.contains("\"tie_word_embeddings\": false"), "{written}");
}

#[test]
fn names_that_fit_twice_are_refused_until_map_decides() {
    let small = Small::new();
    base(&small, &[("text.layers.0.q.weight", &[4, 3]), ("vision.layers.0.q.weight", &[4, 3])]);
    let factors: [(&str, &[usize], f32); 2] =
        [("layers.0.q.lora_A.weight", &[2, 3], 0.5), ("layers.0.q.lora_B.weight", &[4, 2], 0.25)];
    adapter(&small, none(), &factors);
    small.refuses(&["in two ways", "'text.layers.0.q.weight' or 'vision.layers.0.q.weight'", "--map =text."]);
    let (code, _, stderr) = run(small.args(&["--map", "=vision."]));
    assert_eq!(code, 0, "{stderr}");
    let out = small.path("out");
    assert_eq!(values(&out, "vision.layers.0.q.weight"), [1.5; 12]);
    assert_eq!(values(&out, "text.layers.0.q.weight"), [1.0; 12]);
}

#[test]
fn a_square_weight_is_read_by_its_kind_of_layer() {
    // B @ A has rows of 1, 2, 3 from A; transposed, columns.
    let small = Small::new();
    let merged = |class: &str| {
        config(&small, &format!(r#"{{"architectures": ["{class}"]}}"#));
        base(&small, &[("transformer.h.0.attn.c_proj.weight", &[3, 3])]);
        let (a, b) = (
            "base_model.model.transformer.h.0.attn.c_proj.lora_A.weight",
            "base_model.model.transformer.h.0.attn.c_proj.lora_B.weight",
        );
        fs::write(
            small.path("adapter").join("adapter_config.json"),
            r#"{"peft_type": "LORA", "r": 1, "lora_alpha": 1}"#,
        )
        .unwrap();
        let tensors =
            [(a, "F32", &[1, 3][..], f32_bytes(&[1.0, 2.0, 3.0])), (b, "F32", &[3, 1][..], f32_bytes(&[1.0; 3]))];
        write_tensors(&small.path("adapter").join("adapter_model.safetensors"), &tensors);
        let (code, _, stderr) = run(small.args(&["--force"]));
        assert_eq!(code, 0, "{stderr}");
        values(&small.path("out"), "transformer.h.0.attn.c_proj.weight")
    };
    assert_eq!(merged("GPT2LMHeadModel"), [2.0, 2.0, 2.0, 3.0, 3.0, 3.0, 4.0, 4.0, 4.0]);
    assert_eq!(merged("LlamaForCausalLM"), [2.0, 3.0, 4.0, 2.0, 3.0, 4.0, 2.0, 3.0, 4.0]);
}

#[test]
fn a_vocabulary_grows_with_embedding_head_and_configuration() {
    let small = Small::new();
    config(&small, r#"{"tie_word_embeddings": false, "vocab_size": 4}"#);
    base(&small, &[(EMBEDDING, &[4, 3]), ("lm_head.weight", &[4, 3])]);
    adapter(&small, none(), &[(EMBEDDING, &[6, 3], 2.0), ("lm_head.weight", &[6, 3], 3.0)]);
    let (code, _, stderr) = run(small.args(&[]));
    assert_eq!(code, 0, "{stderr}");
    let out = small.path("out");
    assert_eq!(values(&out, EMBEDDING), [2.0; 18]);
    assert!(fs::read_to_string(out.join("config.json")).unwrap().contains("\"vocab_size\": 6"));
    fs::remove_dir_all(out).unwrap();
    // One of the two only, fewer rows, factors without their embedding.
    adapter(&small, none(), &[(EMBEDDING, &[6, 3], 2.0)]);
    small.refuses(&["grew from 4 to 6 rows", "'lm_head.weight' has 4", "resize_token_embeddings(6)"]);
    adapter(&small, none(), &[(EMBEDDING, &[2, 3], 2.0)]);
    small.refuses(&["has shape [4, 3]", "[2, 3]"]);
    let (a, b) = ("model.embed_tokens.lora_embedding_A", "model.embed_tokens.lora_embedding_B");
    adapter(&small, none(), &[(a, &[2, 6], 0.5), (b, &[3, 2], 0.25)]);
    small.refuses(&["the adapter was trained with 6 tokens, the base has 4", "resize_token_embeddings(6)"]);
}

#[test]
fn adapters_that_change_nothing_are_warned_about() {
    let small = Small::new();
    small.write_adapter(Q, 2, 4, 3, &[0.5; 6], &[0.0; 8]);
    let (code, _, stderr) = run(small.args(&[]));
    assert_eq!(code, 0, "{stderr}");
    assert!(stderr.contains("changes nothing: a factor of each of its 1 modules is zero"), "{stderr}");
    fs::remove_dir_all(small.path("out")).unwrap();
    let settings = serde_json::json!({"lora_alpha": null});
    adapter(&small, settings, &[("q.lora_A.weight", &[2, 3], 0.5), ("q.lora_B.weight", &[4, 2], 0.25)]);
    small.refuses(&["lora_alpha is null"]);
}

#[test]
fn refusals_name_the_cause() {
    let small = Small::new();
    let factors: [(&str, &[usize], f32); 2] = [("q.lora_A.weight", &[2, 3], 0.5), ("q.lora_B.weight", &[4, 2], 0.25)];
    adapter(&small, none(), &factors);
    // Quantised: told by the configuration, or by the scales beside the weight.
    config(&small, r#"{"quantization_config": {"quant_method": "gptq"}}"#);
    base(&small, &[("q.qweight", &[1, 3]), ("q.scales", &[1, 3])]);
    small.refuses(&[
        "is quantised (config.json: quantization_config gptq)",
        "help: merge into the model that it was quantised",
    ]);
    config(&small, "{}");
    base(&small, &[("q.weight", &[4, 3]), ("q.weight_scale_inv", &[1, 1])]);
    small.refuses(&["cannot merge 'q.weight'", "is quantised (it stores 'q.weight_scale_inv')"]);
    let (base_path, out) = (small.path("base"), small.path("out"));
    let (code, _, stderr) =
        run(["merge", "--base", base_path.to_str().unwrap(), "-o", out.to_str().unwrap(), "--dtype", "bf16"]);
    assert!(code == 2 && stderr.contains("cannot apply --dtype"), "{stderr}");
    // nn.MultiheadAttention keeps its weights in parameters of its own.
    base(&small, &[("q.in_proj_weight", &[9, 3])]);
    small.refuses(&["module 'q'", "is an nn.MultiheadAttention", "help: merge this adapter with PEFT"]);
    // ZeRO-3 saves what it did not gather without values.
    base(&small, &[("q.weight", &[4, 3]), ("score.weight", &[2, 3])]);
    adapter(&small, serde_json::json!({"modules_to_save": ["score"]}), &[("score.weight", &[0], 1.0)]);
    small.refuses(&["'base_model.model.score.weight'", "is empty, shape [0]", "ZeRO-3"]);
    // A saved tensor that lies where the base has others, which no model would read.
    adapter(&small, serde_json::json!({"modules_to_save": ["gate"]}), &[("q.gate.weight", &[2, 3], 1.0)]);
    small.refuses(&["1 of 1 tensors", "'base_model.model.q.gate.weight'", "--map FROM=TO"]);
}

#[test]
fn a_folder_with_two_models_is_refused() {
    let small = Small::new();
    let base = small.path("base");
    write_tensors(&base.join("model-00001-of-00001.safetensors"), &[("q", "F32", &[1], f32_bytes(&[1.0]))]);
    fs::write(
        base.join("model.safetensors.index.json"),
        r#"{"weight_map": {"q": "model-00001-of-00001.safetensors"}}"#,
    )
    .unwrap();
    small.refuses(&["holds two models", "transformers reads model.safetensors"]);
}
