//! `relora-kit extract`, driven as a user does.

use crate::common::{entries, f32_bytes, refused, run, write_tensors};
use relora_kit::checkpoint::Checkpoint;
use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
};

fn fixture(name: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name).to_str().unwrap().to_owned()
}

/// Runs a command that must succeed.
#[track_caller]
fn done(args: &[&str]) -> String {
    let (code, stdout, stderr) = run(args);
    assert_eq!(code, 0, "{stderr}");
    stdout
}

/// A folder with what `fixtures/tiny_adapter` makes of `fixtures/tiny_llama`, as `tuned`.
struct Desk(tempfile::TempDir);

impl Desk {
    fn new() -> Desk {
        let desk = Desk(tempfile::tempdir().unwrap());
        let (base, adapter, tuned) = (fixture("tiny_llama"), fixture("tiny_adapter"), desk.path("tuned"));
        done(&["merge", "--base", &base, "--adapter", &adapter, "-o", &tuned]);
        desk
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().to_owned()
    }

    /// Extracts `tuned - tiny_llama` into `adapter`; returns the report.
    #[track_caller]
    fn extract(&self, flags: &[&str]) -> Value {
        let (base, tuned, adapter) = (fixture("tiny_llama"), self.path("tuned"), self.path("adapter"));
        let fixed = ["extract", "--base", &base, "--tuned", &tuned, "-o", &adapter, "--format", "json"];
        serde_json::from_str(&done(&[&fixed, flags].concat())).unwrap()
    }

    /// Merges `adapter` into `tiny_llama`, and expects `tuned` within 1e-5 of the largest change.
    #[track_caller]
    fn merges_to_tuned(&self) {
        let (base, adapter, again) = (fixture("tiny_llama"), self.path("adapter"), self.path("again"));
        done(&["merge", "--base", &base, "--adapter", &adapter, "-o", &again]);
        let [base, tuned, again] =
            [base, self.path("tuned"), again].map(|p| Checkpoint::open(&PathBuf::from(p)).unwrap());
        assert_eq!(tuned.len(), again.len());
        for t in tuned.tensors() {
            let [w, t, found] = [&base, &tuned, &again].map(|c| c.tensor(t.name()).unwrap());
            let [w_values, t_values, found] = [w, t, found].map(|t| t.to_f32().unwrap());
            let delta = t_values.iter().zip(&*w_values).map(|(t, w)| (t - w).abs()).fold(0f32, f32::max);
            let error = t_values.iter().zip(&*found).map(|(t, f)| (t - f).abs()).fold(0f32, f32::max);
            assert!(error <= 1e-5 * delta.max(0.1), "{}: {error} of {delta}", t.name());
        }
    }
}

#[test]
fn the_delta_of_an_adapter_comes_back_by_its_rank() {
    let desk = Desk::new();
    let report = desk.extract(&["--rank", "4"]);
    assert_eq!(report["matrices"].as_array().unwrap().len(), 14);
    for m in report["matrices"].as_array().unwrap() {
        assert_eq!(m["rank"], 4);
        assert!(m["energy"].as_f64().unwrap() > 1.0 - 1e-10 && m["relative_error"].as_f64().unwrap() < 1e-5, "{m}");
    }
    assert_eq!(report["left_out"].as_array().unwrap().len(), 0);
    let config: Value = serde_json::from_slice(&fs::read(desk.path("adapter/adapter_config.json")).unwrap()).unwrap();
    assert_eq!((&config["r"], &config["lora_alpha"]), (&4.into(), &4.into()));
    let targets = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"];
    assert_eq!(config["target_modules"], serde_json::json!(targets));
    desk.merges_to_tuned();
}

#[test]
fn all_of_the_energy_finds_the_rank_and_part_of_it_gives_patterns() {
    let desk = Desk::new();
    let report = desk.extract(&["--energy", "0.9999999"]);
    assert_eq!((&report["totals"]["rank_min"], &report["totals"]["rank_max"]), (&4.into(), &4.into()));
    let report = desk.extract(&["--energy", "0.85", "--force"]);
    let matrices = report["matrices"].as_array().unwrap();
    let ranks: Vec<u64> = matrices.iter().map(|m| m["rank"].as_u64().unwrap()).collect();
    assert!(ranks.iter().min() < ranks.iter().max() && ranks.iter().all(|&r| r <= 4), "{ranks:?}");
    for m in matrices {
        let (energy, error) = (m["energy"].as_f64().unwrap(), m["relative_error"].as_f64().unwrap());
        assert!(energy >= 0.85 && (error * error - (1.0 - energy)).abs() < 1e-6, "{m}");
    }
    // Another program of ours reads ranks and scales as they were meant.
    let adapter = relora_kit::adapter::Adapter::open(Path::new(&desk.path("adapter"))).unwrap();
    for module in adapter.lora_modules() {
        let module = module.unwrap();
        let m = matrices.iter().find(|m| m["name"] == module.tensor_name()).unwrap();
        assert_eq!((module.r as u64, module.scaling), (m["rank"].as_u64().unwrap(), 1.0), "{}", module.name);
    }
}

#[test]
fn a_filter_names_the_targets_in_full() {
    let desk = Desk::new();
    desk.extract(&["--rank", "2", "--filter", "*.0.self_attn.q_proj*", "--filter", "*o_proj*"]);
    let config: Value = serde_json::from_slice(&fs::read(desk.path("adapter/adapter_config.json")).unwrap()).unwrap();
    assert_eq!(config["target_modules"], serde_json::json!(["model.layers.0.self_attn.q_proj", "o_proj"]));
}

/// `tuned` with one more change: every value of `name` grows by 1.
fn grow(desk: &Desk, name: &str) {
    let path = desk.path("tuned/model.safetensors");
    let file = Checkpoint::open(Path::new(&path)).unwrap();
    let tensors: Vec<_> = file
        .tensors()
        .map(|t| {
            let mut values = t.to_f32().unwrap().into_owned();
            values.iter_mut().filter(|_| t.name() == name).for_each(|v| *v += 1.0);
            (t.name(), "F32", t.shape(), f32_bytes(&values))
        })
        .collect();
    write_tensors(Path::new(&desk.path("new.safetensors")), &tensors);
    fs::rename(desk.path("new.safetensors"), &path).unwrap();
}

#[test]
fn norms_and_embeddings_are_listed_or_stored_in_full() {
    let desk = Desk::new();
    grow(&desk, "model.layers.1.input_layernorm.weight");
    grow(&desk, "model.embed_tokens.weight");
    let report = desk.extract(&["--rank", "4"]);
    let left: Vec<_> = report["left_out"].as_array().unwrap().iter().map(|t| t["name"].as_str().unwrap()).collect();
    assert_eq!(left, ["model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"]);
    let report = desk.extract(&["--rank", "4", "--save-rest", "--force"]);
    assert_eq!(report["saved_in_full"].as_array().unwrap().len(), 2);
    desk.merges_to_tuned();
}

#[test]
fn a_tied_embedding_that_changed_stays_tied() {
    let desk = Desk::new();
    grow(&desk, "model.embed_tokens.weight");
    let tied = desk.path("tied");
    for (from, to) in [(fixture("tiny_llama"), tied.clone()), (desk.path("tuned"), desk.path("tuned_tied"))] {
        fs::create_dir(&to).unwrap();
        let file = Checkpoint::open(Path::new(&from)).unwrap();
        let kept = file.tensors().filter(|t| t.name() != "lm_head.weight");
        let kept: Vec<_> = kept.map(|t| (t.name(), "F32", t.shape(), t.bytes().to_vec())).collect();
        write_tensors(&Path::new(&to).join("model.safetensors"), &kept);
        let config = fs::read_to_string(Path::new(&from).join("config.json")).unwrap();
        let config = config.replace("\"tie_word_embeddings\": false", "\"tie_word_embeddings\": true");
        fs::write(Path::new(&to).join("config.json"), config).unwrap();
    }
    let (tuned, adapter, again) = (desk.path("tuned_tied"), desk.path("adapter"), desk.path("again"));
    done(&["extract", "--base", &tied, "--tuned", &tuned, "-o", &adapter, "--rank", "4", "--save-rest"]);
    // PEFT stores the head of a tied model beside the embedding, and looks for it.
    let names: Vec<_> = Checkpoint::open(Path::new(&format!("{adapter}/adapter_model.safetensors")))
        .unwrap()
        .tensors()
        .map(|t| t.name().to_owned())
        .collect();
    assert!(names.contains(&"base_model.model.lm_head.weight".to_owned()), "{names:?}");
    done(&["merge", "--base", &tied, "--adapter", &adapter, "-o", &again]);
    done(&["diff", &again, &tuned, "--atol", "1e-6"]);
    let config: Value = serde_json::from_slice(&fs::read(format!("{again}/config.json")).unwrap()).unwrap();
    assert_eq!(config["tie_word_embeddings"], true);
}

#[test]
fn what_cannot_be_extracted_is_refused_before_anything_is_written() {
    let desk = Desk::new();
    let (base, tuned, out) = (fixture("tiny_llama"), desk.path("tuned"), desk.path("out"));
    let refuse = |base: &str, tuned: &str, flags: &[&str], parts: &[&str]| {
        let fixed = ["extract", "--base", base, "--tuned", tuned, "-o", &out];
        refused([&fixed, flags].concat(), 2, parts);
        assert!(!entries(desk.0.path()).iter().any(|name| name.contains("out")));
    };
    refuse(&base, &tuned, &["--rank", "65"], &["rank 65 is more than tensor 'model.layers.0.", "at most 64"]);
    refuse(&base, &tuned, &["--rank", "0"], &["rank 0"]);
    refuse(&base, &tuned, &["--energy", "1.5"], &["an energy of 1.5"]);
    refuse(&base, &base, &["--rank", "4"], &["no tensor changed", "check the order"]);
    refuse(&base, &tuned, &[], &["--rank"]);
    let pair = |a: &[(&str, &str, &[usize], Vec<u8>)], b: &[(&str, &str, &[usize], Vec<u8>)]| {
        write_tensors(Path::new(&desk.path("a.safetensors")), a);
        write_tensors(Path::new(&desk.path("b.safetensors")), b);
        (desk.path("a.safetensors"), desk.path("b.safetensors"))
    };
    let zeros = || f32_bytes(&[0.0; 4]);
    let (a, b) = pair(&[("q.weight", "F32", &[2, 2], zeros())], &[("q.weight", "F32", &[4, 1], zeros())]);
    refuse(&a, &b, &["--rank", "1"], &["'q.weight' has shape [2, 2] in", "but [4, 1] in"]);
    let nan = f32_bytes(&[0.0, 0.0, 0.0, f32::NAN]);
    let (a, b) = pair(&[("q.weight", "F32", &[2, 2], zeros())], &[("q.weight", "F32", &[2, 2], nan)]);
    refuse(&a, &b, &["--rank", "1"], &["the delta of 'q.weight' is not finite at [1, 1]", "holds NaN"]);
    let (a, b) = pair(&[("q.weight", "F32", &[2, 2], zeros())], &[("k.weight", "F32", &[2, 2], zeros())]);
    refuse(&a, &b, &["--rank", "1"], &["a.safetensors' has no tensor 'k.weight'"]);
    let more = f32_bytes(&[1.0; 4]);
    let (a, b) = pair(
        &[("q.weight", "F32", &[2, 2], zeros()), ("q.gain", "F32", &[4], zeros())],
        &[("q.weight", "F32", &[2, 2], more.clone()), ("q.gain", "F32", &[4], more)],
    );
    refuse(&a, &b, &["--rank", "1", "--save-rest"], &["'q.gain' changed", "beside factors of its module"]);
}
