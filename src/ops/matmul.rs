//! Matrix products: row-major operands inside larger buffers, either of them transposed.

use crate::threads;
use ndarray::{ArrayView2, ArrayViewMut2, Axis, linalg::general_mat_mul, parallel::prelude::*};

/// A row-major matrix inside a buffer, read as it lies or transposed.
pub struct Mat<'a, B> {
    /// The buffer.
    pub data: &'a B,
    /// Element at which the matrix starts.
    pub offset: usize,
    /// Rows as stored.
    pub rows: usize,
    /// Columns as stored.
    pub cols: usize,
    /// Whether the product uses the transpose.
    pub transposed: bool,
}

impl<'a, B> Mat<'a, B> {
    /// The first `rows · cols` elements of `data`.
    pub fn new(data: &'a B, rows: usize, cols: usize) -> Self {
        Mat { data, offset: 0, rows, cols, transposed: false }
    }

    /// The same extents, starting `rows` whole rows later.
    pub fn from_row(self, row: usize) -> Self {
        Mat { offset: self.offset + row * self.cols, ..self }
    }

    /// The transpose.
    pub fn t(self) -> Self {
        Mat { transposed: !self.transposed, ..self }
    }
}

/// A row-major matrix inside a buffer that a product writes.
pub struct MatMut<'a, B> {
    /// The buffer.
    pub data: &'a mut B,
    /// Element at which the matrix starts.
    pub offset: usize,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
}

impl<'a, B> MatMut<'a, B> {
    /// The first `rows · cols` elements of `data`.
    pub fn new(data: &'a mut B, rows: usize, cols: usize) -> Self {
        MatMut { data, offset: 0, rows, cols }
    }

    /// The same extents, starting `rows` whole rows later.
    pub fn from_row(self, row: usize) -> Self {
        MatMut { offset: self.offset + row * self.cols, ..self }
    }
}

impl Mat<'_, Vec<f32>> {
    fn view(&self) -> ArrayView2<'_, f32> {
        let stored = &self.data[self.offset..][..self.rows * self.cols];
        let view = ArrayView2::from_shape((self.rows, self.cols), stored).expect("the slice has rows · cols elements");
        if self.transposed { view.reversed_axes() } else { view }
    }
}

/// `c = alpha · a · b + beta · c`: blocks of c on rayon's threads, each a single-threaded BLAS call.
pub fn matmul(alpha: f32, a: Mat<Vec<f32>>, b: Mat<Vec<f32>>, beta: f32, c: MatMut<Vec<f32>>) {
    let (a, b) = (a.view(), b.view());
    let (rows, cols) = (c.rows, c.cols);
    assert_eq!((a.nrows(), a.ncols(), b.ncols()), (rows, b.nrows(), cols), "matmul: shapes");
    let c = ArrayViewMut2::from_shape((rows, cols), &mut c.data[c.offset..][..rows * cols])
        .expect("the slice has rows · cols elements");
    threads::with_serial_blas(|| product(alpha, a, b, beta, c));
}

fn product(alpha: f32, a: ArrayView2<f32>, b: ArrayView2<f32>, beta: f32, mut c: ArrayViewMut2<f32>) {
    let (rows, cols) = c.dim();
    let (axis, extent) = if rows >= cols { (Axis(0), rows) } else { (Axis(1), cols) };
    let block = block_len(extent, 2 * rows * cols * a.ncols() / extent);
    let blocks = c.axis_chunks_iter_mut(axis, block).into_par_iter().enumerate();
    blocks.for_each(|(i, mut c)| {
        let own = (i * block) as isize..(i * block + c.len_of(axis)) as isize;
        if axis.index() == 0 {
            general_mat_mul(alpha, &a.slice_axis(Axis(0), own.into()), &b, beta, &mut c);
        } else {
            general_mat_mul(alpha, &a, &b.slice_axis(Axis(1), own.into()), beta, &mut c);
        }
    });
}

/// Rows (or columns) of c that one task takes, given the operations each of them costs. Depends on the shape alone, so
/// that results do not depend on the number of threads.
fn block_len(extent: usize, flops_each: usize) -> usize {
    const MIN_FLOPS: usize = 1 << 22;
    const MIN_LEN: usize = 64;
    let least = MIN_LEN.max(MIN_FLOPS.div_ceil(flops_each.max(1)));
    // An even number of equal blocks, at most 32, in whole vector registers.
    let mut count = 1;
    while count < 32 && extent / (2 * count) >= least {
        count *= 2;
    }
    extent.div_ceil(count).next_multiple_of(16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_close, noise};

    fn reference(a: &[f32], ta: bool, b: &[f32], tb: bool, (m, k, n): (usize, usize, usize)) -> Vec<f64> {
        let at = |i: usize, j: usize| f64::from(if ta { a[j * m + i] } else { a[i * k + j] });
        let bt = |i: usize, j: usize| f64::from(if tb { b[j * k + i] } else { b[i * n + j] });
        (0..m * n).map(|e| (0..k).map(|l| at(e / n, l) * bt(l, e % n)).sum()).collect()
    }

    #[test]
    fn every_orientation_and_odd_shape_matches_f64() {
        for (m, k, n) in [(1, 1, 1), (3, 5, 2), (1, 300, 7), (257, 33, 19), (19, 33, 1201), (700, 129, 130)] {
            for (ta, tb) in [(false, false), (false, true), (true, false), (true, true)] {
                let (a, b, mut c) = (noise(1, m * k), noise(2, k * n), noise(3, m * n));
                let product = reference(&a, ta, &b, tb, (m, k, n));
                let expected: Vec<f64> = product.iter().zip(&c).map(|(p, c)| 0.5 * p + 2.0 * f64::from(*c)).collect();
                let stored = |t: bool, r, c| if t { (c, r) } else { (r, c) };
                let ((ar, ac), (br, bc)) = (stored(ta, m, k), stored(tb, k, n));
                let (a, b) = (Mat::new(&a, ar, ac), Mat::new(&b, br, bc));
                let (a, b) = (if ta { a.t() } else { a }, if tb { b.t() } else { b });
                matmul(0.5, a, b, 2.0, MatMut::new(&mut c, m, n));
                assert_close(&format!("{m}x{k}x{n} {ta} {tb}"), &c, &expected, 1e-5);
            }
        }
    }

    #[test]
    fn rows_inside_a_buffer_are_used_and_the_others_left_alone() {
        let (a, b) = (noise(1, 10 * 4), noise(2, 6 * 4));
        let mut c = vec![f32::NAN; 5 * 6];
        matmul(1.0, Mat::new(&a, 3, 4).from_row(2), Mat::new(&b, 6, 4).t(), 0.0, MatMut::new(&mut c, 3, 6).from_row(1));
        assert_close("rows", &c[6..24], &reference(&a[8..20], false, &b, true, (3, 4, 6)), 1e-6);
        assert!(c[..6].iter().chain(&c[24..]).all(|x| x.is_nan()));
    }
}
