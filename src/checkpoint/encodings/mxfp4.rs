//! MXFP4 (OCP microscaling formats) as gpt-oss stores its experts.

use super::{
    packed,
    stored::{EncodedWeight, Stored, bad, expect_dtype, expect_shape},
};
use crate::{checkpoint::Dtype, error::Result};

/// `X_blocks` is `[experts, out, in / 32, 16]`, two E2M1 values a byte, the low one first; `X_scales` is `[experts, out, in / 32]`
/// in E8M0. The plain parameter X is `[experts, in, out]`: transposed.
pub(super) fn find<'a>(stored: &Stored<'a>) -> Result<Vec<EncodedWeight<'a>>> {
    let mut found = Vec::new();
    for (name, blocks) in stored.ending("_blocks") {
        let scale = stored.need(&format!("{name}_scales"), &blocks)?;
        expect_dtype(&blocks, &[Dtype::U8])?;
        expect_dtype(&scale, &[Dtype::U8, Dtype::F8_E8M0])?;
        let &[experts, outputs, groups, 16] = blocks.shape() else {
            return Err(bad(
                &blocks,
                format!("it has shape {:?}, expected [experts, out, in / 32, 16]", blocks.shape()),
            ));
        };
        expect_shape(&scale, &[experts, outputs, groups], "one per 32 values")?;
        let inputs = 32 * groups;
        found.push(EncodedWeight {
            name: name.to_owned(),
            shape: vec![experts, inputs, outputs],
            tensors: vec![blocks, scale],
            open: Box::new(move || {
                if let Some(i) = scale.bytes().iter().position(|&b| b == 255) {
                    return Err(bad(&scale, format!("scale {i} is NaN")));
                }
                let exponents = packed::table(packed::e8m0);
                Ok(Box::new(move |rows, out| {
                    for (row, out) in rows.zip(out.chunks_exact_mut(outputs.max(1))) {
                        let (expert, i) = (row / inputs, row % inputs);
                        for (o, out) in out.iter_mut().enumerate() {
                            let group = (expert * outputs + o) * groups + i / 32;
                            let byte = blocks.bytes()[group * 16 + i % 32 / 2];
                            let code = if i.is_multiple_of(2) { byte & 15 } else { byte >> 4 };
                            *out = packed::E2M1[usize::from(code)] * exponents[usize::from(scale.bytes()[group])];
                        }
                    }
                }))
            }),
        });
    }
    Ok(found)
}
