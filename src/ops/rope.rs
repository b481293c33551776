//! Rotary embedding (arXiv:2104.09864) with Hugging Face's pairing: element i of a head turns with element i + D/2.

use rayon::prelude::*;

/// Extents of the buffer that is turned: (batch, len, heads, head_dim).
#[derive(Clone, Copy, Debug)]
pub struct RopeShape {
    /// B.
    pub batch: usize,
    /// T.
    pub len: usize,
    /// Heads of this buffer: H for queries, K for keys.
    pub heads: usize,
    /// D.
    pub head_dim: usize,
}

pub fn forward(shape: RopeShape, cos: &[f32], sin: &[f32], x: &mut [f32]) {
    turn::<false>(shape, cos, sin, x);
}

pub fn backward(shape: RopeShape, cos: &[f32], sin: &[f32], dx: &mut [f32]) {
    turn::<true>(shape, cos, sin, dx);
}

fn turn<const BACK: bool>(shape: RopeShape, cos: &[f32], sin: &[f32], x: &mut [f32]) {
    let RopeShape { batch, len, heads, head_dim } = shape;
    let (row, half) = (heads * head_dim, head_dim / 2);
    assert_eq!(x.len(), batch * len * row, "rope: rows");
    assert!(cos.len() >= len * half && sin.len() == cos.len(), "rope: table");
    let rows_per_task = 64;
    x.par_chunks_mut(rows_per_task * row).enumerate().for_each(|(i, x)| {
        for (j, x) in x.chunks_mut(row).enumerate() {
            let t = (i * rows_per_task + j) % len;
            let (cos, sin) = (&cos[t * half..][..half], &sin[t * half..][..half]);
            for head in x.chunks_mut(head_dim) {
                let (first, second) = head.split_at_mut(half);
                for (((a, b), c), s) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                    let s = if BACK { -s } else { *s };
                    (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
                }
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_close, dot, gradient, noise, wide};

    fn reference(x: &[f64], shape: RopeShape, cos: &[f64], sin: &[f64]) -> Vec<f64> {
        let (d, half) = (shape.head_dim, shape.head_dim / 2);
        (0..x.len())
            .map(|i| {
                let (t, e) = (i / (shape.heads * d) % shape.len, i % d);
                let (c, s) = (cos[t * half + e % half], sin[t * half + e % half]);
                if e < half { x[i] * c - x[i + half] * s } else { x[i] * c + x[i - half] * s }
            })
            .collect()
    }

    #[test]
    fn forward_and_backward_match_f64_and_its_differences() {
        let shape = RopeShape { batch: 3, len: 7, heads: 5, head_dim: 6 };
        let n = 3 * 7 * 5 * 6;
        let angles = noise(1, 9 * 3); // a table longer than the windows
        let (cos, sin): (Vec<f32>, Vec<f32>) = angles.iter().map(|a| (a.cos(), a.sin())).unzip();
        let (x, dy) = (noise(2, n), noise(3, n));
        let (mut y, mut dx) = (x.clone(), dy.clone());
        forward(shape, &cos, &sin, &mut y);
        backward(shape, &cos, &sin, &mut dx);
        let f = |x: &[f64]| reference(x, shape, &wide(&cos), &wide(&sin));
        assert_close("y", &y, &f(&wide(&x)), 1e-6);
        assert_close("dx", &dx, &gradient(&wide(&x), |x| dot(&f(x), &wide(&dy))), 1e-6);
    }
}
