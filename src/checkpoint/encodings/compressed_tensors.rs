//! compressed-tensors (llm-compressor, vLLM): 8-bit floats and integers, packed integers, NVFP4.

use super::{
    fp8::{self, Grid},
    packed::{E2M1, unpack},
    stored::{EncodedWeight, Stored, bad, expect_dtype, expect_shape, matrix, scales, word, words},
};
use crate::{
    checkpoint::{Dtype, Tensor},
    error::Result,
};
use serde_json::Value;

/// What tells the kind of a weight are its tensors: `weight_packed` of U8 is NVFP4, of I32 packed integers, and `weight` beside
/// `weight_scale` holds 8-bit numbers.
pub(super) fn find<'a>(stored: &Stored<'a>) -> Result<Vec<EncodedWeight<'a>>> {
    let format = stored.settings["format"].as_str().unwrap_or("dense");
    const KNOWN: &[&str] = &[
        "dense",
        "naive-quantized",
        "float-quantized",
        "int-quantized",
        "pack-quantized",
        "nvfp4-pack-quantized",
        "mixed-precision",
    ];
    if let Some(tensor) = stored.base.tensors().next()
        && !KNOWN.contains(&format)
    {
        return Err(bad(
            &tensor,
            format!("the format of the checkpoint is '{format}', known are {}", KNOWN.join(", ")),
        ));
    }
    if let Some((_, tensor)) = [".weight_bitmask", ".bitmask"].into_iter().find_map(|end| stored.ending(end).next()) {
        return Err(bad(&tensor, "sparse weights are not known"));
    }
    let mut found = Vec::new();
    for (module, values) in stored.ending(".weight_packed") {
        found.push(match values.dtype() {
            Dtype::U8 => nvfp4(stored, module, values)?,
            _ => integers(stored, module, values)?,
        });
    }
    for (module, scale) in stored.ending(".weight_scale") {
        if stored.get(&format!("{module}.weight_packed")).is_some() {
            continue;
        }
        let name = format!("{module}.weight");
        let values = stored.need(&name, &scale)?;
        if let Some(zero) = stored.get(&format!("{module}.weight_zero_point"))
            && zero.bytes().iter().any(|&b| b != 0)
        {
            return Err(bad(&values, "8-bit values with a zero point are not known"));
        }
        let block = block_structure(&stored.settings);
        let grid = match block {
            Some((m, n)) if m > 0 && n > 0 && scale.elements() > 1 => Grid::blocks(&values, &scale, m, n)?,
            _ => Grid::leading(&values, &scale)?,
        };
        let mut weight = fp8::weight(&name, values, scale, grid)?;
        weight.tensors.extend(stored.get(&format!("{module}.weight_zero_point")));
        found.push(weight);
    }
    // Scales of activations and of the cache go with the quantised weights.
    fp8::complete(stored, found)
}

/// `block_structure` of the first group that has one: the shape of the blocks that share a scale.
fn block_structure(settings: &Value) -> Option<(usize, usize)> {
    let groups = settings["config_groups"].as_object()?;
    groups.values().find_map(|group| {
        let block = group["weights"]["block_structure"].as_array()?;
        Some((block.first()?.as_u64()? as usize, block.get(1)?.as_u64()? as usize))
    })
}

/// `W = e2m1 * (weight_scale[i, j / 16] / weight_global_scale)`, two values a byte, the low one first.
fn nvfp4<'a>(stored: &Stored<'a>, module: &str, values: Tensor<'a>) -> Result<EncodedWeight<'a>> {
    let [rows, half] = matrix(&values)?;
    let columns = 2 * half;
    let scale = stored.need(&format!("{module}.weight_scale"), &values)?;
    let global = stored.need(&format!("{module}.weight_global_scale"), &values)?;
    expect_dtype(&scale, &[Dtype::F8_E4M3])?;
    expect_shape(&scale, &[rows, columns / 16], "one per 16 values")?;
    if !columns.is_multiple_of(16) || global.elements() != 1 {
        return Err(bad(&values, format!("its shape {:?} or that of its global scale is not NVFP4's", values.shape())));
    }
    Ok(EncodedWeight {
        name: format!("{module}.weight"),
        shape: vec![rows, columns],
        tensors: vec![values, scale, global],
        open: Box::new(move || {
            let global = scales(&global)?[0];
            let scales: Vec<f32> = scales(&scale)?.into_iter().map(|s| s / global).collect();
            if let Some(i) = scales.iter().position(|s| !s.is_finite()) {
                return Err(bad(&scale, format!("scale {i} divided by weight_global_scale is {}", scales[i])));
            }
            Ok(Box::new(move |rows, out| {
                let bytes = &values.bytes()[rows.start * half..rows.end * half];
                let pairs = out.as_chunks_mut::<2>().0.iter_mut().zip(bytes).enumerate();
                for (n, (out, &byte)) in pairs {
                    let scale = scales[rows.start * (columns / 16) + n / 8];
                    *out = [E2M1[usize::from(byte & 15)] * scale, E2M1[usize::from(byte >> 4)] * scale];
                }
            }))
        }),
    })
}

/// `W = (q - zero) * weight_scale[i, g(j)]` with q unsigned, packed along the row into 32-bit words, the lowest bits first; the zero is
/// half the range unless `weight_zero_point` (packed along the outputs) gives it. `weight_g_idx` gives the group of each column.
fn integers<'a>(stored: &Stored<'a>, module: &str, values: Tensor<'a>) -> Result<EncodedWeight<'a>> {
    expect_dtype(&values, &[Dtype::I32])?;
    let [rows, packed_columns] = matrix(&values)?;
    let shape = stored.need(&format!("{module}.weight_shape"), &values)?;
    let columns = columns_of(&shape, rows)?;
    let bits = bits_of(&stored.settings, &values, packed_columns, columns)?;
    let per_word = 32 / bits;
    let scale = stored.need(&format!("{module}.weight_scale"), &values)?;
    let groups = match *scale.shape() {
        [r, groups] if r == rows && groups > 0 => groups,
        [1] | [1, 1] => 0,
        _ => return Err(bad(&scale, format!("it has shape {:?} for {rows} rows", scale.shape()))),
    };
    let mut tensors = vec![values, shape, scale];
    let zero_point = stored.get(&format!("{module}.weight_zero_point"));
    if let Some(zero) = zero_point {
        expect_dtype(&zero, &[Dtype::I32])?;
        expect_shape(&zero, &[rows.div_ceil(per_word), groups.max(1)], "packed zeros")?;
        tensors.push(zero);
    }
    let g_idx = stored.get(&format!("{module}.weight_g_idx"));
    if let Some(g_idx) = g_idx {
        expect_shape(&g_idx, &[columns], "the group of each column")?;
        tensors.push(g_idx);
    } else if groups > 1 && !columns.is_multiple_of(groups) {
        return Err(bad(&scale, format!("its {groups} groups do not divide {columns} columns")));
    }
    Ok(EncodedWeight {
        name: format!("{module}.weight"),
        shape: vec![rows, columns],
        tensors,
        open: Box::new(move || {
            let group: Vec<usize> = match &g_idx {
                Some(g_idx) => words(g_idx)?.into_iter().map(|g| g as usize).collect(),
                None => (0..columns).map(|j| j * groups.max(1) / columns).collect(),
            };
            if let Some(g) = group.iter().find(|&&g| g >= groups.max(1)) {
                return Err(bad(&values, format!("its weight_g_idx names group {g} of {groups}")));
            }
            let scales = scales(&scale)?;
            let zeros = zero_point.as_ref().map(words).transpose()?;
            let middle = (1u32 << (bits - 1)) as f32;
            Ok(Box::new(move |rows, out| {
                let bytes = values.bytes();
                for (i, out) in rows.zip(out.chunks_exact_mut(columns)) {
                    for (j, out) in out.iter_mut().enumerate() {
                        let q = unpack(word(bytes, i * packed_columns + j / per_word), bits, j % per_word) as f32;
                        let zero = zeros.as_ref().map_or(middle, |zeros| {
                            unpack(zeros[i / per_word * groups.max(1) + group[j]], bits, i % per_word) as f32
                        });
                        *out = (q - zero) * scales[if groups == 0 { 0 } else { i * groups + group[j] }];
                    }
                }
            }))
        }),
    })
}

/// Columns of the plain weight, from `weight_shape`.
fn columns_of(shape: &Tensor, rows: usize) -> Result<usize> {
    let extents: Vec<i64> = match shape.dtype() {
        Dtype::I64 => shape.bytes().as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b)).collect(),
        _ => words(shape)?.into_iter().map(i64::from).collect(),
    };
    match extents[..] {
        [r, columns] if r == rows as i64 && columns > 0 => Ok(columns as usize),
        _ => Err(bad(shape, format!("it says {extents:?}, the packed values have {rows} rows"))),
    }
}

/// Bits of a value: what makes `columns` fit the packed words; where two fit, what the configuration says.
fn bits_of(settings: &Value, values: &Tensor, packed_columns: usize, columns: usize) -> Result<usize> {
    let fitting: Vec<usize> =
        [2, 4, 8].into_iter().filter(|bits| columns.div_ceil(32 / bits) == packed_columns).collect();
    let groups = settings["config_groups"].as_object();
    let mut said: Vec<usize> = groups
        .into_iter()
        .flat_map(|groups| groups.values())
        .filter_map(|group| Some(group["weights"]["num_bits"].as_u64()? as usize))
        .filter(|bits| fitting.contains(bits))
        .collect();
    said.dedup();
    match (&fitting[..], &said[..]) {
        (&[bits], _) | (_, &[bits]) => Ok(bits),
        _ => Err(bad(values, format!("{packed_columns} words a row do not tell how {columns} columns are packed"))),
    }
}
