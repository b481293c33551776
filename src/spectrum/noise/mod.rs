//! What rounding alone can put into the spectrum of a stored difference.
//!
//! Rounding a weight to the nearest number of its type makes an error that behaves like a variable of mean 0 and variance
//! `u^2 / 12`, `u` the distance between the neighbouring numbers there (Widrow and Kollár, "Quantization Noise", 2008).
//! Rounding it stochastically makes one of variance `u^2 p (1 - p)`, `p` the position between them: `u^2 / 6` where all
//! positions are equally likely. A matrix of independent centred entries with standard deviations `s_ij` has a spectral
//! norm of about `max_i sqrt(sum_j s_ij^2) + max_j sqrt(sum_i s_ij^2)` (Bandeira and van Handel, Ann. Probab. 44 (2016),
//! 2479-2506; for equal entries it is the Bai-Yin edge `s (sqrt m + sqrt n)`). Independent roundings add variances.

mod blocks;
mod grid;
pub mod known;

pub use blocks::Blocks;
pub use grid::Grid;

use crate::{
    checkpoint::{Dtype, Tensor},
    error::Result,
};

/// Sums of squared distances between neighbouring numbers, by row and by column of a stored matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct StepSums {
    /// `sum_j u_ij^2`
    pub rows: Vec<f64>,
    /// `sum_i u_ij^2`
    pub columns: Vec<f64>,
}

impl StepSums {
    /// All zero, for a `rows x columns` matrix.
    pub fn new(rows: usize, columns: usize) -> Self {
        StepSums { rows: vec![0.0; rows], columns: vec![0.0; columns] }
    }

    /// Adds a piece of one row, entries `(row, first_column ..)`: finite values that were rounded to numbers of `grid`.
    pub fn add(&mut self, grid: Grid, row: usize, first_column: usize, values: &[f64]) {
        let columns = &mut self.columns[first_column..first_column + values.len()];
        let mut sum = 0.0;
        for (column, &x) in columns.iter_mut().zip(values) {
            let u2 = grid.squared_step(x);
            *column += u2;
            sum += u2;
        }
        self.rows[row] += sum;
    }

    fn times(&self, factor: f64) -> StepSums {
        let scaled = |sums: &[f64]| sums.iter().map(|x| factor * x).collect();
        StepSums { rows: scaled(&self.rows), columns: scaled(&self.columns) }
    }

    /// `sqrt(roundings) * (max_i sqrt(sum_j u_ij^2 / 12) + max_j sqrt(sum_i u_ij^2 / 12))`. A stochastic rounding counts as
    /// two roundings.
    pub fn noise_edge(&self, roundings: f64) -> f64 {
        let largest = |sums: &[f64]| sums.iter().copied().fold(0.0, f64::max);
        roundings.sqrt() * ((largest(&self.rows) / 12.0).sqrt() + (largest(&self.columns) / 12.0).sqrt())
    }
}

/// The noise edge of roundings of several kinds, each with its number, all of them repeated `times` times.
pub fn edge(sums: &[(StepSums, f64)], times: f64) -> f64 {
    match sums {
        [] => 0.0,
        [(sums, roundings)] => sums.noise_edge(times * roundings),
        [(first, roundings), rest @ ..] => {
            let mut all = first.times(*roundings);
            for (sums, roundings) in rest {
                let other = sums.times(*roundings);
                all.rows.iter_mut().zip(&other.rows).for_each(|(a, b)| *a += b);
                all.columns.iter_mut().zip(&other.columns).for_each(|(a, b)| *a += b);
            }
            all.noise_edge(times)
        }
    }
}

/// The numbers that a weight was rounded to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Numbers {
    /// Those that the values of both sides show: the stored type, or a coarser one whose numbers they all are; the coarser
    /// of the two sides.
    Shown,
    /// Those of the tuned side's stored type, or of another type where that is coarser.
    Type(Option<Dtype>),
    /// Those of a quantised type.
    Blocks(Blocks),
}

/// The sums of a whole stored matrix.
pub fn of_tensor(weight: &Tensor, numbers: Numbers) -> Result<StepSums> {
    let (m, n) = weight.matrix_shape()?;
    let mut sums = StepSums::new(m, n);
    if let Numbers::Blocks(blocks) = numbers {
        blocks.add(weight, &mut sums)?;
        return Ok(sums);
    }
    let mut row = vec![0.0; n];
    for i in 0..m {
        weight.read_f64(i * n, &mut row)?;
        if let Some(grid) = Grid::of(weight.dtype()) {
            let grid = match numbers {
                Numbers::Type(Some(dtype)) => grid.coarser_of(Grid::of(dtype).unwrap_or(grid)),
                Numbers::Type(None) => grid,
                _ => grid.shown_by(&row),
            };
            sums.add(grid, i, 0, &row);
        }
    }
    Ok(sums)
}

#[cfg(test)]
mod tests;
