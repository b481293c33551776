//! Every operation with a backward, in f32 on random values of odd extents, against candle's autograd in f64.
//! Tolerances are relative to the largest element: 2e-6 for one pass over the data, 1e-5 for long sums of products.

use crate::common::autograd;
use crate::common::autograd::{
    added, assert_close, backward, constant, cross_entropy, grad, indices, noise, rms_norm, rope, swiglu, values, var,
};
use relora_kit::ops::{AdamW, AttentionShape, Cpu, Device, Dropout, IGNORE, Mat, MatMut, RopeShape, StepStats};

const PASS: f64 = 2e-6;
const SUMS: f64 = 1e-5;

#[test]
fn products_of_every_cut_match_candle() {
    // A linear layer, `y = alpha · x Wᵀ + beta · y`, whose product is cut by rows, columns, the inner extent, or not at all.
    for (rows, inner, out) in [(7, 5, 3), (700, 129, 130), (40, 130, 901), (21, 2100, 131)] {
        let what = format!("{rows} x {inner} x {out}");
        let (alpha, beta) = (0.75, 0.5);
        let (x, w, y) = (noise(1, rows * inner), noise(2, out * inner), noise(3, rows * out));
        let dy = noise(4, rows * out);
        let (vx, vw, vy) = (var(&x, &[rows, inner]), var(&w, &[out, inner]), var(&y, &[rows, out]));
        let product = vx.matmul(&vw.t().unwrap()).unwrap();
        let whole = ((product * alpha).unwrap() + (vy.as_tensor() * beta).unwrap()).unwrap();
        let grads = backward(&whole, &dy);

        let (alpha, mut found) = (alpha as f32, y);
        let (x, w, dy) = (|| Mat::new(&x, rows, inner), || Mat::new(&w, out, inner), || Mat::new(&dy, rows, out));
        Cpu.matmul(alpha, x(), w().t(), beta as f32, MatMut::new(&mut found, rows, out));
        assert_close(&format!("{what}: y"), &found, &values(&whole), SUMS);

        let mut dx = vec![f32::NAN; rows * inner];
        Cpu.matmul(alpha, dy(), w(), 0.0, MatMut::new(&mut dx, rows, inner));
        assert_close(&format!("{what}: dx"), &dx, &grad(&grads, &vx), SUMS);
        let start = noise(5, out * inner);
        let mut dw = start.clone();
        Cpu.matmul(alpha, dy().t(), x(), 1.0, MatMut::new(&mut dw, out, inner));
        assert_close(&format!("{what}: dw"), &dw, &added(&start, &grads, &vw), SUMS);
    }
}

#[test]
fn embedding_matches_candle() {
    let (vocab, width, ids) = (11, 7, [3u32, 0, 3, 10, 5, 3, 0]);
    let (table, dy) = (noise(1, vocab * width), noise(2, ids.len() * width));
    let v = var(&table, &[vocab, width]);
    let y = v.index_select(&indices(&ids), 0).unwrap();
    let grads = backward(&y, &dy);

    let tokens = Cpu.upload_tokens(&ids);
    let mut found = vec![f32::NAN; dy.len()];
    Cpu.embedding_forward(&tokens, &table, &mut found);
    assert_close("y", &found, &values(&y), 0.0);
    let start = noise(3, table.len());
    let mut dtable = start.clone();
    Cpu.embedding_backward(&tokens, &dy, &mut dtable);
    assert_close("dtable", &dtable, &added(&start, &grads, &v), PASS);
}

#[test]
fn rms_norm_matches_candle() {
    let (rows, width, eps) = (67, 37, 1e-3);
    let (x, w, dy) = (noise(1, rows * width), noise(2, width), noise(3, rows * width));
    let (vx, vw) = (var(&x, &[rows, width]), var(&w, &[width]));
    let y = rms_norm(&vx, &vw, eps).unwrap();
    let grads = backward(&y, &dy);

    let (mut found, mut rstd) = (vec![f32::NAN; x.len()], vec![f32::NAN; rows]);
    Cpu.rms_norm_forward(&x, &w, eps as f32, &mut found, &mut rstd);
    assert_close("y", &found, &values(&y), PASS);
    let (start_x, start_w) = (noise(4, x.len()), noise(5, width));
    let (mut dx, mut dw) = (start_x.clone(), start_w.clone());
    Cpu.rms_norm_backward(&x, &w, &rstd, &dy, &mut dx, Some(&mut dw));
    assert_close("dx", &dx, &added(&start_x, &grads, &vx), PASS);
    assert_close("dw", &dw, &added(&start_w, &grads, &vw), PASS);
}

#[test]
fn rope_matches_candle() {
    let shape = RopeShape { batch: 3, len: 5, heads: 3, head_dim: 6 };
    let dims = [shape.batch, shape.len, shape.heads, shape.head_dim];
    let n = dims.iter().product();
    let (x, dy) = (noise(1, n), noise(2, n));
    let angles: Vec<f32> = noise(3, shape.len * shape.head_dim / 2).iter().map(|a| 3.0 * a).collect();
    let v = var(&x, &dims);
    let y = rope(&v, &constant(&angles, &[shape.len, shape.head_dim / 2])).unwrap();
    let grads = backward(&y, &dy);

    let (cos, sin): (Vec<f32>, Vec<f32>) = angles.iter().map(|a| (a.cos(), a.sin())).unzip();
    let (mut found, mut dx) = (x, dy);
    Cpu.rope_forward(shape, &cos, &sin, &mut found);
    Cpu.rope_backward(shape, &cos, &sin, &mut dx);
    assert_close("y", &found, &values(&y), PASS);
    assert_close("dx", &dx, &grad(&grads, &v), PASS);
}

#[test]
fn attention_matches_candle() {
    let shapes = [(2, 5, 3, 3, 6), (1, 7, 6, 2, 4), (2, 131, 4, 1, 10)];
    for (batch, len, heads, kv_heads, head_dim) in shapes {
        let shape = AttentionShape { batch, len, heads, kv_heads, head_dim };
        let (q_dims, kv_dims) = ([batch, len, heads, head_dim], [batch, len, kv_heads, head_dim]);
        let (n, m) = (q_dims.iter().product(), kv_dims.iter().product());
        let wider = |seed, n| noise(seed, n).iter().map(|x| 2.0 * x).collect::<Vec<f32>>();
        let (q, k, v, d_o) = (wider(1, n), wider(2, m), noise(3, m), noise(4, n));
        let vars = [var(&q, &q_dims), var(&k, &kv_dims), var(&v, &kv_dims)];
        let y = autograd::attention(&vars[0], &vars[1], &vars[2]).unwrap();
        let grads = backward(&y, &d_o);

        let (mut o, mut lse) = (vec![f32::NAN; n], vec![f32::NAN; batch * heads * len]);
        Cpu.attention_forward(shape, &q, &k, &v, &mut o, &mut lse);
        assert_close(&format!("{shape:?} o"), &o, &values(&y), PASS);
        let [mut dq, mut dk, mut dv] = [q, k, v];
        Cpu.attention_backward(shape, [&mut dq, &mut dk, &mut dv], &o, &lse, &d_o);
        for ((name, found), v) in [("dq", dq), ("dk", dk), ("dv", dv)].into_iter().zip(&vars) {
            assert_close(&format!("{shape:?} {name}"), &found, &grad(&grads, v), PASS);
        }
    }
}

#[test]
fn swiglu_matches_candle() {
    let n = 4099;
    let wider = |seed| noise(seed, n).iter().map(|x| 8.0 * x).collect::<Vec<f32>>();
    let (gate, up, dy) = (wider(1), wider(2), noise(3, n));
    let (vg, vu) = (var(&gate, &[n]), var(&up, &[n]));
    let y = swiglu(&vg, &vu).unwrap();
    let grads = backward(&y, &dy);

    let mut found = vec![f32::NAN; n];
    Cpu.swiglu_forward(&gate, &up, &mut found);
    assert_close("y", &found, &values(&y), PASS);
    let (mut dgate, mut dup) = (gate, up);
    Cpu.swiglu_backward(&dy, &mut dgate, &mut dup);
    assert_close("dgate", &dgate, &grad(&grads, &vg), PASS);
    assert_close("dup", &dup, &grad(&grads, &vu), PASS);
}

#[test]
fn cross_entropy_matches_candle() {
    let (vocab, scale) = (1037, 0.25);
    let targets = [5u32, 1036, IGNORE, 0, 77];
    let logits: Vec<f32> = noise(1, targets.len() * vocab).iter().map(|x| 20.0 * x).collect();
    let v = var(&logits, &[targets.len(), vocab]);
    let weights: Vec<f32> = targets.iter().map(|&t| if t == IGNORE { 0.0 } else { 1.0 }).collect();
    let wanted: Vec<u32> = targets.iter().map(|&t| if t == IGNORE { 0 } else { t }).collect();
    let losses = (cross_entropy(&v, &wanted).unwrap() * constant(&weights, &[targets.len()])).unwrap();
    let grads = backward(&losses, &[scale; 5]);

    let (mut found, mut d) = (vec![f32::NAN; targets.len()], logits);
    let tokens = Cpu.upload_tokens(&targets);
    // In two calls, as the head does it: rows 0-1, then rows 2-4.
    let mut rest = d.split_off(2 * vocab);
    Cpu.cross_entropy(vocab, 0, 2, &tokens, &mut d, &mut found, Some(scale));
    Cpu.cross_entropy(vocab, 2, 3, &tokens, &mut rest, &mut found, Some(scale));
    d.extend(rest);
    assert_close("losses", &found, &values(&losses), PASS);
    assert_close("dlogits", &d, &grad(&grads, &v), PASS);
}

#[test]
fn dropout_matches_candle_with_the_same_mask() {
    let n = 4099;
    let dropout = Dropout { p: 0.3, key: 11, first_run: 0 };
    let (x, dy, mut mask) = (noise(1, n), noise(2, n), vec![f32::NAN; n]);
    Cpu.dropout_forward(dropout, &vec![1.0; n], &mut mask);
    let kept = mask.iter().filter(|m| **m != 0.0).count() as f64 / n as f64;
    assert!((kept - 0.7).abs() < 0.05 && mask.iter().all(|m| *m == 0.0 || (*m - 1.0 / 0.7).abs() < 1e-6), "{kept}");
    let v = var(&x, &[n]);
    let y = (v.as_tensor() * constant(&mask, &[n])).unwrap();
    let grads = backward(&y, &dy);

    let mut found = vec![f32::NAN; n];
    Cpu.dropout_forward(dropout, &x, &mut found);
    assert_close("y", &found, &values(&y), PASS);
    let start = noise(3, n);
    let mut dx = start.clone();
    Cpu.dropout_backward(dropout, &dy, &mut dx);
    assert_close("dx", &dx, &added(&start, &grads, &v), PASS);
}

#[test]
fn adamw_on_gradients_of_candle_follows_its_formula_in_tensors() {
    // Least squares of p (n) against a fixed target, a few updates; the gradient comes from autograd on either side.
    let n = 53;
    let (lr, beta1, beta2, eps, weight_decay, grad_scale) = (1e-2, 0.9, 0.99, 1e-8, 0.1, 0.5);
    let target = constant(&noise(2, n), &[n]);
    let gradient = |p: &candle_core::Var| {
        let loss = (p.as_tensor() - &target).unwrap().powf(4.0).unwrap().sum_all().unwrap();
        loss.backward().unwrap().get(p).unwrap().clone()
    };
    let (mut p, mut m, mut v) = (noise(1, n), vec![0.0; n], vec![0.0; n]);
    let wide = var(&p, &[n]);
    let (mut wide_m, mut wide_v) = (constant(&m, &[n]), constant(&v, &[n]));
    for step in 1..=6 {
        let g: Vec<f32> = values(&gradient(&var(&p, &[n]))).iter().map(|&g| g as f32).collect();
        let settings = AdamW { lr, beta1, beta2, eps, weight_decay, step };
        Cpu.adamw(&settings, &StepStats { factor: grad_scale, ..StepStats::default() }, &mut p, &g, &mut m, &mut v);

        let g = (gradient(&wide) * grad_scale).unwrap();
        wide_m = ((wide_m * beta1).unwrap() + (&g * (1.0 - beta1)).unwrap()).unwrap();
        wide_v = ((wide_v * beta2).unwrap() + (g.sqr().unwrap() * (1.0 - beta2)).unwrap()).unwrap();
        let unbiased = |x: &candle_core::Tensor, beta: f64| (x / (1.0 - beta.powi(step as i32))).unwrap();
        let root = (unbiased(&wide_v, beta2).sqrt().unwrap() + eps).unwrap();
        let decayed = (wide.as_tensor() * (1.0 - lr * weight_decay)).unwrap();
        let moved = (decayed - (unbiased(&wide_m, beta1) / root).unwrap() * lr).unwrap();
        wide.set(&moved).unwrap();
        assert_close(&format!("p after {step}"), &p, &values(&wide), SUMS);
    }
}
