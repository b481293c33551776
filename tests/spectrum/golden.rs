//! Spectra of checkpoint pairs against numpy's f64 SVD of the exact difference.

use crate::common;
use crate::common::fixtures::{assert_close, fixture, json};
use relora_kit::{
    ops::CudaOptions,
    progress::Progress,
    spectrum::{self, Labelled, Options, SourceSpec, measures::METRICS},
};

/// Singular values within 1e-6 of the largest; counts exactly; other measures within 1e-9, or 1e-5 where the smallest
/// singular values, which are rounding themselves, have a say. A Gram matrix, which a GPU takes, leaves zeros of those.
fn spectra_match(base: &str, tuned: &str, expected: &str, gpu: Option<CudaOptions>) {
    let expected = json(&format!("spectra/{expected}.json"));
    let squared = gpu.is_some();
    let options = Options {
        sources: vec![SourceSpec::Checkpoints {
            base: fixture(base),
            tuned: Labelled { label: "tuned".into(), path: fixture(tuned) },
        }],
        filter: vec!["*_proj.weight".into()],
        common_only: true,
        sigma: true,
        roundings: Some(1),
        // On a GPU small matrices, too.
        small: gpu.is_some().then_some(0),
        gpu,
        ..Options::default()
    };
    let found = spectrum::run(&options, &Progress::hidden()).unwrap();
    assert_eq!(found.matrices.len(), expected.as_object().unwrap().len(), "number of matrices");
    for matrix in &found.matrices {
        assert_eq!(matrix.device.as_deref(), squared.then_some("cuda:0"), "{}", matrix.name);
        let expected = &expected[&matrix.name];
        assert_eq!(serde_json::json!(matrix.shape), expected["shape"], "{}", matrix.name);
        let sigma: Vec<f64> = serde_json::from_value(expected["sigma"].clone()).unwrap();
        let name = format!("{}: singular values", matrix.name);
        assert_close(&name, &[sigma.len()], matrix.sigma.as_ref().unwrap(), &sigma, |_| 1e-6 * sigma[0]);
        for metric in METRICS {
            let expected = &expected[metric.name];
            let value = expected.as_f64().unwrap_or_else(|| panic!("no expected {}", metric.name));
            let allowed = match metric.name {
                _ if expected.is_u64() => 0.0,
                "condition_number" if squared => continue,
                // They give the smallest values more weight.
                "effective_rank" | "proportional_effective_rank" if squared => 1e-4 * value,
                "nuclear_norm" if squared => 1e-5 * value,
                _ if squared => 1e-6 * value,
                // A ratio to the smallest singular value, which is known to 1e-6 of the largest at best.
                "condition_number" => 1e-3 * value,
                _ => 1e-9 * value,
            };
            let found = matrix.measures.get(metric).unwrap_or(f64::NAN);
            assert_close(&format!("{}: {}", matrix.name, metric.name), &[1], &[found], &[value], |_| allowed);
        }
    }
}

#[test]
fn three_merged_cycles_in_f32_have_rank_12() {
    spectra_match("tiny_llama", "relora", "relora_f32", None);
}

#[test]
fn a_merge_into_bf16_shows_rank_4_above_the_noise() {
    spectra_match("tiny_llama_bf16", "merged/tiny_adapter_bf16.safetensors", "merged_bf16", None);
}

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
#[test]
fn a_gpu_finds_the_same() {
    let gpu = Some(common::cuda_emulator::options());
    spectra_match("tiny_llama", "relora", "relora_f32", gpu.clone());
    spectra_match("tiny_llama_bf16", "merged/tiny_adapter_bf16.safetensors", "merged_bf16", gpu);
}
