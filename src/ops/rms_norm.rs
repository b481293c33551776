//! RMSNorm over the last axis (arXiv:1910.07467): `y = weight · x · rstd`.

use super::math;
use multiversion::multiversion;
use rayon::prelude::*;

/// Rows that one task takes: fixed, so that the sum over rows in the backward does not depend on the threads.
const ROWS: usize = 64;

pub fn forward(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32], rstd: &mut [f32]) {
    let width = weight.len();
    assert_eq!((x.len(), y.len()), (rstd.len() * width, rstd.len() * width), "rms_norm: rows");
    let blocks = x.par_chunks(ROWS * width).zip(y.par_chunks_mut(ROWS * width)).zip(rstd.par_chunks_mut(ROWS));
    blocks.for_each(|((x, y), rstd)| forward_block(x, weight, eps, y, rstd));
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw", "x86_64+avx2+fma"))]
fn forward_block(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32], rstd: &mut [f32]) {
    let width = weight.len();
    for ((x, y), rstd) in x.chunks(width).zip(y.chunks_mut(width)).zip(rstd) {
        let mean = math::sum_by(x, x, |x, _| x * x) / width as f64;
        *rstd = (1.0 / (mean + f64::from(eps)).sqrt()) as f32;
        for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
            *y = w * (x * *rstd);
        }
    }
}

/// `sum = x + branch`, and [`forward`] of that.
pub fn add_forward(
    [x, branch]: [&[f32]; 2],
    sum: &mut [f32],
    weight: &[f32],
    eps: f32,
    y: &mut [f32],
    rstd: &mut [f32],
) {
    let width = weight.len();
    let len = rstd.len() * width;
    assert_eq!([x.len(), branch.len(), sum.len(), y.len()], [len; 4], "rms_norm: rows");
    let size = ROWS * width;
    let inputs = x.par_chunks(size).zip(branch.par_chunks(size));
    let outputs = sum.par_chunks_mut(size).zip(y.par_chunks_mut(size)).zip(rstd.par_chunks_mut(ROWS));
    inputs.zip(outputs).for_each(|((x, branch), ((sum, y), rstd))| {
        for ((sum, x), branch) in sum.iter_mut().zip(x).zip(branch) {
            *sum = x + branch;
        }
        forward_block(sum, weight, eps, y, rstd);
    });
}

/// With `n = x · rstd` and `g = weight · dy`: `dx += rstd · (g - n · mean(g · n))`, `dweight += sum over rows of dy · n`.
pub fn backward(x: &[f32], weight: &[f32], rstd: &[f32], dy: &[f32], dx: &mut [f32], dweight: Option<&mut [f32]>) {
    let width = weight.len();
    assert_eq!((x.len(), dy.len(), dx.len()), (rstd.len() * width, x.len(), x.len()), "rms_norm: rows");
    let want_dweight = dweight.is_some();
    let parts: Vec<Vec<f32>> = x
        .par_chunks(ROWS * width)
        .zip(dy.par_chunks(ROWS * width))
        .zip(dx.par_chunks_mut(ROWS * width))
        .zip(rstd.par_chunks(ROWS))
        .map(|(((x, dy), dx), rstd)| {
            let mut part = vec![0f32; if want_dweight { width } else { 0 }];
            backward_block(x, weight, rstd, dy, dx, &mut part);
            part
        })
        .collect();
    if let Some(dweight) = dweight {
        for part in parts {
            for (d, p) in dweight.iter_mut().zip(part) {
                *d += p;
            }
        }
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw", "x86_64+avx2+fma"))]
fn backward_block(x: &[f32], weight: &[f32], rstd: &[f32], dy: &[f32], dx: &mut [f32], dweight: &mut [f32]) {
    let width = weight.len();
    let mut scaled = vec![0f32; width];
    for (((x, dy), dx), &rstd) in x.chunks(width).zip(dy.chunks(width)).zip(dx.chunks_mut(width)).zip(rstd) {
        for ((s, dy), w) in scaled.iter_mut().zip(dy).zip(weight) {
            *s = dy * w;
        }
        let mean = (math::sum_by(&scaled, x, |g, x| g * x) * f64::from(rstd) / width as f64) as f32;
        for ((dx, g), x) in dx.iter_mut().zip(&scaled).zip(x) {
            *dx += rstd * (g - x * rstd * mean);
        }
        for ((d, dy), x) in dweight.iter_mut().zip(dy).zip(x) {
            *d += dy * (x * rstd);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_close, dot, gradient, noise, wide};

    const EPS: f64 = 1e-3;

    fn reference(x: &[f64], w: &[f64]) -> Vec<f64> {
        x.chunks(w.len())
            .flat_map(|x| {
                let rstd = 1.0 / (dot(x, x) / w.len() as f64 + EPS).sqrt();
                x.iter().zip(w).map(move |(x, w)| x * rstd * w).collect::<Vec<_>>()
            })
            .collect()
    }

    #[test]
    fn forward_and_backward_match_f64_and_its_differences() {
        let (rows, width) = (67, 37);
        let (x, w, dy) = (noise(1, rows * width), noise(2, width), noise(3, rows * width));
        let (mut y, mut rstd) = (vec![0.0; x.len()], vec![0.0; rows]);
        forward(&x, &w, EPS as f32, &mut y, &mut rstd);
        let (x64, w64, dy64) = (wide(&x), wide(&w), wide(&dy));
        assert_close("y", &y, &reference(&x64, &w64), 1e-6);
        let (half, mut sum) = (x.iter().map(|x| 0.5 * x).collect::<Vec<f32>>(), vec![9.0; x.len()]);
        let before = (y.clone(), rstd.clone());
        add_forward([&half, &half], &mut sum, &w, EPS as f32, &mut y, &mut rstd);
        assert!(sum == x && (y, rstd.clone()) == before);

        let (mut dx, mut dw) = (noise(4, x.len()), noise(5, width));
        let add = |start: &[f32], g: Vec<f64>| wide(start).iter().zip(g).map(|(a, b)| a + b).collect::<Vec<_>>();
        let want_dx = add(&dx, gradient(&x64, |x| dot(&reference(x, &w64), &dy64)));
        let want_dw = add(&dw, gradient(&w64, |w| dot(&reference(&x64, w), &dy64)));
        let mut same_dx = dx.clone();
        backward(&x, &w, &rstd, &dy, &mut same_dx, None);
        backward(&x, &w, &rstd, &dy, &mut dx, Some(&mut dw));
        assert_close("dx", &dx, &want_dx, 1e-6);
        assert_close("dw", &dw, &want_dw, 1e-6);
        assert_eq!(dx, same_dx);
    }
}
