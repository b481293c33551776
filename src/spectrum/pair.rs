//! The difference of two stored matrices, formed straight from the two memory maps, block by block.

use super::noise::{self, Grid, Numbers, StepSums, known::Term};
use crate::{checkpoint::Tensor, error::Result};
use std::ops::Range;

/// `tuned - base`, exact for F32 and shorter types up to one f64 rounding.
#[derive(Clone)]
pub struct Pair<'a> {
    /// The earlier weight.
    pub base: Tensor<'a>,
    /// The later weight, of the same shape.
    pub tuned: Tensor<'a>,
    /// Rows and columns.
    pub shape: (usize, usize),
    /// How the values were rounded.
    pub roundings: Vec<Term>,
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

impl NonFinite {
    /// The finding as a clause, with the files.
    pub fn describe(&self, pair: &Pair) -> String {
        let ((i, j), file) = (self.index, |t: Tensor| t.file().path().display().to_string());
        format!(
            "the delta is not finite at [{i}, {j}]: '{}' holds {} and '{}' holds {}",
            file(pair.base),
            self.base,
            file(pair.tuned),
            self.tuned
        )
    }
}

impl<'a> Pair<'a> {
    /// Nothing measured yet.
    pub fn noise(&self) -> PairNoise {
        let read_along = |term: &&Term| !matches!(term.numbers, Numbers::Blocks(_));
        let numbers = self.roundings.iter().find(read_along).map(|term| term.numbers);
        PairNoise { numbers, sums: StepSums::new(self.shape.0, self.shape.1) }
    }

    /// The largest singular value that rounding alone explains, after all blocks have been read with `noise`.
    pub fn noise_edge(&self, noise: PairNoise) -> Result<f64> {
        let mut sums = Vec::new();
        for term in &self.roundings {
            let own = if noise.numbers == Some(term.numbers) {
                noise.sums.clone()
            } else {
                noise::of_tensor(&self.tuned, term.numbers)?
            };
            sums.push((own, term.roundings));
        }
        Ok(noise::edge(&sums, 1.0))
    }

    /// Writes block `rows x columns` of the difference into `out`, row-major, and adds its values to `noise`. Stops at the
    /// first entry that is not finite.
    pub fn block(
        &self,
        rows: Range<usize>,
        columns: Range<usize>,
        out: &mut [f64],
        noise: &mut PairNoise,
    ) -> Result<std::result::Result<(), NonFinite>> {
        let width = columns.len();
        if (rows.len(), width) == self.shape {
            // The whole matrix at once comes first, or after panels that were given up: counted once.
            *noise = self.noise();
        }
        let mut base = vec![0.0; width];
        for (row, out) in rows.zip(out.chunks_exact_mut(width.max(1))) {
            let first = row * self.shape.1 + columns.start;
            self.tuned.read_f64(first, out)?;
            self.base.read_f64(first, &mut base)?;
            // x - x is 0 for finite x and NaN otherwise: one sum finds any offender.
            if out.iter().zip(&base).map(|(t, b)| (t - b) * 0.0).sum::<f64>() != 0.0 {
                let found = out.iter().zip(&base).position(|(t, b)| !(t - b).is_finite()).unwrap_or(0);
                let index = (row, columns.start + found);
                return Ok(Err(NonFinite { index, base: base[found], tuned: out[found] }));
            }
            if let Some(numbers) = noise.numbers {
                self.add_noise(numbers, &mut noise.sums, (row, columns.start), &base, out);
            }
            out.iter_mut().zip(&base).for_each(|(t, b)| *t -= b);
        }
        Ok(Ok(()))
    }

    fn add_noise(&self, numbers: Numbers, sums: &mut StepSums, at: (usize, usize), base: &[f64], tuned: &[f64]) {
        let Some(stored) = Grid::of(self.tuned.dtype()) else { return };
        match numbers {
            Numbers::Type(Some(dtype)) => {
                sums.add(stored.coarser_of(Grid::of(dtype).unwrap_or(stored)), at.0, at.1, tuned)
            }
            Numbers::Shown => {
                let grid = stored.shown_by(tuned);
                // The same numbers on both sides: those of the tuned weight count.
                match Grid::of(self.base.dtype()).map(|stored| stored.shown_by(base)) {
                    Some(coarser) if coarser.is_coarser_than(grid) => sums.add(coarser, at.0, at.1, base),
                    _ => sums.add(grid, at.0, at.1, tuned),
                }
            }
            _ => sums.add(stored, at.0, at.1, tuned),
        }
    }
}

/// What has been read of the noise of a pair.
pub struct PairNoise {
    /// Those that are summed up while the values are read; the others take a second pass.
    numbers: Option<Numbers>,
    sums: StepSums,
}
