//! One decoder block: `x += attention(norm(x)); x += mlp(norm(x))`, forward and then backward.
//!
//! What is kept for backward: the inputs of both halves, queries, keys, values, the attention's output, gate and up.
//! Normed activations and the MLP's inner product are computed again: they cost one pass, and a third of the memory.
//! Gradients of activations take the place of what they are the gradient of, where they can.
//! With activation checkpointing all blocks share what is kept, and [`forward`] runs again before [`backward`].

use super::{
    config::LlamaConfig,
    linear::{Linear, LinearScratch, Needs, Pass, Scaling},
    params::{Layout, Param, TARGETS},
    pool::Pool,
    product::Product,
};
use crate::ops::{AttentionShape, Device, Dropout, Element, RopeShape};

/// Extents of a batch, and the rotary table for them.
pub(super) struct Shape<D: Device> {
    pub attention: AttentionShape,
    pub eps: f32,
    /// Of the current pass.
    pub dropout: Option<Dropout>,
    /// See [`Pass::first_row`].
    pub first_row: usize,
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
        Shape { attention, eps: config.rms_norm_eps as f32, dropout: None, first_row: 0, cos, sin }
    }

    /// N.
    pub fn rows(&self) -> usize {
        self.attention.batch * self.attention.len
    }

    fn pass(&self) -> Pass {
        Pass { rows: self.rows(), dropout: self.dropout, first_row: self.first_row }
    }

    fn rope(&self, heads: usize) -> RopeShape {
        let AttentionShape { batch, len, head_dim, .. } = self.attention;
        RopeShape { batch, len, heads, head_dim }
    }
}

/// Where a block's parameters are.
pub(super) struct Block {
    pub attention_norm: usize,
    mlp_norm: usize,
    linears: [Linear; TARGETS.len()],
}

impl Block {
    pub fn new(layout: &Layout, layer: usize, linears: [Linear; TARGETS.len()]) -> Self {
        Block { attention_norm: layout.norm(layer, 0), mlp_norm: layout.norm(layer, 1), linears }
    }

    /// Gives the projections that train and have no gradient one of zeros.
    pub fn begin_gradients<D: Device>(&self, device: &D, params: &mut [Param<D>], pool: &mut Pool<D>) {
        // In the order of backward.
        for linear in self.linears.iter().rev() {
            let param = &mut params[linear.weight];
            if param.trainable && param.grad.is_none() {
                let mut grad = pool.take(device, Element::F32, param.elements());
                device.fill(&mut grad, 0.0);
                param.grad = Some(grad);
            }
        }
    }

    /// Places of everything in it, in the order of backward.
    pub fn params(&self) -> Vec<usize> {
        let linear = |l: &Linear| {
            let (factors, scaling) = match l.lora {
                Some(f) => (vec![f.a, f.b], if let Scaling::Tanh(at) = f.scaling { Some(at) } else { None }),
                None => (Vec::new(), None),
            };
            [l.weight].into_iter().chain(factors).chain(scaling)
        };
        self.linears.iter().rev().flat_map(linear).chain([self.mlp_norm, self.attention_norm]).collect()
    }

    /// Whether [`Block::begin_gradients`] needs buffers.
    pub fn lacks_gradients<D: Device>(&self, params: &[Param<D>]) -> bool {
        self.linears.iter().any(|l| params[l.weight].trainable && params[l.weight].grad.is_none())
    }

    /// What its layers need of the scratch.
    pub fn needs<D: Device>(&self, params: &[Param<D>]) -> [Needs; TARGETS.len()] {
        self.linears.map(|l| {
            let (out, inner) = l.dims(params);
            let quantised = params[l.weight].quantised.is_some();
            Needs { out, inner, product: l.lora.map(|f| f.product), quantised }
        })
    }
}

/// What one block keeps from forward to backward. Its input x (N, C), and rstd of its first norm, belong to the caller.
pub(super) struct Saved<D: Device> {
    rstd: D::Buffer,
    q: D::Buffer,
    k: D::Buffer,
    v: D::Buffer,
    o: D::Buffer,
    lse: D::Buffer,
    /// The residual stream between attention and MLP (N, C).
    pub middle: D::Buffer,
    gate: D::Buffer,
    up: D::Buffer,
    xa: [Option<D::Buffer>; TARGETS.len()],
}

impl<D: Device> Saved<D> {
    pub fn new(
        device: &D,
        pool: &mut Pool<D>,
        config: &LlamaConfig,
        element: Element,
        rows: usize,
        params: &[Param<D>],
        block: &Block,
    ) -> Self {
        let (q, kv) = (config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim);
        let rstd = pool.take(device, Element::F32, rows);
        let lse = pool.take(device, Element::F32, rows * config.num_attention_heads);
        let mut buffer = |width: usize| pool.take(device, element, rows * width);
        Saved {
            rstd,
            q: buffer(q),
            k: buffer(kv),
            v: buffer(kv),
            o: buffer(q),
            lse,
            middle: buffer(config.hidden_size),
            gate: buffer(config.intermediate_size),
            up: buffer(config.intermediate_size),
            xa: block.linears.each_ref().map(|linear| {
                let factors = linear.lora.filter(|f| f.product == Product::Factored)?;
                Some(buffer(params[factors.a].shape[0]))
            }),
        }
    }

    /// Its buffers are free.
    pub fn give(self, pool: &mut Pool<D>) {
        let Saved { rstd, q, k, v, o, lse, middle, gate, up, xa } = self;
        let always = [rstd, q, k, v, o, lse, middle, gate, up];
        always.into_iter().chain(xa.into_iter().flatten()).for_each(|buffer| pool.give(buffer));
    }
}

/// Buffers that all blocks share: nothing in them outlives one half of a block, but `dx`.
pub(super) struct Scratch<D: Device> {
    /// Normed activations (N, C).
    pub h: D::Buffer,
    /// Their gradient (N, C); in forward, what is added to the residual stream next.
    pub dh: D::Buffer,
    /// Gradient of the residual stream (N, C).
    pub dx: D::Buffer,
    /// In the blocks the MLP's inner product (N, F) and then its gradient, in the head some rows of logits.
    pub wide: D::Buffer,
    /// Gradient of the attention's output (N, H D), unless it has the extents of `dh` and lies there.
    d_o: Option<D::Buffer>,
    linear: LinearScratch<D>,
}

impl<D: Device> Scratch<D> {
    /// With room for `logits` elements of these.
    pub fn new(
        device: &D,
        config: &LlamaConfig,
        element: Element,
        rows: usize,
        logits: usize,
        linear: LinearScratch<D>,
    ) -> Self {
        let q = config.num_attention_heads * config.head_dim;
        let buffer = |width: usize| device.zeros_of(element, rows * width);
        Scratch {
            h: buffer(config.hidden_size),
            dh: buffer(config.hidden_size),
            dx: buffer(config.hidden_size),
            wide: device.zeros_of(element, logits.max(rows * config.intermediate_size)),
            d_o: (q != config.hidden_size).then(|| buffer(q)),
            linear,
        }
    }
}

/// From the normed x in `scratch.h` to what the block adds to the residual stream after `saved.middle`, in `scratch.dh`.
/// Without `output`, only what backward needs is computed (again).
#[allow(clippy::too_many_arguments)]
pub(super) fn forward<D: Device>(
    device: &D,
    params: &[Param<D>],
    block: &Block,
    shape: &Shape<D>,
    x: &D::Buffer,
    saved: &mut Saved<D>,
    scratch: &mut Scratch<D>,
    output: bool,
) {
    let pass = shape.pass();
    let Saved { rstd, q, k, v, o, lse, middle, gate, up, xa } = saved;
    let Scratch { h, dh: branch, wide: act, linear, .. } = scratch;
    let [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj] = block.linears;
    let [q_xa, k_xa, v_xa, o_xa, gate_xa, up_xa, down_xa] = xa.each_mut().map(Option::as_mut);

    q_proj.forward(device, params, pass, h, q_xa, linear, q);
    k_proj.forward(device, params, pass, h, k_xa, linear, k);
    v_proj.forward(device, params, pass, h, v_xa, linear, v);
    device.rope_forward(shape.rope(shape.attention.heads), &shape.cos, &shape.sin, q);
    device.rope_forward(shape.rope(shape.attention.kv_heads), &shape.cos, &shape.sin, k);
    device.attention_forward(shape.attention, q, k, v, o, lse);
    o_proj.forward(device, params, pass, o, o_xa, linear, branch);

    let norm = &params[block.mlp_norm].value;
    device.add_rms_norm_forward(x, branch, middle, norm, shape.eps, h, rstd);
    gate_proj.forward(device, params, pass, h, gate_xa, linear, gate);
    up_proj.forward(device, params, pass, h, up_xa, linear, up);
    if output {
        device.swiglu_forward(gate, up, act);
        down_proj.forward(device, params, pass, act, down_xa, linear, branch);
    } else if down_xa.is_some() {
        device.swiglu_forward(gate, up, act);
        down_proj.project_again(device, params, pass, act, down_xa, linear);
    }
}

/// The linear layers of one block in backward.
struct Linears<'a, D: Device> {
    device: &'a D,
    params: &'a mut [Param<D>],
    pass: Pass,
    linears: [Linear; TARGETS.len()],
    xa: &'a [Option<D::Buffer>; TARGETS.len()],
    scratch: &'a mut LinearScratch<D>,
}

impl<D: Device> Linears<'_, D> {
    fn backward(&mut self, which: usize, x: &D::Buffer, dy: &D::Buffer, beta: f32, dx: &mut D::Buffer) {
        self.weight_gradients(which, x, dy);
        self.input_gradient(which, dy, beta, dx);
    }

    fn weight_gradients(&mut self, which: usize, x: &D::Buffer, dy: &D::Buffer) {
        let (linear, xa) = (self.linears[which], self.xa[which].as_ref());
        linear.weight_gradients(self.device, self.params, self.pass, x, xa, self.scratch, dy);
    }

    fn input_gradient(&mut self, which: usize, dy: &D::Buffer, beta: f32, dx: &mut D::Buffer) {
        let linear = self.linears[which];
        linear.input_gradient(self.device, self.params, self.pass, self.scratch, dy, beta, dx);
    }

    fn norm_backward(&mut self, norm: usize, x: &D::Buffer, rstd: &D::Buffer, dy: &D::Buffer, dx: &mut D::Buffer) {
        norm_backward(self.device, &mut self.params[norm], x, rstd, dy, dx);
    }
}

/// `scratch.dx` is the gradient of the block's output before, of its input x (N, C) after; `rstd` is that of the norm of x.
/// Uses up `saved`: gate, up, q, k and v become their gradients, and so does the MLP's inner product where it lies.
#[allow(clippy::too_many_arguments)]
pub(super) fn backward<D: Device>(
    device: &D,
    params: &mut [Param<D>],
    block: &Block,
    shape: &Shape<D>,
    x: &D::Buffer,
    rstd: &mut D::Buffer,
    saved: &mut Saved<D>,
    scratch: &mut Scratch<D>,
) {
    let Saved { rstd: rstd_mlp, q, k, v, o, lse, middle, gate, up, xa } = saved;
    let Scratch { h, dh, dx, wide, d_o, linear } = scratch;
    let linears = block.linears;
    let mut linears = Linears { device, params, pass: shape.pass(), linears, xa, scratch: linear };

    device.swiglu_forward(gate, up, wide);
    linears.weight_gradients(6, wide, dx);
    linears.input_gradient(6, dx, 0.0, wide);
    device.swiglu_backward(wide, gate, up);
    device.rms_norm_forward(middle, &linears.params[block.mlp_norm].value, shape.eps, h, rstd_mlp);
    linears.backward(5, h, up, 0.0, dh);
    linears.backward(4, h, gate, 1.0, dh);
    linears.norm_backward(block.mlp_norm, middle, rstd_mlp, dh, dx);

    let d_o = d_o.as_mut().unwrap_or(dh);
    linears.backward(3, o, dx, 0.0, d_o);
    device.attention_backward(shape.attention, [q, k, v], o, lse, d_o);
    device.rope_backward(shape.rope(shape.attention.heads), &shape.cos, &shape.sin, q);
    device.rope_backward(shape.rope(shape.attention.kv_heads), &shape.cos, &shape.sin, k);
    device.rms_norm_forward(x, &linears.params[block.attention_norm].value, shape.eps, h, rstd);
    linears.backward(2, h, v, 0.0, dh);
    linears.backward(1, h, k, 1.0, dh);
    linears.backward(0, h, q, 1.0, dh);
    linears.norm_backward(block.attention_norm, x, rstd, dh, dx);
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
