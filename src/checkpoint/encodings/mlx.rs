//! Affine quantisation as mlx-lm stores it.

use super::{
    packed::unpack,
    stored::{EncodedWeight, Stored, bad, expect_dtype, matrix, scales, word},
};
use crate::{
    checkpoint::{Dtype, Tensor},
    error::Result,
};

/// `W[o, i] = scales[o, g] * q + biases[o, g]` with `g = i / group_size`; q is packed along the row into U32, the lowest bits first.
pub(super) fn find<'a>(stored: &Stored<'a>) -> Result<Vec<EncodedWeight<'a>>> {
    let mut found = Vec::new();
    for (module, scale) in stored.ending(".scales") {
        let name = format!("{module}.weight");
        let values = stored.need(&name, &scale)?;
        // A layer may have settings of its own, under its name.
        let own = &stored.settings[module];
        let setting = |key: &str| own[key].as_u64().or_else(|| stored.setting(key));
        let mode = own["mode"].as_str().or_else(|| stored.settings["mode"].as_str()).unwrap_or("affine");
        if mode != "affine" {
            return Err(bad(&values, format!("its mode is '{mode}', known is affine")));
        }
        found.push(layer(stored, module, values, scale, (setting("group_size"), setting("bits")))?);
    }
    Ok(found)
}

fn layer<'a>(
    stored: &Stored<'a>,
    module: &str,
    values: Tensor<'a>,
    scale: Tensor<'a>,
    (group_size, bits): (Option<u64>, Option<u64>),
) -> Result<EncodedWeight<'a>> {
    expect_dtype(&values, &[Dtype::U32])?;
    let bias = stored.need(&format!("{module}.biases"), &values)?;
    let (Some(group_size), Some(bits)) = (group_size.map(|g| g as usize), bits.map(|b| b as usize)) else {
        return Err(bad(&values, "config.json's quantization gives no group_size and bits"));
    };
    if ![2, 4, 8].contains(&bits) {
        return Err(bad(&values, format!("it has {bits} bits, known are 2, 4 and 8")));
    }
    let (per_word, [rows, packed_columns], [scale_rows, groups]) = (32 / bits, matrix(&values)?, matrix(&scale)?);
    let columns = packed_columns * per_word;
    if scale_rows != rows || group_size.checked_mul(groups) != Some(columns) || bias.shape() != scale.shape() {
        return Err(bad(
            &values,
            format!(
                "{bits} bits and groups of {group_size} do not fit values {:?}, scales {:?} and biases {:?}",
                values.shape(),
                scale.shape(),
                bias.shape()
            ),
        ));
    }
    Ok(EncodedWeight {
        name: format!("{module}.weight"),
        shape: vec![rows, columns],
        tensors: vec![values, scale, bias],
        open: Box::new(move || {
            let (scales, biases) = (scales(&scale)?, scales(&bias)?);
            Ok(Box::new(move |rows, out| {
                let bytes = values.bytes();
                for (i, out) in rows.zip(out.chunks_exact_mut(columns)) {
                    for (j, out) in out.iter_mut().enumerate() {
                        let q = unpack(word(bytes, i * packed_columns + j / per_word), bits, j % per_word) as f32;
                        let at = i * groups + j / group_size;
                        *out = scales[at] * q + biases[at];
                    }
                }
            }))
        }),
    })
}
