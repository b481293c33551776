//! Small square matrices: skew-symmetric ones, and the rotations that Cayley's transform makes of them.

use crate::{adapter::Module, error::Result};
use ndarray::{Array2, s};

/// The skew-symmetric matrix whose upper triangle is `values`, row by row.
pub fn skew(values: &[f64], n: usize) -> Array2<f64> {
    let mut q = Array2::zeros((n, n));
    let mut values = values.iter();
    for i in 0..n {
        for j in i + 1..n {
            let x = values.next().copied().unwrap_or_default();
            q[[i, j]] = x;
            q[[j, i]] = -x;
        }
    }
    q
}

/// `(I - Q) (I + Q)^-1`, orthogonal for a skew-symmetric Q.
pub fn cayley(module: &Module, q: &Array2<f64>) -> Result<Array2<f64>> {
    let n = q.nrows();
    let eye = Array2::<f64>::eye(n);
    // (I - Q) and (I + Q)^-1 commute: solving (I + Q) X = I - Q gives the same.
    solve(&eye + q, &eye - q)
        .ok_or_else(|| module.damaged("a block has no Cayley transform: its values are not finite"))
}

/// X with `a X = b`, by elimination with partial pivoting.
fn solve(mut a: Array2<f64>, mut b: Array2<f64>) -> Option<Array2<f64>> {
    let n = a.nrows();
    for k in 0..n {
        let pivot = (k..n).max_by(|&i, &j| a[[i, k]].abs().total_cmp(&a[[j, k]].abs()))?;
        if a[[pivot, k]] == 0.0 || !a[[pivot, k]].is_finite() {
            return None;
        }
        for j in 0..n {
            a.swap([k, j], [pivot, j]);
            b.swap([k, j], [pivot, j]);
        }
        let (row_a, row_b) = (a.row(k).to_owned(), b.row(k).to_owned());
        for i in (0..n).filter(|i| *i != k) {
            let factor = a[[i, k]] / row_a[k];
            if factor != 0.0 {
                a.slice_mut(s![i, k..]).scaled_add(-factor, &row_a.slice(s![k..]));
                b.row_mut(i).scaled_add(-factor, &row_b);
            }
        }
    }
    for k in 0..n {
        let pivot = a[[k, k]];
        b.row_mut(k).mapv_inplace(|x| x / pivot);
    }
    Some(b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elimination_solves_and_pivots() {
        let a = ndarray::arr2(&[[0.0, 2.0, 1.0], [1.0, 1.0, 0.5], [3.0, -1.0, 4.0]]);
        let x = ndarray::arr2(&[[1.0, 0.0, 2.0], [-1.0, 5.0, 0.25], [0.5, 1.0, -3.0]]);
        let found = solve(a.clone(), a.dot(&x)).unwrap();
        assert!((&found - &x).iter().all(|e| e.abs() < 1e-14), "{found}");
        assert!(solve(Array2::zeros((2, 2)), Array2::eye(2)).is_none());
        assert_eq!(skew(&[1.0, 2.0, 3.0], 3), ndarray::arr2(&[[0.0, 1.0, 2.0], [-1.0, 0.0, 3.0], [-2.0, -3.0, 0.0]]));
    }
}
