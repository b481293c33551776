//! How a GGUF file says that rotary angles are stretched, and how `config.json` says it.
//!
//! The keys of yarn are read as llama.cpp's converter writes them from a `config.json` (`conversion/base.py`):
//! `yarn_attn_factor` is `attention_factor`, `yarn_beta_fast` and `yarn_beta_slow` have their own names there.

use super::reader::Gguf;
use crate::error::Result;
use serde_json::{Value, json};
use std::f64::consts::TAU;

/// Llama 3.1 and its successors stretch with one divisor per frequency, which GGUF stores as a tensor.
pub const FACTORS: &str = "rope_freqs.weight";

/// What these models share, and the file does not say: `low_freq_factor`, `high_freq_factor`, and the context before.
const LLAMA3: (f64, f64, f64) = (1.0, 4.0, 8192.0);

/// The value of `rope_scaling`: null, or an object with `rope_type`.
pub fn scaling(file: &Gguf, architecture: &str, theta: f64, head_dim: usize) -> Result<Value> {
    let key = |name: &str| format!("{architecture}.rope.{name}");
    let kind = file.text(&key("scaling.type"))?.unwrap_or("none");
    let factor = file.number(&key("scaling.factor"))?.or(file.number(&key("scale_linear"))?);
    let other = || {
        file.bad(format!("{} is '{kind}' with factor {factor:?}", key("scaling.type")))
            .help("supported: none, linear, yarn with a factor, and the factors of Llama 3.1 in a tensor")
    };
    let settings = ["yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow", "yarn_ext_factor"]
        .map(|name| (name, file.number(&key(&format!("scaling.{name}")))));
    let tensor = file.tensors.iter().find(|t| t.name == FACTORS);
    let scaling = match (tensor, kind, factor) {
        (Some(tensor), "none", None | Some(1.0)) => {
            if tensor.elements() != head_dim / 2 {
                return Err(file.bad(format!("'{FACTORS}' has shape {:?}, expected [{}]", tensor.shape, head_dim / 2)));
            }
            llama3(file, &file.values(tensor)?, theta)?
        }
        // Both would apply.
        (Some(_), ..) => return Err(other()),
        (None, "none", None) | (None, "none" | "linear", Some(1.0)) => Value::Null,
        (None, "none" | "linear", Some(factor)) => json!({"rope_type": "linear", "factor": factor}),
        (None, "yarn", Some(factor)) => {
            // Without the key the context is the one before the stretching, for llama.cpp and for transformers.
            let original = file.count(&key("scaling.original_context_length"))?;
            let original = original.map_or_else(|| file.size(&format!("{architecture}.context_length")), Ok)?;
            json!({"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original})
        }
        (None, ..) => return Err(other()),
    };
    yarn_settings(file, &key("scaling."), settings, scaling)
}

/// Adds the settings of yarn that the file has. Beside another scaling they must be what changes nothing.
fn yarn_settings(
    file: &Gguf,
    prefix: &str,
    settings: [(&str, Result<Option<f64>>); 4],
    mut scaling: Value,
) -> Result<Value> {
    let yarn = scaling["rope_type"] == "yarn";
    for (name, value) in settings {
        let Some(value) = value? else { continue };
        let target = match name {
            "yarn_attn_factor" => "attention_factor",
            "yarn_beta_fast" => "beta_fast",
            "yarn_beta_slow" => "beta_slow",
            // How much of yarn is used: all (1) or what the kind of scaling says (negative). transformers has all or none.
            _ if value < 0.0 || value == f64::from(u8::from(yarn)) => continue,
            _ => "",
        };
        // llama.cpp reads the two betas only where it extrapolates.
        if !yarn && target.starts_with("beta") || !yarn && target == "attention_factor" && value == 1.0 {
            continue;
        }
        if !yarn || target.is_empty() || value <= 0.0 {
            return Err(file
                .bad(format!("the setting {prefix}{name} is {value} beside the scaling {scaling}"))
                .help("config.json cannot express this; convert a file with another rotary scaling"));
        }
        scaling[target] = value.into();
    }
    Ok(scaling)
}

/// The llama3 scaling that has these divisors. They are recomputed and compared: nothing is guessed.
fn llama3(file: &Gguf, divisors: &[f32], theta: f64) -> Result<Value> {
    let (low, high, original) = LLAMA3;
    let factor = divisors.iter().copied().fold(1.0, f32::max);
    let d = 2.0 * divisors.len() as f64;
    for (i, &found) in divisors.iter().enumerate() {
        let frequency = theta.powf(-2.0 * i as f64 / d);
        let turns = original * frequency / TAU;
        let keep = ((turns - low) / (high - low)).clamp(0.0, 1.0);
        let expected = 1.0 / (keep + (1.0 - keep) / f64::from(factor));
        let difference = (f64::from(found) / expected - 1.0).abs();
        if difference.is_nan() || difference > 1e-3 {
            return Err(file.bad(format!(
                "'{FACTORS}' divides frequency {i} by {found}, which is no llama3 scaling by {factor} (expected {expected:.6})"
            )));
        }
    }
    Ok(json!({
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original as u64,
    }))
}

#[cfg(test)]
mod tests {
    use super::{super::reader::Value as Stored, *};
    use std::path::Path;

    fn scaled(keys: &[(&str, Stored)]) -> Result<Value> {
        let mut file = Gguf::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/gguf/types.gguf")).unwrap();
        for (key, value) in keys {
            file.metadata.insert(format!("llama.rope.{key}"), value.clone());
        }
        file.metadata.insert("llama.context_length".into(), Stored::Int(64));
        scaling(&file, "llama", 1e4, 16)
    }

    fn text(text: &str) -> Stored {
        Stored::Text(text.into())
    }

    #[test]
    fn the_settings_of_yarn_are_carried_over() {
        let yarn = [("scaling.type", text("yarn")), ("scaling.factor", Stored::Float(4.0))];
        let with = |more: &[(&str, Stored)]| scaled(&[&yarn, more].concat());
        let plain = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64});
        assert_eq!(with(&[]).unwrap(), plain);
        for (key, target) in
            [("yarn_attn_factor", "attention_factor"), ("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")]
        {
            let mut expected = plain.clone();
            expected[target] = 0.5.into();
            assert_eq!(with(&[(&format!("scaling.{key}"), Stored::Float(0.5))]).unwrap(), expected);
        }
        let original = with(&[("scaling.original_context_length", Stored::Int(16))]).unwrap();
        assert_eq!(original["original_max_position_embeddings"], 16);
        for value in [1.0, -1.0] {
            assert_eq!(with(&[("scaling.yarn_ext_factor", Stored::Float(value))]).unwrap(), plain);
        }
        for (key, value) in [("yarn_ext_factor", 0.5), ("yarn_ext_factor", 0.0), ("yarn_attn_factor", 0.0)] {
            let error = with(&[(&format!("scaling.{key}"), Stored::Float(value))]).unwrap_err();
            assert!(error.message.contains(&format!("llama.rope.scaling.{key} is {value}")), "{error}");
        }
    }

    #[test]
    fn settings_of_yarn_without_yarn_are_refused_or_change_nothing() {
        let linear = [("scaling.type", text("linear")), ("scaling.factor", Stored::Float(2.0))];
        let plain = json!({"rope_type": "linear", "factor": 2.0});
        for (key, value) in [("yarn_beta_fast", 8.0), ("yarn_attn_factor", 1.0), ("yarn_ext_factor", 0.0)] {
            let key = format!("scaling.{key}");
            let keys = [&linear[..], &[(&*key, Stored::Float(value))]].concat();
            assert_eq!(scaled(&keys).unwrap(), plain, "{key}");
        }
        for (key, value) in [("yarn_attn_factor", 0.5), ("yarn_ext_factor", 1.0)] {
            let key = format!("scaling.{key}");
            let keys = [&linear[..], &[(&*key, Stored::Float(value))]].concat();
            assert!(scaled(&keys).is_err(), "{key}");
            assert!(scaled(&keys[2..]).is_err(), "{key}");
        }
        assert!(scaled(&[("scaling.type", text("longrope"))]).is_err());
    }
}
