//! `relora-kit inspect`, driven as a user does.

use crate::common::{f32_bytes, refused, run, write_raw, write_tensors};
use serde_json::Value;
use std::{fs, path::Path, time::Instant};

fn inspect(path: &Path, flags: &[&str]) -> String {
    let mut args = vec!["inspect", path.to_str().unwrap()];
    args.extend(flags);
    let (code, stdout, stderr) = run(args);
    assert_eq!(code, 0, "{stderr}");
    stdout
}

fn json(path: &Path, flags: &[&str]) -> Value {
    serde_json::from_str(&inspect(path, &[flags, &["--format", "json"]].concat())).unwrap()
}

fn fixture(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)
}

#[test]
fn a_sharded_checkpoint_is_listed_with_its_files() {
    let report = json(&fixture("tiny_llama_bf16"), &[]);
    assert_eq!(report["files"].as_array().unwrap().len(), 3);
    let tensors = report["tensors"].as_array().unwrap();
    let sum: u64 = tensors.iter().map(|t| t["bytes"].as_u64().unwrap()).sum();
    assert_eq!(report["bytes"].as_u64(), Some(sum));
    assert_eq!(report["parameters"].as_u64(), Some(sum / 2));
    let table = inspect(&fixture("tiny_llama_bf16"), &[]);
    assert!(table.contains("model.embed_tokens.weight") && table.contains("in 3 files"), "{table}");
    assert!(table.contains("model-00002-of-00003.safetensors"), "{table}");
}

#[test]
fn an_adapter_folder_shows_rank_alpha_and_targets() {
    let report = json(&fixture("tiny_adapter"), &[]);
    let config: Value =
        serde_json::from_slice(&fs::read(fixture("tiny_adapter").join("adapter_config.json")).unwrap()).unwrap();
    let adapter = &report["adapter"];
    assert_eq!(adapter["r"], config["r"]);
    assert_eq!(adapter["lora_alpha"].as_f64(), config["lora_alpha"].as_f64());
    assert_eq!(adapter["target_modules"], config["target_modules"]);
    assert_eq!(adapter["modules"].as_u64().unwrap() * 2, report["tensors"].as_array().unwrap().len() as u64);
    let table = inspect(&fixture("tiny_adapter"), &[]);
    assert!(table.contains("lora_alpha") && table.contains("target_modules"), "{table}");
}

#[test]
fn a_pickled_adapter_is_shown_like_the_one_in_safetensors() {
    let (pickled, plain) =
        (json(&fixture("tiny_adapter_bin"), &["--stats"]), json(&fixture("tiny_adapter"), &["--stats"]));
    assert_eq!(pickled["adapter"], plain["adapter"]);
    let of = |report: &Value| {
        let mut tensors = report["tensors"].as_array().unwrap().clone();
        tensors.sort_by_key(|t| t["name"].to_string());
        tensors.iter().map(|t| (t["name"].clone(), t["shape"].clone(), t["stats"].clone())).collect::<Vec<_>>()
    };
    assert_eq!(of(&pickled), of(&plain));
    let file = &pickled["files"][0];
    let stored = fixture("tiny_adapter_bin").join("adapter_model.bin");
    assert_eq!(
        (&file["name"], file["bytes"].as_u64()),
        (&"adapter_model.bin".into(), Some(stored.metadata().unwrap().len()))
    );
    refused(["inspect".as_ref(), stored.as_os_str()], 2, &["not a valid safetensors file", "relora-kit convert"]);
}

#[test]
fn stats_of_every_type_are_those_of_the_values() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.safetensors");
    let values = [1.0f32, 2.0, 3.0, -6.0, 0.0, -0.0];
    let bf16 = values.iter().flat_map(|v| ((v.to_bits() >> 16) as u16).to_le_bytes()).collect();
    let f64s = values.iter().flat_map(|v| f64::from(*v).to_le_bytes()).collect();
    let f16s = values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect();
    let ints = values.iter().flat_map(|v| (*v as i64).to_le_bytes()).collect();
    write_tensors(
        &path,
        &[
            ("f32", "F32", &[2, 3], f32_bytes(&values)),
            ("bf16", "BF16", &[6], bf16),
            ("f64", "F64", &[6], f64s),
            ("f16", "F16", &[6], f16s),
            ("i64", "I64", &[6], ints),
            ("empty", "F32", &[0], vec![]),
        ],
    );
    let report = json(&path, &["--stats"]);
    for t in report["tensors"].as_array().unwrap() {
        let s = &t["stats"];
        if t["name"] == "empty" {
            assert!(s["mean"].is_null() && s["zeros"] == 0, "{t}");
            continue;
        }
        assert_eq!(
            (s["min"].as_f64(), s["max"].as_f64(), s["mean"].as_f64()),
            (Some(-6.0), Some(3.0), Some(0.0)),
            "{t}"
        );
        assert!((s["std"].as_f64().unwrap() - (50f64 / 6.0).sqrt()).abs() < 1e-14, "{t}");
        assert_eq!((&s["zeros"], &s["nan"], &s["inf"]), (&2.into(), &0.into(), &0.into()), "{t}");
    }
}

#[test]
fn values_that_are_not_finite_are_counted_and_located() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.safetensors");
    let mut values = vec![0.5f32; 3 * 100_000];
    values[200_001] = f32::NAN;
    values[299_999] = f32::NEG_INFINITY;
    write_tensors(&path, &[("w", "F32", &[3, 100_000], f32_bytes(&values))]);
    let report = json(&path, &["--stats"]);
    let stats = &report["tensors"][0]["stats"];
    assert_eq!((&stats["nan"], &stats["inf"]), (&1.into(), &1.into()));
    assert_eq!(stats["first_non_finite"], serde_json::json!([2, 1]));
    assert_eq!((stats["min"].as_f64(), stats["std"].as_f64()), (Some(0.5), Some(0.0)));
    let table = inspect(&path, &["--stats"]);
    assert!(table.contains("'w' holds 2 values that are NaN or infinite, the first at [2, 1]"), "{table}");
}

#[test]
fn stats_do_not_depend_on_the_number_of_threads() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.safetensors");
    let values: Vec<f32> = (0..1_000_000).map(|i| (i as f32 * 0.37).sin()).collect();
    write_tensors(&path, &[("w", "F32", &[1000, 1000], f32_bytes(&values))]);
    assert_eq!(json(&path, &["--stats", "--threads", "1"]), json(&path, &["--stats", "--threads", "3"]));
}

#[test]
fn a_filter_chooses_and_one_that_matches_nothing_is_refused() {
    let model = fixture("tiny_llama");
    let report = json(&model, &["--filter", "*norm*"]);
    let names: Vec<_> = report["tensors"].as_array().unwrap().iter().map(|t| t["name"].as_str().unwrap()).collect();
    assert!(!names.is_empty() && names.iter().all(|n| n.contains("norm")), "{names:?}");
    refused(["inspect", model.to_str().unwrap(), "--filter", "nothing*"], 2, &["tiny_llama", "filter", "help: "]);
    refused(["inspect", model.to_str().unwrap(), "--filter", "[a"], 2, &["'[a' is not a glob"]);
}

#[test]
fn the_tree_folds_equal_layers_and_its_sums_are_the_totals() {
    let report = json(&fixture("tiny_llama"), &["--tree"]);
    let sum: u64 = report["tree"].as_array().unwrap().iter().map(|n| n["parameters"].as_u64().unwrap()).sum();
    assert_eq!(report["parameters"].as_u64(), Some(sum));
    let table = inspect(&fixture("tiny_llama"), &["--tree"]);
    assert!(table.contains("0..1 (2 times)") && table.contains("── q_proj"), "{table}");
}

#[test]
fn every_format_holds_every_tensor_and_o_writes_a_file() {
    let model = fixture("tiny_llama");
    let csv = inspect(&model, &["--format", "csv", "--stats"]);
    let tensors = json(&model, &[])["tensors"].as_array().unwrap().len();
    assert_eq!(csv.lines().count(), tensors + 1);
    assert!(csv.starts_with("tensor,dtype,shape,bytes,min,max,mean,std,zeros,nan,inf\n"), "{csv}");
    assert!(inspect(&model, &["--format", "markdown"]).contains("| model.norm.weight |"));
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.csv");
    assert_eq!(inspect(&model, &["--format", "csv", "--stats", "-o", out.to_str().unwrap()]), "");
    assert_eq!(fs::read_to_string(&out).unwrap(), csv);
    refused(["inspect", model.to_str().unwrap(), "-o", out.to_str().unwrap()], 2, &["exists already", "--force"]);
}

#[test]
fn each_kind_of_damage_is_refused_with_the_tensor_and_the_place() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.safetensors");
    let entry = |name: &str, dtype: &str, shape: &str, begin: u64, end: u64| {
        format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}"#)
    };
    let one = |t: String| format!("{{{t}}}");
    let overlapping = format!("{{{},{}}}", entry("v", "U8", "[6]", 0, 6), entry("w", "U8", "[4]", 4, 8));
    for (header, data, parts) in [
        (one(entry("w", "F32", "[4]", 0, 16)), 12, ["is cut short", "'w'"]),
        (overlapping, 8, ["'w' at bytes", "overlaps 'v'"]),
        (one(entry("w", "F32", "[4]", 0, 12)), 12, ["'w' at byte 0", "needs 16 bytes"]),
        (one(entry("w", "Q9", "[4]", 0, 4)), 4, ["'w' at byte 0", "unknown dtype 'Q9'"]),
        (one(entry("w", "U8", "[4]", 0, 4)), 9, ["bytes 65..70", "belong to no tensor"]),
        (
            format!("{{{0},{0}}}", entry("w", "U8", "[4]", 0, 4)),
            4,
            ["header is not the expected JSON", "'w' appears twice"],
        ),
        ("not json".into(), 0, ["header is not the expected JSON", "line 1"]),
    ] {
        write_raw(&path, &header, &vec![0; data]);
        refused(["inspect", path.to_str().unwrap()], 2, &["m.safetensors", parts[0], parts[1], "help: "]);
    }
    for (bytes, part) in [
        (vec![], "expected at least 8 bytes, found 0"),
        ((100u64 << 30).to_le_bytes().to_vec(), "claims 107374182400 bytes, more than the limit"),
        (60u64.to_le_bytes().to_vec(), "claims 60 bytes, the file holds 0"),
    ] {
        fs::write(&path, bytes).unwrap();
        refused(["inspect", path.to_str().unwrap()], 2, &["m.safetensors", part, "help: "]);
    }
}

#[test]
fn a_shard_that_is_missing_or_does_not_fit_its_index_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(fixture("tiny_llama_bf16")).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    let shard = |i: u32| dir.path().join(format!("model-0000{i}-of-00003.safetensors"));
    let folder = dir.path().to_str().unwrap();
    fs::copy(shard(1), shard(2)).unwrap();
    refused(["inspect", folder], 2, &["index.json", "model-00002-of-00003.safetensors", "help: "]);
    fs::remove_file(shard(2)).unwrap();
    refused(["inspect", folder], 2, &["model-00002-of-00003.safetensors", "does not exist", "help: "]);
}

#[test]
fn ten_thousand_tensors_are_listed_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.safetensors");
    let names: Vec<String> =
        (0..10_000).map(|i| format!("model.layers.{}.block.{}.weight", i / 100, i % 100)).collect();
    let tensors: Vec<(&str, &str, &[usize], Vec<u8>)> =
        names.iter().map(|n| (n.as_str(), "BF16", &[2usize, 3][..], vec![0; 12])).collect();
    write_tensors(&path, &tensors);
    let start = Instant::now();
    let csv = inspect(&path, &["--format", "csv"]);
    // 50 ms on an idle machine (docs/benchmarks.md); the slack is for one that is busy.
    assert!(start.elapsed().as_secs_f64() < 2.0, "{:?}", start.elapsed());
    assert_eq!(csv.lines().count(), 10_001);
    assert!(inspect(&path, &["--tree"]).contains("0..99 (100 times)"));
}
