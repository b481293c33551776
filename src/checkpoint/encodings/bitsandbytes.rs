//! bitsandbytes: NF4 and FP4 in blocks of the flattened weight, int8 with a scale per row.

use super::{
    fp8::Grid,
    stored::{EncodedWeight, Stored, bad, expect_dtype, expect_shape, matrix, scales},
};
use crate::{
    checkpoint::{Dtype, Tensor},
    error::Result,
};
use serde::Deserialize;

/// `W.flat[n] = quant_map[code n] * absmax[n / blocksize]`, two codes a byte, the high one first; blocks run across rows. With
/// double quantisation `absmax = nested_quant_map[u8] * nested_absmax[b / nested_blocksize] + nested_offset`.
/// int8: `W[i, j] = int8 * SCB[i] / 127`.
pub(super) fn find<'a>(stored: &Stored<'a>) -> Result<Vec<EncodedWeight<'a>>> {
    let mut found = Vec::new();
    for tensor in stored.base.tensors() {
        if let Some((name, kind)) = tensor.name().split_once(".quant_state.bitsandbytes__") {
            found.push(four_bits(stored, name, kind, tensor)?);
        } else if let Some(module) = tensor.name().strip_suffix(".SCB") {
            found.push(int8(stored, module, tensor)?);
        }
    }
    Ok(found)
}

/// `quant_state`: JSON in the bytes of a tensor.
#[derive(Deserialize)]
struct State {
    blocksize: usize,
    shape: Vec<usize>,
    nested_blocksize: Option<usize>,
    nested_offset: Option<f32>,
}

fn four_bits<'a>(stored: &Stored<'a>, name: &str, kind: &str, quant_state: Tensor<'a>) -> Result<EncodedWeight<'a>> {
    if !["nf4", "fp4"].contains(&kind) {
        return Err(bad(&quant_state, format!("its type is '{kind}', known are nf4 and fp4")));
    }
    let state: State = serde_json::from_slice(quant_state.bytes())
        .map_err(|e| bad(&quant_state, format!("its quant_state is damaged: {e}")))?;
    let codes = stored.need(name, &quant_state)?;
    let absmax = stored.need(&format!("{name}.absmax"), &codes)?;
    let map = stored.need(&format!("{name}.quant_map"), &codes)?;
    let elements = state.shape.iter().try_fold(1usize, |n, &extent| n.checked_mul(extent));
    let elements = elements.ok_or_else(|| bad(&quant_state, format!("its shape {:?} is impossible", state.shape)))?;
    // The codes may be stored as any type (bnb_4bit_quant_storage): what counts are the bytes.
    if state.shape.is_empty() || codes.bytes().len() != elements.div_ceil(2) {
        let (found, shape) = (codes.bytes().len(), &state.shape);
        return Err(bad(&codes, format!("it has {found} bytes of 4-bit codes, its quant_state says shape {shape:?}")));
    }
    if state.blocksize == 0 {
        return Err(bad(&quant_state, "its blocksize is 0"));
    }
    let blocks = elements.div_ceil(state.blocksize);
    expect_shape(&absmax, &[blocks], "one per block")?;
    expect_shape(&map, &[16], "one per code")?;
    let mut tensors = vec![codes, absmax, map, quant_state];
    let nested = match (state.nested_blocksize, state.nested_offset) {
        (Some(blocksize), Some(offset)) if blocksize > 0 => {
            let nested_map = stored.need(&format!("{name}.nested_quant_map"), &codes)?;
            let nested_absmax = stored.need(&format!("{name}.nested_absmax"), &codes)?;
            expect_dtype(&absmax, &[Dtype::U8])?;
            expect_shape(&nested_map, &[256], "one per code")?;
            expect_shape(&nested_absmax, &[blocks.div_ceil(blocksize)], "one per block of scales")?;
            tensors.extend([nested_map, nested_absmax]);
            Some(Nested { map: nested_map, absmax: nested_absmax, blocksize, offset })
        }
        (None, None) => None,
        _ => return Err(bad(&quant_state, "its quant_state gives only a part of the double quantisation")),
    };
    let columns = *state.shape.last().unwrap_or(&1);
    Ok(EncodedWeight {
        name: name.to_owned(),
        shape: state.shape.clone(),
        tensors,
        open: Box::new(move || {
            let map = scales(&map)?;
            let absmax = match &nested {
                Some(nested) => nested.scales(&absmax)?,
                None => scales(&absmax)?,
            };
            let blocksize = state.blocksize;
            Ok(Box::new(move |rows, out| {
                let bytes = codes.bytes();
                for (n, out) in (rows.start * columns..).zip(out) {
                    let code = if n % 2 == 0 { bytes[n / 2] >> 4 } else { bytes[n / 2] & 15 };
                    *out = map[usize::from(code)] * absmax[n / blocksize];
                }
            }))
        }),
    })
}

/// Scales that are quantised themselves.
#[derive(Clone, Copy)]
struct Nested<'a> {
    map: Tensor<'a>,
    absmax: Tensor<'a>,
    blocksize: usize,
    offset: f32,
}

impl Nested<'_> {
    fn scales(&self, codes: &Tensor) -> Result<Vec<f32>> {
        let (map, absmax) = (scales(&self.map)?, scales(&self.absmax)?);
        let decode = |(b, &code): (usize, &u8)| map[usize::from(code)] * absmax[b / self.blocksize] + self.offset;
        Ok(codes.bytes().iter().enumerate().map(decode).collect())
    }
}

fn int8<'a>(stored: &Stored<'a>, module: &str, scb: Tensor<'a>) -> Result<EncodedWeight<'a>> {
    let name = format!("{module}.weight");
    let values = stored.need(&name, &scb)?;
    expect_dtype(&values, &[Dtype::I8])?;
    let [rows, columns] = matrix(&values)?;
    expect_shape(&scb, &[rows], "one per row")?;
    let mut tensors = vec![values, scb];
    if let Some(format) = stored.get(&format!("{module}.weight_format")) {
        if format.bytes().iter().any(|&b| b != 0) {
            return Err(bad(
                &values,
                "its weight_format is not 0 (row by row): save it again with bitsandbytes 0.43 or newer",
            ));
        }
        tensors.push(format);
    }
    let grid = Grid::leading(&values, &scb)?;
    Ok(EncodedWeight {
        name,
        shape: vec![rows, columns],
        tensors,
        open: Box::new(move || {
            let scales = scales(&scb)?;
            Ok(Box::new(move |rows, out| {
                let bytes = &values.bytes()[rows.start * columns..rows.end * columns];
                out.iter_mut().zip(bytes).for_each(|(o, &b)| *o = f32::from(b as i8));
                grid.apply(&scales, rows, out);
                // bitsandbytes multiplies in this order, with the f32 nearest to 1/127.
                out.iter_mut().for_each(|o| *o *= 1.0 / 127.0);
            }))
        }),
    })
}
