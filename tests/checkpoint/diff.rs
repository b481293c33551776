//! `relora-kit diff`, driven as a user does.

use crate::common::{f32_bytes, refused, run, write_tensors};
use relora_kit::checkpoint::{Dtype, dtype};
use serde_json::Value;
use std::path::{Path, PathBuf};

struct Pair {
    folder: tempfile::TempDir,
}

impl Pair {
    fn new(a: &[(&str, &str, &[usize], Vec<u8>)], b: &[(&str, &str, &[usize], Vec<u8>)]) -> Pair {
        let folder = tempfile::tempdir().unwrap();
        write_tensors(&folder.path().join("a.safetensors"), a);
        write_tensors(&folder.path().join("b.safetensors"), b);
        Pair { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn diff(&self, flags: &[&str]) -> (i32, String) {
        let (a, b) = (self.path("a.safetensors"), self.path("b.safetensors"));
        let mut args = vec!["diff", a.to_str().unwrap(), b.to_str().unwrap()];
        args.extend(flags);
        let (code, stdout, stderr) = run(args);
        assert!(code < 2, "{stderr}");
        (code, stdout)
    }

    fn json(&self, flags: &[&str]) -> (i32, Value) {
        let (code, text) = self.diff(&[flags, &["--format", "json"]].concat());
        (code, serde_json::from_str(&text).unwrap())
    }
}

fn one<'a>(values: &[f32]) -> [(&'static str, &'static str, &'a [usize], Vec<u8>); 1] {
    [("w", "F32", &[2, 2], f32_bytes(values))]
}

#[test]
fn equal_checkpoints_exit_with_0_whatever_their_shards() {
    let fixture = |name: &str| Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name);
    let model = fixture("tiny_llama_bf16");
    let (code, stdout, stderr) = run(["diff".as_ref(), model.as_os_str(), model.as_os_str()]);
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.contains("identical") && stdout.contains("verdict: ") && stdout.contains("are equal"), "{stdout}");
}

#[test]
fn the_measures_are_those_of_the_definitions() {
    let pair = Pair::new(&one(&[1.0, 2.0, 3.0, 4.0]), &one(&[1.0, 2.0, 3.0, 3.0]));
    let (code, report) = pair.json(&[]);
    assert_eq!((code, &report["equal"]), (1, &false.into()));
    let t = &report["tensors"][0];
    assert_eq!((&t["status"], &t["values"]["max_abs"]), (&"different".into(), &1.0.into()));
    assert_eq!(t["values"]["max_abs_at"], serde_json::json!([1, 1]));
    assert_eq!(t["values"]["beyond_tolerance"], 1);
    let near = |key: &str, expected: f64| {
        let found = t["values"][key].as_f64().unwrap();
        assert!((found - expected).abs() < 1e-14, "{key}: {found} and {expected}");
    };
    near("relative_frobenius", 1.0 / 23f64.sqrt());
    near("cosine", 26.0 / (30f64 * 23.0).sqrt());
}

#[test]
fn tolerances_decide_and_are_relative_to_b() {
    let pair = Pair::new(&one(&[1.0, 2.0, 3.0, 4.0]), &one(&[1.0, 2.0, 3.0, 3.0]));
    for (flags, code) in [
        (&["--atol", "1"][..], 0),
        (&["--atol", "0.99"], 1),
        (&["--rtol", "0.34"], 0),
        (&["--rtol", "0.33"], 1),
        (&["--atol", "0.4", "--rtol", "0.2"], 0),
    ] {
        assert_eq!(pair.diff(flags).0, code, "{flags:?}");
    }
    let (_, report) = pair.json(&["--atol", "1"]);
    assert_eq!((&report["tensors"][0]["status"], &report["equal"]), (&"close".into(), &true.into()));
    let (a, b) = (pair.path("a.safetensors"), pair.path("b.safetensors"));
    refused(["diff", a.to_str().unwrap(), b.to_str().unwrap(), "--atol", "nan"], 2, &["--atol NaN"]);
}

#[test]
fn missing_extra_and_reshaped_tensors_are_named() {
    let a = [("both", "F32", &[2usize][..], f32_bytes(&[1.0, 2.0])), ("left", "F32", &[1], f32_bytes(&[1.0]))];
    let b = [("both", "F32", &[2usize, 1][..], f32_bytes(&[1.0, 2.0])), ("right", "F32", &[1], f32_bytes(&[1.0]))];
    let pair = Pair::new(&a, &b);
    let (code, report) = pair.json(&["--atol", "100"]);
    let found: Vec<_> = report["tensors"].as_array().unwrap().iter().map(|t| (&t["name"], &t["status"])).collect();
    let expected =
        [("both", "shape"), ("left", "only_in_a"), ("right", "only_in_b")].map(|(n, s)| (n.into(), s.into()));
    assert_eq!((code, found), (1, expected.iter().map(|(n, s): &(Value, Value)| (n, s)).collect()));
    let (_, table) = pair.diff(&[]);
    assert!(table.contains("2 / 2x1") && table.contains("only in A") && table.contains("are different"), "{table}");
}

#[test]
fn types_are_compared_by_value_and_the_report_says_so() {
    let values: Vec<f32> = (0..5000).map(|i| (i as f32 * 0.61).sin()).collect();
    let bf16 = dtype::encode_f32(Dtype::BF16, &values).unwrap().into_owned();
    let f64s: Vec<u8> = values.iter().flat_map(|v| f64::from(*v).to_le_bytes()).collect();
    let shape = &[50usize, 100][..];
    let f32s = ("w", "F32", shape, f32_bytes(&values));
    let narrow = Pair::new(std::slice::from_ref(&f32s), &[("w", "BF16", shape, bf16)]);
    assert_eq!((narrow.diff(&[]).0, narrow.diff(&["--rtol", "0.004"]).0), (1, 0));
    let wide = Pair::new(&[f32s], &[("w", "F64", shape, f64s)]);
    let (code, table) = wide.diff(&[]);
    assert_eq!(code, 0);
    assert!(
        table.contains("F32 / F64") && table.contains("1 tensor stored in two types, compared by value"),
        "{table}"
    );
}

#[test]
fn values_that_are_not_finite_differ_unless_both_sides_agree() {
    let nan = f32::NAN;
    let same = Pair::new(&one(&[nan, 1.0, f32::INFINITY, 2.0]), &one(&[nan, 1.0, f32::INFINITY, 2.0]));
    assert_eq!(same.diff(&[]).0, 0);
    let one_sided = Pair::new(&one(&[nan, 1.0, 2.0, 2.0]), &one(&[0.0, 1.0, 2.0, 2.0]));
    let (code, report) = one_sided.json(&["--atol", "1e9"]);
    assert_eq!((code, &report["tensors"][0]["values"]["non_finite"]), (1, &1.into()));
}

#[test]
fn integers_are_compared_byte_by_byte() {
    let ids = |last: i64| [1i64, 2, last].iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let pair = Pair::new(&[("ids", "I64", &[3], ids(3))], &[("ids", "I64", &[3], ids(4))]);
    let (code, report) = pair.json(&["--atol", "100"]);
    assert_eq!((code, &report["tensors"][0]["values"]["beyond_tolerance"]), (1, &1.into()));
    let types = Pair::new(&[("ids", "I64", &[3], ids(3))], &[("ids", "F64", &[3], ids(3))]);
    assert_eq!(types.json(&[]).1["tensors"][0]["status"], "dtype");
}

#[test]
fn the_result_does_not_depend_on_the_number_of_threads() {
    let values: Vec<f32> = (0..600_000).map(|i| (i as f32 * 0.37).sin()).collect();
    let moved: Vec<f32> = values.iter().map(|v| v * 1.001).collect();
    let shape = &[600usize, 1000][..];
    let pair = Pair::new(&[("w", "F32", shape, f32_bytes(&values))], &[("w", "F32", shape, f32_bytes(&moved))]);
    assert_eq!(pair.json(&["--threads", "1"]), pair.json(&["--threads", "3"]));
}
