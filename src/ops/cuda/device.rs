//! Every operation as a launch of its kernels. What a kernel does, and which grid it expects, stands beside it.

use super::{
    Arg, Cuda, THREADS, WARPS, attention,
    blas::{Factors, Matrix, Product, workspace_bytes},
    blocks,
    buffer::{CudaBuffer, CudaStepStats, CudaTokens, width},
    memory::Memory,
    quantise::CudaQuantised,
    typed,
};
use crate::{
    error::Result,
    ops::{
        AdamW, AttentionShape, Device, Dropout, Element, Factor, LaunchQueue, Mat, MatMut, PACKED_STATS, Pruning,
        Quantisation, Quantised, RopeShape, Rounding, StepStats, prune,
    },
};
use half::bf16;
use std::{borrow::Cow, collections::BTreeMap};

/// Rows that one thread adds up in the gradient of a norm's weight: `ROWS` of rms_norm.cu.
const NORM_ROWS: usize = 64;

/// Words of `struct Select` of prune.cu.
const SELECT: usize = 4 + 256;

/// Blocks that sum a buffer, each a part of it.
const PARTS: u32 = 1024;

impl Cuda {
    /// What elements are on this GPU: before compute capability 8.0, cuBLAS multiplies no bf16.
    fn native(&self, element: Element) -> Element {
        if self.0.gpu.capability < 80 { Element::F32 } else { element }
    }

    /// Adds `scale` times the parts that `kernel` makes of `buffers`, all of one length, in f64, to the number at `total`.
    fn add_up(&self, kernel: &'static str, buffers: &[&CudaBuffer], scale: f64, total: Arg) {
        let len = buffers.first().map_or(0, |b| b.len);
        self.add_up_raw(kernel, buffers.iter().map(|b| Arg::from(*b)).collect(), len, scale, total);
    }

    /// [`Cuda::add_up`] of what lies at these addresses.
    pub(super) fn add_up_raw(&self, kernel: &'static str, mut args: Vec<Arg>, len: usize, scale: f64, total: Arg) {
        let parts = self.allocate(2 * PARTS as usize);
        // Several elements per thread, so that the sum within a block is not most of the work.
        let count = blocks(len.div_ceil(8)).min(PARTS);
        args.extend::<[Arg; 2]>([len.into(), (&parts).into()]);
        self.launch(kernel, [count, 1, 1], 0, &args);
        if count > 0 {
            self.launch("add_parts", [1; 3], 0, &[(&parts).into(), count.into(), scale.into(), total]);
        }
    }

    /// The sum of the parts that `kernel` makes of `buffers`. The host waits for it.
    fn sum_of(&self, kernel: &'static str, buffers: &[&CudaBuffer]) -> f64 {
        let total = self.allocate(2);
        self.fill_words(&total, 0);
        self.add_up(kernel, buffers, 1.0, (&total).into());
        let mut sum = [0f64];
        self.after_flush(|_| total.read(&mut sum)).map_or(f64::NAN, |()| sum[0])
    }
}

/// The arguments of both kernels of dropout.
fn dropout_args(dropout: Dropout, n: usize, from: &CudaBuffer, to: &CudaBuffer) -> [Arg; 7] {
    let (first, threshold, factor) = (dropout.first_counter(), dropout.threshold(), dropout.factor());
    [from.into(), to.into(), n.into(), first.into(), dropout.key.into(), threshold.into(), factor.into()]
}

impl LaunchQueue for Cuda {
    fn begin_capture(&self) -> bool {
        self.begin_deferring()
    }

    fn flush(&self) {
        self.flush_queue();
    }

    fn end_capture(&self) {
        self.end_deferring();
    }
}

impl Device for Cuda {
    type Buffer = CudaBuffer;
    type Tokens = CudaTokens;
    type Quantised = CudaQuantised;
    type StepStats = CudaStepStats;

    fn zeros_of(&self, element: Element, len: usize) -> CudaBuffer {
        let element = self.native(element);
        let memory = self.allocate_bytes(width(element) * len);
        self.fill_words(&memory, 0);
        CudaBuffer { memory, element, len }
    }

    fn zeros(&self, len: usize) -> CudaBuffer {
        self.zeros_of(Element::F32, len)
    }

    fn upload(&self, values: &[f32]) -> CudaBuffer {
        CudaBuffer { memory: self.uploaded(values), element: Element::F32, len: values.len() }
    }

    fn write(&self, buffer: &mut CudaBuffer, values: &[f32]) {
        assert_eq!(buffer.len, values.len(), "write: lengths");
        self.after_flush(|_| match buffer.element {
            Element::F32 => buffer.memory.write(values),
            Element::Bf16 => {
                buffer.memory.write(&values.iter().map(|x| bf16::from_f32(*x).to_bits()).collect::<Vec<u16>>())
            }
        });
    }

    fn read(&self, buffer: &CudaBuffer) -> Vec<f32> {
        let values = self.after_flush(|_| match buffer.element {
            Element::F32 => {
                let mut values = vec![0f32; buffer.len];
                buffer.memory.read(&mut values).map(|()| values)
            }
            Element::Bf16 => {
                let mut bits = vec![0u16; buffer.len];
                buffer.memory.read(&mut bits)?;
                Ok(bits.into_iter().map(|b| bf16::from_bits(b).to_f32()).collect())
            }
        });
        values.unwrap_or_else(|| vec![f32::NAN; buffer.len])
    }

    fn view<'a>(&self, buffer: &'a CudaBuffer) -> Cow<'a, [f32]> {
        Cow::Owned(self.read(buffer))
    }

    fn len(&self, buffer: &CudaBuffer) -> usize {
        buffer.len
    }

    fn width(&self, element: Element) -> usize {
        width(self.native(element))
    }

    fn capacity(&self, buffer: &CudaBuffer) -> usize {
        // Where no memory was to be had, the failure is remembered, and any length will do.
        buffer.memory.bytes().max(width(buffer.element) * buffer.len)
    }

    fn address(&self, buffer: &CudaBuffer) -> u64 {
        buffer.address(0)
    }

    fn resize_in_place(&self, buffer: &mut CudaBuffer, element: Element, len: usize) {
        let element = self.native(element);
        let (needed, room) = (width(element) * len, self.capacity(buffer));
        assert!(needed <= room, "resize_in_place: {needed} bytes in a buffer of {room}");
        (buffer.element, buffer.len) = (element, len);
    }

    fn upload_tokens(&self, tokens: &[u32]) -> CudaTokens {
        CudaTokens { memory: self.uploaded(tokens), host: tokens.to_vec() }
    }

    fn status(&self) -> Result<()> {
        self.after_flush(|gpu| gpu.synchronize());
        self.first_failure().map_or(Ok(()), Err)
    }

    fn free_memory(&self) -> Option<u64> {
        Some(self.guarded(|gpu| gpu.memory())?.0)
    }

    fn reserve(&self, bytes: u64) -> bool {
        self.guarded(|gpu| gpu.reserve(bytes)).unwrap_or(false)
    }

    fn overhead(&self, shape: &AttentionShape, element: Element) -> u64 {
        // Token ids sorted for the embedding, parts of sums, what the pool loses between buffers, and what cuBLAS has.
        let others = 16 * (shape.batch * shape.len) as u64 + (8 << 20) + workspace_bytes(self.0.gpu.capability) as u64;
        self.attention_workspace(shape, element) + others
    }

    fn peak_memory(&self) -> Option<u64> {
        self.guarded(|gpu| gpu.peak_memory())
    }

    fn allow_tf32(&self, allow: bool) {
        self.after_flush(|gpu| self.0.blas.allow_tf32(gpu, allow));
        self.forget();
    }

    fn fill(&self, x: &mut CudaBuffer, value: f32) {
        self.fill_words(
            &x.memory,
            match x.element {
                Element::F32 => value.to_bits(),
                Element::Bf16 => u32::from(bf16::from_f32(value).to_bits()) * 0x1_0001,
            },
        );
    }

    fn scale(&self, x: &mut CudaBuffer, factor: f32) {
        only_f32("scale", &[x]);
        self.launch_each("scale", x.len, &[(&x).into(), x.len.into(), factor.into()]);
    }

    fn axpy(&self, alpha: f32, x: &CudaBuffer, y: &mut CudaBuffer) {
        assert_eq!(x.len, y.len, "axpy: lengths");
        only_f32("axpy", &[x, y]);
        self.launch_each("axpy", x.len, &[alpha.into(), x.into(), (&y).into(), x.len.into()]);
    }

    fn copy(&self, x: &CudaBuffer, y: &mut CudaBuffer) {
        assert_eq!(x.len, y.len, "copy: lengths");
        self.convert((x.address(0), x.element), (y.address(0), y.element), x.len);
    }

    fn round_to_bf16(&self, rounding: Rounding, x: &mut CudaBuffer) {
        only_f32("rounding", &[x]);
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
        assert!(x.len == y.len && x.element == y.element, "dot: lengths");
        self.sum_of(typed!("dot_parts", x.element), &[x, y])
    }

    fn sum(&self, x: &CudaBuffer) -> f64 {
        only_f32("sum", &[x]);
        self.sum_of("sum_parts", &[x])
    }

    fn dropout_forward(&self, dropout: Dropout, x: &CudaBuffer, y: &mut CudaBuffer) {
        let n = x.len.min(y.len);
        let args = dropout_args(dropout, n, x, y);
        assert_eq!(x.element, y.element, "dropout: elements");
        self.launch_each(typed!("dropout_forward", x.element), n, &args);
    }

    fn dropout_backward(&self, dropout: Dropout, dy: &CudaBuffer, dx: &mut CudaBuffer) {
        let n = dy.len.min(dx.len);
        let args = dropout_args(dropout, n, dy, dx);
        assert_eq!(dx.element, dy.element, "dropout: elements");
        self.launch_each(typed!("dropout_backward", dx.element), n, &args);
    }

    fn tanh_backward(&self, p: &CudaBuffer, x: &CudaBuffer, y: &CudaBuffer, dp: &mut CudaBuffer) {
        assert!(x.len == y.len && x.element == y.element, "tanh: lengths");
        let sum = self.allocate(2);
        self.fill_words(&sum, 0);
        self.add_up(typed!("dot_parts", x.element), &[x, y], 1.0, (&sum).into());
        self.launch("tanh_backward", [1; 3], 0, &[p.into(), (&sum).into(), (&dp).into()]);
    }

    fn matmul<'a>(
        &self,
        alpha: impl Into<Factor<'a, CudaBuffer>>,
        a: Mat<'_, CudaBuffer>,
        b: Mat<'_, CudaBuffer>,
        beta: f32,
        c: MatMut<'_, CudaBuffer>,
    ) {
        let extents = |m: &Mat<'_, CudaBuffer>| if m.transposed { (m.cols, m.rows) } else { (m.rows, m.cols) };
        let ((rows, inner), (b_rows, cols)) = (extents(&a), extents(&b));
        assert_eq!((rows, inner, cols), (c.rows, b_rows, c.cols), "matmul: shapes");
        assert!(a.offset + a.rows * a.cols <= a.data.len, "matmul: a");
        assert!(b.offset + b.rows * b.cols <= b.data.len, "matmul: b");
        assert!(c.offset + c.rows * c.cols <= c.data.len, "matmul: c");
        if rows == 0 || cols == 0 || inner == 0 {
            return;
        }
        let matrix = |x: &Mat<'_, CudaBuffer>| {
            let m = Matrix::new(x.data.address(0), x.data.element, x.offset, x.cols);
            if x.transposed { m.t() } else { m }
        };
        let on_gpu;
        let factors = match alpha.into() {
            Factor::Number(alpha) => Factors::Numbers { alpha, beta },
            Factor::Tanh(p) => {
                on_gpu = self.allocate(2);
                self.launch("tanh_factors", [1; 3], 0, &[p.into(), beta.into(), (&on_gpu).into()]);
                Factors::OnGpu(on_gpu.address())
            }
        };
        let target = Matrix::new(c.data.address(0), c.data.element, c.offset, c.cols);
        let (a, b) = (matrix(&b), matrix(&a));
        let (m, n, k) = (cols, rows, inner);
        self.multiply(Product { m, n, k, count: [1, 1], factors, a, b, c: target, places: None });
    }

    fn embedding_forward(&self, tokens: &CudaTokens, table: &CudaBuffer, y: &mut CudaBuffer) {
        let width = y.len / tokens.host.len();
        assert_eq!(y.len, tokens.host.len() * width, "embedding: rows");
        only_f32("embedding", &[table]);
        let args = [(&tokens.memory).into(), table.into(), (&y).into(), y.len.into(), (width as u32).into()];
        self.launch_each(typed!("embedding_forward", y.element), y.len, &args);
    }

    fn embedding_backward(&self, tokens: &CudaTokens, dy: &CudaBuffer, dtable: &mut CudaBuffer) {
        let width = dy.len / tokens.host.len();
        assert_eq!(dy.len, tokens.host.len() * width, "embedding: rows");
        only_f32("embedding", &[dtable]);
        let mut by_token: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
        for (row, token) in tokens.host.iter().enumerate() {
            by_token.entry(*token).or_default().push(row as u32);
        }
        let mut starts = vec![0];
        starts.extend(by_token.values().scan(0, |end, rows| {
            *end += rows.len() as u32;
            Some(*end)
        }));
        // As long as it can be: in every pass the same memory.
        starts.resize(tokens.host.len() + 1, tokens.host.len() as u32);
        let rows = self.upload_tokens(&by_token.values().flatten().copied().collect::<Vec<_>>());
        let starts = self.upload_tokens(&starts);
        let args = [&tokens.memory, &rows.memory, &starts.memory, &dy.memory, &dtable.memory].map(Arg::from);
        let args: Vec<Arg> = args.into_iter().chain([(width as u32).into()]).collect();
        self.launch(typed!("embedding_backward", dy.element), [by_token.len() as u32, 1, 1], 0, &args);
    }

    fn rms_norm_forward(
        &self,
        x: &CudaBuffer,
        weight: &CudaBuffer,
        eps: f32,
        y: &mut CudaBuffer,
        rstd: &mut CudaBuffer,
    ) {
        check_norm([x, y], weight, rstd);
        let (rows, width) = (rstd.len as u32, weight.len as u32);
        let args = [x.into(), weight.into(), eps.into(), (&y).into(), (&rstd).into(), rows.into(), width.into()];
        self.launch(typed!("rms_norm_forward", x.element), [rows.div_ceil(WARPS), 1, 1], 0, &args);
    }

    fn add_rms_norm_forward(
        &self,
        x: &CudaBuffer,
        branch: &CudaBuffer,
        sum: &mut CudaBuffer,
        weight: &CudaBuffer,
        eps: f32,
        y: &mut CudaBuffer,
        rstd: &mut CudaBuffer,
    ) {
        check_norm([x, branch], weight, rstd);
        check_norm([sum, y], weight, rstd);
        let (rows, width) = (rstd.len as u32, weight.len as u32);
        let inputs = [x.into(), branch.into(), (&sum).into(), weight.into(), eps.into()];
        let args = [(&y).into(), (&rstd).into(), rows.into(), width.into()];
        let args: Vec<Arg> = inputs.into_iter().chain(args).collect();
        self.launch(typed!("add_rms_norm_forward", x.element), [rows.div_ceil(WARPS), 1, 1], 0, &args);
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
        check_norm([x, dy], weight, rstd);
        check_norm([dx, dy], weight, rstd);
        let blocks = (rows as u32).div_ceil(WARPS);
        let args = [x.into(), weight.into(), rstd.into(), dy.into(), (&dx).into(), (rows as u32).into(), width.into()];
        self.launch(typed!("rms_norm_backward", x.element), [blocks, 1, 1], 0, &args);
        let Some(dweight) = dweight else { return };
        assert_eq!(dweight.len, weight.len, "rms_norm: dweight");
        let (columns, count) = (width.div_ceil(THREADS), rows.div_ceil(NORM_ROWS));
        let parts = self.allocate(count * weight.len);
        let args = [x.into(), rstd.into(), dy.into(), (&parts).into(), (rows as u32).into(), width.into()];
        self.launch(typed!("rms_norm_dweight_parts", x.element), [columns, count as u32, 1], 0, &args);
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
        attention::check(&shape, [q, o], [k, v], lse);
        self.attend(shape, [q, k, v], o, lse);
    }

    fn attention_backward(
        &self,
        shape: AttentionShape,
        [q, k, v]: [&mut CudaBuffer; 3],
        o: &CudaBuffer,
        lse: &CudaBuffer,
        d_o: &CudaBuffer,
    ) {
        attention::check(&shape, [q, o], [k, v], lse);
        attention::check(&shape, [d_o, q], [k, v], lse);
        self.attend_backward(shape, [q, k, v], o, lse, d_o);
    }

    fn swiglu_forward(&self, gate: &CudaBuffer, up: &CudaBuffer, y: &mut CudaBuffer) {
        assert!(gate.len == up.len && y.len >= gate.len, "swiglu: lengths");
        assert!(gate.element == up.element && y.element == up.element, "swiglu: elements");
        self.launch_each(
            typed!("swiglu_forward", up.element),
            gate.len,
            &[gate.into(), up.into(), (&y).into(), gate.len.into()],
        );
    }

    fn swiglu_backward(&self, dy: &CudaBuffer, gate: &mut CudaBuffer, up: &mut CudaBuffer) {
        assert!(gate.len == up.len && dy.len >= gate.len, "swiglu: lengths");
        assert!(gate.element == up.element && dy.element == up.element, "swiglu: elements");
        self.launch_each(
            typed!("swiglu_backward", up.element),
            gate.len,
            &[dy.into(), (&gate).into(), (&up).into(), gate.len.into()],
        );
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
            (targets.memory.address() + 4 * first as u64).into(),
            (&logits).into(),
            losses.at(first),
            (vocab as u32).into(),
            u32::from(scale.is_some()).into(),
            scale.unwrap_or(0.0).into(),
        ];
        only_f32("cross_entropy", &[losses]);
        self.launch(typed!("cross_entropy", logits.element), [rows as u32, 1, 1], 0, &args);
    }

    fn quantise(&self, how: Quantisation, rows: usize, cols: usize, x: &CudaBuffer) -> CudaQuantised {
        self.quantise_matrix(how, rows, cols, x)
    }

    fn dequantise(&self, x: &CudaQuantised, y: &mut CudaBuffer) {
        self.dequantise_matrix(x, y);
    }

    fn upload_quantised(&self, x: &Quantised) -> CudaQuantised {
        self.upload_matrix(x)
    }

    fn read_quantised(&self, x: &CudaQuantised) -> Quantised {
        self.download_matrix(x)
    }

    fn prune(&self, how: Pruning, m: &mut CudaBuffer, v: &mut CudaBuffer) {
        assert_eq!(m.len, v.len, "prune: lengths");
        only_f32("prune", &[m, v]);
        let n = m.len;
        match how {
            Pruning::Zero => [m, v].into_iter().for_each(|x| self.fill(x, 0.0)),
            Pruning::Random { ratio, key } => {
                let args =
                    [(&m).into(), (&v).into(), n.into(), key.into(), prune::chance(ratio, key).threshold().into()];
                self.launch_each("prune_random", n, &args);
            }
            Pruning::Magnitude { ratio, joint } => {
                let (by_m, fraction) = self.select_size(m, ratio);
                if joint {
                    self.prune_below(v, m, &by_m, fraction);
                } else {
                    let (by_v, fraction) = self.select_size(v, ratio);
                    self.prune_below(v, v, &by_v, fraction);
                }
                self.prune_below(m, m, &by_m, fraction);
            }
        }
    }

    fn step_stats(&self) -> CudaStepStats {
        let memory = self.allocate(8);
        self.fill_words(&memory, 0);
        CudaStepStats(memory)
    }

    fn accumulate_losses(&self, scale: f64, losses: &CudaBuffer, stats: &mut CudaStepStats) {
        only_f32("losses", &[losses]);
        self.add_up("sum_parts", &[losses], scale, stats.at(0));
    }

    fn accumulate_and_clip(&self, gradients: &[&CudaBuffer], max_norm: f64, stats: &mut CudaStepStats) {
        for gradient in gradients {
            self.add_up(typed!("dot_parts", gradient.element), &[gradient, gradient], 1.0, stats.at(1));
        }
        self.launch("clip", [1; 3], 0, &[stats.at(0), max_norm.into()]);
    }

    fn read_step_stats(&self, stats: &CudaStepStats) -> Result<StepStats> {
        let mut numbers = [f64::NAN; 4];
        self.after_flush(|_| stats.0.read(&mut numbers));
        let [loss, squares, factor, signals] = numbers;
        self.first_failure().map_or(Ok(StepStats { loss, squares, factor, signals }), Err)
    }

    fn pack_step_stats(&self, stats: &CudaStepStats, signal: f32, place: usize, shares: &mut CudaBuffer) {
        assert!(PACKED_STATS * (place + 1) <= shares.len, "pack_step_stats: place {place}");
        only_f32("pack_step_stats", &[shares]);
        self.launch("pack_step_stats", [1; 3], 0, &[stats.at(0), signal.into(), shares.at(PACKED_STATS * place)]);
    }

    fn reduce_step_stats(&self, shares: &CudaBuffer, stats: &mut CudaStepStats) {
        only_f32("reduce_step_stats", &[shares]);
        let count = shares.len / PACKED_STATS;
        self.launch("reduce_step_stats", [1; 3], 0, &[shares.into(), count.into(), stats.at(0)]);
    }

    fn adamw(
        &self,
        step: &AdamW,
        stats: &CudaStepStats,
        p: &mut CudaBuffer,
        g: &CudaBuffer,
        m: &mut CudaBuffer,
        v: &mut CudaBuffer,
    ) {
        assert_eq!((g.len, m.len, v.len), (p.len, p.len, p.len), "adamw: lengths");
        only_f32("adamw", &[p, g, m, v]);
        let f = step.factors();
        let args = [(&p).into(), g.into(), (&m).into(), (&v).into(), p.len.into(), stats.at(0)];
        let factors = [f.keep, f.b1, f.c1, f.b2, f.c2, f.size, f.root, f.eps].map(Arg::from);
        self.launch_each("adamw", p.len, &args.into_iter().chain(factors).collect::<Vec<_>>());
    }
}

impl Cuda {
    /// The element whose size is a quantile's lower neighbour, as prune.cu keeps it, and how far on the quantile lies.
    fn select_size(&self, x: &CudaBuffer, ratio: f64) -> (Memory, f64) {
        let (below, fraction) = prune::position(ratio, x.len);
        let mut start = [0u32; SELECT];
        start[1] = below as u32;
        let select = self.uploaded(&start);
        for shift in [24u32, 16, 8, 0] {
            self.launch_each("select_count", x.len, &[x.into(), x.len.into(), shift.into(), (&select).into()]);
            self.launch("select_digit", [1; 3], 0, &[shift.into(), (&select).into()]);
        }
        self.launch_each("select_above", x.len, &[x.into(), x.len.into(), (&select).into()]);
        (select, fraction)
    }

    /// `x = 0` where `by` is not above the quantile.
    fn prune_below(&self, x: &CudaBuffer, by: &CudaBuffer, select: &Memory, fraction: f64) {
        self.launch_each("prune_below", x.len, &[x.into(), by.into(), x.len.into(), select.into(), fraction.into()]);
    }

    fn rope(&self, shape: RopeShape, cos: &CudaBuffer, sin: &CudaBuffer, x: &mut CudaBuffer, direction: f32) {
        let RopeShape { batch, len, heads, head_dim } = shape;
        let half = head_dim / 2;
        assert_eq!(x.len, batch * len * heads * head_dim, "rope: rows");
        assert!(cos.len >= len * half && sin.len == cos.len, "rope: table");
        let pairs = x.len / 2;
        let [len, heads, half] = [len, heads, half].map(|x| x as u32);
        let args = [cos.into(), sin.into(), (&x).into(), pairs.into(), len.into(), heads.into(), half.into()];
        only_f32("rope", &[cos, sin]);
        self.launch_each(
            typed!("rope", x.element),
            pairs,
            &args.into_iter().chain([direction.into()]).collect::<Vec<_>>(),
        );
    }
}

fn check_norm(x: [&CudaBuffer; 2], weight: &CudaBuffer, rstd: &CudaBuffer) {
    let len = rstd.len * weight.len;
    assert!(x.iter().all(|x| x.len == len), "rms_norm: rows");
    assert_eq!(x[0].element, x[1].element, "rms_norm: elements");
    only_f32("rms_norm", &[weight, rstd]);
}

/// What has no kernel for bf16.
fn only_f32(what: &str, buffers: &[&CudaBuffer]) {
    assert!(buffers.iter().all(|b| b.element == Element::F32), "{what}: elements");
}
