//! `config.toml` against the manifest: what was to be done is what was done.

use super::{Findings, Mismatch};
use crate::{
    inputs,
    run::{Manifest, RunDir},
};

/// Bytes of the largest configuration that is read.
const MAX_BYTES: u64 = 10_000_000;

/// Mode, seed, steps, rank and rounding are those of the run's configuration.
pub(super) fn check(dir: &RunDir, manifest: &Manifest, findings: &mut Findings) {
    let what = "config.toml";
    let text = inputs::read(&dir.config_path(), MAX_BYTES).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    let table: toml::Table = match text.map(|text| toml::from_str(&text)) {
        Ok(Ok(table)) => table,
        Ok(Err(_)) => return findings.mismatches.push(Mismatch::new(what, "it is not valid TOML")),
        Err(e) => return findings.mismatches.push(Mismatch::new(what, e.message)),
    };
    let get = |section: &str, key: &str| table.get(section).and_then(|s| s.get(key));
    let text = |section, key| get(section, key).and_then(toml::Value::as_str);
    let number = |section, key| get(section, key).and_then(toml::Value::as_integer);
    let mut expect = |key: &str, configured: Option<String>, claimed: String| {
        let shown = configured.as_deref().unwrap_or("nothing");
        findings.expect(configured.as_ref() == Some(&claimed), what, || {
            format!("{key} is {shown}, the manifest says {claimed}")
        });
    };
    expect("train.mode", text("train", "mode").map(str::to_owned), manifest.mode.clone());
    expect("train.seed", Some(number("train", "seed").unwrap_or(0).to_string()), manifest.seed.to_string());
    if let Some(checkpoint) = manifest.checkpoint.as_ref().filter(|_| manifest.finished) {
        let steps = number("train", "num_training_steps").map(|n| n.to_string());
        expect("train.num_training_steps", steps, checkpoint.step.to_string());
    }
    for cycle in &manifest.cycles {
        expect("relora.lora_r", number("relora", "lora_r").map(|n| n.to_string()), cycle.r.to_string());
    }
    // Both widen what rounding explains.
    let stochastic = text("train", "rounding") == Some("stochastic");
    let rounds = text("train", "dtype") == Some("bf16") || text("train", "mixed_precision") == Some("bf16");
    let quantised = match get("relora", "quantize") {
        None => None,
        Some(value) if value.as_str() == Some("4bit") || value.as_integer() == Some(4) => Some("nf4"),
        Some(_) => Some("int8"),
    };
    expect(
        "the rounding of merged weights",
        Some(rounding(stochastic && (rounds || quantised.is_some()), quantised)),
        rounding(manifest.stochastic_rounding, manifest.quantised.as_deref()),
    );
}

fn rounding(stochastic: bool, quantised: Option<&str>) -> String {
    let how = if stochastic { "stochastic" } else { "to nearest" };
    quantised.map_or(how.to_owned(), |storage| format!("{how}, {storage}"))
}
