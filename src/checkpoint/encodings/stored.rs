//! What the encodings share: the encoded weight that they find, the tensors that they find it in, and the checks of these.

use super::packed;
use crate::{
    checkpoint::{Checkpoint, Dtype, Tensor, dtype},
    error::{Error, Result},
};
use serde_json::Value;
use std::{collections::HashSet, ops::Range};

/// Overwrites the second argument, `[rows.len(), columns]` in f32, with these rows of the plain weight.
pub type Decode<'a> = Box<dyn Fn(Range<usize>, &mut [f32]) + Send + Sync + 'a>;

/// A weight that is stored encoded. Its plain form has the name, the shape and the orientation that the model's own code
/// gives it.
pub struct EncodedWeight<'a> {
    /// Name of the plain weight: `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// Shape of the plain weight.
    pub shape: Vec<usize>,
    /// The stored tensors that the plain weight replaces, the values first.
    pub tensors: Vec<Tensor<'a>>,
    pub(super) open: Box<dyn Fn() -> Result<Decode<'a>> + Send + Sync + 'a>,
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

/// What encodings are found in: the tensors of a checkpoint and the settings of its encoding.
pub(super) struct Stored<'a> {
    pub base: &'a Checkpoint,
    pub settings: Value,
}

impl<'a> Stored<'a> {
    pub fn new(base: &'a Checkpoint, settings: Value) -> Self {
        Stored { base, settings }
    }

    /// Every tensor whose name ends with `end`, with the part of the name before it, in the order of the files.
    pub fn ending(&self, end: &'static str) -> impl Iterator<Item = (&'a str, Tensor<'a>)> {
        let base: &'a Checkpoint = self.base;
        base.tensors().filter_map(move |t| Some((t.name().strip_suffix(end)?, t)))
    }

    pub fn get(&self, name: &str) -> Option<Tensor<'a>> {
        self.base.get(name)
    }

    /// The tensor that the weight `of` needs beside its values.
    pub fn need(&self, name: &str, of: &Tensor) -> Result<Tensor<'a>> {
        self.get(name).ok_or_else(|| bad(of, format!("its '{name}' is missing")))
    }

    pub fn setting(&self, key: &str) -> Option<u64> {
        self.settings[key].as_u64()
    }
}

/// The checkpoint is damaged, or stored in a way that this encoding does not know.
pub(super) fn bad(tensor: &Tensor, what: impl std::fmt::Display) -> Error {
    Error::request(format!(
        "cannot decode the quantised weight '{}' in '{}': {what}",
        tensor.name(),
        tensor.file().path().display()
    ))
    .help("use the unquantised model that it was made from, or dequantise it first")
}

/// Refuses `tensor` unless it has `shape`.
pub(super) fn expect_shape(tensor: &Tensor, shape: &[usize], what: &str) -> Result<()> {
    if tensor.shape() == shape {
        return Ok(());
    }
    Err(bad(tensor, format!("it has shape {:?}, expected {shape:?} ({what})", tensor.shape())))
}

/// Refuses `tensor` unless it has one of `dtypes`.
pub(super) fn expect_dtype(tensor: &Tensor, dtypes: &[Dtype]) -> Result<()> {
    if dtypes.contains(&tensor.dtype()) {
        return Ok(());
    }
    Err(bad(tensor, format!("it holds {:?}, expected {dtypes:?}", tensor.dtype())))
}

/// The two extents of a matrix.
pub(super) fn matrix(tensor: &Tensor) -> Result<[usize; 2]> {
    <[usize; 2]>::try_from(tensor.shape())
        .map_err(|_| bad(tensor, format!("it has shape {:?}, expected a matrix", tensor.shape())))
}

/// Scales in f32, from any float type, 8 bits included. NaN and infinity are refused: they would spoil whole blocks.
pub(super) fn scales(tensor: &Tensor) -> Result<Vec<f32>> {
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
pub(super) fn words(tensor: &Tensor) -> Result<Vec<u32>> {
    expect_dtype(tensor, &[Dtype::I32, Dtype::U32])?;
    Ok(tensor.bytes().as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect())
}

/// The `index`-th little-endian 32-bit word of `bytes`.
pub(super) fn word(bytes: &[u8], index: usize) -> u32 {
    u32::from_le_bytes([bytes[4 * index], bytes[4 * index + 1], bytes[4 * index + 2], bytes[4 * index + 3]])
}

/// Names of all tensors that belong to an encoded weight.
pub fn owned<'a>(weights: &[EncodedWeight<'a>]) -> HashSet<&'a str> {
    weights.iter().flat_map(|w| w.tensors.iter().map(|t| t.name())).collect()
}
