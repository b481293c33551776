//! Weights that are stored encoded: packed or narrow values beside scales, as quantisation leaves them.
//!
//! Each encoding is one file with a `find` function, registered in [`ENCODINGS`]. It recognises its tensors from
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

use super::{Checkpoint, Dtype, Tensor, dtype};
use crate::error::{Error, Result};
use serde_json::Value;
use std::{
    collections::{HashMap, HashSet},
    ops::Range,
};

/// Overwrites the second argument, `[rows.len(), columns]` in f32, with these rows of the plain weight.
pub type Decode<'a> = Box<dyn Fn(Range<usize>, &mut [f32]) + Send + Sync + 'a>;

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

/// A weight that is stored encoded. Its plain form has the name, the shape and the orientation that the model's own code
/// gives it.
pub struct EncodedWeight<'a> {
    /// Name of the plain weight: `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// Shape of the plain weight.
    pub shape: Vec<usize>,
    /// The stored tensors that the plain weight replaces, the values first.
    pub tensors: Vec<Tensor<'a>>,
    open: Box<dyn Fn() -> Result<Decode<'a>> + Send + Sync + 'a>,
}

impl<'a> EncodedWeight<'a> {
    /// Reads the scales, and returns what decodes rows. All extents but the last make the rows.
    pub fn decoder(&self) -> Result<Decode<'a>> {
        (self.open)()
    }

    /// Rows and columns of the plain weight seen as a matrix.
    pub fn matrix_shape(&self) -> (usize, usize) {
        let columns = self.shape.last().copied().unwrap_or(1);
        (self.shape.iter().rev().skip(1).product(), columns)
    }

    /// Bytes of the tensors that it is stored in.
    pub fn bytes(&self) -> u64 {
        self.tensors.iter().map(|t| t.bytes().len() as u64).sum()
    }
}

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

/// What encodings are found in: the tensors of a checkpoint and the settings of its encoding.
struct Stored<'a> {
    base: &'a Checkpoint,
    settings: Value,
}

impl<'a> Stored<'a> {
    fn new(base: &'a Checkpoint, settings: Value) -> Self {
        Stored { base, settings }
    }

    /// Every tensor whose name ends with `end`, with the part of the name before it, in the order of the files.
    fn ending(&self, end: &'static str) -> impl Iterator<Item = (&'a str, Tensor<'a>)> {
        let base: &'a Checkpoint = self.base;
        base.tensors().filter_map(move |t| Some((t.name().strip_suffix(end)?, t)))
    }

    fn get(&self, name: &str) -> Option<Tensor<'a>> {
        self.base.get(name)
    }

    /// The tensor that the weight `of` needs beside its values.
    fn need(&self, name: &str, of: &Tensor) -> Result<Tensor<'a>> {
        self.get(name).ok_or_else(|| bad(of, format!("its '{name}' is missing")))
    }

    fn setting(&self, key: &str) -> Option<u64> {
        self.settings[key].as_u64()
    }
}

/// The checkpoint is damaged, or stored in a way that this encoding does not know.
fn bad(tensor: &Tensor, what: impl std::fmt::Display) -> Error {
    Error::request(format!(
        "cannot decode the quantised weight '{}' in '{}': {what}",
        tensor.name(),
        tensor.file().path().display()
    ))
    .help("use the unquantised model that it was made from, or dequantise it first")
}

/// Refuses `tensor` unless it has `shape`.
fn expect_shape(tensor: &Tensor, shape: &[usize], what: &str) -> Result<()> {
    if tensor.shape() == shape {
        return Ok(());
    }
    Err(bad(tensor, format!("it has shape {:?}, expected {shape:?} ({what})", tensor.shape())))
}

/// Refuses `tensor` unless it has one of `dtypes`.
fn expect_dtype(tensor: &Tensor, dtypes: &[Dtype]) -> Result<()> {
    if dtypes.contains(&tensor.dtype()) {
        return Ok(());
    }
    Err(bad(tensor, format!("it holds {:?}, expected {dtypes:?}", tensor.dtype())))
}

/// The two extents of a matrix.
fn matrix(tensor: &Tensor) -> Result<[usize; 2]> {
    <[usize; 2]>::try_from(tensor.shape())
        .map_err(|_| bad(tensor, format!("it has shape {:?}, expected a matrix", tensor.shape())))
}

/// Scales in f32, from any float type, 8 bits included. NaN and infinity are refused: they would spoil whole blocks.
fn scales(tensor: &Tensor) -> Result<Vec<f32>> {
    let values = match tensor.dtype() {
        Dtype::F8_E4M3 => tensor.bytes().iter().map(|&b| packed::e4m3(b)).collect(),
        dtype if dtype::is_float(dtype) => {
            let mut values = vec![0f32; tensor.elements()];
            tensor.read_f32(0, &mut values)?;
            values
        }
        dtype => return Err(bad(tensor, format!("it holds {dtype:?}, expected floating point scales"))),
    };
    match values.iter().position(|v: &f32| !v.is_finite()) {
        Some(i) => Err(bad(tensor, format!("scale {i} is {}", values[i]))),
        None => Ok(values),
    }
}

/// Little-endian 32-bit words of a tensor of I32 or U32.
fn words(tensor: &Tensor) -> Result<Vec<u32>> {
    expect_dtype(tensor, &[Dtype::I32, Dtype::U32])?;
    Ok(tensor.bytes().as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect())
}

/// The `index`-th little-endian 32-bit word of `bytes`.
fn word(bytes: &[u8], index: usize) -> u32 {
    u32::from_le_bytes([bytes[4 * index], bytes[4 * index + 1], bytes[4 * index + 2], bytes[4 * index + 3]])
}

/// Names of all tensors that belong to an encoded weight.
pub fn owned<'a>(weights: &[EncodedWeight<'a>]) -> HashSet<&'a str> {
    weights.iter().flat_map(|w| w.tensors.iter().map(|t| t.name())).collect()
}
