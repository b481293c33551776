//! Which element type would keep a delta that rounding destroyed, measured and not guessed.

use super::{
    MIN_RETENTION,
    apply::{self, Scratch, Sums},
    plan::Output,
    prepared::{Element, Prepared},
    result::Retention,
    rounding::Rounding,
    stream,
};
use crate::{checkpoint::Dtype, error::Result, threads};
use serde::Serialize;

/// Blocks of rows that are measured, spread over the tensor.
const SAMPLED: usize = 8;

/// An element type that keeps enough of the worst tensor's delta, rounded to nearest.
#[derive(Clone, Debug, Serialize)]
pub struct DtypeAdvice {
    /// The tensor that lost most.
    pub tensor: String,
    /// The narrowest type that keeps its delta.
    pub dtype: Dtype,
    /// What it keeps, measured on rows spread over the tensor.
    #[serde(flatten)]
    pub retention: Retention,
}

/// Tries wider types on `output`, narrow ones first.
pub(super) fn find(output: &Output) -> Result<Option<DtypeAdvice>> {
    let candidates: &[Dtype] = match output.spec.dtype {
        Dtype::BF16 => &[Dtype::F16, Dtype::F32],
        Dtype::F16 => &[Dtype::F32],
        _ => &[],
    };
    for &dtype in candidates {
        let sums = match output.in_double() {
            true => threads::with_serial_blas(|| sample::<f64>(output, dtype)),
            false => threads::with_serial_blas(|| sample::<f32>(output, dtype)),
        };
        // A type that is too narrow for some weight does not help.
        let retention = sums.ok().and_then(Retention::new).filter(|r| r.retention >= MIN_RETENTION);
        if let Some(retention) = retention {
            return Ok(Some(DtypeAdvice { tensor: output.spec.name.clone(), dtype, retention }));
        }
    }
    Ok(None)
}

fn sample<T: Element>(output: &Output, dtype: Dtype) -> Result<Sums> {
    let prepared = Prepared::<T>::new(output, Rounding::Nearest, None)?;
    let mut scratch = Scratch::new();
    let blocks: Vec<_> = stream::row_blocks(output).collect();
    let mut sums = Sums::default();
    for block in blocks.iter().step_by(blocks.len().div_ceil(SAMPLED).max(1)) {
        sums += apply::rows(output, dtype, &prepared, block.clone(), &mut scratch)?;
    }
    Ok(sums)
}
