//! The operations of a LLaMA in candle, in f64, for its autograd to differentiate; and how results are compared.
#![allow(dead_code)]

use candle_core::{D, DType, Device, Result, Tensor, Var, backprop::GradStore};

/// Values in (-1, 1), the same for the same `seed`.
pub fn noise(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let step = |_| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((state >> 40) as f32 / (1u64 << 23) as f32) - 1.0
    };
    (0..len).map(step).collect()
}

/// A variable with these values, in f64.
pub fn var(values: &[f32], shape: &[usize]) -> Var {
    Var::from_tensor(&constant(values, shape)).unwrap()
}

/// The same without a gradient.
pub fn constant(values: &[f32], shape: &[usize]) -> Tensor {
    let wide: Vec<f64> = values.iter().map(|&x| x.into()).collect();
    Tensor::from_vec(wide, shape, &Device::Cpu).unwrap()
}

/// Ids as indices.
pub fn indices(ids: &[u32]) -> Tensor {
    Tensor::new(ids, &Device::Cpu).unwrap()
}

/// All elements, row-major.
pub fn values(x: &Tensor) -> Vec<f64> {
    x.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// What `<y, dy>` has as its gradients.
pub fn backward(y: &Tensor, dy: &[f32]) -> GradStore {
    (y * constant(dy, y.dims())).unwrap().sum_all().unwrap().backward().unwrap()
}

/// The gradient of a variable.
pub fn grad(grads: &GradStore, of: &Var) -> Vec<f64> {
    values(grads.get(of).expect("the variable has a gradient"))
}

/// The gradient of a variable, added to what was there.
pub fn added(start: &[f32], grads: &GradStore, of: &Var) -> Vec<f64> {
    start.iter().zip(grad(grads, of)).map(|(s, g)| f64::from(*s) + g).collect()
}

/// The largest difference is at most `tolerance` of the largest expected value.
#[track_caller]
pub fn assert_close(what: &str, actual: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(actual.len(), expected.len(), "{what}");
    let top = expected.iter().fold(1e-30, |m: f64, x| m.max(x.abs()));
    let worst = actual.iter().zip(expected).fold(0.0, |m: f64, (a, e)| m.max((f64::from(*a) - e).abs()));
    assert!(
        worst / top <= tolerance && worst.is_finite(),
        "{what}: relative error {:e} exceeds {tolerance:e}",
        worst / top
    );
}

/// x (rows, C), weight (C).
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let rstd = (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?.recip()?;
    x.broadcast_mul(&rstd)?.broadcast_mul(weight)
}

/// x (B, T, heads, D); angles (T, D/2): elements i and i + D/2 turn together.
pub fn rope(x: &Tensor, angles: &Tensor) -> Result<Tensor> {
    let half = x.dim(D::Minus1)? / 2;
    let (a, b) = (x.narrow(D::Minus1, 0, half)?, x.narrow(D::Minus1, half, half)?);
    let angles = angles.unsqueeze(1)?;
    let (cos, sin) = (angles.cos()?, angles.sin()?);
    let turned =
        [(a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?, (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?];
    Tensor::cat(&turned, D::Minus1)
}

/// q (B, T, H, D); k, v (B, T, K, D); the T x T scores in full, the future masked.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    let (batch, len, heads, d) = q.dims4()?;
    let kv_heads = k.dim(2)?;
    let per_head = |x: &Tensor| x.transpose(1, 2)?.contiguous();
    let repeated = |x: &Tensor| {
        let x = per_head(x)?.unsqueeze(2)?.broadcast_as((batch, kv_heads, heads / kv_heads, len, d))?;
        x.contiguous()?.reshape((batch, heads, len, d))
    };
    let scores = (per_head(q)?.matmul(&repeated(k)?.transpose(2, 3)?.contiguous()?)? / (d as f64).sqrt())?;
    let future: Vec<f32> = (0..len * len).map(|i| if i % len > i / len { -1e9 } else { 0.0 }).collect();
    let e = scores.broadcast_add(&constant(&future, &[len, len]))?.exp()?;
    let p = e.broadcast_div(&e.sum_keepdim(D::Minus1)?)?;
    p.matmul(&repeated(v)?)?.transpose(1, 2)?.contiguous()
}

/// `silu(gate) · up`.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    (gate / (gate.neg()?.exp()? + 1.0)?)? * up
}

/// Losses (rows) of logits (rows, V).
pub fn cross_entropy(logits: &Tensor, targets: &[u32]) -> Result<Tensor> {
    let total = logits.exp()?.sum(D::Minus1)?.log()?;
    total - logits.gather(&indices(targets).unsqueeze(1)?, 1)?.squeeze(1)?
}
