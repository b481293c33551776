//! Loops over whole buffers: `scale`, `axpy`, sums.

use super::math;
use multiversion::multiversion;
use rayon::prelude::*;
use std::mem::MaybeUninit;

/// Elements that one task takes: fixed, so that no result depends on the number of threads.
pub(super) const BLOCK: usize = 1 << 15;

/// Up to the capacity of `x`, without another allocation; what is new is 0.
pub fn set_len(x: &mut Vec<f32>, len: usize) {
    assert!(len <= x.capacity(), "set_len: {len} elements in a buffer made for {}", x.capacity());
    match len.checked_sub(x.len()) {
        None => x.truncate(len),
        Some(more) => {
            let new = &mut x.spare_capacity_mut()[..more];
            new.par_chunks_mut(BLOCK).for_each(|x| x.fill(MaybeUninit::new(0.0)));
            // SAFETY: the elements between the old and the new length have just been written.
            unsafe { x.set_len(len) }
        }
    }
}

pub fn fill(x: &mut [f32], value: f32) {
    x.par_chunks_mut(BLOCK).for_each(|x| x.fill(value));
}

pub fn scale(x: &mut [f32], factor: f32) {
    x.par_chunks_mut(BLOCK).for_each(|x| {
        for x in x {
            *x *= factor;
        }
    });
}

pub fn axpy(alpha: f32, x: &[f32], y: &mut [f32]) {
    assert_eq!(x.len(), y.len(), "axpy: lengths");
    y.par_chunks_mut(BLOCK).zip(x.par_chunks(BLOCK)).for_each(|(y, x)| {
        for (y, x) in y.iter_mut().zip(x) {
            *y += alpha * x;
        }
    });
}

pub fn copy(x: &[f32], y: &mut [f32]) {
    assert_eq!(x.len(), y.len(), "copy: lengths");
    y.par_chunks_mut(BLOCK).zip(x.par_chunks(BLOCK)).for_each(|(y, x)| y.copy_from_slice(x));
}

pub fn sum_of_squares(x: &[f32]) -> f64 {
    dot(x, x)
}

pub fn dot(x: &[f32], y: &[f32]) -> f64 {
    assert_eq!(x.len(), y.len(), "dot: lengths");
    let parts: Vec<f64> = x.par_chunks(BLOCK).zip(y.par_chunks(BLOCK)).map(|(x, y)| dot_block(x, y)).collect();
    parts.iter().sum()
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw", "x86_64+avx2+fma"))]
fn dot_block(x: &[f32], y: &[f32]) -> f64 {
    math::sum_by(x, y, |x, y| x * y)
}

pub fn sum(x: &[f32]) -> f64 {
    x.iter().map(|&x| f64::from(x)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_close, noise, wide};

    #[test]
    fn a_buffer_gets_shorter_and_as_long_again_where_it_lies() {
        let mut x = noise(1, 2 * BLOCK + 7);
        let (expected, place) = (x[..5].to_vec(), x.as_ptr());
        set_len(&mut x, 5);
        assert_eq!(x, expected);
        set_len(&mut x, 2 * BLOCK + 7);
        assert!(x[..5] == expected && x[5..].iter().all(|x| *x == 0.0));
        assert!(x.len() == 2 * BLOCK + 7 && x.as_ptr() == place);
    }

    #[test]
    fn loops_agree_with_f64_over_several_blocks() {
        let n = 2 * BLOCK + 77;
        let (x, mut y) = (noise(1, n), noise(2, n));
        let expected: Vec<f64> = wide(&y).iter().zip(wide(&x)).map(|(y, x)| 2.0 * (y + 0.5 * x)).collect();
        axpy(0.5, &x, &mut y);
        scale(&mut y, 2.0);
        assert_close("axpy, scale", &y, &expected, 1e-6);
        let product: f64 = wide(&x).iter().zip(wide(&y)).map(|(x, y)| x * y).sum();
        assert!((dot(&x, &y) / product - 1.0).abs() < 1e-5);
        let squares: f64 = wide(&x).iter().map(|x| x * x).sum();
        assert!((sum_of_squares(&x) / squares - 1.0).abs() < 1e-6);
        assert!((sum(&x) - wide(&x).iter().sum::<f64>()).abs() < 1e-9);
    }
}
