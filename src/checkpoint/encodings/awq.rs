//! AWQ (arXiv:2306.00978) as AutoAWQ's `gemm` version stores it.

use super::{
    packed::unpack,
    stored::{EncodedWeight, Stored, bad, expect_dtype, expect_shape, matrix, scales, word, words},
};
use crate::{
    checkpoint::{Dtype, Tensor},
    error::Result,
};

/// Where the eight outputs of a word lie in it: output `k` is the nibble `ORDER[k]`.
const ORDER: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

/// `W[o, i] = scales[i / group_size, o] * (q[i, o] - zero[i / group_size, o])`, eight outputs to a 32-bit word.
pub(super) fn find<'a>(stored: &Stored<'a>) -> Result<Vec<EncodedWeight<'a>>> {
    stored.ending(".qweight").map(|(module, qweight)| layer(stored, module, qweight)).collect()
}

fn layer<'a>(stored: &Stored<'a>, module: &str, qweight: Tensor<'a>) -> Result<EncodedWeight<'a>> {
    let version = stored.settings["version"].as_str().unwrap_or("gemm");
    if !version.eq_ignore_ascii_case("gemm") {
        return Err(bad(&qweight, format!("its AWQ version is '{version}', known is gemm")));
    }
    if let Some(bits) = stored.setting("bits").filter(|&bits| bits != 4) {
        return Err(bad(&qweight, format!("it has {bits} bits, AWQ's gemm version has 4")));
    }
    expect_dtype(&qweight, &[Dtype::I32])?;
    let [inputs, packed_columns] = matrix(&qweight)?;
    let outputs = packed_columns * 8;
    let qzeros = stored.need(&format!("{module}.qzeros"), &qweight)?;
    let scale = stored.need(&format!("{module}.scales"), &qweight)?;
    let [groups, scale_outputs] = matrix(&scale)?;
    if scale_outputs != outputs || groups == 0 || !inputs.is_multiple_of(groups) {
        return Err(bad(&scale, format!("it has shape {:?} for {inputs} inputs and {outputs} outputs", scale.shape())));
    }
    expect_dtype(&qzeros, &[Dtype::I32])?;
    expect_shape(&qzeros, &[groups, packed_columns], "packed zeros")?;
    Ok(EncodedWeight {
        name: format!("{module}.weight"),
        shape: vec![outputs, inputs],
        tensors: vec![qweight, qzeros, scale],
        open: Box::new(move || {
            let (scales, zeros) = (scales(&scale)?, words(&qzeros)?);
            let group_size = inputs / groups;
            Ok(Box::new(move |rows, out| {
                let bytes = qweight.bytes();
                for i in 0..inputs {
                    let group = i / group_size;
                    for (row, o) in rows.clone().enumerate() {
                        let nibble = |word| unpack(word, 4, ORDER[o % 8]) as f32;
                        let q = nibble(word(bytes, i * packed_columns + o / 8));
                        let zero = nibble(zeros[group * packed_columns + o / 8]);
                        out[row * inputs + i] = scales[group * outputs + o] * (q - zero);
                    }
                }
            }))
        }),
    })
}
