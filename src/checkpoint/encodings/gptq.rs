//! GPTQ (arXiv:2210.17323) as AutoGPTQ and GPTQModel store it.

use super::{
    packed::unpack,
    stored::{EncodedWeight, Stored, bad, expect_dtype, expect_shape, matrix, scales, word, words},
};
use crate::{
    checkpoint::{Dtype, Tensor},
    error::Result,
};

/// `W[o, i] = scales[g(i), o] * (q[i, o] - zero[g(i), o])` with `g = g_idx`, or `i / group_size` without it. `qweight` packs along
/// the inputs, `qzeros` along the outputs, the lowest bits first. `checkpoint_format: gptq` stores `zero - 1`, `gptq_v2` the
/// zero itself.
pub(super) fn find<'a>(stored: &Stored<'a>) -> Result<Vec<EncodedWeight<'a>>> {
    let format = stored.settings["checkpoint_format"].as_str().unwrap_or("gptq");
    stored.ending(".qweight").map(|(module, qweight)| layer(stored, module, qweight, format)).collect()
}

fn layer<'a>(stored: &Stored<'a>, module: &str, qweight: Tensor<'a>, format: &str) -> Result<EncodedWeight<'a>> {
    let lowered = match format {
        "gptq" => true,
        "gptq_v2" => false,
        other => return Err(bad(&qweight, format!("its checkpoint_format is '{other}', known are gptq and gptq_v2"))),
    };
    let bits = stored.setting("bits").unwrap_or(4) as usize;
    if ![2, 4, 8].contains(&bits) {
        return Err(bad(&qweight, format!("it has {bits} bits, known are 2, 4 and 8")));
    }
    let per_word = 32 / bits;
    expect_dtype(&qweight, &[Dtype::I32])?;
    let [packed_rows, outputs] = matrix(&qweight)?;
    let inputs = packed_rows * per_word;
    let qzeros = stored.need(&format!("{module}.qzeros"), &qweight)?;
    let scale = stored.need(&format!("{module}.scales"), &qweight)?;
    let [groups, scale_outputs] = matrix(&scale)?;
    if scale_outputs != outputs || !outputs.is_multiple_of(per_word) {
        return Err(bad(&scale, format!("it has shape {:?} for {outputs} outputs", scale.shape())));
    }
    expect_dtype(&qzeros, &[Dtype::I32])?;
    expect_shape(&qzeros, &[groups, outputs / per_word], "packed zeros")?;
    let mut tensors = vec![qweight, qzeros, scale];
    let g_idx = stored.get(&format!("{module}.g_idx"));
    if let Some(g_idx) = g_idx {
        expect_shape(&g_idx, &[inputs], "the group of each input")?;
        tensors.push(g_idx);
    }
    let act_order = stored.settings["desc_act"].as_bool().unwrap_or(false);
    if g_idx.is_none() && (act_order || groups == 0 || !inputs.is_multiple_of(groups)) {
        return Err(bad(&qweight, "its 'g_idx' is missing, and desc_act or the number of groups asks for one"));
    }
    Ok(EncodedWeight {
        name: format!("{module}.weight"),
        shape: vec![outputs, inputs],
        tensors,
        open: Box::new(move || {
            let group: Vec<usize> = match &g_idx {
                Some(g_idx) => words(g_idx)?.into_iter().map(|g| g as usize).collect(),
                None => (0..inputs).map(|i| i / (inputs / groups)).collect(),
            };
            if let Some(g) = group.iter().find(|&&g| g >= groups) {
                return Err(bad(&qweight, format!("its g_idx names group {g} of {groups}")));
            }
            let (scales, zeros) = (scales(&scale)?, zeros(&qzeros, bits, lowered)?);
            Ok(Box::new(move |rows, out| {
                let bytes = qweight.bytes();
                for packed_row in 0..packed_rows {
                    for (o, out) in rows.clone().zip(out.chunks_exact_mut(inputs)) {
                        let word = word(bytes, packed_row * outputs + o);
                        let first = packed_row * per_word;
                        for (k, out) in out[first..first + per_word].iter_mut().enumerate() {
                            let at = group[first + k] * outputs + o;
                            *out = scales[at] * (unpack(word, bits, k) as f32 - zeros[at]);
                        }
                    }
                }
            }))
        }),
    })
}

/// The zero of every group and output.
fn zeros(qzeros: &Tensor, bits: usize, lowered: bool) -> Result<Vec<f32>> {
    let largest = (1u32 << bits) - 1;
    let mut zeros = Vec::new();
    for word in words(qzeros)? {
        for k in 0..32 / bits {
            let stored = unpack(word, bits, k);
            if lowered && stored == largest {
                // Programs disagree: some read it as 2^bits, some wrap around to 0.
                return Err(bad(
                    qzeros,
                    format!("it stores {largest}, which means {} to some programs and 0 to others", largest + 1),
                ));
            }
            zeros.push((stored + u32::from(lowered)) as f32);
        }
    }
    Ok(zeros)
}
