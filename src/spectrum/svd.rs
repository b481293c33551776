//! Singular values of a dense matrix, values only, in f64.

use crate::error::{Error, Result};
use ndarray::ArrayViewMut2;
use ndarray_linalg::{JobSvd, SVDDCInplace};

/// Singular values of a row-major `rows x columns` matrix, largest first, by LAPACK `dgesdd` without vectors
/// (bidiagonal reduction, then dqds: relative accuracy of a few `f64::EPSILON * s1`). Overwrites `matrix`.
/// Every entry must be finite.
pub fn singular_values(matrix: &mut [f64], rows: usize, columns: usize) -> Result<Vec<f64>> {
    if rows == 0 || columns == 0 {
        return Ok(Vec::new());
    }
    let mut view = ArrayViewMut2::from_shape((rows, columns), matrix)
        .map_err(|e| Error::world(format!("a {rows} x {columns} matrix does not fit its buffer: {e}")))?;
    let (_, sigma, _) = view.svddc_inplace(JobSvd::None).map_err(|e| Error::world(format!("LAPACK dgesdd: {e}")))?;
    Ok(descending(sigma.to_vec()))
}

/// Clears the sign of rounding below zero and sorts, largest first.
fn descending(mut sigma: Vec<f64>) -> Vec<f64> {
    sigma.iter_mut().for_each(|s| *s = s.max(0.0));
    sigma.sort_by(|a, b| b.total_cmp(a));
    sigma
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_at_the_edge_have_the_obvious_values() {
        assert!(singular_values(&mut [], 0, 5).unwrap().is_empty());
        assert!(singular_values(&mut [], 5, 0).unwrap().is_empty());
        assert_eq!(singular_values(&mut [-3.0], 1, 1).unwrap(), [3.0]);
        let row = singular_values(&mut [3.0, 0.0, 4.0], 1, 3).unwrap();
        assert!(row.len() == 1 && (row[0] - 5.0).abs() < 1e-15);
        let column = singular_values(&mut [3.0, 0.0, 4.0], 3, 1).unwrap();
        assert!(column.len() == 1 && (column[0] - 5.0).abs() < 1e-15);
        assert_eq!(singular_values(&mut [0.0; 6], 2, 3).unwrap(), [0.0, 0.0]);
    }

    #[test]
    fn a_diagonal_keeps_its_values() {
        let mut m = [0.0, 2.0, 0.0, -7.0, 0.0, 0.0];
        let s = singular_values(&mut m, 2, 3).unwrap();
        assert!((s[0] - 7.0).abs() < 1e-14 && (s[1] - 2.0).abs() < 1e-14);
    }
}
