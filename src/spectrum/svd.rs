//! Singular values of a matrix, values only, in f64: chooses between the Gram matrix and LAPACK's SVD.

use super::{
    gram::{self, Gram},
    lapack::Side,
};
use crate::{
    error::{Error, Result},
    ops::Solver,
};
use ndarray::ArrayViewMut2;
use ndarray_linalg::{JobSvd, SVDDCInplace};
use std::ops::Range;

/// How singular values are computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Method {
    /// The Gram matrix where it is accurate enough for every measure, LAPACK's SVD elsewhere.
    #[default]
    Auto,
    /// LAPACK's SVD everywhere: slower, relative accuracy down to `1e-15 * s1`.
    Dense,
}

/// Up to this `min(m, n)` the SVD costs little and is taken for its accuracy.
pub const SMALL: usize = 256;

/// Rows, or columns, of a panel: wide enough for the product to run at full speed.
pub const PANEL: usize = 256;

/// How, and on what device, the singular values of a matrix are computed.
#[derive(Clone, Copy)]
pub struct SvdOptions<'a> {
    /// Gram matrix or SVD.
    pub method: Method,
    /// Up to this `min(m, n)` the SVD is taken ([`SMALL`]).
    pub small: usize,
    /// Takes the Gram matrices.
    pub gpu: Option<&'a Solver>,
}

/// Singular values, largest first.
#[derive(Clone, Debug)]
pub struct Sigma {
    /// As many as the smaller extent.
    pub values: Vec<f64>,
    /// Whether a GPU computed them.
    pub on_gpu: bool,
}

impl SvdOptions<'_> {
    /// On the CPU.
    pub fn cpu(method: Method) -> SvdOptions<'static> {
        SvdOptions { method, small: SMALL, gpu: None }
    }

    /// Whether the Gram matrix serves a matrix of this shape, when values down to `tolerance * s1` count.
    pub fn takes_gram(&self, shape: (usize, usize), tolerance: f64) -> bool {
        self.method == Method::Auto
            && shape.0.min(shape.1) > self.small
            && tolerance > 10.0 * gram::relative_floor(shape)
    }
}

/// Singular values of a matrix that is read block by block: `block(rows, columns, out)` fills `out`, row-major, or
/// stops the whole with an `E`. `below` is an absolute size that values are compared with, too (0.1).
pub fn streamed<E>(
    shape: (usize, usize),
    options: SvdOptions,
    tolerance: f64,
    below: f64,
    mut block: impl FnMut(Range<usize>, Range<usize>, &mut [f64]) -> Result<std::result::Result<(), E>>,
) -> Result<std::result::Result<Sigma, E>> {
    let (m, n) = shape;
    if options.takes_gram(shape, tolerance) {
        let mut gram = Gram::new(shape, options.gpu)?;
        let (length, other) = if gram.side() == Side::Columns { shape } else { (n, m) };
        let mut panel = vec![0.0; PANEL.min(length) * other];
        for first in (0..length).step_by(PANEL) {
            let piece = first..length.min(first + PANEL);
            let (rows, columns) = if gram.side() == Side::Columns { (piece, 0..n) } else { (0..m, piece) };
            let (r, c) = (rows.len(), columns.len());
            if let Err(e) = block(rows, columns, &mut panel[..r * c])? {
                return Ok(Err(e));
            }
            gram.add(&panel[..r * c], r, c)?;
        }
        drop(panel);
        if let Some(values) = gram.singular_values()?
            && values.first().is_none_or(|s1| below > 10.0 * gram::relative_floor(shape) * s1)
        {
            return Ok(Ok(Sigma { values, on_gpu: options.gpu.is_some() }));
        }
    }
    let mut matrix = vec![0.0; m * n];
    match block(0..m, 0..n, &mut matrix)? {
        Ok(()) => singular_values(&mut matrix, m, n).map(|values| Ok(Sigma { values, on_gpu: false })),
        Err(e) => Ok(Err(e)),
    }
}

/// Singular values of a row-major `rows x columns` matrix, largest first, by LAPACK `dgesdd` without vectors
/// (bidiagonal reduction, then dqds: absolute accuracy of a few `f64::EPSILON * s1`). Overwrites `matrix`.
/// Every entry must be finite.
pub fn singular_values(matrix: &mut [f64], rows: usize, columns: usize) -> Result<Vec<f64>> {
    if rows == 0 || columns == 0 {
        return Ok(Vec::new());
    }
    let mut view = ArrayViewMut2::from_shape((rows, columns), matrix)
        .map_err(|e| Error::environment(format!("a {rows} x {columns} matrix does not fit its buffer: {e}")))?;
    let (_, sigma, _) =
        view.svddc_inplace(JobSvd::None).map_err(|e| Error::environment(format!("LAPACK dgesdd: {e}")))?;
    let mut sigma: Vec<f64> = sigma.iter().map(|s| s.max(0.0)).collect();
    sigma.sort_by(|a, b| b.total_cmp(a));
    Ok(sigma)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::{Array2, s};
    use ndarray_linalg::QR;

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

    fn random(seed: u64, rows: usize, columns: usize) -> Array2<f64> {
        let mut state = seed;
        Array2::from_shape_simple_fn((rows, columns), || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as f64 / (1u64 << 30) as f64 - 1.0
        })
    }

    /// A matrix with the given singular values between random orthogonal factors.
    fn with_values(m: usize, n: usize, values: &[f64]) -> Array2<f64> {
        let k = values.len();
        let (u, _) = random(1, m, k).qr().unwrap();
        let (v, _) = random(2, n, k).qr().unwrap();
        (&u.slice(s![.., ..k]) * &ndarray::Array1::from_vec(values.to_vec())).dot(&v.slice(s![.., ..k]).t())
    }

    fn by_gram(matrix: &Array2<f64>) -> Vec<f64> {
        let shape = matrix.dim();
        assert!(SvdOptions::cpu(Method::Auto).takes_gram(shape, super::super::measures::default_tolerance(shape)));
        let block = |rows: Range<usize>, columns: Range<usize>, out: &mut [f64]| {
            // The dense path asks for everything at once: it must not be needed here.
            assert!(rows.len() < shape.0 || columns.len() < shape.1, "fell back to the dense path");
            out.iter_mut().zip(matrix.slice(s![rows, columns])).for_each(|(o, x)| *o = *x);
            Ok(Ok::<(), ()>(()))
        };
        streamed(shape, SvdOptions::cpu(Method::Auto), 1e-5, f64::MAX, block).unwrap().unwrap().values
    }

    /// Both paths against the values the matrix was made with: spread, graded, deficient, clustered, huge and tiny.
    #[test]
    fn the_gram_path_agrees_to_a_millionth_of_the_largest() {
        let k = 270;
        let graded: Vec<f64> = (0..k).map(|i| 10f64.powf(-12.0 * i as f64 / k as f64)).collect();
        let spread: Vec<f64> = (0..k).map(|i| (k - i) as f64).collect();
        let deficient: Vec<f64> = (0..k).map(|i| if i < 24 { 3.0 - 0.1 * i as f64 } else { 0.0 }).collect();
        let clustered: Vec<f64> = (0..k).map(|i| if i < 100 { 2.0 } else { 1.0 + 1e-9 * (k - i) as f64 }).collect();
        let extreme = |scale: f64| spread.iter().map(|s| s * scale).collect::<Vec<f64>>();
        for values in [graded, spread.clone(), deficient, clustered, extreme(1e100), extreme(1e-100)] {
            for (m, n) in [(k, 700), (600, k), (k, k)] {
                let found = by_gram(&with_values(m, n, &values));
                assert_eq!(found.len(), k);
                for (a, b) in found.iter().zip(&values) {
                    assert!((a - b).abs() <= 1e-6 * values[0], "{m}x{n}: {a} {b}");
                }
            }
        }
    }

    #[test]
    fn a_zero_matrix_has_zero_values_on_the_gram_path() {
        assert_eq!(by_gram(&Array2::zeros((300, 400))), vec![0.0; 300]);
    }

    #[test]
    fn what_the_gram_path_cannot_resolve_takes_the_dense_one() {
        assert!(!SvdOptions::cpu(Method::Auto).takes_gram((300, 300), 1e-9), "a tolerance below the floor");
        assert!(!SvdOptions::cpu(Method::Auto).takes_gram((100, 5000), 1e-3), "a small matrix");
        assert!(!SvdOptions::cpu(Method::Dense).takes_gram((3000, 3000), 1e-3), "on request");
        // 0.1 lies below the floor of a huge matrix, squares overflow in an astronomic one.
        for scale in [1e9, 1e200] {
            let values: Vec<f64> = (0..300).map(|i| scale / (1.0 + i as f64)).collect();
            let matrix = with_values(300, 310, &values);
            let mut dense = false;
            let block = |rows: Range<usize>, columns: Range<usize>, out: &mut [f64]| {
                dense |= rows.len() == 300 && columns.len() == 310;
                out.iter_mut().zip(matrix.slice(s![rows, columns])).for_each(|(o, x)| *o = *x);
                Ok(Ok::<(), ()>(()))
            };
            let found = streamed((300, 310), SvdOptions::cpu(Method::Auto), 1e-5, 0.1, block).unwrap().unwrap().values;
            assert!(dense);
            assert!(found.iter().zip(&values).all(|(a, b)| (a - b).abs() <= 1e-12 * scale));
        }
    }
}
