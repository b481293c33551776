//! `relora-kit merge`: what rounding does to a delta, what is said about it, and what a dry run says beforehand.

use crate::common;
use crate::common::{
    entries, run,
    small_merge::{Q, Small, values},
};
use relora_kit::checkpoint::Checkpoint;
use serde_json::{Value, json};

/// bf16 has steps of 2^-7 above 1, f16 of 2^-10: a delta of 2^-12 vanishes in both.
fn lossy() -> Small {
    let small = Small::new();
    small.write_adapter(Q, 2, 4, 3, &[0.5; 6], &[f32::powi(2.0, -13); 8]);
    small
}

#[test]
fn a_delta_that_rounding_destroys_is_reported_with_the_type_that_keeps_it() {
    let small = lossy();
    let (code, stdout, stderr) = run(small.args(&["--dtype", "bf16"]));
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.contains("0.00%"), "{stdout}");
    assert!(stderr.contains("warning: 1 of ") && stderr.contains("--dtype f32 would keep 100.0% of it"), "{stderr}");
    assert!(stderr.contains("--rounding stochastic"), "{stderr}");
    // 2^-9 is above half a step of f16.
    small.write_adapter(Q, 2, 4, 3, &[0.5; 6], &[f32::powi(2.0, -10); 8]);
    let (code, stdout, stderr) = run(small.args(&["--dtype", "bf16", "--force", "--format", "json"]));
    assert_eq!(code, 0, "{stderr}");
    let report: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!((&report["remedy"]["dtype"], &report["remedy"]["retention"]), (&"F16".into(), &1.0.into()));
    assert!(stderr.contains("--dtype f16 would keep 100.0%"), "{stderr}");
}

#[test]
fn stochastic_rounding_moves_some_elements_by_a_whole_step_and_the_same_seed_gives_the_same_bytes() {
    let small = lossy();
    // 96 x 64 weights of 1, a delta of 2^-12: one in 32 goes up by 2^-7.
    small.write_adapter(Q, 2, 96, 64, &[0.5; 128], &[f32::powi(2.0, -13); 192]);
    let base = [(format!("{Q}.weight"), vec![1.0f32; 96 * 64])];
    let tensors: Vec<_> = base.iter().map(|(n, v)| (n.as_str(), "F32", &[96, 64][..], common::f32_bytes(v))).collect();
    common::write_tensors(&small.path("base").join("model.safetensors"), &tensors);
    let merged = |seed: &str| {
        let options = ["--dtype", "bf16", "--rounding", "stochastic", "--seed", seed, "--force", "--format", "json"];
        let (code, stdout, stderr) = run(small.args(&options));
        assert_eq!(code, 0, "{stderr}");
        (values(&small.path("out"), &format!("{Q}.weight")), serde_json::from_str::<Value>(&stdout).unwrap())
    };
    let (first, report) = merged("1");
    let up = first.iter().filter(|x| **x == 1.0 + f32::powi(2.0, -7)).count();
    assert_eq!(up + first.iter().filter(|x| **x == 1.0).count(), 96 * 64);
    // 192 expected, standard deviation 13.6.
    assert!((130..260).contains(&up), "{up}");
    assert_eq!((&report["rounding"], &report["seed"]), (&"stochastic".into(), &1.into()));
    let retention = report["totals"]["retention"].as_f64().unwrap();
    assert!((retention - up as f64 / 192.0).abs() < 1e-6, "{retention}");
    assert!(report["totals"]["relative_error"].as_f64().unwrap() > 5.0, "{report}");
    assert_eq!(merged("1").0, first);
    assert_ne!(merged("2").0, first);
    let file = Checkpoint::open(&small.path("out")).unwrap();
    assert_eq!(file.files()[0].metadata()["rounding"], "stochastic, seed 2");
}

#[test]
fn threads_do_not_change_what_chance_decides() {
    let small = lossy();
    let bytes = |threads: &str| {
        let options = ["--dtype", "f16", "--rounding", "stochastic", "--force", "--threads", threads];
        let (code, _, stderr) = run(small.args(&options));
        assert_eq!(code, 0, "{stderr}");
        std::fs::read(small.path("out").join("model.safetensors")).unwrap()
    };
    assert_eq!(bytes("1"), bytes("2"));
}

#[test]
fn a_dry_run_says_what_a_merge_then_does_and_writes_nothing() {
    let small = Small::new();
    let options = ["--dtype", "bf16", "--max-shard-size", "24B", "--format", "json"];
    let dry: Vec<&str> = options.into_iter().chain(["--dry-run"]).collect();
    let (code, stdout, stderr) = run(small.args(&dry));
    assert_eq!(code, 0, "{stderr}");
    assert_eq!(entries(small.0.path()), ["adapter", "base"]);
    let plan: Value = serde_json::from_str(&stdout).unwrap();
    let rows: Vec<_> = plan["tensors"].as_array().unwrap().iter().collect();
    let facts = |t: &Value| json!([t["name"], t["action"], t["base_bytes"], t["bytes"], t["file"]]);
    let q = format!("{Q}.weight");
    let (one, two) = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors");
    assert_eq!(facts(rows[0]), json!([q, "merged", 48, 24, one]));
    assert_eq!(facts(rows[1]), json!(["model.norm.weight", "recast", 12, 6, two]));
    assert_eq!(plan["files"][0], json!({"name": one, "tensors": 1, "changed": 1, "bytes": 24}));
    assert_eq!(plan["estimate"]["bytes_written"], 30);
    // 60 of the base, 6 + 8 factors of four bytes.
    assert_eq!(plan["estimate"]["bytes_read"], 60 + 56);
    assert!(plan["estimate"]["seconds"].as_f64().unwrap() > 0.0);

    let (code, stdout, _) = run(small.args(&options));
    assert_eq!(code, 0);
    let done: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(done["files"], plan["files"]);
    for (planned, done) in rows.iter().zip(done["tensors"].as_array().unwrap()) {
        assert_eq!(facts(planned), facts(done));
    }
    assert!(entries(&small.path("out")).contains(&two.to_owned()));
}

#[test]
fn the_table_of_a_dry_run_has_a_row_per_kind_of_tensor_and_per_file() {
    let small = Small::new();
    let names: Vec<String> = (0..12).map(|i| format!("model.layers.{i}.mlp.up_proj.weight")).collect();
    let ones = common::f32_bytes(&[1.0; 12]);
    let mut tensors: Vec<_> = names.iter().map(|n| (n.as_str(), "F32", &[4, 3][..], ones.clone())).collect();
    let q = format!("{Q}.weight");
    tensors.push((&q, "F32", &[4, 3], ones.clone()));
    common::write_tensors(&small.path("base").join("model.safetensors"), &tensors);
    let (code, stdout, stderr) = run(small.args(&["--dry-run"]));
    assert_eq!(code, 0, "{stderr}");
    let row = stdout.lines().find(|l| l.contains("model.layers.*.mlp.up_proj.weight")).unwrap();
    assert!(row.split_whitespace().any(|cell| cell == "12") && row.contains("copied"), "{stdout}");
    assert!(stdout.lines().any(|l| l.contains(&q) && l.contains("merged")), "{stdout}");
    assert!(stdout.contains("model.safetensors") && stdout.contains("less than 0.1 s"), "{stdout}");
    assert!(stdout.contains("1 merged") && stdout.contains("12 copied"), "{stdout}");
    let (code, stdout, _) = run(small.args(&["--dry-run", "--format", "csv"]));
    assert_eq!((code, stdout.lines().count()), (0, 14), "{stdout}");
}
