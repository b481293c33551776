//! `scaling * left @ right` in row blocks.

use super::{product::multiply, real::Real};
use ndarray::{Array2, ArrayViewMut2, s};
use std::ops::Range;

/// A low-rank delta in the layout of the stored weight, `[rows, columns] = scaling * left @ right`.
#[derive(Clone, Debug)]
pub struct LowRank<T> {
    /// `[rows, r]`: B, or Aᵀ where the weight is stored transposed.
    pub left: Array2<T>,
    /// `[r, columns]`: A, or Bᵀ.
    pub right: Array2<T>,
    /// What the product is multiplied with.
    pub scaling: T,
}

impl<T: Real> LowRank<T> {
    /// Rows `rows` of the delta, `scaling * (left @ right)`, overwriting `out` (`[rows.len(), columns]`).
    pub fn rows(&self, rows: Range<usize>, out: ArrayViewMut2<T>) {
        multiply(self.scaling, self.left.slice(s![rows, ..]), self.right.view(), out);
    }

    /// Adds rows `rows` of the delta to `out` (`[rows.len(), columns]`), rounded before: so does PEFT.
    pub fn add_rows(&self, rows: Range<usize>, mut out: ArrayViewMut2<T>) {
        let mut own = Array2::zeros(out.dim());
        self.rows(rows, own.view_mut());
        out.zip_mut_with(&own, |out, &own| *out = *out + own);
    }

    /// The whole delta.
    pub fn dense(&self) -> Array2<T> {
        let (m, n) = self.shape();
        let mut out = Array2::zeros((m, n));
        self.rows(0..m, out.view_mut());
        out
    }
}

impl<T> LowRank<T> {
    /// `(rows, columns)` of the stored weight.
    pub fn shape(&self) -> (usize, usize) {
        (self.left.nrows(), self.right.ncols())
    }

    /// Inner extent.
    pub fn r(&self) -> usize {
        self.right.nrows()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::arr2;

    #[test]
    fn row_blocks_agree_with_the_formula() {
        let (left, right) =
            (arr2(&[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, -1.0]]), arr2(&[[1., 2., 3.], [4., 5., 6.]]));
        let delta = LowRank { left, right, scaling: 2.0 };
        let exact = delta.dense();
        assert_eq!(exact, arr2(&[[2., 4., 6.], [8., 10., 12.], [10., 14., 18.], [-4., -2., 0.]]));
        let mut block = Array2::zeros((2, 3));
        delta.rows(1..3, block.view_mut());
        assert_eq!(block, exact.slice(s![1..3, ..]));
    }
}
