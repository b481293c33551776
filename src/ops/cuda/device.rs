//! Every operation as a launch of its kernels. What a kernel does, and which grid it expects, stands beside it.

use super::{Arg, Cuda, Extents, THREADS, blocks, memory::Memory};
use crate::{
    error::Result,
    ops::{AdamW, AttentionShape, Device, Dropout, Mat, MatMut, RopeShape, Rounding, Tally},
};
use std::{collections::BTreeMap, sync::PoisonError};

/// f32 elements on a GPU; the memory may have room for more.
pub struct CudaBuffer {
    memory: Memory,
    len: usize,
}

impl From<&CudaBuffer> for Arg {
    fn from(x: &CudaBuffer) -> Arg {
        Arg::from(&x.memory)
    }
}

impl From<&&mut CudaBuffer> for Arg {
    fn from(x: &&mut CudaBuffer) -> Arg {
        Arg::from(&x.memory)
    }
}

impl CudaBuffer {
    /// From element `offset` on.
    fn at(&self, offset: usize) -> Arg {
        Arg::U64(self.memory.address() + 4 * offset as u64)
    }
}

/// Token ids on a GPU, and on the host: the scatter-add wants them sorted.
pub struct CudaTokens {
    memory: Memory,
    host: Vec<u32>,
}

/// Three f64: loss, sum of squares, factor.
pub struct CudaTally(Memory);

impl CudaTally {
    fn at(&self, index: u64) -> Arg {
        Arg::U64(self.0.address() + 8 * index)
    }
}

/// Rows that one thread adds up in the gradient of a norm's weight: `ROWS` of rms_norm.cu.
const NORM_ROWS: usize = 64;

/// Warps of a block: `WARPS` of common.cu.
const WARPS: u32 = THREADS / 32;

/// Blocks that sum a buffer, each a part of it.
const PARTS: u32 = 1024;

impl Cuda {
    /// Adds `scale` times the parts that `kernel` makes of `buffers`, all of one length, in f64, to the number at `total`.
    fn add_up(&self, kernel: &'static str, buffers: &[&CudaBuffer], scale: f64, total: Arg) {
        let parts = self.allocate(2 * PARTS as usize);
        let len = buffers.first().map_or(0, |b| b.len);
        // Several elements per thread, so that the sum within a block is not most of the work.
        let count = blocks(len.div_ceil(8)).min(PARTS);
        let mut args: Vec<Arg> = buffers.iter().map(|b| Arg::from(*b)).collect();
        args.extend([len.into(), (&parts).into()]);
        self.launch(kernel, [count, 1, 1], 0, &args);
        if count > 0 {
            self.launch("add_parts", [1; 3], 0, &[(&parts).into(), count.into(), scale.into(), total]);
        }
    }

    /// The sum of the parts that `kernel` makes of `buffers`. The host waits for it.
    fn sum_of(&self, kernel: &'static str, buffers: &[&CudaBuffer]) -> f64 {
        let mut total = self.allocate(2);
        self.attempt(|_| total.fill(0));
        self.add_up(kernel, buffers, 1.0, (&total).into());
        let mut sum = [0f64];
        self.attempt(|_| total.read(&mut sum)).map_or(f64::NAN, |()| sum[0])
    }

    fn extents(shape: &AttentionShape) -> Extents {
        let &AttentionShape { len, heads, kv_heads, head_dim, .. } = shape;
        let [len, heads, kv_heads, dim] = [len, heads, kv_heads, head_dim].map(|x| x as u32);
        Extents { len, heads, kv_heads, dim, scale: shape.scale() }
    }
}

/// Bytes of shared memory for `whole` tiles of `tile` rows of D, and `square` tiles of scores.
fn shared_bytes(tile: usize, head_dim: usize, whole: usize, square: usize) -> u32 {
    (4 * tile * (whole * (head_dim + 1) + square * (tile + 1))) as u32
}

impl Device for Cuda {
    type Buffer = CudaBuffer;
    type Tokens = CudaTokens;
    type Tally = CudaTally;

    fn zeros(&self, len: usize) -> CudaBuffer {
        let mut memory = self.allocate(len);
        self.attempt(|_| memory.fill(0));
        CudaBuffer { memory, len }
    }

    fn upload(&self, values: &[f32]) -> CudaBuffer {
        let mut memory = self.allocate(values.len());
        self.attempt(|_| memory.write(values));
        CudaBuffer { memory, len: values.len() }
    }

    fn write(&self, buffer: &mut CudaBuffer, values: &[f32]) {
        assert_eq!(buffer.len, values.len(), "write: lengths");
        self.attempt(|_| buffer.memory.write(values));
    }

    fn read(&self, buffer: &CudaBuffer) -> Vec<f32> {
        let mut values = vec![f32::NAN; buffer.len];
        if self.attempt(|_| buffer.memory.read(&mut values)).is_none() {
            values.fill(f32::NAN);
        }
        values
    }

    fn len(&self, buffer: &CudaBuffer) -> usize {
        buffer.len
    }

    fn capacity(&self, buffer: &CudaBuffer) -> usize {
        // Where no memory was to be had, the failure is remembered, and any length will do.
        buffer.len.max(buffer.memory.bytes() / 4)
    }

    fn set_len(&self, buffer: &mut CudaBuffer, len: usize) {
        assert!(len <= self.capacity(buffer), "set_len: {len} elements in a buffer made for {}", self.capacity(buffer));
        buffer.len = len;
    }

    fn upload_tokens(&self, tokens: &[u32]) -> CudaTokens {
        let mut memory = self.allocate(tokens.len());
        self.attempt(|_| memory.write(tokens));
        CudaTokens { memory, host: tokens.to_vec() }
    }

    fn status(&self) -> Result<()> {
        self.attempt(|gpu| gpu.synchronize());
        self.0.failure.lock().unwrap_or_else(PoisonError::into_inner).clone().map_or(Ok(()), Err)
    }

    fn free_memory(&self) -> Option<u64> {
        Some(self.attempt(|gpu| gpu.memory())?.0)
    }

    fn allow_tf32(&self, allow: bool) {
        self.attempt(|gpu| self.0.blas.allow_tf32(gpu, allow));
    }

    fn fill(&self, x: &mut CudaBuffer, value: f32) {
        self.attempt(|_| x.memory.fill(value.to_bits()));
    }

    fn scale(&self, x: &mut CudaBuffer, factor: f32) {
        self.launch_each("scale", x.len, &[(&x).into(), x.len.into(), factor.into()]);
    }

    fn axpy(&self, alpha: f32, x: &CudaBuffer, y: &mut CudaBuffer) {
        assert_eq!(x.len, y.len, "axpy: lengths");
        self.launch_each("axpy", x.len, &[alpha.into(), x.into(), (&y).into(), x.len.into()]);
    }

    fn copy(&self, x: &CudaBuffer, y: &mut CudaBuffer) {
        assert_eq!(x.len, y.len, "copy: lengths");
        self.attempt(|_| y.memory.copy_from(&x.memory, 4 * x.len));
    }

    fn round_to_bf16(&self, rounding: Rounding, x: &mut CudaBuffer) {
        match rounding {
            Rounding::Nearest => self.launch_each("round_nearest", x.len, &[(&x).into(), x.len.into()]),
            Rounding::Stochastic(key) => {
                self.launch_each("round_stochastic", x.len, &[(&x).into(), x.len.into(), key.into()]);
            }
        }
    }

    fn sum_of_squares(&self, x: &CudaBuffer) -> f64 {
        self.dot(x, x)
    }

    fn dot(&self, x: &CudaBuffer, y: &CudaBuffer) -> f64 {
        assert_eq!(x.len, y.len, "dot: lengths");
        self.sum_of("dot_parts", &[x, y])
    }

    fn sum(&self, x: &CudaBuffer) -> f64 {
        self.sum_of("sum_parts", &[x])
    }

    fn dropout_forward(&self, dropout: Dropout, x: &CudaBuffer, y: &mut CudaBuffer) {
        let (n, key, threshold, factor) = (x.len.min(y.len), dropout.key, dropout.threshold(), dropout.factor());
        let args = [x.into(), (&y).into(), n.into(), key.into(), threshold.into(), factor.into()];
        self.launch_each("dropout_forward", n, &args);
    }

    fn dropout_backward(&self, dropout: Dropout, dy: &CudaBuffer, dx: &mut CudaBuffer) {
        let (n, key, threshold, factor) = (dy.len.min(dx.len), dropout.key, dropout.threshold(), dropout.factor());
        let args = [dy.into(), (&dx).into(), n.into(), key.into(), threshold.into(), factor.into()];
        self.launch_each("dropout_backward", n, &args);
    }

    fn matmul(&self, alpha: f32, a: Mat<'_, CudaBuffer>, b: Mat<'_, CudaBuffer>, beta: f32, c: MatMut<'_, CudaBuffer>) {
        let extents = |m: &Mat<'_, CudaBuffer>| if m.transposed { (m.cols, m.rows) } else { (m.rows, m.cols) };
        let ((rows, inner), (b_rows, cols)) = (extents(&a), extents(&b));
        assert_eq!((rows, inner, cols), (c.rows, b_rows, c.cols), "matmul: shapes");
        assert!(a.offset + a.rows * a.cols <= a.data.len, "matmul: a");
        assert!(b.offset + b.rows * b.cols <= b.data.len, "matmul: b");
        assert!(c.offset + c.rows * c.cols <= c.data.len, "matmul: c");
        if rows == 0 || cols == 0 || inner == 0 {
            return;
        }
        let [a_data, b_data, mut c_data] = [a.data, b.data, &*c.data].map(|x| x.memory.address());
        let a = Mat { data: &a_data, offset: a.offset, rows: a.rows, cols: a.cols, transposed: a.transposed };
        let b = Mat { data: &b_data, offset: b.offset, rows: b.rows, cols: b.cols, transposed: b.transposed };
        let c = MatMut { data: &mut c_data, offset: c.offset, rows: c.rows, cols: c.cols };
        self.attempt(|gpu| self.0.blas.matmul(gpu, alpha, a, b, beta, c));
    }

    fn embedding_forward(&self, tokens: &CudaTokens, table: &CudaBuffer, y: &mut CudaBuffer) {
        let width = y.len / tokens.host.len();
        assert_eq!(y.len, tokens.host.len() * width, "embedding: rows");
        let args = [(&tokens.memory).into(), table.into(), (&y).into(), y.len.into(), (width as u32).into()];
        self.launch_each("embedding_forward", y.len, &args);
    }

    fn embedding_backward(&self, tokens: &CudaTokens, dy: &CudaBuffer, dtable: &mut CudaBuffer) {
        let width = dy.len / tokens.host.len();
        assert_eq!(dy.len, tokens.host.len() * width, "embedding: rows");
        let mut by_token: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
        for (row, token) in tokens.host.iter().enumerate() {
            by_token.entry(*token).or_default().push(row as u32);
        }
        let mut starts = vec![0];
        starts.extend(by_token.values().scan(0, |end, rows| {
            *end += rows.len() as u32;
            Some(*end)
        }));
        let rows = self.upload_tokens(&by_token.values().flatten().copied().collect::<Vec<_>>());
        let starts = self.upload_tokens(&starts);
        let args = [&tokens.memory, &rows.memory, &starts.memory, &dy.memory, &dtable.memory].map(Arg::from);
        let args: Vec<Arg> = args.into_iter().chain([(width as u32).into()]).collect();
        self.launch("embedding_backward", [by_token.len() as u32, 1, 1], 0, &args);
    }

    fn rms_norm_forward(
        &self,
        x: &CudaBuffer,
        weight: &CudaBuffer,
        eps: f32,
        y: &mut CudaBuffer,
        rstd: &mut CudaBuffer,
    ) {
        assert_eq!((x.len, y.len), (rstd.len * weight.len, rstd.len * weight.len), "rms_norm: rows");
        let (rows, width) = (rstd.len as u32, weight.len as u32);
        let args = [x.into(), weight.into(), eps.into(), (&y).into(), (&rstd).into(), rows.into(), width.into()];
        self.launch("rms_norm_forward", [rows.div_ceil(WARPS), 1, 1], 0, &args);
    }

    fn rms_norm_backward(
        &self,
        x: &CudaBuffer,
        weight: &CudaBuffer,
        rstd: &CudaBuffer,
        dy: &CudaBuffer,
        dx: &mut CudaBuffer,
        dweight: Option<&mut CudaBuffer>,
    ) {
        let (rows, width) = (rstd.len, weight.len as u32);
        assert_eq!((x.len, dy.len, dx.len), (rows * weight.len, x.len, x.len), "rms_norm: rows");
        let blocks = (rows as u32).div_ceil(WARPS);
        let args = [x.into(), weight.into(), rstd.into(), dy.into(), (&dx).into(), (rows as u32).into(), width.into()];
        self.launch("rms_norm_backward", [blocks, 1, 1], 0, &args);
        let Some(dweight) = dweight else { return };
        assert_eq!(dweight.len, weight.len, "rms_norm: dweight");
        let (columns, count) = (width.div_ceil(THREADS), rows.div_ceil(NORM_ROWS));
        let parts = self.allocate(count * weight.len);
        let args = [x.into(), rstd.into(), dy.into(), (&parts).into(), (rows as u32).into(), width.into()];
        self.launch("rms_norm_dweight_parts", [columns, count as u32, 1], 0, &args);
        let args = [(&parts).into(), (&dweight).into(), (count as u32).into(), width.into()];
        self.launch("rms_norm_dweight", [columns, 1, 1], 0, &args);
    }

    fn rope_forward(&self, shape: RopeShape, cos: &CudaBuffer, sin: &CudaBuffer, x: &mut CudaBuffer) {
        self.rope(shape, cos, sin, x, 1.0);
    }

    fn rope_backward(&self, shape: RopeShape, cos: &CudaBuffer, sin: &CudaBuffer, dx: &mut CudaBuffer) {
        self.rope(shape, cos, sin, dx, -1.0);
    }

    fn attention_forward(
        &self,
        shape: AttentionShape,
        q: &CudaBuffer,
        k: &CudaBuffer,
        v: &CudaBuffer,
        o: &mut CudaBuffer,
        lse: &mut CudaBuffer,
    ) {
        let AttentionShape { batch, len, heads, head_dim, .. } = shape;
        check_attention(&shape, [q, o], [k, v], lse);
        let (kernel, tile) = match head_dim {
            ..=128 => ("attention_forward_32", 32),
            _ => ("attention_forward_16", 16),
        };
        let grid = [len.div_ceil(tile), heads, batch].map(|x| x as u32);
        let args = [q.into(), k.into(), v.into(), (&o).into(), (&lse).into()];
        let args: Vec<Arg> = [Arg::Extents(Self::extents(&shape))].into_iter().chain(args).collect();
        self.launch(kernel, grid, shared_bytes(tile, head_dim, 2, 1), &args);
    }

    fn attention_backward(
        &self,
        shape: AttentionShape,
        [q, k, v]: [&mut CudaBuffer; 3],
        o: &CudaBuffer,
        lse: &CudaBuffer,
        d_o: &CudaBuffer,
    ) {
        let AttentionShape { batch, len, heads, kv_heads, head_dim } = shape;
        check_attention(&shape, [q, o], [k, v], lse);
        check_attention(&shape, [d_o, q], [k, v], lse);
        let (kernel_q, kernel_kv, tile) = match head_dim {
            ..=64 => ("attention_backward_q_32", "attention_backward_kv_32", 32),
            65..=128 => ("attention_backward_q_16", "attention_backward_kv_16", 16),
            _ => ("attention_backward_q_8", "attention_backward_kv_8", 8),
        };
        let with_extents =
            |args: Vec<Arg>| -> Vec<Arg> { [Arg::Extents(Self::extents(&shape))].into_iter().chain(args).collect() };
        let rows = batch * len * heads;
        let delta = self.allocate(rows);
        let args = with_extents(vec![o.into(), d_o.into(), (&delta).into(), rows.into()]);
        self.launch("attention_delta", [(rows as u64).div_ceil(u64::from(WARPS)) as u32, 1, 1], 0, &args);
        let inputs = [&q.memory, &k.memory, &v.memory, &lse.memory, &delta, &d_o.memory];
        let inputs = || inputs.map(Arg::from).into_iter();
        let grid = |heads: usize| [len.div_ceil(tile), heads, batch].map(|x| x as u32);
        // All blocks of both kernels read keys and values, so their gradients lie elsewhere first. A block of queries is
        // read by the one that replaces it, once the kernel for keys and values is done with it.
        let [mut dk, mut dv] = [&k.memory, &v.memory].map(|memory| self.allocate(memory.bytes() / 4));
        let args = with_extents(inputs().chain([(&dk).into(), (&dv).into()]).collect());
        self.launch(kernel_kv, grid(kv_heads), shared_bytes(tile, head_dim, 4, 2), &args);
        let args = with_extents(inputs().chain([(&q.memory).into()]).collect());
        self.launch(kernel_q, grid(heads), shared_bytes(tile, head_dim, 4, 1), &args);
        std::mem::swap(&mut k.memory, &mut dk);
        std::mem::swap(&mut v.memory, &mut dv);
    }

    fn swiglu_forward(&self, gate: &CudaBuffer, up: &CudaBuffer, y: &mut CudaBuffer) {
        assert!(gate.len == up.len && y.len >= gate.len, "swiglu: lengths");
        self.launch_each("swiglu_forward", gate.len, &[gate.into(), up.into(), (&y).into(), gate.len.into()]);
    }

    fn swiglu_backward(&self, dy: &CudaBuffer, gate: &mut CudaBuffer, up: &mut CudaBuffer) {
        assert!(gate.len == up.len && dy.len >= gate.len, "swiglu: lengths");
        self.launch_each("swiglu_backward", gate.len, &[dy.into(), (&gate).into(), (&up).into(), gate.len.into()]);
    }

    fn cross_entropy(
        &self,
        vocab: usize,
        first: usize,
        rows: usize,
        targets: &CudaTokens,
        logits: &mut CudaBuffer,
        losses: &mut CudaBuffer,
        scale: Option<f32>,
    ) {
        assert!(
            rows * vocab <= logits.len && first + rows <= losses.len.min(targets.host.len()),
            "cross_entropy: rows"
        );
        let args = [
            Arg::U64(targets.memory.address() + 4 * first as u64),
            (&logits).into(),
            losses.at(first),
            (vocab as u32).into(),
            u32::from(scale.is_some()).into(),
            scale.unwrap_or(0.0).into(),
        ];
        self.launch("cross_entropy", [rows as u32, 1, 1], 0, &args);
    }

    fn tally(&self) -> CudaTally {
        let mut memory = self.allocate(6);
        self.attempt(|_| memory.fill(0));
        CudaTally(memory)
    }

    fn tally_losses(&self, scale: f64, losses: &CudaBuffer, tally: &mut CudaTally) {
        self.add_up("sum_parts", &[losses], scale, tally.at(0));
    }

    fn tally_gradients(&self, gradients: &[&CudaBuffer], max_norm: f64, tally: &mut CudaTally) {
        gradients.iter().for_each(|gradient| self.add_up("dot_parts", &[gradient, gradient], 1.0, tally.at(1)));
        self.launch("clip", [1; 3], 0, &[tally.at(0), max_norm.into()]);
    }

    fn read_tally(&self, tally: &CudaTally) -> Tally {
        let mut numbers = [f64::NAN; 3];
        self.attempt(|_| tally.0.read(&mut numbers));
        let [loss, squares, factor] = numbers;
        Tally { loss, squares, factor }
    }

    fn adamw(
        &self,
        step: &AdamW,
        tally: &CudaTally,
        p: &mut CudaBuffer,
        g: &CudaBuffer,
        m: &mut CudaBuffer,
        v: &mut CudaBuffer,
    ) {
        assert_eq!((g.len, m.len, v.len), (p.len, p.len, p.len), "adamw: lengths");
        let f = step.factors();
        let args = [(&p).into(), g.into(), (&m).into(), (&v).into(), p.len.into(), tally.at(0)];
        let factors = [f.keep, f.b1, f.c1, f.b2, f.c2, f.size, f.root, f.eps].map(Arg::from);
        self.launch_each("adamw", p.len, &args.into_iter().chain(factors).collect::<Vec<_>>());
    }
}

impl Cuda {
    fn rope(&self, shape: RopeShape, cos: &CudaBuffer, sin: &CudaBuffer, x: &mut CudaBuffer, direction: f32) {
        let RopeShape { batch, len, heads, head_dim } = shape;
        let half = head_dim / 2;
        assert_eq!(x.len, batch * len * heads * head_dim, "rope: rows");
        assert!(cos.len >= len * half && sin.len == cos.len, "rope: table");
        let pairs = x.len / 2;
        let [len, heads, half] = [len, heads, half].map(|x| x as u32);
        let args = [cos.into(), sin.into(), (&x).into(), pairs.into(), len.into(), heads.into(), half.into()];
        self.launch_each("rope", pairs, &args.into_iter().chain([direction.into()]).collect::<Vec<_>>());
    }
}

fn check_attention(shape: &AttentionShape, q: [&CudaBuffer; 2], kv: [&CudaBuffer; 2], lse: &CudaBuffer) {
    let &AttentionShape { batch, len, heads, kv_heads, head_dim } = shape;
    assert!(head_dim <= 256, "attention: the CUDA kernels take heads of up to 256 elements");
    assert!(q.iter().all(|x| x.len == batch * len * heads * head_dim), "attention: q, o");
    assert!(kv.iter().all(|x| x.len == batch * len * kv_heads * head_dim), "attention: k, v");
    assert_eq!(lse.len, batch * heads * len, "attention: lse");
}
