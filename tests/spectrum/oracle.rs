//! Singular values and measures against NumPy's float64 SVD (reference values outside this repository).

use crate::common;
use relora_kit::{
    ops::CudaOptions,
    progress::Progress,
    spectrum::{
        self, Labelled, Matrix, Options, SourceSpec, Spectrum,
        measures::{METRICS, Metric},
    },
};
use serde_json::Value;
use std::path::Path;

/// Our key -> theirs. `numerical_rank` and the energy ranks are compared on their own, with the margins given.
const SAME: [(&str, &str); 8] = [
    ("spectral_norm", "spectral_norm"),
    ("frobenius_norm", "frobenius_norm"),
    ("nuclear_norm", "nuclear_norm"),
    ("effective_rank", "effective_rank"),
    ("stable_rank", "stable_rank"),
    ("participation_ratio", "participation_ratio"),
    ("below_0_1", "count_below_0.1"),
    ("numerical_rank", "numerical_rank"),
];

/// The CPU, and on the CUDA emulator a GPU.
type On = Option<CudaOptions>;

/// On a GPU everything goes by the Gram matrix, small matrices, too.
fn options(on: &On) -> Options {
    Options { sigma: true, gpu: on.clone(), small: on.is_some().then_some(0), ..Options::default() }
}

fn measure(on: &On, folder: &Path, expected: &Value, roundings: u64) -> Spectrum {
    let side = |key: &str| folder.join(expected[key].as_str().map_or(format!("{key}.safetensors"), str::to_owned));
    let tuned = Labelled { label: "x".into(), path: side("wn") };
    let source = SourceSpec::Checkpoints { base: side("w0"), tuned };
    let options = Options { sources: vec![source], skip_nonfinite: true, roundings: Some(roundings), ..options(on) };
    spectrum::run(&options, &Progress::hidden()).unwrap()
}

/// Relative to a measure. A Gram matrix leaves zeros of values below 3e-7 of the largest, which some measures notice.
fn allowed(metric: &str, on: &On) -> f64 {
    match metric {
        "effective_rank" | "proportional_effective_rank" if on.is_some() => 1e-4,
        "nuclear_norm" if on.is_some() => 1e-5,
        _ => 1e-6,
    }
}

fn compare(on: &On, case: &str, name: &str, ours: &Matrix, theirs: &Value) {
    let place = format!("{case} {name}");
    let sigma: Vec<f64> = theirs["singular_values"].as_array().unwrap().iter().map(|s| s.as_f64().unwrap()).collect();
    let found = ours.sigma.as_ref().unwrap();
    assert_eq!(found.len(), sigma.len(), "{place}");
    let s1 = sigma.first().copied().unwrap_or(0.0);
    for (i, (a, b)) in found.iter().zip(&sigma).enumerate() {
        assert!((a - b).abs() <= 1e-6 * s1, "{place}: s{i} is {a}, expected {b}");
    }
    for (key, their_key) in SAME {
        let metric = ours.measures.get(Metric::find(key).unwrap());
        match (metric, theirs[their_key].as_f64()) {
            (Some(a), Some(b)) => {
                assert!((a - b).abs() <= allowed(key, on) * b.abs(), "{place}: {key} is {a}, expected {b}")
            }
            (a, b) => assert_eq!(a, b, "{place}: {key}"),
        }
    }
    for (rank, key) in [(ours.measures.energy_rank_90, "0.90"), (ours.measures.energy_rank_99, "0.99")] {
        if theirs[format!("energy_margin_{key}")].as_f64().is_none_or(|margin| margin > 1e-9) {
            assert_eq!(Some(rank as u64), theirs[format!("energy_rank_{key}")].as_u64(), "{place}: energy {key}");
        }
    }
    // The smallest value of a rank-deficient matrix is rounding; where it is not, the condition number is sharp.
    let sharp = if on.is_some() { 1e4 } else { 1e6 };
    if theirs["condition_number"].as_f64().is_some_and(|c| c < sharp) {
        let (a, b) = (ours.measures.condition_number.unwrap(), theirs["condition_number"].as_f64().unwrap());
        assert!((a - b).abs() <= 1e-6 * b, "{place}: condition_number is {a}, expected {b}");
    }
}

#[test]
fn every_case_agrees_with_numpy() {
    agree_with_numpy(&None);
}

fn agree_with_numpy(on: &On) {
    let Some(oracles) = common::oracles() else { return };
    let mut compared = 0;
    for entry in std::fs::read_dir(oracles.join("spectrum")).unwrap() {
        let folder = entry.unwrap().path();
        let Ok(text) = std::fs::read(folder.join("expected.json")) else { continue };
        let expected: Value = serde_json::from_slice(&text).unwrap();
        let spectrum = measure(on, &folder, &expected, 1);
        let case = folder.file_name().unwrap().to_string_lossy().into_owned();
        for (name, theirs) in expected["tensors"].as_object().unwrap() {
            let ours = spectrum.matrices.iter().find(|m| m.name == *name);
            if theirs["not_a_matrix"] == true || theirs["non_finite_elements"].as_u64().is_some_and(|n| n > 0) {
                assert!(ours.is_none(), "{case} {name} should have been skipped");
                assert!(spectrum.skipped.iter().any(|s| s.name == *name), "{case} {name} is not listed");
                continue;
            }
            let device = ours.and_then(|m| m.device.as_deref());
            // Squares do not resolve the tolerance of the smallest matrix, nor 0.1 beside large values: the SVD is taken.
            let needs_svd = ["one", "large_values"].contains(&name.as_str());
            let expected = on.as_ref().map(|_| if needs_svd { "cpu" } else { "cuda:0" });
            assert_eq!(device, expected, "{case} {name}");
            compare(on, &case, name, ours.unwrap_or_else(|| panic!("{case} {name} is missing")), theirs);
            compared += 1;
        }
    }
    assert!(compared > 20, "only {compared} matrices were compared");
}

/// Stored in bf16, a sum of six rank-4 updates has numerical rank 96; above the rounding noise it has rank 24.
#[test]
fn rounding_does_not_pass_for_rank() {
    rank_is_above_the_noise(&None);
}

fn rank_is_above_the_noise(on: &On) {
    let Some(oracles) = common::oracles() else { return };
    let cases = [("bf16", 1), ("f16", 1), ("f32", 1), ("f32_seq", 6), ("f16_seq", 6)];
    for (case, roundings) in cases.map(|(c, roundings)| (format!("sum6_rank4_{c}"), roundings)) {
        let folder = oracles.join("spectrum").join(&case);
        let expected = serde_json::from_slice(&std::fs::read(folder.join("expected.json")).unwrap()).unwrap();
        let spectrum = measure(on, &folder, &expected, roundings);
        assert_eq!(spectrum.matrices[0].measures.rank_above_noise, 24, "{case}");
    }
}

/// The project's own fixtures: every measure and value by NumPy, in every clone.
#[test]
fn the_fixtures_agree_with_numpy() {
    fixtures_agree_with_numpy(&None);
}

fn fixtures_agree_with_numpy(on: &On) {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
    for (expected, base, tuned, roundings) in [
        ("relora_f32", "tiny_llama", "relora/model.safetensors", 1),
        ("merged_bf16", "tiny_llama_bf16", "merged/tiny_adapter_bf16.safetensors", 1),
    ] {
        let text = std::fs::read(fixtures.join(format!("spectra/{expected}.json"))).unwrap();
        let expected: Value = serde_json::from_slice(&text).unwrap();
        let tuned = Labelled { label: "x".into(), path: fixtures.join(tuned) };
        let source = SourceSpec::Checkpoints { base: fixtures.join(base), tuned };
        let options = Options { sources: vec![source], common_only: true, roundings: Some(roundings), ..options(on) };
        let spectrum = spectrum::run(&options, &Progress::hidden()).unwrap();
        for (name, theirs) in expected.as_object().unwrap() {
            let ours = spectrum.matrices.iter().find(|m| m.name == *name).unwrap();
            let sigma = theirs["sigma"].as_array().unwrap();
            let s1 = ours.measures.spectral_norm;
            assert_eq!(ours.sigma.as_ref().unwrap().len(), sigma.len());
            for (a, b) in ours.sigma.as_ref().unwrap().iter().zip(sigma) {
                assert!((a - b.as_f64().unwrap()).abs() <= 1e-6 * s1, "{name}: {a} {b}");
            }
            for metric in METRICS.iter().filter(|m| m.name != "condition_number") {
                let (a, b) = (ours.measures.get(metric).unwrap(), theirs[metric.name].as_f64().unwrap());
                let allowed = allowed(metric.name, on) * b.abs();
                assert!((a - b).abs() <= allowed, "{name}: {} is {a}, expected {b}", metric.name);
            }
        }
    }
}

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
#[test]
fn a_gpu_agrees_with_numpy() {
    let on = Some(common::cuda_emulator::options());
    agree_with_numpy(&on);
    rank_is_above_the_noise(&on);
    fixtures_agree_with_numpy(&on);
}
