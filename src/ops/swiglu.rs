//! The gate of the MLP (arXiv:2002.05202): `y = silu(gate) · up`, `silu(x) = x · sigmoid(x)`.

use super::{elementwise::BLOCK, math::sigmoid};
use multiversion::multiversion;
use rayon::prelude::*;

pub fn forward(gate: &[f32], up: &[f32], y: &mut [f32]) {
    assert_eq!(gate.len(), up.len(), "swiglu: lengths");
    let blocks = y[..gate.len()].par_chunks_mut(BLOCK).zip(gate.par_chunks(BLOCK)).zip(up.par_chunks(BLOCK));
    blocks.for_each(|((y, gate), up)| forward_block(gate, up, y));
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw", "x86_64+avx2+fma"))]
fn forward_block(gate: &[f32], up: &[f32], y: &mut [f32]) {
    for ((y, g), u) in y.iter_mut().zip(gate).zip(up) {
        *y = g * sigmoid(*g) * u;
    }
}

/// `silu'(x) = s + x · s · (1 - s)` with `s = sigmoid(x)`. Gate and up are replaced by their gradients.
pub fn backward(dy: &[f32], gate: &mut [f32], up: &mut [f32]) {
    assert_eq!(gate.len(), up.len(), "swiglu: lengths");
    let dy = &dy[..gate.len()];
    let blocks = gate.par_chunks_mut(BLOCK).zip(up.par_chunks_mut(BLOCK)).zip(dy.par_chunks(BLOCK));
    blocks.for_each(|((gate, up), dy)| backward_block(dy, gate, up));
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw", "x86_64+avx2+fma"))]
fn backward_block(dy: &[f32], gate: &mut [f32], up: &mut [f32]) {
    for ((g, u), dy) in gate.iter_mut().zip(up).zip(dy) {
        let s = sigmoid(*g);
        let silu = *g * s;
        (*g, *u) = (dy * *u * (s + silu * (1.0 - s)), dy * silu);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_close, dot, gradient, noise, wide};

    #[test]
    fn forward_and_backward_match_f64_and_its_differences() {
        let n = 101;
        let wider = |seed| noise(seed, n).iter().map(|x| 8.0 * x).collect::<Vec<f32>>();
        let (gate, up, dy) = (wider(1), wider(2), noise(3, n));
        let silu = |x: f64| x / (1.0 + (-x).exp());
        let f = |g: &[f64], u: &[f64]| g.iter().zip(u).map(|(g, u)| silu(*g) * u).collect::<Vec<_>>();
        let (g64, u64, dy64) = (wide(&gate), wide(&up), wide(&dy));
        let mut y = vec![0.0; n];
        forward(&gate, &up, &mut y);
        assert_close("y", &y, &f(&g64, &u64), 1e-6);
        let (mut dgate, mut dup) = (gate.clone(), up.clone());
        backward(&dy, &mut dgate, &mut dup);
        assert_close("dgate", &dgate, &gradient(&g64, |g| dot(&f(g, &u64), &dy64)), 1e-6);
        assert_close("dup", &dup, &gradient(&u64, |u| dot(&f(&g64, u), &dy64)), 1e-6);
    }
}
