//! How a GGUF file says that rotary angles are stretched, and how `config.json` says it.

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
    if let Some(tensor) = file.tensors.iter().find(|t| t.name == FACTORS) {
        if tensor.elements() != head_dim / 2 {
            return Err(file.bad(format!("'{FACTORS}' has shape {:?}, expected [{}]", tensor.shape, head_dim / 2)));
        }
        return llama3(file, &file.values(tensor)?, theta);
    }
    let kind = file.text(&key("scaling.type"))?.unwrap_or("none");
    let factor = file.number(&key("scaling.factor"))?.or(file.number(&key("scale_linear"))?);
    Ok(match (kind, factor) {
        ("none", None) | ("none" | "linear", Some(1.0)) => Value::Null,
        ("none" | "linear", Some(factor)) => json!({"rope_type": "linear", "factor": factor}),
        ("yarn", Some(factor)) => {
            let original = file.count(&key("scaling.original_context_length"))?;
            json!({"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original})
        }
        (other, factor) => {
            return Err(file
                .bad(format!("{} is '{other}' with factor {factor:?}", key("scaling.type")))
                .help("supported: none, linear, yarn with a factor, and the factors of Llama 3.1 in a tensor"));
        }
    })
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
