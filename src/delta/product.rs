//! Products of narrow factors whose bits do not depend on the processor.
//!
//! BLAS's kernels add up in an order of their own on each: the same merge would differ in the last places from machine to
//! machine, and by more than PEFT's does from the exact sum. Here, every element is one sum from the first term to the last, fused.

use super::real::Real;
use multiversion::multiversion;
use ndarray::{ArrayView2, ArrayViewMut2, Axis};

/// Terms of a sum that the crate `gemm` adds up without a break, on any processor. Longer sums break where its cache has it.
#[cfg(test)]
const LONGEST: usize = 512;

/// `out = scale * a @ b` on the thread that calls it: the same bits on every processor with fused multiplication and addition,
/// whatever the width of its vectors, for up to 512 terms.
pub(super) fn multiply<T: Real>(scale: T, a: ArrayView2<T>, b: ArrayView2<T>, mut out: ArrayViewMut2<T>) {
    let ((m, k), (inner, n)) = (a.dim(), b.dim());
    assert_eq!((m, inner, n), (out.nrows(), k, out.ncols()), "product: shapes");
    let [a_strides, b_strides, out_strides] = [a.strides(), b.strides(), out.strides()].map(|s| [s[0], s[1]]);
    // `gemm` has ways of its own for these: it scales a factor before, or adds up several sums.
    let dots = a_strides[1] == 1 && b_strides[0] == 1;
    if m == 1 || n == 1 || k <= 2 || dots {
        return by_rows(scale, a, b, out);
    }
    // SAFETY: the three views have these shapes and strides, and `out` is borrowed alone.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            out_strides[1],
            out_strides[0],
            false,
            a.as_ptr(),
            a_strides[1],
            a_strides[0],
            b.as_ptr(),
            b_strides[1],
            b_strides[0],
            T::one(),
            scale,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// [`multiply`], in plain loops.
#[multiversion(targets("x86_64+avx512f", "x86_64+avx2+fma", "aarch64+neon"))]
fn by_rows<T: Real>(scale: T, a: ArrayView2<T>, b: ArrayView2<T>, mut out: ArrayViewMut2<T>) {
    let mut sums = vec![T::zero(); b.ncols()];
    for (a, mut out) in a.axis_iter(Axis(0)).zip(out.axis_iter_mut(Axis(0))) {
        sums.fill(T::zero());
        for (&x, b) in a.iter().zip(b.axis_iter(Axis(0))) {
            match b.to_slice() {
                Some(b) => sums.iter_mut().zip(b).for_each(|(sum, &y)| *sum = x.mul_add(y, *sum)),
                None => sums.iter_mut().zip(b).for_each(|(sum, &y)| *sum = x.mul_add(y, *sum)),
            }
        }
        out.iter_mut().zip(&sums).for_each(|(out, &sum)| *out = scale * sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::Array2;

    #[test]
    fn every_sum_goes_from_the_first_term_to_the_last() {
        let noise = |seed: u32, rows: usize, columns: usize| {
            let value =
                |(i, j)| ((seed + (i * columns + j) as u32).wrapping_mul(2_654_435_761) >> 8) as f32 / 8e6 - 1.0;
            Array2::from_shape_fn((rows, columns), value)
        };
        for (m, k, n) in
            [(8, 8, 8), (1, 16, 9), (9, 16, 1), (7, 1, 5), (7, 2, 50), (33, 5, 77), (70, 64, 300), (9, LONGEST, 40)]
        {
            // Factors as they are read, and turned: B and A, or Aᵀ and Bᵀ.
            for turned in [[false, false], [true, true], [true, false], [false, true]] {
                let factor = |seed, rows, columns, turned| match turned {
                    false => noise(seed, rows, columns),
                    true => noise(seed, columns, rows).reversed_axes(),
                };
                let (a, b) = (factor(1, m, k, turned[0]), factor(7, k, n, turned[1]));
                let mut found = Array2::zeros((m, n));
                multiply(0.37, a.view(), b.view(), found.view_mut());
                for ((i, j), x) in found.indexed_iter() {
                    let sum = (0..k).fold(0f32, |sum, p| a[[i, p]].mul_add(b[[p, j]], sum));
                    assert_eq!(*x, 0.37 * sum, "{m} x {k} x {n}, turned: {turned:?}, at {i}, {j}");
                }
            }
        }
    }
}
