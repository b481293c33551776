//! Singular values as square roots of the eigenvalues of the smaller Gram matrix, accumulated panel by panel.
//!
//! `G = DᵀD` (or `D Dᵀ`) costs one symmetric product; the large matrix is never held. Rounding moves an eigenvalue by a
//! few `eps(f64) * s1^2`, so a singular value is off by at most `sqrt` of that, about `1e-7 * s1`, where it is near
//! zero, and by far less above. Values below that floor are indistinguishable from zero on this path and are returned
//! as zero. Every threshold of the measures lies far above the floor, or the caller takes the dense path.

use super::lapack::{self, Side};
use crate::{
    error::Result,
    ops::{GpuGram, Solver},
};

/// A Gram matrix being accumulated.
pub struct Gram<'a> {
    shape: (usize, usize),
    side: Side,
    entries: Entries<'a>,
}

/// Where it lies.
enum Entries<'a> {
    Host(Vec<f64>),
    Gpu(GpuGram<'a>),
}

impl<'a> Gram<'a> {
    /// For a matrix of the given shape; nothing added yet.
    pub fn new(shape: (usize, usize), gpu: Option<&'a Solver>) -> Result<Gram<'a>> {
        let n = shape.0.min(shape.1);
        let side = if shape.0 >= shape.1 { Side::Columns } else { Side::Rows };
        let entries = match gpu {
            Some(gpu) => Entries::Gpu(gpu.gram(n)?),
            None => Entries::Host(vec![0.0; n * n]),
        };
        Ok(Gram { shape, side, entries })
    }

    /// Which panels it takes: whole rows (`Columns`: the columns survive) or whole columns.
    pub fn side(&self) -> Side {
        self.side
    }

    /// Adds a row-major panel: `rows` whole rows, or `columns` whole columns, of the matrix.
    pub fn add(&mut self, panel: &[f64], rows: usize, columns: usize) -> Result<()> {
        match &mut self.entries {
            Entries::Host(entries) => lapack::add_product(entries, self.side, panel, rows, columns),
            Entries::Gpu(gram) => gram.add(self.side == Side::Rows, panel, rows, columns),
        }
    }

    /// Singular values, largest first. `None` where squares have left the range of f64, or a GPU finds no eigenvalues.
    pub fn singular_values(self) -> Result<Option<Vec<f64>>> {
        let n = self.shape.0.min(self.shape.1);
        let trace: f64 = match &self.entries {
            Entries::Host(entries) => (0..n).map(|i| entries[i * n + i]).sum(),
            Entries::Gpu(gram) => gram.trace()?,
        };
        // The smallest square that counts is about 1e-14 of the trace and must be a normal number.
        if trace != 0.0 && !(1e-280..1e300).contains(&trace) {
            return Ok(None);
        }
        let eigenvalues = match self.entries {
            Entries::Host(mut entries) => lapack::eigenvalues(&mut entries, n)?,
            Entries::Gpu(gram) => match gram.eigenvalues()? {
                Some(eigenvalues) => eigenvalues,
                None => return Ok(None),
            },
        };
        let largest = eigenvalues.last().copied().unwrap_or(0.0).max(0.0);
        let floor = largest * relative_floor(self.shape).powi(2);
        Ok(Some(eigenvalues.iter().rev().map(|&e| if e > floor { e.sqrt() } else { 0.0 }).collect()))
    }
}

/// Below this share of `s1` a value cannot be told from zero: `sqrt(8 sqrt(max(m, n)) eps(f64))`.
pub fn relative_floor(shape: (usize, usize)) -> f64 {
    (8.0 * (shape.0.max(shape.1) as f64).sqrt() * f64::EPSILON).sqrt()
}
