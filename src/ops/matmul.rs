//! Matrix products: row-major operands inside larger buffers, either of them transposed.

use crate::threads;
use ndarray::{Array3, ArrayView2, ArrayViewMut2, Axis, linalg::general_mat_mul, parallel::prelude::*};

/// What a product is multiplied with.
pub enum Factor<'a, B> {
    /// This number.
    Number(f32),
    /// `tanh` of the one number in an f32 buffer.
    Tanh(&'a B),
}

impl<B> From<f32> for Factor<'_, B> {
    fn from(x: f32) -> Self {
        Factor::Number(x)
    }
}

impl Factor<'_, Vec<f32>> {
    fn value(&self) -> f32 {
        match self {
            Factor::Number(x) => *x,
            Factor::Tanh(p) => p[0].tanh(),
        }
    }
}

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

/// `c = alpha · a · b + beta · c`: pieces of the product on rayon's threads, each a single-threaded BLAS call.
pub fn matmul(alpha: Factor<Vec<f32>>, a: Mat<Vec<f32>>, b: Mat<Vec<f32>>, beta: f32, c: MatMut<Vec<f32>>) {
    let (alpha, a, b) = (alpha.value(), a.view(), b.view());
    let (rows, cols) = (c.rows, c.cols);
    assert_eq!((a.nrows(), a.ncols(), b.ncols()), (rows, b.nrows(), cols), "matmul: shapes");
    let c = ArrayViewMut2::from_shape((rows, cols), &mut c.data[c.offset..][..rows * cols])
        .expect("the slice has rows · cols elements");
    threads::with_serial_blas(|| match Split::choose(rows, cols, a.ncols()) {
        Split::Whole => general_mat_mul_into(alpha, a, b, beta, c),
        Split::Rows => by_blocks(alpha, Axis(0), a, b, beta, c),
        Split::Columns => by_blocks(alpha, Axis(1), a, b, beta, c),
        Split::Inner => by_terms(alpha, a, b, beta, c),
    });
}

fn general_mat_mul_into(alpha: f32, a: ArrayView2<f32>, b: ArrayView2<f32>, beta: f32, mut c: ArrayViewMut2<f32>) {
    general_mat_mul(alpha, &a, &b, beta, &mut c);
}

/// How a product is cut for the threads. Depends on the shape alone.
#[derive(Debug, PartialEq)]
enum Split {
    Whole,
    /// Rows of a and c.
    Rows,
    /// Columns of b and c.
    Columns,
    /// The inner dimension: partial products that are added up.
    Inner,
}

/// Partial products of [`Split::Inner`]: fixed, since it decides the order of the sums.
const TERMS: usize = 8;

impl Split {
    /// BLAS copies its operands into the order its kernel wants; a cut across one operand copies the other once per
    /// piece, a cut of the inner dimension writes c once per piece. Takes the cheapest.
    fn choose(rows: usize, cols: usize, inner: usize) -> Split {
        const WORTH_A_CUT: usize = 1 << 22;
        if 2 * rows * cols * inner < WORTH_A_CUT {
            return Split::Whole;
        }
        let repeats = |extent: usize| (extent / 64).min(TERMS);
        let candidates = [
            (rows >= 128, inner * cols * repeats(rows), Split::Rows),
            (cols >= 128, inner * rows * repeats(cols), Split::Columns),
            (inner >= TERMS * 128, 3 * rows * cols * TERMS, Split::Inner),
        ];
        let possible = candidates.into_iter().filter(|(possible, ..)| *possible);
        possible.min_by_key(|(_, copied, _)| *copied).map_or(Split::Whole, |(.., split)| split)
    }
}

/// Blocks of rows or columns of c. Their number depends on the extent alone: the kernel that BLAS takes for a block, and
/// so the last bits of the result, may depend on its size.
fn by_blocks(alpha: f32, axis: Axis, a: ArrayView2<f32>, b: ArrayView2<f32>, beta: f32, mut c: ArrayViewMut2<f32>) {
    let block = (c.len_of(axis) / 8).clamp(64, 2048).next_multiple_of(16);
    c.axis_chunks_iter_mut(axis, block).into_par_iter().enumerate().for_each(|(i, mut c)| {
        let own = (i * block) as isize..(i * block + c.len_of(axis)) as isize;
        if axis.index() == 0 {
            general_mat_mul(alpha, &a.slice_axis(Axis(0), own.into()), &b, beta, &mut c);
        } else {
            general_mat_mul(alpha, &a, &b.slice_axis(Axis(1), own.into()), beta, &mut c);
        }
    });
}

/// Partial products over pieces of the inner dimension, added in their order.
fn by_terms(alpha: f32, a: ArrayView2<f32>, b: ArrayView2<f32>, beta: f32, mut c: ArrayViewMut2<f32>) {
    let block = a.ncols().div_ceil(TERMS);
    let term = |i: usize, beta: f32, c: &mut ArrayViewMut2<f32>| {
        let own = (i * block) as isize..((i + 1) * block).min(a.ncols()) as isize;
        let (a, b) = (a.slice_axis(Axis(1), own.clone().into()), b.slice_axis(Axis(0), own.into()));
        general_mat_mul(alpha, &a, &b, beta, c);
    };
    let mut partial = Array3::<f32>::zeros((TERMS - 1, c.nrows(), c.ncols()));
    rayon::join(
        || term(0, beta, &mut c),
        || partial.outer_iter_mut().into_par_iter().enumerate().for_each(|(i, mut p)| term(i + 1, 0.0, &mut p)),
    );
    c.outer_iter_mut().into_par_iter().enumerate().for_each(|(row, mut c)| {
        for p in partial.outer_iter() {
            c += &p.row(row);
        }
    });
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
        let cases = [
            ((1, 1, 1), Split::Whole),
            ((3, 5, 2), Split::Whole),
            ((1, 300, 7), Split::Whole),
            ((257, 33, 19), Split::Whole),
            ((700, 129, 130), Split::Rows),
            ((40, 130, 901), Split::Columns),
            ((21, 2100, 131), Split::Inner),
        ];
        for ((m, k, n), split) in cases {
            assert_eq!(Split::choose(m, n, k), split);
            for (ta, tb) in [(false, false), (false, true), (true, false), (true, true)] {
                let (a, b, mut c) = (noise(1, m * k), noise(2, k * n), noise(3, m * n));
                let product = reference(&a, ta, &b, tb, (m, k, n));
                let expected: Vec<f64> = product.iter().zip(&c).map(|(p, c)| 0.5 * p + 2.0 * f64::from(*c)).collect();
                let stored = |t: bool, r, c| if t { (c, r) } else { (r, c) };
                let ((ar, ac), (br, bc)) = (stored(ta, m, k), stored(tb, k, n));
                let (a, b) = (Mat::new(&a, ar, ac), Mat::new(&b, br, bc));
                let (a, b) = (if ta { a.t() } else { a }, if tb { b.t() } else { b });
                matmul(0.5.into(), a, b, 2.0, MatMut::new(&mut c, m, n));
                assert_close(&format!("{m}x{k}x{n} {ta} {tb}"), &c, &expected, 1e-5);
            }
        }
    }

    #[test]
    fn rows_inside_a_buffer_are_used_and_the_others_left_alone() {
        let (a, b) = (noise(1, 10 * 4), noise(2, 6 * 4));
        let mut c = vec![f32::NAN; 5 * 6];
        matmul(
            1.0.into(),
            Mat::new(&a, 3, 4).from_row(2),
            Mat::new(&b, 6, 4).t(),
            0.0,
            MatMut::new(&mut c, 3, 6).from_row(1),
        );
        assert_close("rows", &c[6..24], &reference(&a[8..20], false, &b, true, (3, 4, 6)), 1e-6);
        assert!(c[..6].iter().chain(&c[24..]).all(|x| x.is_nan()));
    }
}
