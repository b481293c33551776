//! Weights that are stored encoded, decoded bit for bit as the packages that define their formats do.

use crate::common;

use relora_kit::checkpoint::{Checkpoint, encodings};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::{
    fs,
    path::{Path, PathBuf},
};

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// The plain form of every encoded weight in `folder`, by name; each is decoded whole and in uneven blocks of rows.
fn decoded(folder: &Path) -> Vec<(String, Vec<usize>, Vec<f32>)> {
    let base = Checkpoint::open(folder).unwrap();
    let declared = encodings::declared(&json(&folder.join("config.json"))).expect("no encoding is declared");
    let weights = encodings::find(&base, &declared).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let decode = |weight: &encodings::EncodedWeight| {
        let (rows, columns) = weight.matrix_shape();
        let decoder = weight.decoder().unwrap();
        let mut whole = vec![f32::NAN; rows * columns];
        decoder(0..rows, &mut whole);
        let mut blocks = vec![f32::NAN; rows * columns];
        let (mut first, mut step) = (0, 1);
        while first < rows {
            let end = rows.min(first + step);
            decoder(first..end, &mut blocks[first * columns..end * columns]);
            (first, step) = (end, step + 2);
        }
        let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&whole), bits(&blocks), "{} depends on the block of rows", weight.name);
        (weight.name.clone(), weight.shape.clone(), whole)
    };
    weights.iter().map(decode).collect()
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/encodings")
}

#[test]
fn every_encoding_is_decoded_bit_for_bit() {
    let mut folders: Vec<_> = fs::read_dir(fixtures()).unwrap().map(|e| e.unwrap().path()).collect();
    folders.sort();
    assert!(folders.len() >= 16, "{folders:?}");
    for folder in folders {
        let plain = Checkpoint::open(&folder.join("plain.safetensors")).unwrap();
        let found = decoded(&folder);
        assert_eq!(found.len(), plain.len(), "{}", folder.display());
        for (name, shape, values) in found {
            let expected = plain.tensor(&name).unwrap();
            assert_eq!(shape, expected.shape(), "{}: {name}", folder.display());
            let expected = expected.to_f32().unwrap();
            for (i, (ours, theirs)) in values.iter().zip(expected.iter()).enumerate() {
                assert!(
                    ours.to_bits() == theirs.to_bits(),
                    "{}: {name}[{i}]: {ours} instead of {theirs}",
                    folder.display()
                );
            }
        }
    }
}

#[test]
fn what_cannot_be_decoded_is_refused_by_name() {
    let copy = |fixture: &str, change: &dyn Fn(&mut Value)| {
        let dir = tempfile::tempdir().unwrap();
        fs::copy(fixtures().join(fixture).join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
        let mut config = json(&fixtures().join(fixture).join("config.json"));
        change(&mut config);
        fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let base = Checkpoint::open(dir.path()).unwrap();
        let error = encodings::find(&base, &encodings::declared(&config).unwrap()).err().map(|e| e.message);
        error.unwrap_or_else(|| panic!("{fixture} was taken"))
    };
    for (fixture, key, value, parts) in [
        ("fp8_blocks", "quant_method", Value::from("quip"), &["quant_method 'quip'"][..]),
        ("fp8_blocks", "weight_block_size", serde_json::json!([4, 4]), &["a.weight_scale_inv", "[2, 3]", "[2, 2]"]),
        ("gptq", "bits", Value::from(3), &["a.qweight", "3 bits"]),
        ("gptq", "bits", Value::from(8), &["a.qzeros", "[2, 4]"]),
        ("gptq", "checkpoint_format", Value::from("marlin"), &["'marlin'"]),
        ("awq", "version", Value::from("gemv"), &["'gemv'"]),
        ("compressed_tensors_4bit", "format", Value::from("marlin-24"), &["'marlin-24'"]),
    ] {
        let message = copy(fixture, &|config| config["quantization_config"][key] = value.clone());
        for part in parts {
            assert!(message.contains(part), "expected '{part}' in: {message}");
        }
    }
    let message = copy("mlx", &|config| config["quantization"]["bits"] = 8.into());
    assert!(message.contains("a.weight") && message.contains("8 bits"), "{message}");
}

#[test]
fn oracle_quantised_bases_are_decoded_to_the_bits_of_their_formats() {
    let Some(oracles) = common::oracles() else { return };
    let cases = oracles.join("adapters/e_quant");
    let mut compared = 0;
    for case in fs::read_dir(&cases).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_dir()) {
        let expected = json(&case.join("expected.json"));
        let Some(tensors) = expected["tensors"].as_object() else { continue };
        if !tensors.values().any(|t| t["dequantised_f32"].is_object()) {
            continue;
        }
        let found = decoded(&case.join(expected["base"].as_str().unwrap()));
        for (name, expected) in tensors.iter().filter(|(_, t)| t["dequantised_f32"].is_object()) {
            let (_, shape, values) =
                found.iter().find(|(n, ..)| n == name).unwrap_or_else(|| panic!("{name} is missing"));
            let expected = &expected["dequantised_f32"];
            assert_eq!(&serde_json::json!(shape), &expected["shape"], "{}: {name}", case.display());
            let digest = Sha256::digest(bytemuck::cast_slice::<f32, u8>(values));
            let digest: String = digest.iter().map(|b| format!("{b:02x}")).collect();
            assert_eq!(digest, expected["sha256"].as_str().unwrap(), "{}: {name}", case.display());
            compared += 1;
        }
    }
    assert!(compared >= 50, "only {compared} tensors were compared");
}
