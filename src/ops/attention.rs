//! Causal attention with grouped key/value heads, in blocks of query rows: of the T x T scores only one block per task
//! exists at a time, and only its keys up to the diagonal.

use super::math;
use crate::threads;
use multiversion::multiversion;
use ndarray::{
    Array2, ArrayView2, ArrayView4, ArrayViewMut2, ArrayViewMut4, Ix4, linalg::general_mat_mul, parallel::prelude::*, s,
};

/// Query rows that are scored at a time.
const BLOCK: usize = 64;

/// Extents of the buffers: q, o (B, T, H, D); k, v (B, T, K, D).
#[derive(Clone, Copy, Debug)]
pub struct AttentionShape {
    /// B.
    pub batch: usize,
    /// T.
    pub len: usize,
    /// H: query heads.
    pub heads: usize,
    /// K: key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// D.
    pub head_dim: usize,
}

impl AttentionShape {
    fn q_dim(&self) -> Ix4 {
        Ix4(self.batch, self.len, self.heads, self.head_dim)
    }

    fn kv_dim(&self) -> Ix4 {
        Ix4(self.batch, self.len, self.kv_heads, self.head_dim)
    }

    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    pub(super) fn scale(&self) -> f32 {
        (1.0 / (self.head_dim as f64).sqrt()) as f32
    }
}

fn view<'a>(x: &'a [f32], dim: Ix4) -> ArrayView4<'a, f32> {
    ArrayView4::from_shape(dim, x).expect("attention: the buffer has the extents of its shape")
}

/// The (T, D) matrices of every window and head of a (B, T, heads, D) buffer, window by window.
fn heads_mut(x: &mut [f32], dim: Ix4) -> Vec<ArrayViewMut2<'_, f32>> {
    let x = ArrayViewMut4::from_shape(dim, x).expect("attention: the buffer has the extents of its shape");
    let windows = x.permuted_axes([0, 2, 1, 3]).into_outer_iter_mut();
    windows.flat_map(|window| window.into_outer_iter_mut()).collect()
}

fn head<'a>(x: &'a ArrayView4<'_, f32>, window: usize, head: usize) -> ArrayView2<'a, f32> {
    x.slice(s![window, .., head, ..])
}

pub fn forward(shape: AttentionShape, q: &[f32], k: &[f32], v: &[f32], o: &mut [f32], lse: &mut [f32]) {
    let (q, k, v) = (view(q, shape.q_dim()), view(k, shape.kv_dim()), view(v, shape.kv_dim()));
    assert_eq!(lse.len(), shape.batch * shape.heads * shape.len, "attention: lse");
    let tasks: Vec<_> = heads_mut(o, shape.q_dim()).into_iter().zip(lse.chunks_mut(shape.len)).collect();
    threads::with_serial_blas(|| {
        tasks.into_par_iter().enumerate().for_each(|(i, (o, lse))| {
            let (b, h) = (i / shape.heads, i % shape.heads);
            let kv = h / shape.group();
            forward_head(shape.scale(), [head(&q, b, h), head(&k, b, kv), head(&v, b, kv)], o, lse);
        })
    });
}

/// One query head of one window: q, k, v, o (T, D); lse (T).
fn forward_head(scale: f32, [q, k, v]: [ArrayView2<f32>; 3], mut o: ArrayViewMut2<f32>, lse: &mut [f32]) {
    let len = lse.len();
    let mut scratch = vec![0f32; BLOCK.min(len) * len];
    for first in (0..len).step_by(BLOCK) {
        let end = (first + BLOCK).min(len);
        let mut scores = block(&mut scratch, end - first, end);
        general_mat_mul(scale, &q.slice(s![first..end, ..]), &k.slice(s![..end, ..]).t(), 0.0, &mut scores);
        for (t, mut row) in (first..end).zip(scores.outer_iter_mut()) {
            let (row, future) = row.as_slice_mut().expect("contiguous").split_at_mut(t + 1);
            lse[t] = softmax(row);
            future.fill(0.0);
        }
        general_mat_mul(1.0, &scores, &v.slice(s![..end, ..]), 0.0, &mut o.slice_mut(s![first..end, ..]));
    }
}

/// Scores become probabilities; returns the log of the sum of their exponentials.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw", "x86_64+avx2+fma"))]
fn softmax(row: &mut [f32]) -> f32 {
    let top = math::max(row);
    let total = math::replace_by_exp(row, top);
    let factor = (1.0 / total) as f32;
    for x in row {
        *x *= factor;
    }
    (f64::from(top) + total.ln()) as f32
}

/// The probabilities are recomputed from the scores and `lse` (arXiv:2205.14135); q, k and v become their gradients. One
/// task per window and key/value head, which owns that head's k and v and the q of its group.
pub fn backward(shape: AttentionShape, [q, k, v]: [&mut [f32]; 3], o: &[f32], lse: &[f32], d_o: &[f32]) {
    let (o, d_o) = (view(o, shape.q_dim()), view(d_o, shape.q_dim()));
    let mut q = heads_mut(q, shape.q_dim()).into_iter();
    let kv = heads_mut(k, shape.kv_dim()).into_iter().zip(heads_mut(v, shape.kv_dim()));
    let tasks: Vec<_> = kv.map(|kv| (kv, q.by_ref().take(shape.group()).collect::<Vec<_>>())).collect();
    threads::with_serial_blas(|| {
        tasks.into_par_iter().enumerate().for_each(|(i, ((mut k, mut v), qs))| {
            let (b, kv) = (i / shape.kv_heads, i % shape.kv_heads);
            let (mut dk, mut dv) = (Array2::zeros(k.dim()), Array2::zeros(v.dim()));
            for (j, q) in qs.into_iter().enumerate() {
                let h = kv * shape.group() + j;
                let kept = Kept {
                    k: k.view(),
                    v: v.view(),
                    o: head(&o, b, h),
                    lse: &lse[(b * shape.heads + h) * shape.len..][..shape.len],
                };
                backward_head(shape.scale(), kept, head(&d_o, b, h), q, [dk.view_mut(), dv.view_mut()]);
            }
            k.assign(&dk);
            v.assign(&dv);
        })
    });
}

/// What the backward of one query head reads besides q: (T, D) each, and lse (T).
struct Kept<'a> {
    k: ArrayView2<'a, f32>,
    v: ArrayView2<'a, f32>,
    o: ArrayView2<'a, f32>,
    lse: &'a [f32],
}

/// With P the probabilities and `dP = dO Vᵀ`: `dS = P · (dP - rowsum(dO · O))`, `dk += scale · dSᵀ Q`, `dv += Pᵀ dO`,
/// and `scale · dS K`, the gradient of q, in its place.
fn backward_head(
    scale: f32,
    kept: Kept,
    d_o: ArrayView2<f32>,
    mut q: ArrayViewMut2<f32>,
    [mut dk, mut dv]: [ArrayViewMut2<f32>; 2],
) {
    let Kept { k, v, o, lse } = kept;
    let len = lse.len();
    let mut scratch = [vec![0f32; BLOCK.min(len) * len], vec![0f32; BLOCK.min(len) * len]];
    let [p_scratch, ds_scratch] = &mut scratch;
    for first in (0..len).step_by(BLOCK) {
        let end = (first + BLOCK).min(len);
        let (rows, keys) = (s![first..end, ..], s![..end, ..]);
        let (mut p, mut ds) = (block(p_scratch, end - first, end), block(ds_scratch, end - first, end));
        general_mat_mul(scale, &q.slice(rows), &k.slice(keys).t(), 0.0, &mut p);
        general_mat_mul(1.0, &d_o.slice(rows), &v.slice(keys).t(), 0.0, &mut ds);
        for (t, (mut p, mut ds)) in (first..end).zip(p.outer_iter_mut().zip(ds.outer_iter_mut())) {
            let d: f32 = d_o.row(t).iter().zip(o.row(t)).map(|(a, b)| a * b).sum();
            let (p, p_future) = p.as_slice_mut().expect("contiguous").split_at_mut(t + 1);
            let (ds, ds_future) = ds.as_slice_mut().expect("contiguous").split_at_mut(t + 1);
            softmax_backward(p, ds, lse[t], d);
            p_future.fill(0.0);
            ds_future.fill(0.0);
        }
        general_mat_mul(scale, &ds.t(), &q.slice(rows), 1.0, &mut dk.slice_mut(keys));
        general_mat_mul(1.0, &p.t(), &d_o.slice(rows), 1.0, &mut dv.slice_mut(keys));
        general_mat_mul(scale, &ds, &k.slice(keys), 0.0, &mut q.slice_mut(rows));
    }
}

/// Scores become probabilities again, and `ds`, their gradient, that of the scores: `p · (ds - d)`.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw", "x86_64+avx2+fma"))]
fn softmax_backward(p: &mut [f32], ds: &mut [f32], lse: f32, d: f32) {
    for (p, ds) in p.iter_mut().zip(ds) {
        *p = math::exp(*p - lse);
        *ds = *p * (*ds - d);
    }
}

fn block(scratch: &mut [f32], rows: usize, cols: usize) -> ArrayViewMut2<'_, f32> {
    ArrayViewMut2::from_shape((rows, cols), &mut scratch[..rows * cols]).expect("the slice has rows · cols elements")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_close, dot, gradient, noise, wide};
    use ndarray::Dimension;

    fn reference(shape: AttentionShape, q: &[f64], k: &[f64], v: &[f64]) -> Vec<f64> {
        let AttentionShape { batch, len, heads, kv_heads, head_dim: d } = shape;
        let mut o = vec![0.0; batch * len * heads * d];
        for (b, t, h) in (0..batch * len * heads).map(|i| (i / heads / len, i / heads % len, i % heads)) {
            let at = |heads: usize, t: usize, h: usize| ((b * len + t) * heads + h) * d;
            let kv = h / (heads / kv_heads);
            let q = &q[at(heads, t, h)..][..d];
            let e: Vec<f64> =
                (0..=t).map(|s| (dot(q, &k[at(kv_heads, s, kv)..][..d]) / (d as f64).sqrt()).exp()).collect();
            let total: f64 = e.iter().sum();
            for (s, e) in e.iter().enumerate() {
                for i in 0..d {
                    o[at(heads, t, h) + i] += e / total * v[at(kv_heads, s, kv) + i];
                }
            }
        }
        o
    }

    fn check(shape: AttentionShape) {
        let (n, m) = (shape.q_dim().size(), shape.kv_dim().size());
        let scaled = |seed, n| noise(seed, n).iter().map(|x| 2.0 * x).collect::<Vec<f32>>();
        let (q, k, v, d_o) = (scaled(1, n), scaled(2, m), noise(3, m), noise(4, n));
        let (mut o, mut lse) = (vec![9.0; n], vec![9.0; shape.batch * shape.heads * shape.len]);
        forward(shape, &q, &k, &v, &mut o, &mut lse);
        let (q64, k64, v64, d64) = (wide(&q), wide(&k), wide(&v), wide(&d_o));
        assert_close("o", &o, &reference(shape, &q64, &k64, &v64), 2e-6);
        let (mut dq, mut dk, mut dv) = (q, k, v);
        backward(shape, [&mut dq, &mut dk, &mut dv], &o, &lse, &d_o);
        let f = |q: &[f64], k: &[f64], v: &[f64]| dot(&reference(shape, q, k, v), &d64);
        assert_close("dq", &dq, &gradient(&q64, |q| f(q, &k64, &v64)), 2e-6);
        assert_close("dk", &dk, &gradient(&k64, |k| f(&q64, k, &v64)), 2e-6);
        assert_close("dv", &dv, &gradient(&v64, |v| f(&q64, &k64, v)), 2e-6);
    }

    #[test]
    fn one_head_per_key_head_matches_f64_and_its_differences() {
        check(AttentionShape { batch: 2, len: 5, heads: 3, kv_heads: 3, head_dim: 6 });
    }

    #[test]
    fn grouped_heads_match_f64_and_its_differences() {
        check(AttentionShape { batch: 1, len: 7, heads: 6, kv_heads: 2, head_dim: 4 });
    }

    #[test]
    fn windows_of_several_blocks_match_f64_and_its_differences() {
        check(AttentionShape { batch: 1, len: 2 * BLOCK + 3, heads: 2, kv_heads: 1, head_dim: 2 });
    }
}
