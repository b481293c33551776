//! Adapters of every type, compared with merges in f64 of the same files.
//!
//! `fixtures/adapter_types` holds one small adapter per type with what PEFT makes of it; the reference data, where there are any, many more.

use crate::common;
use relora_kit::{
    checkpoint::{Checkpoint, Dtype, dtype},
    error::Result,
    merge::{self, MAX_SHARD_SIZE, Options, Rounding},
    progress::Progress,
};
use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
};

fn merged(base: &Path, adapters: &[PathBuf]) -> (tempfile::TempDir, Result<Checkpoint>) {
    let dir = tempfile::tempdir().unwrap();
    let options = Options {
        map: Vec::new(),
        base: base.to_owned(),
        adapters: adapters.iter().map(|path| (path.clone(), 1.0)).collect(),
        output: dir.path().join("out"),
        dtype: None,
        rounding: Rounding::Nearest,
        max_shard_size: MAX_SHARD_SIZE,
        force: false,
        dry_run: false,
        gpu: None,
    };
    let model = merge::run(&options, &Progress::hidden()).and_then(|_| Checkpoint::open(&options.output));
    (dir, model)
}

fn values(checkpoint: &Checkpoint, name: &str) -> Vec<f64> {
    let tensor = checkpoint.tensor(name).unwrap();
    let mut values = vec![0.0; tensor.elements()];
    tensor.read_f64(0, &mut values).unwrap();
    values
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// Every tensor of `expected` is within `units` of the stored type's spacing at its largest value, and all others are the base's.
fn compare(case: &str, base: &Checkpoint, ours: &Checkpoint, names: &[(String, Dtype, f64)], exact: &[&Checkpoint]) {
    for (name, dtype, units) in names {
        let expected = exact.iter().find(|file| file.get(name).is_some()).unwrap();
        let expected = values(expected, name);
        let largest = expected.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
        let limit = units * dtype::ulp(*dtype, largest);
        let found = values(ours, name);
        assert_eq!(found.len(), expected.len(), "{case}: '{name}'");
        for (i, (x, y)) in found.iter().zip(&expected).enumerate() {
            assert!((x - y).abs() <= limit, "{case}: '{name}' at {i}: {x}, expected {y}, limit {limit:e}");
        }
    }
    for tensor in ours.tensors().filter(|t| names.iter().all(|(name, ..)| name != t.name())) {
        assert_eq!(tensor.bytes(), base.tensor(tensor.name()).unwrap().bytes(), "{case}: '{}' changed", tensor.name());
    }
}

/// What is refused although PEFT merges it, and the word of the reason.
const REFUSED: &[(&str, &str)] = &[
    ("adamss", "clustering"),
    ("frod", "FROD"),
    ("glora_bias", "product with the weight"),
    ("psoft", "signs"),
    ("tinylora", "TINYLORA"),
    ("unilora_no_indices", "NumPy"),
    ("waveft", "WAVEFT"),
    ("waveft_coif1", "WAVEFT"),
    ("waveft_db2", "WAVEFT"),
    ("waveft_direct", "WAVEFT"),
    ("waveft_sym4", "WAVEFT"),
];

#[test]
fn every_type_of_the_reference_is_merged_within_its_tolerance_or_refused() {
    let Some(oracles) = common::oracles() else { return };
    let part = oracles.join("adapters/a_peft");
    let mut cases = common::entries(&part);
    cases.retain(|case| part.join(case).join("expected.json").exists());
    assert!(cases.len() >= 100, "{} cases", cases.len());
    for case in &cases {
        let folder = part.join(case);
        let expected = json(&folder.join("expected.json"));
        let adapters: Vec<PathBuf> = match expected["adapters_in_order"].as_array() {
            Some(names) => names.iter().map(|name| folder.join(name.as_str().unwrap())).collect(),
            None => vec![folder.join("adapter")],
        };
        let mut base = folder.join(expected["base"].as_str().unwrap());
        if !base.exists() {
            base = oracles.join("merge_tiny/bases").join(base.file_name().unwrap());
        }
        let (_dir, ours) = merged(&base, &adapters);
        if let Some((_, word)) = REFUSED.iter().find(|(name, _)| name == case) {
            let error = ours.err().unwrap_or_else(|| panic!("{case} is merged: take it off the list"));
            assert!(error.message.contains(word), "{case}: {error}");
            continue;
        }
        let ours = ours.unwrap_or_else(|e| panic!("{case}: {e}"));
        let names = expected["tensors"].as_object().unwrap().iter().map(|(name, tensor)| {
            let dtype = if tensor["dtype"] == "BF16" { Dtype::BF16 } else { Dtype::F32 };
            (name.clone(), dtype, tensor["tolerance_ulp"].as_f64().unwrap())
        });
        let names: Vec<_> = names.collect();
        let files = ["exact.safetensors", "merged.safetensors"].map(|name| folder.join(name));
        let files: Vec<_> =
            files.iter().filter(|file| file.exists()).map(|file| Checkpoint::open(file).unwrap()).collect();
        compare(case, &Checkpoint::open(&base).unwrap(), &ours, &names, &files.iter().collect::<Vec<_>>());
    }
}

#[test]
fn what_has_no_merged_form_is_refused_by_name() {
    let Some(oracles) = common::oracles() else { return };
    let part = oracles.join("adapters/a_refuse");
    for case in common::entries(&part).iter().filter(|case| part.join(case).join("expected.json").exists()) {
        let folder = part.join(case);
        let mut base = folder.join(json(&folder.join("expected.json"))["base"].as_str().unwrap());
        if !base.exists() {
            base = oracles.join("merge_tiny/bases").join(base.file_name().unwrap());
        }
        let (dir, ours) = merged(&base, &[folder.join("adapter")]);
        let error = ours.err().unwrap_or_else(|| panic!("{case} is merged"));
        assert!(error.message.contains("cannot be merged"), "{case}: {error}");
        assert!(!dir.path().join("out").exists(), "{case}");
    }
}

/// One adapter per type, made by `tools/make_adapter_fixtures.py`.
#[test]
fn every_type_has_a_fixture_and_merges_as_peft_does() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/adapter_types");
    let base = root.join("base");
    let mut kinds = Vec::new();
    for case in common::entries(&root).into_iter().filter(|name| name != "base") {
        let folder = root.join(&case);
        kinds.push(json(&folder.join("adapter_config.json"))["peft_type"].as_str().unwrap().to_owned());
        let (_dir, ours) = merged(&base, std::slice::from_ref(&folder));
        let ours = ours.unwrap_or_else(|e| panic!("{case}: {e}"));
        let peft = Checkpoint::open(&folder.join("merged.safetensors")).unwrap();
        let names: Vec<_> = peft.tensors().map(|t| (t.name().to_owned(), t.dtype(), 12.0)).collect();
        assert!(names.iter().any(|(name, ..)| {
            Checkpoint::open(&base)
                .unwrap()
                .get(name)
                .is_none_or(|before| before.bytes() != peft.tensor(name).unwrap().bytes())
        }));
        compare(&case, &Checkpoint::open(&base).unwrap(), &ours, &names, &[&peft]);
    }
    let missing: Vec<_> = relora_kit::adapter::types::ids().filter(|id| !kinds.iter().any(|kind| kind == id)).collect();
    // Bone is MiSS under an older name, which PEFT no longer writes.
    assert_eq!(missing, ["BONE"], "types without a fixture");
}
