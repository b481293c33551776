//! `relora-kit spectrum`, driven as a user does.

use crate::common::synthetic_run::{Spec, noise, write_run};
use crate::common::{f32_bytes, refused, run, write_tensors};
use relora_kit::checkpoint::{Dtype, dtype};
use serde_json::Value;
use std::path::{Path, PathBuf};

const Q: &str = "model.layers.0.self_attn.q_proj.weight";
const UP: &str = "model.layers.0.mlp.up_proj.weight";
const NORM: &str = "model.norm.weight";

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
        vec!["spectrum", "--base", text(&self.base), "--tuned", text(&self.tuned), "--roundings", "1"]
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
    assert!(
        lines
            .next()
            .unwrap()
            .starts_with("name,label,rows,columns,dtype,module,layer,r,cycle,cumulative,spectral_norm,")
    );
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

#[test]
fn the_rank_of_a_run_grows_by_r_with_every_cycle_until_it_is_full() {
    let folder = tempfile::tempdir().unwrap();
    let run = write_run(folder.path(), Spec { cycles: 7, r: 4, ..Spec::default() });
    let result = json(&["spectrum", "--run", text(&run)]);
    let cycles = result["cycles"].as_array().unwrap();
    for (k, cycle) in (1u64..).zip(cycles) {
        assert_eq!(cycle["own_rank"]["median"], 4.0);
        assert_eq!(cycle["sum_of_r"]["median"].as_f64(), Some(4.0 * k as f64));
        let expected = (4 * k).min(24) as f64;
        assert_eq!(cycle["rank_above_noise"]["min"].as_f64(), Some(expected), "{cycle}");
        assert_eq!(cycle["rank_above_noise"]["max"].as_f64(), Some(expected), "{cycle}");
    }
    assert_eq!(cycles.len(), 7);
    let matrices = result["matrices"].as_array().unwrap();
    assert_eq!(matrices.len(), 3 * 7 * 2);
    assert_eq!(result["groups"].as_array().unwrap().len(), 3);
}

/// The factors' sum and the stored checkpoints tell the same story, by two unrelated routes.
#[test]
fn the_sum_of_the_cycles_agrees_with_the_difference_of_the_checkpoints() {
    let folder = tempfile::tempdir().unwrap();
    let run = write_run(folder.path(), Spec::default());
    let (base, tuned) = (run.join("base"), run.join("checkpoints/step-35"));
    let only = ["--sigma", "--filter", "*_proj*"];
    let dense =
        json(&[&["spectrum", "--base", text(&base), "--tuned", text(&tuned), "--roundings", "3"], &only[..]].concat());
    let factored = json(&[&["spectrum", "--run", text(&run)], &only[..]].concat());
    for d in dense["matrices"].as_array().unwrap() {
        let same = |m: &&Value| m["name"] == d["name"] && m["cycle"] == 3 && m["cumulative"] == true;
        let f = factored["matrices"].as_array().unwrap().iter().find(same).unwrap();
        assert_eq!(d["rank_above_noise"], 12);
        assert_eq!((&f["rank_above_noise"], &f["noise_edge"]), (&d["rank_above_noise"], &d["noise_edge"]));
        let values = |m: &Value| m["sigma"].as_array().unwrap().iter().map(|s| s.as_f64().unwrap()).collect::<Vec<_>>();
        let (d, f) = (values(d), values(f));
        assert!(d.iter().zip(&f).all(|(a, b)| (a - b).abs() < 1e-6 * d[0]), "{d:?} {f:?}");
    }
}

#[test]
fn the_gate_of_a_high_rank_update_fails_after_a_single_cycle() {
    let gate = |cycles| {
        let folder = tempfile::tempdir().unwrap();
        let path = write_run(folder.path(), Spec { cycles, ..Spec::default() });
        run(["spectrum", "--run", text(&path), "--require", "rank_above_noise > 2*r for 90%"])
    };
    let (code, stdout, stderr) = gate(3);
    assert_eq!(code, 0, "{stdout}{stderr}");
    let (code, stdout, _) = gate(1);
    assert_eq!(code, 1, "{stdout}");
    assert!(stdout.contains("q_proj.weight has 4 against 8"), "{stdout}");
}

#[test]
fn an_adapter_is_measured_from_its_factors() {
    let folder = tempfile::tempdir().unwrap();
    let run = write_run(folder.path(), Spec::default());
    let result =
        json(&["spectrum", "--adapter", text(&run.join("cycles/cycle-002")), "--require", "numerical_rank == r"]);
    let first = &result["matrices"][0];
    assert_eq!((&first["r"], &first["rank_above_noise"], &first["noise_edge"]), (&4.into(), &4.into(), &0.0.into()));
    assert_eq!(result["sources"][0]["kind"], "adapter");
    assert!(first.get("cycle").is_none());
}

#[test]
fn a_run_without_cycles_and_a_folder_that_is_no_run_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let run = write_run(folder.path(), Spec { cycles: 0, ..Spec::default() });
    refused(["spectrum", "--run", text(&run)], 2, &["no finished cycle"]);
    refused(["spectrum", "--run", text(folder.path())], 2, &["manifest.json"]);
}

#[test]
fn the_page_needs_no_network_and_shows_gates_figures_and_hashes() {
    let folder = tempfile::tempdir().unwrap();
    let path = write_run(folder.path(), Spec::default());
    let page = folder.path().join("page.html");
    let args = ["spectrum", "--run", text(&path), "--report", text(&page), "--require", "rank_above_noise > 2*r"];
    let (code, stdout, stderr) = run(args);
    assert_eq!(code, 0, "{stdout}{stderr}");
    let html = std::fs::read_to_string(&page).unwrap();
    let hash = relora_kit::run::sha256_file(&path.join("manifest.json")).unwrap();
    for part in
        ["rank_above_noise &gt; 2*r", "1 gate held", "Rank over cycles", "down_proj", "prefers-color-scheme", &hash]
    {
        assert!(html.contains(part), "the page lacks '{part}'");
    }
    // Growth, and a histogram and a scree plot per module kind.
    assert_eq!(html.matches("<svg").count(), 1 + 2 * 3);
    for forbidden in ["<script", "<link", "src=", "href=", "url("] {
        assert!(!html.contains(forbidden), "the page holds '{forbidden}'");
    }
    refused(args, 2, &["page.html", "exists already"]);
}

#[test]
fn an_earlier_result_is_compared_with_and_lost_rank_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let three = write_run(&folder.path().join("three"), Spec::default());
    let two = write_run(&folder.path().join("two"), Spec { cycles: 2, ..Spec::default() });
    let before = folder.path().join("before.json");
    let (code, ..) = run(["spectrum", "--run", text(&three), "--format", "json", "-o", text(&before)]);
    assert_eq!(code, 0);
    let args = ["spectrum", "--run", text(&two), "--against", text(&before)];
    let (_, stdout, _) = run([&args[..], &["--format", "markdown"]].concat());
    assert!(
        stdout.contains("12 -&gt; 8") && stdout.contains("q_proj.weight ('run') lost rank: 12 before, 8 now"),
        "{stdout}"
    );
    let result = json(&args);
    assert_eq!(result["against"]["matrices"], 3);
    assert_eq!(result["against"]["changes"][0]["rank_above_noise"], serde_json::json!([12.0, 8.0]));
    refused(
        ["spectrum", "--run", text(&two), "--against", text(&two.join("manifest.json"))],
        2,
        &["is not a spectrum"],
    );
}
