//! The two routines of BLAS and LAPACK that no safe wrapper offers: accumulation of a Gram matrix, and symmetric
//! eigenvalues by two-stage reduction.

use crate::{
    error::{Error, Result},
    threads,
};
use cblas_sys::{CBLAS_LAYOUT, CBLAS_TRANSPOSE, CBLAS_UPLO, cblas_dsyrk};
use std::ffi::{c_char, c_int};

/// Which side of a panel `P` is multiplied away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// `G += Pᵀ P`
    Columns,
    /// `G += P Pᵀ`
    Rows,
}

/// Adds the product of a row-major `rows x columns` panel with itself to the upper triangle (row-major) of the
/// symmetric `gram`, whose extent is the panel's columns or rows.
pub fn add_product(gram: &mut [f64], side: Side, panel: &[f64], rows: usize, columns: usize) -> Result<()> {
    let (n, k, transposed) = match side {
        Side::Columns => (columns, rows, CBLAS_TRANSPOSE::CblasTrans),
        Side::Rows => (rows, columns, CBLAS_TRANSPOSE::CblasNoTrans),
    };
    if rows == 0 || columns == 0 {
        return Ok(());
    }
    assert!(gram.len() == n * n && panel.len() >= rows * columns, "panel and Gram matrix do not fit");
    let (n, k, lda) = (int(n)?, int(k)?, int(columns)?);
    // SAFETY: the assertion above makes both buffers as large as dsyrk's arguments say: gram n x n with stride n, the
    // panel rows x columns with stride columns. dsyrk reads the panel and writes gram only.
    unsafe {
        cblas_dsyrk(
            CBLAS_LAYOUT::CblasRowMajor,
            CBLAS_UPLO::CblasUpper,
            transposed,
            n,
            k,
            1.0,
            panel.as_ptr(),
            lda,
            1.0,
            gram.as_mut_ptr(),
            n,
        );
    }
    Ok(())
}

/// From this extent on the reduction by way of a band matrix wins over `dsyev`'s: with one thread 0.54 s against 0.61 s at
/// 2048, but 0.39 s against 0.29 s at 1792 and 0.10 s against 0.06 s at 1024 (OpenBLAS 0.3.21, AVX-512).
const TWO_STAGE: usize = 2048;

/// Half the width of the band. All three stages take 0.79 s with n = 2048 and 5.7 s with 4096 at 16, which `dsyev_2stage` would
/// choose, 0.67 and 4.8 s at 32, 0.63 and 4.1 s at 64.
const BAND: usize = 64;

/// Below this extent the reduction keeps to one thread: at 2048 a second one changed little, and on a busy machine handing over
/// its many small products took up to four times as long as computing them.
const THREADS: usize = 4096;

// LAPACK's routines behind dsyev_2stage, which lapack-sys does not declare. The last arguments are the lengths that
// Fortran passes for characters.
unsafe extern "C" {
    fn dsytrd_sy2sb_(
        uplo: *const c_char,
        n: *const c_int,
        kd: *const c_int,
        a: *mut f64,
        lda: *const c_int,
        ab: *mut f64,
        ldab: *const c_int,
        tau: *mut f64,
        work: *mut f64,
        lwork: *const c_int,
        info: *mut c_int,
        uplo_len: usize,
    );
    fn dsytrd_sb2st_(
        stage1: *const c_char,
        vect: *const c_char,
        uplo: *const c_char,
        n: *const c_int,
        kd: *const c_int,
        ab: *mut f64,
        ldab: *const c_int,
        d: *mut f64,
        e: *mut f64,
        hous: *mut f64,
        lhous: *const c_int,
        work: *mut f64,
        lwork: *const c_int,
        info: *mut c_int,
        stage1_len: usize,
        vect_len: usize,
        uplo_len: usize,
    );
}

/// Eigenvalues, smallest first, of the symmetric `n x n` matrix whose upper triangle (row-major) is given.
/// Overwrites `gram`.
pub fn eigenvalues(gram: &mut [f64], n: usize) -> Result<Vec<f64>> {
    assert_eq!(gram.len(), n * n, "the matrix is not n x n");
    match n {
        0 => Ok(Vec::new()),
        _ if n < TWO_STAGE => in_one_stage(gram, n),
        _ if n < THREADS => threads::with_serial_blas(|| in_two_stages(gram, n)),
        _ => in_two_stages(gram, n),
    }
}

/// LAPACK `dsyev`.
fn in_one_stage(gram: &mut [f64], n: usize) -> Result<Vec<f64>> {
    let size = int(n)?;
    let (job, uplo) = (b'N' as c_char, LOWER);
    let mut values = vec![0.0; n];
    let mut run = |work: &mut [f64], lwork: c_int| {
        let mut info = 0;
        // SAFETY: gram has n * n entries and values n; work has at least lwork entries, or one for the size query
        // (lwork -1). With job 'N' nothing else is written.
        unsafe {
            let (gram, values, work) = (gram.as_mut_ptr(), values.as_mut_ptr(), work.as_mut_ptr());
            lapack_sys::dsyev_(&job, &uplo, &size, gram, &size, values, work, &lwork, &mut info);
        }
        check("dsyev", info)
    };
    with_workspace(&mut run)?;
    Ok(values)
}

/// Full to band, band to tridiagonal, then the eigenvalues by `dsterf`: what LAPACK's `dsyev_2stage` does, with a wider
/// band. Both steps keep the absolute accuracy of `dsyev`.
fn in_two_stages(gram: &mut [f64], n: usize) -> Result<Vec<f64>> {
    let (size, half) = (int(n)?, int(BAND)?);
    let (rows, none, reduced) = (half + 1, b'N' as c_char, b'Y' as c_char);
    let mut banded = vec![0.0; (BAND + 1) * n];
    let mut tau = vec![0.0; n];
    with_workspace(&mut |work, lwork| {
        let mut info = 0;
        // SAFETY: gram is n x n, banded (half + 1) x n, tau has n entries, of which n - half are used; work as queried.
        unsafe {
            let (gram, banded, tau) = (gram.as_mut_ptr(), banded.as_mut_ptr(), tau.as_mut_ptr());
            let work = work.as_mut_ptr();
            dsytrd_sy2sb_(&LOWER, &size, &half, gram, &size, banded, &rows, tau, work, &lwork, &mut info, 1);
        }
        check("dsytrd_sy2sb", info)
    })?;
    let (mut diagonal, mut beside) = (vec![0.0; n], vec![0.0; n]);
    let mut householder = vec![0.0];
    with_workspace(&mut |work, lwork| {
        let (mut info, lhous) = (0, if lwork == -1 { -1 } else { int(householder.len())? });
        // SAFETY: banded is (half + 1) x n, diagonal and beside have n entries; householder and work as queried.
        unsafe {
            let (banded, hous) = (banded.as_mut_ptr(), householder.as_mut_ptr());
            let (d, e, work) = (diagonal.as_mut_ptr(), beside.as_mut_ptr(), work.as_mut_ptr());
            #[rustfmt::skip]
            dsytrd_sb2st_(
                &reduced, &none, &LOWER, &size, &half, banded, &rows, d, e, hous, &lhous, work, &lwork, &mut info, 1, 1, 1,
            );
        }
        if lwork == -1 {
            householder = vec![0.0; householder[0] as usize + 1];
        }
        check("dsytrd_sb2st", info)
    })?;
    let mut info = 0;
    // SAFETY: n entries each; dsterf reads n - 1 of the second.
    unsafe { lapack_sys::dsterf_(&size, diagonal.as_mut_ptr(), beside.as_mut_ptr(), &mut info) };
    check("dsterf", info)?;
    Ok(diagonal)
}

/// Row-major upper is column-major lower, with which the band reduction is a quarter faster than with upper.
const LOWER: c_char = b'L' as c_char;

/// Calls `run` with `lwork` -1 to learn the size of its workspace, then with that workspace.
fn with_workspace(run: &mut impl FnMut(&mut [f64], c_int) -> Result<()>) -> Result<()> {
    let mut query = [0.0];
    run(&mut query, -1)?;
    let lwork = int(query[0] as usize + 1)?;
    run(&mut vec![0.0; lwork as usize], lwork)
}

fn check(routine: &str, info: c_int) -> Result<()> {
    if info == 0 { Ok(()) } else { Err(Error::environment(format!("LAPACK {routine}: info {info}"))) }
}

fn int(n: usize) -> Result<c_int> {
    c_int::try_from(n).map_err(|_| Error::request(format!("extent {n} is too large for LAPACK")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panels_add_up_to_the_gram_matrix() {
        // P = [1 2 3; 4 5 6]
        let panel = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        let mut gram = [0.0; 9];
        add_product(&mut gram, Side::Columns, &panel[..3], 1, 3).unwrap();
        add_product(&mut gram, Side::Columns, &panel[3..], 1, 3).unwrap();
        assert_eq!([gram[0], gram[1], gram[4], gram[2], gram[5], gram[8]], [17.0, 22.0, 29.0, 27.0, 36.0, 45.0]);
        let mut gram = [0.0; 4];
        add_product(&mut gram, Side::Rows, &panel, 2, 3).unwrap();
        assert_eq!([gram[0], gram[1], gram[3]], [14.0, 32.0, 77.0]);
    }

    #[test]
    fn both_solvers_find_the_known_eigenvalues_of_a_tridiagonal_matrix() {
        // 2 on the diagonal, -1 beside it: 2 - 2 cos(k pi / (n + 1)).
        for n in [1, 2, 50, TWO_STAGE, TWO_STAGE + 1] {
            let mut matrix = vec![0.0; n * n];
            for i in 0..n {
                matrix[i * n + i] = 2.0;
                if i > 0 {
                    matrix[(i - 1) * n + i] = -1.0;
                }
            }
            let found = eigenvalues(&mut matrix, n).unwrap();
            for (k, value) in (1..).zip(found) {
                let expected = 2.0 - 2.0 * (k as f64 * std::f64::consts::PI / (n + 1) as f64).cos();
                assert!((value - expected).abs() < 1e-12, "{n}: {value} {expected}");
            }
        }
    }
}
