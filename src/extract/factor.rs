//! One matrix: its difference, the truncated SVD, and how much of it the stored factors hold.

use super::Size;
use crate::{
    checkpoint::Tensor,
    delta::unravel,
    error::{Error, Result},
};
use ndarray::{Array2, Axis, linalg::general_mat_mul, s};
use ndarray_linalg::{JobSvd, SVDDCInto};

/// The factors of one difference, as they will be stored, and what they miss. All energies are squared Frobenius norms.
pub(super) struct Factors {
    /// `[r, in]`, `sqrt(S) Vᵀ`.
    pub a: Vec<f32>,
    /// `[out, r]`, `U sqrt(S)`.
    pub b: Vec<f32>,
    pub r: usize,
    /// `||dW||^2`
    pub energy: f64,
    /// Of it, what the r largest singular values hold.
    pub captured: f64,
    /// `||dW - B A||^2`, with the factors rounded to f32 as they are stored.
    pub residual: f64,
}

/// Values of the base that are read at a time.
const CHUNK: usize = 1 << 16;

/// `tuned - base`, row-major. Refuses values that are not finite.
pub(super) fn difference(base: &Tensor, tuned: &Tensor) -> Result<Vec<f64>> {
    let mut delta = vec![0.0; tuned.elements()];
    let mut before = vec![0.0; CHUNK.min(delta.len())];
    tuned.read_f64(0, &mut delta)?;
    for (chunk, delta) in delta.chunks_mut(CHUNK).enumerate() {
        let before = &mut before[..delta.len()];
        base.read_f64(chunk * CHUNK, before)?;
        for (i, (d, b)) in delta.iter_mut().zip(before).enumerate() {
            let after = *d;
            *d -= *b;
            if !d.is_finite() {
                return Err(Error::request(format!(
                    "the delta of '{}' is not finite at {:?}: '{}' holds {b} and '{}' holds {after}",
                    tuned.name(),
                    unravel(chunk * CHUNK + i, tuned.shape()),
                    base.file().path().display(),
                    tuned.file().path().display()
                ))
                .help(
                    "training diverged or a file is damaged; `relora-kit inspect --stats` lists what is not finite",
                ));
            }
        }
    }
    Ok(delta)
}

/// The best approximation of `delta` of the asked size (Eckart and Young), by LAPACK's `dgesdd` in f64.
/// `transposed`: the weight is stored `[in, out]`.
pub(super) fn factor(delta: Array2<f64>, size: Size, transposed: bool) -> Result<Factors> {
    let delta = if transposed { delta.reversed_axes().as_standard_layout().into_owned() } else { delta };
    let svd = |e| Error::environment(format!("LAPACK dgesdd: {e}"));
    let (u, sigma, vt) = delta.clone().svddc_into(JobSvd::Some).map_err(svd)?;
    let (Some(u), Some(vt)) = (u, vt) else { return Err(Error::environment("LAPACK dgesdd returned no vectors")) };
    let squares: Vec<f64> = sigma.iter().map(|s| s * s).collect();
    let r = match size {
        Size::Rank(r) => r,
        Size::Energy(share) => rank_for(&squares, share),
    };
    let roots = sigma.slice(s![..r]).mapv(|s| s.max(0.0).sqrt());
    let b = (&u.slice(s![.., ..r]) * &roots).mapv(|x| x as f32);
    let a = (&vt.slice(s![..r, ..]) * &roots.insert_axis(Axis(1))).mapv(|x| x as f32);
    let energy = delta.iter().map(|x| x * x).sum();
    let mut rest = delta;
    general_mat_mul(-1.0, &b.mapv(f64::from), &a.mapv(f64::from), 1.0, &mut rest);
    Ok(Factors {
        a: a.iter().copied().collect(),
        b: b.iter().copied().collect(),
        r,
        energy,
        captured: squares[..r].iter().sum(),
        residual: rest.iter().map(|x| x * x).sum(),
    })
}

/// The smallest rank whose share of the energy is at least `share`; 1 at least. What f64 cannot tell apart counts as equal.
fn rank_for(squares: &[f64], share: f64) -> usize {
    let total: f64 = squares.iter().sum();
    let wanted = share * total * (1.0 - 1e-13);
    let mut sum = 0.0;
    let reached = squares.iter().position(|s| {
        sum += s;
        sum >= wanted
    });
    reached.map_or(squares.len(), |i| i + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn energy_asks_for_the_smallest_rank_that_has_it() {
        let squares = [9.0, 4.0, 1.0, 0.0];
        assert_eq!([0.1, 9.0 / 14.0, 0.65, 0.99, 1.0].map(|share| rank_for(&squares, share)), [1, 1, 2, 3, 3]);
    }

    #[test]
    fn a_truncated_diagonal_keeps_the_largest_in_either_orientation() {
        let delta = ndarray::arr2(&[[3.0, 0.0, 0.0], [0.0, 0.0, 4.0]]);
        for transposed in [false, true] {
            let f = factor(delta.clone(), Size::Rank(1), transposed).unwrap();
            assert_eq!((f.a.len(), f.b.len()), if transposed { (2, 3) } else { (3, 2) });
            assert!((f.energy - 25.0).abs() < 1e-12 && (f.captured - 16.0).abs() < 1e-12);
            assert!((f.residual - 9.0).abs() < 1e-5);
            let largest = f.a.iter().chain(&f.b).fold(0f32, |m, x| m.max(x.abs()));
            assert!((largest - 2.0).abs() < 1e-6, "both factors carry half of the singular value");
        }
    }
}
