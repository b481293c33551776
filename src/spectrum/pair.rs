//! The difference of two stored matrices, formed straight from the two memory maps, block by block.

use super::noise::UlpSums;
use crate::{checkpoint::Tensor, error::Result};
use std::ops::Range;

/// `tuned - base`, exact for F32 and shorter types up to one f64 rounding.
#[derive(Clone, Copy)]
pub struct Pair<'a> {
    /// The earlier weight.
    pub base: Tensor<'a>,
    /// The later weight, of the same shape.
    pub tuned: Tensor<'a>,
    /// Rows and columns.
    pub shape: (usize, usize),
}

/// Where a difference is NaN or infinite, and what the two sides hold there.
#[derive(Clone, Copy, Debug)]
pub struct NonFinite {
    /// Row and column.
    pub index: (usize, usize),
    /// `W0` there.
    pub base: f64,
    /// `Wn` there.
    pub tuned: f64,
}

impl Pair<'_> {
    /// Writes block `rows x columns` of the difference into `out`, row-major, and adds the units in the last place of
    /// the tuned side to `ulps`. Stops at the first entry that is not finite.
    pub fn block(
        &self,
        rows: Range<usize>,
        columns: Range<usize>,
        out: &mut [f64],
        ulps: &mut UlpSums,
    ) -> Result<Option<NonFinite>> {
        let width = columns.len();
        let mut base = vec![0.0; width];
        for (row, out) in rows.zip(out.chunks_exact_mut(width.max(1))) {
            let first = row * self.shape.1 + columns.start;
            self.tuned.read_f64(first, out)?;
            self.base.read_f64(first, &mut base)?;
            // x - x is 0 for finite x and NaN otherwise: one sum finds any offender.
            if out.iter().zip(&base).map(|(t, b)| (t - b) * 0.0).sum::<f64>() != 0.0 {
                let found = out.iter().zip(&base).position(|(t, b)| !(t - b).is_finite()).unwrap_or(0);
                let index = (row, columns.start + found);
                return Ok(Some(NonFinite { index, base: base[found], tuned: out[found] }));
            }
            ulps.add(self.tuned.dtype(), row, columns.start, out);
            out.iter_mut().zip(&base).for_each(|(t, b)| *t -= b);
        }
        Ok(None)
    }
}
