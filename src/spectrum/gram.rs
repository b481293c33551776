//! Singular values as square roots of the eigenvalues of the smaller Gram matrix, accumulated panel by panel.
//!
//! `G = DᵀD` (or `D Dᵀ`) costs one symmetric product; the large matrix is never held. Rounding moves an eigenvalue by a
//! few `eps(f64) * s1^2`, so a singular value is off by at most `sqrt` of that, about `1e-7 * s1`, where it is near
//! zero, and by far less above. Values below that floor are indistinguishable from zero on this path and are returned
//! as zero. Every threshold of the measures lies far above the floor, or the caller takes the dense path.

use super::lapack::{self, Side};
use crate::error::Result;

/// A Gram matrix being accumulated.
pub struct Gram {
    shape: (usize, usize),
    side: Side,
    entries: Vec<f64>,
}

impl Gram {
    /// For a matrix of the given shape; nothing added yet.
    pub fn new(shape: (usize, usize)) -> Gram {
        let n = shape.0.min(shape.1);
        let side = if shape.0 >= shape.1 { Side::Columns } else { Side::Rows };
        Gram { shape, side, entries: vec![0.0; n * n] }
    }

    /// Which panels it takes: whole rows (`Columns`: the columns survive) or whole columns.
    pub fn side(&self) -> Side {
        self.side
    }

    /// Adds a row-major panel: `rows` whole rows, or `columns` whole columns, of the matrix.
    pub fn add(&mut self, panel: &[f64], rows: usize, columns: usize) -> Result<()> {
        lapack::add_product(&mut self.entries, self.side, panel, rows, columns)
    }

    /// Singular values, largest first. `None` where squares have left the range of f64.
    pub fn singular_values(mut self) -> Result<Option<Vec<f64>>> {
        let n = self.shape.0.min(self.shape.1);
        let trace: f64 = (0..n).map(|i| self.entries[i * n + i]).sum();
        // The smallest square that counts is about 1e-14 of the trace and must be a normal number.
        if trace != 0.0 && !(1e-280..1e300).contains(&trace) {
            return Ok(None);
        }
        let eigenvalues = lapack::eigenvalues(&mut self.entries, n)?;
        let largest = eigenvalues.last().copied().unwrap_or(0.0).max(0.0);
        let floor = largest * relative_floor(self.shape).powi(2);
        Ok(Some(eigenvalues.iter().rev().map(|&e| if e > floor { e.sqrt() } else { 0.0 }).collect()))
    }
}

/// Below this share of `s1` a value cannot be told from zero: `sqrt(8 sqrt(max(m, n)) eps(f64))`.
pub fn relative_floor(shape: (usize, usize)) -> f64 {
    (8.0 * (shape.0.max(shape.1) as f64).sqrt() * f64::EPSILON).sqrt()
}
