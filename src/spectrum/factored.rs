//! Singular values of sums of low-rank deltas from their factors; the dense delta is never formed.
//!
//! Stack the factors of K cycles, `L = [s1 L1 | .. | sK LK]` (`[m, T]`, T the sum of the ranks) and `R = [R1; ..; RK]`
//! (`[T, n]`). With `L = Q U` and `Rᵀ = P V` (`U`, `V` upper trapezoidal) the delta `L R = Q (U Vᵀ) Pᵀ` has the
//! singular values of the small core `U Vᵀ`. The first k cycles are the first columns of L, whose triangle is the
//! leading block of U: one QR of each side serves every cycle.

use super::{
    measures::BELOW,
    svd::{self, Sigma, SvdOptions},
};
use crate::{
    delta::LowRank,
    error::{Error, Result},
};
use ndarray::{Array2, ArrayView2, Axis, concatenate, s};
use ndarray_linalg::{Lapack, MatrixLayout};
use std::{convert::Infallible, ops::Range};

/// Singular values of one cycle's delta and of the sum of all up to it: `min(m, n)` each, largest first.
#[derive(Clone, Debug)]
pub struct CycleValues {
    /// Of the cycle alone.
    pub own: Sigma,
    /// Of the first cycles up to this one.
    pub cumulative: Sigma,
}

/// Singular values of every cycle and of every partial sum of `deltas`, which have one shape. `options` and `tolerance`
/// as for [`svd::streamed`]; they matter where the ranks add up to more than a few hundred.
pub fn singular_values(deltas: &[LowRank<f64>], options: SvdOptions, tolerance: f64) -> Result<Vec<CycleValues>> {
    let Some(first) = deltas.first() else { return Ok(Vec::new()) };
    let (m, n) = first.shape();
    let lefts: Vec<Array2<f64>> = deltas.iter().map(|d| &d.left * d.scaling).collect();
    let rights: Vec<ArrayView2<f64>> = deltas.iter().map(|d| d.right.t()).collect();
    let shape_error = |e| Error::environment(format!("stacking factors: {e}"));
    let left = concatenate(Axis(1), &lefts.iter().map(|l| l.view()).collect::<Vec<_>>()).map_err(shape_error)?;
    let right = concatenate(Axis(1), &rights).map_err(shape_error)?;
    let (u, v) = (triangle(left)?, triangle(right)?);

    let mut values = Vec::new();
    let mut end = 0;
    for delta in deltas {
        let begin = end;
        end += delta.r();
        let block = |t: &Array2<f64>| triangle(t.slice(s![..t.nrows().min(end), begin..end]).to_owned());
        let core = |u: ArrayView2<f64>, v: ArrayView2<f64>| core(u, v, m.min(n), options, tolerance);
        let own = core(block(&u)?.view(), block(&v)?.view())?;
        let leading = |t: &Array2<f64>| t.slice(s![..t.nrows().min(end), ..end]).to_owned();
        let cumulative = if begin == 0 { own.clone() } else { core(leading(&u).view(), leading(&v).view())? };
        values.push(CycleValues { own, cumulative });
    }
    Ok(values)
}

/// Singular values of `u vᵀ`, padded with the exact zeros that make them `count`.
fn core(u: ArrayView2<f64>, v: ArrayView2<f64>, count: usize, options: SvdOptions, tolerance: f64) -> Result<Sigma> {
    let product = u.dot(&v.t());
    let block = |rows: Range<usize>, columns: Range<usize>, out: &mut [f64]| {
        out.iter_mut().zip(product.slice(s![rows, columns])).for_each(|(o, x)| *o = *x);
        Ok(Ok::<(), Infallible>(()))
    };
    let Ok(mut sigma) = svd::streamed(product.dim(), options, tolerance, BELOW, block)?;
    sigma.values.resize(count, 0.0);
    Ok(sigma)
}

/// The upper trapezoidal factor of a QR decomposition, `[min(rows, columns), columns]` (LAPACK `dgeqrf`).
fn triangle(matrix: Array2<f64>) -> Result<Array2<f64>> {
    let (rows, columns) = matrix.dim();
    if rows == 0 || columns == 0 {
        return Ok(Array2::zeros((0, columns)));
    }
    // Column-major, so that LAPACK's own order applies.
    let mut entries: Vec<f64> = matrix.t().iter().copied().collect();
    let layout = MatrixLayout::F { col: columns as i32, lda: rows as i32 };
    f64::householder(layout, &mut entries).map_err(|e| Error::environment(format!("LAPACK dgeqrf: {e}")))?;
    let kept = rows.min(columns);
    Ok(Array2::from_shape_fn((kept, columns), |(i, j)| if i <= j { entries[j * rows + i] } else { 0.0 }))
}

#[cfg(test)]
mod tests {
    use super::{super::svd::Method, *};

    fn random(seed: u64, rows: usize, columns: usize) -> Array2<f64> {
        let mut state = seed;
        Array2::from_shape_simple_fn((rows, columns), || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as f64 / (1u64 << 30) as f64 - 1.0
        })
    }

    /// Sums stay low-rank (T < min), reach it, or exceed it on one or both sides: all agree with the dense SVD.
    #[test]
    fn every_partial_sum_agrees_with_the_dense_path() {
        for (m, n, ranks) in [
            (40, 30, vec![4, 4, 4]),
            (12, 50, vec![5, 3, 6, 2]),
            (6, 5, vec![4, 4]),
            (9, 9, vec![9]),
            (320, 400, vec![150, 150]),
        ] {
            let deltas: Vec<LowRank<f64>> = (ranks.iter().enumerate())
                .map(|(k, &r)| LowRank {
                    left: random(k as u64 + 1, m, r),
                    right: random(k as u64 + 100, r, n),
                    scaling: 0.5 + k as f64,
                })
                .collect();
            let mut sum = Array2::zeros((m, n));
            for (delta, found) in
                deltas.iter().zip(singular_values(&deltas, SvdOptions::cpu(Method::Auto), 1e-5).unwrap())
            {
                let own = delta.dense();
                sum += &own;
                for (dense, values) in [(own, &found.own.values), (sum.clone(), &found.cumulative.values)] {
                    let expected =
                        svd::singular_values(dense.into_raw_vec_and_offset().0.as_mut_slice(), m, n).unwrap();
                    assert_eq!(values.len(), expected.len());
                    for (a, b) in values.iter().zip(&expected) {
                        let allowed = if m < 300 { 1e-12 } else { 1e-6 };
                        assert!((a - b).abs() < allowed * expected[0], "{m}x{n}: {a} {b}");
                    }
                }
                assert!(found.own.values[delta.r().min(m).min(n)..].iter().all(|&s| s == 0.0));
            }
        }
    }

    #[test]
    fn a_zero_delta_has_zero_values() {
        let delta = LowRank { left: Array2::zeros((5, 2)), right: random(1, 2, 4), scaling: 2.0 };
        assert_eq!(
            singular_values(&[delta], SvdOptions::cpu(Method::Auto), 1e-5).unwrap()[0].cumulative.values,
            [0.0; 4]
        );
    }
}
