//! `relora-kit spectrum`, driven as a user does.

mod common;

use common::{f32_bytes, refused, run, write_tensors};
use relora_kit::checkpoint::{Dtype, dtype};
use serde_json::Value;
use std::path::{Path, PathBuf};

const Q: &str = "model.layers.0.self_attn.q_proj.weight";
const UP: &str = "model.layers.0.mlp.up_proj.weight";
const NORM: &str = "model.norm.weight";

/// Reproducible values, uniform in -1..1 (SplitMix64).
fn noise(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    (0..count).map(|_| (next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0).collect()
}

/// `w + scale * B @ A` of rank `r`.
fn add_low_rank(w: &[f32], (m, n): (usize, usize), r: usize, scale: f32) -> Vec<f32> {
    let (b, a) = (noise(91, m * r), noise(92, r * n));
    let delta = |i: usize| (0..r).map(|k| b[i / n * r + k] * a[k * n + i % n]).sum::<f32>();
    w.iter().enumerate().map(|(i, w)| w + scale * delta(i)).collect()
}

struct Pair {
    _folder: tempfile::TempDir,
    base: PathBuf,
    tuned: PathBuf,
}

impl Pair {
    fn args(&self) -> Vec<&str> {
        vec!["spectrum", "--base", text(&self.base), "--tuned", text(&self.tuned)]
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn stored(name: &str, values: &[f32]) -> Vec<u8> {
    dtype::encode_f32(if name == "F32" { Dtype::F32 } else { Dtype::BF16 }, values).unwrap().into_owned()
}

/// Two checkpoints: q_proj moves by rank 4, up_proj stays, the norm is no matrix, and the ids are integers.
fn pair(dtype: &str) -> Pair {
    let folder = tempfile::tempdir().unwrap();
    let write = |file: &str, q: &[f32]| {
        let path = folder.path().join(file);
        let up = noise(2, 32 * 64);
        write_tensors(
            &path,
            &[
                (Q, dtype, &[48, 64], stored(dtype, q)),
                (UP, dtype, &[32, 64], stored(dtype, &up)),
                (NORM, dtype, &[64], stored(dtype, &noise(3, 64))),
                ("ids", "I64", &[2, 2], vec![0; 32]),
            ],
        );
        path
    };
    // Representable in both types: only the tuned side is rounded, as a merge does.
    let q: Vec<f32> = noise(1, 48 * 64).iter().map(|x| (x * 128.0).round() / 128.0).collect();
    let base = write("base.safetensors", &q);
    let tuned = write("tuned.safetensors", &add_low_rank(&q, (48, 64), 4, 0.1));
    Pair { _folder: folder, base, tuned }
}

fn json(args: &[&str]) -> Value {
    let (code, stdout, stderr) = run(args.iter().chain(&["--format", "json"]));
    assert_eq!(code, 0, "{stderr}");
    serde_json::from_str(&stdout).unwrap()
}

#[test]
fn json_has_the_keys_of_the_contract() {
    let pair = pair("F32");
    let result = json(&[pair.args(), vec!["--sigma"]].concat());
    assert_eq!(result["schema"], 1);
    let q = &result["matrices"][1];
    assert_eq!((&q["name"], &q["module"], &q["layer"]), (&Q.into(), &"q_proj".into(), &0.into()));
    assert_eq!((&q["label"], &q["dtype"]), (&"tuned.safetensors".into(), &"F32".into()));
    assert_eq!((&q["numerical_rank"], &q["rank_above_noise"]), (&4.into(), &4.into()));
    assert_eq!(q["shape"], serde_json::json!([48, 64]));
    assert_eq!(q["sigma"].as_array().unwrap().len(), 48);
    let up = &result["matrices"][0];
    assert_eq!((&up["numerical_rank"], &up["spectral_norm"], &up["below_0_1"]), (&0.into(), &0.0.into(), &32.into()));
    assert!(up["effective_rank"].is_null() && up["condition_number"].is_null());
    assert_eq!(result["groups"].as_array().unwrap().len(), 2);
    let skipped: Vec<&Value> = result["skipped"].as_array().unwrap().iter().map(|s| &s["reason"]).collect();
    assert_eq!(skipped, ["not_a_matrix", "not_floating_point"]);
}

#[test]
fn sigma_is_left_out_unless_asked_for() {
    assert!(json(&pair("F32").args())["matrices"][0].get("sigma").is_none());
}

#[test]
fn bf16_rounding_is_not_taken_for_rank() {
    let pair = pair("BF16");
    let q = &json(&pair.args())["matrices"][1];
    assert!(q["numerical_rank"].as_u64().unwrap() > 40, "{q}");
    assert_eq!(q["rank_above_noise"], 4);
    assert!(q["noise_edge"].as_f64().unwrap() > 0.0);
}

#[test]
fn the_table_names_matrices_groups_and_what_was_skipped() {
    let (code, stdout, _) = run(pair("F32").args());
    assert_eq!(code, 0);
    for part in [Q, "q_proj", "48x64", "above noise", "skipped 1 tensor: not a matrix (first: model.norm.weight)"] {
        assert!(stdout.contains(part), "expected '{part}' in:\n{stdout}");
    }
}

#[test]
fn csv_has_every_metric_and_one_row_per_matrix() {
    let (_, stdout, _) = run([pair("F32").args(), vec!["--format", "csv"]].concat());
    let mut lines = stdout.lines();
    assert!(lines.next().unwrap().starts_with("name,label,rows,columns,dtype,module,layer,r,spectral_norm,"));
    assert_eq!(lines.count(), 2);
}

#[test]
fn a_gate_that_holds_exits_0_and_one_that_fails_exits_1_with_the_worst_offender() {
    let pair = pair("F32");
    let gate = |gate: &'static str| run([pair.args(), vec!["--rank", "4", "--require", gate]].concat());
    let (code, stdout, _) = gate("rank_above_noise >= r on *q_proj*");
    assert_eq!(code, 0, "{stdout}");
    assert!(stdout.contains("verdict: 1 gate held"), "{stdout}");
    let (code, stdout, _) = gate("rank_above_noise > 2*r");
    assert_eq!(code, 1, "{stdout}");
    assert!(stdout.contains(&format!("{UP} has 0 against 8")) && stdout.contains("FAILS"), "{stdout}");
}

#[test]
fn a_gate_that_does_not_parse_is_refused_with_a_caret() {
    let pair = pair("F32");
    let message = refused([pair.args(), vec!["--require", "rank_above_noise > 2*q"]].concat(), 2, &["expected 'r'"]);
    assert!(message.contains("\n  rank_above_noise > 2*q\n                       ^\n"), "{message}");
}

#[test]
fn gates_over_nothing_or_without_a_rank_are_refused() {
    let pair = pair("F32");
    let gate = |gate: &'static str| [pair.args(), vec!["--require", gate]].concat();
    refused(gate("numerical_rank > 3 on *k_proj*"), 2, &["matches no matrix"]);
    refused(gate("numerical_rank > 2*r"), 2, &["--rank"]);
}

#[test]
fn several_tuned_checkpoints_are_told_apart_by_their_labels() {
    let pair = pair("F32");
    let (one, two) = (format!("one={}", text(&pair.tuned)), format!("two={}", text(&pair.base)));
    let result =
        json(&["spectrum", "--base", text(&pair.base), "--tuned", &one, "--tuned", &two, "--filter", "*q_proj*"]);
    let found: Vec<_> =
        result["matrices"].as_array().unwrap().iter().map(|m| (&m["label"], &m["numerical_rank"])).collect();
    assert_eq!(found, [(&"one".into(), &4.into()), (&"two".into(), &0.into())]);
    let args = ["spectrum", "--base", text(&pair.base), "--tuned", &one, "--tuned", &one];
    refused(args, 2, &["two sources are called 'one'"]);
}

#[test]
fn tensors_on_one_side_are_refused_unless_common_only() {
    let pair = pair("F32");
    let lonely = pair.base.with_file_name("lonely.safetensors");
    write_tensors(&lonely, &[(Q, "F32", &[48, 64], f32_bytes(&noise(1, 48 * 64)))]);
    let args = ["spectrum", "--base", text(&pair.base), "--tuned", text(&lonely)];
    refused(args, 2, &["3 tensors are on one side only", UP, "--common-only"]);
    let result = json(&[&args[..], &["--common-only"]].concat());
    assert_eq!((result["matrices"].as_array().unwrap().len(), result["skipped"].as_array().unwrap().len()), (1, 3));
}

#[test]
fn other_shapes_are_refused_by_name() {
    let pair = pair("F32");
    let other = pair.base.with_file_name("other.safetensors");
    write_tensors(&other, &[(Q, "F32", &[64, 48], f32_bytes(&noise(1, 48 * 64)))]);
    let args = ["spectrum", "--base", text(&pair.base), "--tuned", text(&other), "--common-only"];
    refused(args, 2, &[Q, "[48, 64]", "[64, 48]"]);
}

#[test]
fn non_finite_values_are_named_and_can_be_skipped() {
    let pair = pair("F32");
    let broken = pair.base.with_file_name("broken.safetensors");
    let mut q = noise(1, 48 * 64);
    q[64 + 3] = f32::NAN;
    let up = f32_bytes(&noise(2, 32 * 64));
    write_tensors(&broken, &[(Q, "F32", &[48, 64], f32_bytes(&q)), (UP, "F32", &[32, 64], up)]);
    let args = ["spectrum", "--base", text(&pair.base), "--tuned", text(&broken), "--common-only"];
    refused(args, 2, &[Q, "[1, 3]", "NaN", "--skip-nonfinite"]);
    let result = json(&[&args[..], &["--skip-nonfinite"]].concat());
    assert_eq!(result["matrices"].as_array().unwrap().len(), 1);
    assert!(result["skipped"].as_array().unwrap().iter().any(|s| s["reason"] == "non_finite"));
}

#[test]
fn requests_without_work_are_refused() {
    let pair = pair("F32");
    refused(["spectrum"], 2, &["no source"]);
    refused([pair.args(), vec!["--filter", "nothing*"]].concat(), 2, &["no matrix to measure"]);
    refused([pair.args(), vec!["--filter", "a["]].concat(), 2, &["--filter 'a['"]);
    refused(["spectrum", "--base", "/nowhere", "--tuned", text(&pair.tuned)], 2, &["/nowhere"]);
}

#[test]
fn an_existing_output_is_refused_before_any_work() {
    let pair = pair("F32");
    let out = pair.base.with_file_name("out.json");
    std::fs::write(&out, "old").unwrap();
    refused([pair.args(), vec!["-o", text(&out)]].concat(), 2, &["exists already"]);
    assert_eq!(std::fs::read_to_string(&out).unwrap(), "old");
    let (code, stdout, _) = run([pair.args(), vec!["-o", text(&out), "--force", "--format", "json"]].concat());
    assert!(code == 0 && stdout.is_empty());
    assert!(serde_json::from_slice::<Value>(&std::fs::read(&out).unwrap()).is_ok());
}
