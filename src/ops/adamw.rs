//! AdamW (arXiv:1711.05101) in one pass, in PyTorch's order of operations.

use super::elementwise::BLOCK;
use multiversion::multiversion;
use rayon::prelude::*;

/// What one update needs besides the tensors.
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    /// Learning rate of this update.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay: `p *= 1 - lr · weight_decay` before the update.
    pub weight_decay: f64,
    /// Updates of this tensor, this one included: 1 for the first.
    pub step: u64,
}

/// The numbers that every element is computed with.
pub(super) struct Factors {
    pub keep: f32,
    pub b1: f32,
    pub c1: f32,
    pub b2: f32,
    pub c2: f32,
    pub size: f32,
    pub root: f32,
    pub eps: f32,
}

impl AdamW {
    pub(super) fn factors(&self) -> Factors {
        let t = self.step as f64;
        Factors {
            keep: (1.0 - self.lr * self.weight_decay) as f32,
            b1: self.beta1 as f32,
            c1: (1.0 - self.beta1) as f32,
            b2: self.beta2 as f32,
            c2: (1.0 - self.beta2) as f32,
            size: (self.lr / (1.0 - self.beta1.powf(t))) as f32,
            root: (1.0 / (1.0 - self.beta2.powf(t)).sqrt()) as f32,
            eps: self.eps as f32,
        }
    }
}

/// With the gradient times `factor`; nothing, if that is NaN.
pub fn update(step: &AdamW, factor: f64, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
    assert_eq!((g.len(), m.len(), v.len()), (p.len(), p.len(), p.len()), "adamw: lengths");
    if factor.is_nan() {
        return;
    }
    let blocks =
        p.par_chunks_mut(BLOCK).zip(g.par_chunks(BLOCK)).zip(m.par_chunks_mut(BLOCK)).zip(v.par_chunks_mut(BLOCK));
    let factors = step.factors();
    blocks.for_each(|(((p, g), m), v)| update_block(&factors, factor as f32, p, g, m, v));
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw", "x86_64+avx2+fma"))]
fn update_block(factors: &Factors, grad_scale: f32, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
    let &Factors { keep, b1, c1, b2, c2, size, root, eps } = factors;
    for (((p, g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
        let g = g * grad_scale;
        *m = b1 * *m + c1 * g;
        *v = b2 * *v + c2 * (g * g);
        *p = *p * keep - size * *m / (v.sqrt() * root + eps);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_close, noise, wide};

    #[test]
    fn updates_match_the_formula_in_f64() {
        let n = 53;
        let mut settings = AdamW { lr: 1e-2, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1, step: 0 };
        let (mut p, mut m, mut v) = (noise(1, n), vec![0.0; n], vec![0.0; n]);
        let (mut p64, mut m64, mut v64) = (wide(&p), vec![0.0f64; n], vec![0.0f64; n]);
        for t in 1..=5u64 {
            settings.step = t;
            let g = noise(10 + t, n);
            update(&settings, 0.5, &mut p, &g, &mut m, &mut v);
            for i in 0..n {
                let g = f64::from(g[i]) * 0.5;
                p64[i] *= 1.0 - 1e-2 * 0.1;
                m64[i] = 0.9 * m64[i] + 0.1 * g;
                v64[i] = 0.999 * v64[i] + 0.001 * g * g;
                let (mh, vh) = (m64[i] / (1.0 - 0.9f64.powi(t as i32)), v64[i] / (1.0 - 0.999f64.powi(t as i32)));
                p64[i] -= 1e-2 * mh / (vh.sqrt() + 1e-8);
            }
            assert_close("p", &p, &p64, 1e-6);
            assert_close("m", &m, &m64, 1e-6);
            assert_close("v", &v, &v64, 1e-6);
        }
        let before = (p.clone(), m.clone(), v.clone());
        update(&settings, f64::NAN, &mut p, &noise(20, n), &mut m, &mut v);
        assert!((p, m, v) == before);
    }
}
