//! One decoder block: `x += attention(norm(x)); x += mlp(norm(x))`, forward and then backward.
//!
//! What is kept for backward: the inputs of both halves, queries, keys, values, the attention's output, gate and up.
//! Normed activations and the MLP's inner product are computed again: they cost one pass, and a third of the memory.
//! With activation checkpointing all blocks share what is kept, and [`forward`] runs again before [`backward`].

use super::{
    config::LlamaConfig,
    linear::{Linear, LoraScratch, Pass},
    params::{Layout, Param, TARGETS},
    product::Product,
};
use crate::ops::{AttentionShape, Device, Dropout, RopeShape};

/// Extents of a batch, and the rotary table for them.
pub(super) struct Shape<D: Device> {
    pub attention: AttentionShape,
    pub eps: f32,
    /// Of the current pass.
    pub dropout: Option<Dropout>,
    pub cos: D::Buffer,
    pub sin: D::Buffer,
}

impl<D: Device> Shape<D> {
    pub fn new(device: &D, config: &LlamaConfig, batch: usize, len: usize) -> Self {
        let frequencies = config.rope_frequencies();
        let angles = (0..len).flat_map(|t| frequencies.iter().map(move |f| t as f64 * f));
        let (cos, sin): (Vec<f32>, Vec<f32>) = angles.map(|a| (a.cos() as f32, a.sin() as f32)).unzip();
        let attention = AttentionShape {
            batch,
            len,
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
        };
        let (cos, sin) = (device.upload(&cos), device.upload(&sin));
        Shape { attention, eps: config.rms_norm_eps as f32, dropout: None, cos, sin }
    }

    /// N.
    pub fn rows(&self) -> usize {
        self.attention.batch * self.attention.len
    }

    fn pass(&self) -> Pass {
        Pass { rows: self.rows(), dropout: self.dropout }
    }

    fn rope(&self, heads: usize) -> RopeShape {
        let AttentionShape { batch, len, head_dim, .. } = self.attention;
        RopeShape { batch, len, heads, head_dim }
    }
}

/// Where a block's parameters are.
pub(super) struct Block {
    attention_norm: usize,
    mlp_norm: usize,
    linears: [Linear; TARGETS.len()],
}

impl Block {
    pub fn new(layout: &Layout, layer: usize, linears: [Linear; TARGETS.len()]) -> Self {
        Block { attention_norm: layout.norm(layer, 0), mlp_norm: layout.norm(layer, 1), linears }
    }

    /// `(out, in)` of the low-rank layers, and how they are computed.
    pub fn low_rank<D: Device>(&self, params: &[Param<D>]) -> Vec<(usize, usize, Product)> {
        let dims = self.linears.iter().filter_map(|l| {
            let (out, inner) = l.dims(params);
            Some((out, inner, l.lora?.product))
        });
        dims.collect()
    }
}

/// What one block keeps from forward to backward. Its input x (N, C) belongs to the caller.
pub(super) struct Saved<D: Device> {
    rstd: [D::Buffer; 2],
    q: D::Buffer,
    k: D::Buffer,
    v: D::Buffer,
    o: D::Buffer,
    lse: D::Buffer,
    middle: D::Buffer,
    gate: D::Buffer,
    up: D::Buffer,
    xa: [Option<D::Buffer>; TARGETS.len()],
}

impl<D: Device> Saved<D> {
    pub fn new(device: &D, config: &LlamaConfig, rows: usize, params: &[Param<D>], block: &Block) -> Self {
        let (q, kv) = (config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim);
        let buffer = |width: usize| device.zeros(rows * width);
        let xa = |linear: &Linear| {
            let factors = linear.lora.filter(|f| f.product == Product::Factored)?;
            Some(buffer(params[factors.a].shape[0]))
        };
        Saved {
            rstd: [buffer(1), buffer(1)],
            q: buffer(q),
            k: buffer(kv),
            v: buffer(kv),
            o: buffer(q),
            lse: buffer(config.num_attention_heads),
            middle: buffer(config.hidden_size),
            gate: buffer(config.intermediate_size),
            up: buffer(config.intermediate_size),
            xa: block.linears.each_ref().map(xa),
        }
    }
}

/// Buffers that all blocks share: nothing in them outlives one half of a block, but `dx`.
pub(super) struct Scratch<D: Device> {
    /// Normed activations (N, C).
    pub h: D::Buffer,
    /// Their gradient (N, C).
    pub dh: D::Buffer,
    /// Gradient of the residual stream (N, C).
    pub dx: D::Buffer,
    act: D::Buffer,
    dact: D::Buffer,
    d_o: D::Buffer,
    dq: D::Buffer,
    dk: D::Buffer,
    dv: D::Buffer,
    lora: Option<LoraScratch<D>>,
}

impl<D: Device> Scratch<D> {
    pub fn new(device: &D, config: &LlamaConfig, rows: usize, lora: Option<LoraScratch<D>>) -> Self {
        let (q, kv) = (config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim);
        let buffer = |width: usize| device.zeros(rows * width);
        Scratch {
            h: buffer(config.hidden_size),
            dh: buffer(config.hidden_size),
            dx: buffer(config.hidden_size),
            act: buffer(config.intermediate_size),
            dact: buffer(config.intermediate_size),
            d_o: buffer(q),
            dq: buffer(q),
            dk: buffer(kv),
            dv: buffer(kv),
            lora,
        }
    }
}

/// From x (N, C) to y (N, C). Without y, only what backward needs is computed (again).
#[allow(clippy::too_many_arguments)]
pub(super) fn forward<D: Device>(
    device: &D,
    params: &[Param<D>],
    block: &Block,
    shape: &Shape<D>,
    x: &D::Buffer,
    saved: &mut Saved<D>,
    scratch: &mut Scratch<D>,
    y: Option<&mut D::Buffer>,
) {
    let pass = shape.pass();
    let Saved { rstd: [rstd_attention, rstd_mlp], q, k, v, o, lse, middle, gate, up, xa } = saved;
    let Scratch { h, act, lora, .. } = scratch;
    let [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj] = block.linears;
    let [q_xa, k_xa, v_xa, o_xa, gate_xa, up_xa, down_xa] = xa.each_mut().map(Option::as_mut);

    device.rms_norm_forward(x, &params[block.attention_norm].value, shape.eps, h, rstd_attention);
    q_proj.forward(device, params, pass, h, q_xa, lora.as_mut(), 0.0, q);
    k_proj.forward(device, params, pass, h, k_xa, lora.as_mut(), 0.0, k);
    v_proj.forward(device, params, pass, h, v_xa, lora.as_mut(), 0.0, v);
    device.rope_forward(shape.rope(shape.attention.heads), &shape.cos, &shape.sin, q);
    device.rope_forward(shape.rope(shape.attention.kv_heads), &shape.cos, &shape.sin, k);
    device.attention_forward(shape.attention, q, k, v, o, lse);
    device.copy(x, middle);
    o_proj.forward(device, params, pass, o, o_xa, lora.as_mut(), 1.0, middle);

    device.rms_norm_forward(middle, &params[block.mlp_norm].value, shape.eps, h, rstd_mlp);
    gate_proj.forward(device, params, pass, h, gate_xa, lora.as_mut(), 0.0, gate);
    up_proj.forward(device, params, pass, h, up_xa, lora.as_mut(), 0.0, up);
    match y {
        Some(y) => {
            device.swiglu_forward(gate, up, act);
            device.copy(middle, y);
            down_proj.forward(device, params, pass, act, down_xa, lora.as_mut(), 1.0, y);
        }
        None if down_xa.is_some() => {
            device.swiglu_forward(gate, up, act);
            down_proj.project_again(device, params, pass, act, down_xa, lora.as_mut());
        }
        None => {}
    }
}

/// `scratch.dx` is the gradient of the block's output before, of its input x (N, C) after. Uses up `saved`.
pub(super) fn backward<D: Device>(
    device: &D,
    params: &mut [Param<D>],
    block: &Block,
    shape: &Shape<D>,
    x: &D::Buffer,
    saved: &mut Saved<D>,
    scratch: &mut Scratch<D>,
) {
    let pass = shape.pass();
    let Saved { rstd: [rstd_attention, rstd_mlp], q, k, v, o, lse, middle, gate, up, xa } = saved;
    let Scratch { h, dh, dx, act, dact, d_o, dq, dk, dv, lora } = scratch;
    let [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj] = block.linears;
    let mut linear = |params: &mut [Param<D>], which: usize, linear: Linear, x: &_, dy: &_, beta: f32, dx: &mut _| {
        linear.backward(device, params, pass, x, xa[which].as_ref(), lora.as_mut(), dy, beta, dx);
    };

    device.swiglu_forward(gate, up, act);
    linear(params, 6, down_proj, act, dx, 0.0, dact);
    device.swiglu_backward(dact, gate, up);
    let (dgate, dup) = (gate, up);
    device.rms_norm_forward(middle, &params[block.mlp_norm].value, shape.eps, h, rstd_mlp);
    linear(params, 5, up_proj, h, dup, 0.0, dh);
    linear(params, 4, gate_proj, h, dgate, 1.0, dh);
    norm_backward(device, &mut params[block.mlp_norm], middle, rstd_mlp, dh, dx);

    linear(params, 3, o_proj, o, dx, 0.0, d_o);
    device.attention_backward(shape.attention, [q, k, v], o, lse, d_o, [dq, dk, dv]);
    device.rope_backward(shape.rope(shape.attention.heads), &shape.cos, &shape.sin, dq);
    device.rope_backward(shape.rope(shape.attention.kv_heads), &shape.cos, &shape.sin, dk);
    device.rms_norm_forward(x, &params[block.attention_norm].value, shape.eps, h, rstd_attention);
    linear(params, 2, v_proj, h, dv, 0.0, dh);
    linear(params, 1, k_proj, h, dk, 1.0, dh);
    linear(params, 0, q_proj, h, dq, 1.0, dh);
    norm_backward(device, &mut params[block.attention_norm], x, rstd_attention, dh, dx);
}

/// Adds to the residual stream's gradient `dx` and, if it trains, to the norm's.
pub(super) fn norm_backward<D: Device>(
    device: &D,
    norm: &mut Param<D>,
    x: &D::Buffer,
    rstd: &D::Buffer,
    dy: &D::Buffer,
    dx: &mut D::Buffer,
) {
    device.rms_norm_backward(x, &norm.value, rstd, dy, dx, norm.grad.as_mut());
}
