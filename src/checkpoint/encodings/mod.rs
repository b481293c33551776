//! Weights that are stored encoded: packed or narrow values beside scales, as quantisation leaves them.
//!
//! Each encoding is one file with a `find` function, registered in `ENCODINGS`. It recognises its tensors from
//! `quantization_config` and from their names and shapes, checks them, and decodes rows of the plain weight in f32
//! arithmetic, which is what defines each format. Nothing is decoded before rows are read.

mod awq;
mod bitsandbytes;
mod compressed_tensors;
mod fp8;
mod gptq;
mod mlx;
mod mxfp4;
mod packed;
mod stored;

pub use stored::{Decode, EncodedWeight, owned};

use super::{Checkpoint, Dtype, Tensor};
use crate::error::{Error, Result};
use serde_json::Value;
use std::collections::HashMap;
use stored::Stored;

/// One encoding.
struct Encoding {
    /// `quant_method` of `config.json`, or what stands for it.
    id: &'static str,
    /// Finds the encoded weights of a checkpoint whose configuration names this encoding.
    find: for<'a> fn(&Stored<'a>) -> Result<Vec<EncodedWeight<'a>>>,
}

/// Every encoding that can be decoded.
const ENCODINGS: &[Encoding] = &[
    Encoding { id: "fp8", find: fp8::find_blocks },
    Encoding { id: "fbgemm_fp8", find: fp8::find_rows },
    Encoding { id: "bitsandbytes", find: bitsandbytes::find },
    Encoding { id: "gptq", find: gptq::find },
    Encoding { id: "awq", find: awq::find },
    Encoding { id: "compressed-tensors", find: compressed_tensors::find },
    Encoding { id: "mxfp4", find: mxfp4::find },
    Encoding { id: "mlx", find: mlx::find },
];

/// How a checkpoint says that its weights are encoded.
#[derive(Clone, Debug, PartialEq)]
pub struct Declared {
    /// `quant_method`: `fp8`, `bitsandbytes`, `gptq`, ...; `mlx` for what mlx-lm writes.
    pub method: String,
    /// The configuration's key: `quantization_config`, or `quantization`.
    pub key: &'static str,
    settings: Value,
}

/// The encoding that `config` (a model's `config.json`) declares, if any; composite models may declare it in `text_config`.
pub fn declared(config: &Value) -> Option<Declared> {
    let settings = [&config["quantization_config"], &config["text_config"]["quantization_config"]];
    let settings = settings.into_iter().find(|v| v.is_object());
    // mlx-lm writes both keys, of which only the first has its own meaning.
    let mlx = &config["quantization"];
    if mlx.is_object() && mlx.get("group_size").is_some() {
        return Some(Declared { method: "mlx".into(), key: "quantization", settings: mlx.clone() });
    }
    let settings = settings?;
    let method = settings["quant_method"].as_str().unwrap_or_else(|| {
        // bitsandbytes' first configurations had no `quant_method`.
        if settings.get("load_in_4bit").is_some() || settings.get("load_in_8bit").is_some() {
            "bitsandbytes"
        } else {
            ""
        }
    });
    Some(Declared { method: method.to_lowercase(), key: "quantization_config", settings: settings.clone() })
}

/// Every encoded weight of `base`, whose configuration declares `declared`. An encoding or a layout that is not known is
/// refused by name: its packed numbers must not be taken for weights.
pub fn find<'a>(base: &'a Checkpoint, declared: &Declared) -> Result<Vec<EncodedWeight<'a>>> {
    let Some(encoding) = ENCODINGS.iter().find(|e| e.id == declared.method) else {
        let known: Vec<&str> = ENCODINGS.iter().map(|e| e.id).collect();
        return Err(Error::request(format!(
            "the base '{}' is quantised (config.json: quant_method '{}'), which cannot be decoded",
            base.path().display(),
            declared.method
        ))
        .help(format!(
            "use the unquantised model that it was made from, or dequantise it first; known are {}",
            known.join(", ")
        )));
    };
    let stored = Stored::new(base, declared.settings.clone());
    let found = (encoding.find)(&stored)?;
    // A tensor that belongs to two weights, or a weight that is stored plainly, too, would be read in two ways.
    let mut owners: HashMap<&str, &str> = HashMap::new();
    for weight in &found {
        for tensor in &weight.tensors {
            if let Some(other) = owners.insert(tensor.name(), &weight.name) {
                return Err(Error::request(format!(
                    "'{}' in '{}' belongs to two quantised weights: '{other}' and '{}'",
                    tensor.name(),
                    tensor.file().path().display(),
                    weight.name
                )));
            }
        }
    }
    for weight in &found {
        if let Some(plain) = base.get(&weight.name)
            && owners.get(plain.name()) != Some(&weight.name.as_str())
        {
            return Err(Error::request(format!(
                "'{}' is stored twice in '{}': quantised ('{}') and as it is",
                weight.name,
                base.path().display(),
                weight.tensors[0].name()
            ))
            .help("remove the one that the model does not use"));
        }
    }
    Ok(found)
}

/// Tensors that look as if they were values or scales of an encoded weight: what must not be recast or added to where nothing
/// declares an encoding, and is left over where something does.
pub fn looks_encoded(tensor: &Tensor) -> bool {
    const ENDS: &[&str] = &[
        "_scale_inv",
        ".weight_scale",
        ".weight_scale_2",
        ".weight_global_scale",
        ".weight_packed",
        ".weight_zero_point",
        ".weight_shape",
        ".weight_g_idx",
        ".qweight",
        ".qzeros",
        ".g_idx",
        ".SCB",
        ".weight_format",
        ".absmax",
        ".quant_map",
        ".nested_absmax",
        ".nested_quant_map",
        ".input_scale",
        ".output_scale",
        ".k_scale",
        ".v_scale",
        "_blocks",
        "_scales",
    ];
    let name = tensor.name();
    name.contains(".quant_state.")
        || ENDS.iter().any(|end| name.ends_with(end))
        || matches!(tensor.dtype(), Dtype::F8_E4M3 | Dtype::F8_E5M2 | Dtype::F8_E8M0 | Dtype::F4)
}
