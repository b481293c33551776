//! A device that notes how long each operation of another one takes. It waits for each, so that a device that works while
//! the host goes on is timed, too.

use super::{
    AdamW, AttentionShape, Device, Dropout, Element, Factor, LaunchQueue, Mat, MatMut, Pruning, Quantisation,
    Quantised, RopeShape, Rounding, StepStats,
};
use crate::error::Result;
use serde::Serialize;
use std::{
    borrow::Cow,
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

/// Events that the trace holds at most: a few updates of a large model.
const EVENTS: usize = 100_000;

/// Runs every operation on `D` and notes its time. Clones share their notes.
#[derive(Clone)]
pub struct Profiled<D> {
    device: D,
    log: Arc<Mutex<Log>>,
    began: Instant,
}

#[derive(Default)]
struct Log {
    totals: BTreeMap<String, Total>,
    events: Vec<Event>,
    allocated: u64,
}

#[derive(Default)]
struct Total {
    calls: u64,
    seconds: f64,
    flops: f64,
}

/// One call: what, when and how long, in microseconds.
struct Event {
    name: String,
    start: f64,
    duration: f64,
}

/// All calls of one operation.
#[derive(Clone, Debug, Serialize)]
pub struct OperationTime {
    /// The operation; products with their extents, `rows x inner x columns`.
    pub operation: String,
    /// How often.
    pub calls: u64,
    /// Time in all.
    pub seconds: f64,
    /// Products only: 10^9 floating-point operations per second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gflops: Option<f64>,
}

impl<D: Device> Profiled<D> {
    /// Nothing noted yet.
    pub fn new(device: D) -> Self {
        Profiled { device, log: Arc::default(), began: Instant::now() }
    }

    fn time<T>(&self, name: &str, work: impl FnOnce(&D) -> T) -> T {
        self.time_flops(|| name.to_owned(), 0.0, work)
    }

    fn time_flops<T>(&self, name: impl FnOnce() -> String, flops: f64, work: impl FnOnce(&D) -> T) -> T {
        let start = Instant::now();
        let result = work(&self.device);
        // Its failure, if any, is remembered for whoever asks for it.
        let _ = self.device.status();
        let seconds = start.elapsed().as_secs_f64();
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        let name = name();
        if log.events.len() < EVENTS {
            let start = (start - self.began).as_secs_f64() * 1e6;
            log.events.push(Event { name: name.clone(), start, duration: seconds * 1e6 });
        }
        let total = log.totals.entry(name).or_default();
        total.calls += 1;
        total.seconds += seconds;
        total.flops += flops;
        result
    }

    /// The device that is watched.
    pub fn inner(&self) -> &D {
        &self.device
    }

    /// f32 elements of all buffers made so far, those that are gone included.
    pub fn allocated(&self) -> u64 {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).allocated
    }

    fn note_allocation(&self, len: usize) {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).allocated += len as u64;
    }

    /// Time per operation, longest first.
    pub fn operations(&self) -> Vec<OperationTime> {
        let log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all: Vec<OperationTime> = log
            .totals
            .iter()
            .map(|(operation, t)| OperationTime {
                operation: operation.clone(),
                calls: t.calls,
                seconds: t.seconds,
                gflops: (t.flops > 0.0).then_some(t.flops / t.seconds / 1e9),
            })
            .collect();
        all.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        all
    }

    /// The first calls in the Trace Event Format, which chrome://tracing and Perfetto show.
    pub fn trace(&self) -> serde_json::Value {
        let log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        let events: Vec<serde_json::Value> = log
            .events
            .iter()
            .map(|e| serde_json::json!({"name": e.name, "ph": "X", "ts": e.start, "dur": e.duration, "pid": 1, "tid": 1}))
            .collect();
        serde_json::json!({"displayTimeUnit": "ms", "traceEvents": events})
    }
}

/// Never defers: an operation can be timed only once it has been submitted. The times are those of single launches, without graphs.
impl<D: Device> LaunchQueue for Profiled<D> {
    fn begin_capture(&self) -> bool {
        false
    }

    fn flush(&self) {
        self.device.flush();
    }

    fn end_capture(&self) {
        self.device.end_capture();
    }
}

impl<D: Device> Device for Profiled<D> {
    type Buffer = D::Buffer;
    type Tokens = D::Tokens;
    type Quantised = D::Quantised;
    type StepStats = D::StepStats;

    fn zeros_of(&self, element: Element, len: usize) -> D::Buffer {
        self.note_allocation(len);
        self.time("allocate", |d| d.zeros_of(element, len))
    }

    fn zeros(&self, len: usize) -> D::Buffer {
        self.zeros_of(Element::F32, len)
    }

    fn upload(&self, values: &[f32]) -> D::Buffer {
        self.note_allocation(values.len());
        self.time("upload", |d| d.upload(values))
    }

    fn write(&self, buffer: &mut D::Buffer, values: &[f32]) {
        self.time("upload", |d| d.write(buffer, values));
    }

    fn read(&self, buffer: &D::Buffer) -> Vec<f32> {
        self.time("download", |d| d.read(buffer))
    }

    fn view<'a>(&self, buffer: &'a D::Buffer) -> Cow<'a, [f32]> {
        self.time("download", |d| d.view(buffer))
    }

    fn len(&self, buffer: &D::Buffer) -> usize {
        self.device.len(buffer)
    }

    fn width(&self, element: Element) -> usize {
        self.device.width(element)
    }

    fn capacity(&self, buffer: &D::Buffer) -> usize {
        self.device.capacity(buffer)
    }

    fn address(&self, buffer: &D::Buffer) -> u64 {
        self.device.address(buffer)
    }

    fn resize_in_place(&self, buffer: &mut D::Buffer, element: Element, len: usize) {
        self.time("allocate", |d| d.resize_in_place(buffer, element, len));
    }

    fn upload_tokens(&self, tokens: &[u32]) -> D::Tokens {
        self.time("upload", |d| d.upload_tokens(tokens))
    }

    fn status(&self) -> Result<()> {
        self.time("wait", |d| d.status())
    }

    fn free_memory(&self) -> Option<u64> {
        self.device.free_memory()
    }

    fn reserve(&self, bytes: u64) -> bool {
        self.device.reserve(bytes)
    }

    fn overhead(&self, shape: &AttentionShape, element: Element) -> u64 {
        self.device.overhead(shape, element)
    }

    fn peak_memory(&self) -> Option<u64> {
        self.device.peak_memory()
    }

    fn allow_tf32(&self, allow: bool) {
        self.device.allow_tf32(allow);
    }

    fn fill(&self, x: &mut D::Buffer, value: f32) {
        self.time("fill", |d| d.fill(x, value));
    }

    fn scale(&self, x: &mut D::Buffer, factor: f32) {
        self.time("scale", |d| d.scale(x, factor));
    }

    fn axpy(&self, alpha: f32, x: &D::Buffer, y: &mut D::Buffer) {
        self.time("axpy", |d| d.axpy(alpha, x, y));
    }

    fn copy(&self, x: &D::Buffer, y: &mut D::Buffer) {
        self.time("copy", |d| d.copy(x, y));
    }

    fn round_to_bf16(&self, rounding: Rounding, x: &mut D::Buffer) {
        self.time("round to bf16", |d| d.round_to_bf16(rounding, x));
    }

    fn sum_of_squares(&self, x: &D::Buffer) -> f64 {
        self.time("sum of squares", |d| d.sum_of_squares(x))
    }

    fn dot(&self, x: &D::Buffer, y: &D::Buffer) -> f64 {
        self.time("dot", |d| d.dot(x, y))
    }

    fn dropout_forward(&self, dropout: Dropout, x: &D::Buffer, y: &mut D::Buffer) {
        self.time("dropout", |d| d.dropout_forward(dropout, x, y));
    }

    fn dropout_backward(&self, dropout: Dropout, dy: &D::Buffer, dx: &mut D::Buffer) {
        self.time("dropout, backward", |d| d.dropout_backward(dropout, dy, dx));
    }

    fn tanh_backward(&self, p: &D::Buffer, x: &D::Buffer, y: &D::Buffer, dp: &mut D::Buffer) {
        self.time("tanh, backward", |d| d.tanh_backward(p, x, y, dp));
    }

    fn matmul<'a>(
        &self,
        alpha: impl Into<Factor<'a, D::Buffer>>,
        a: Mat<'_, D::Buffer>,
        b: Mat<'_, D::Buffer>,
        beta: f32,
        c: MatMut<'_, D::Buffer>,
    ) {
        let (rows, cols) = (c.rows, c.cols);
        let inner = if a.transposed { a.rows } else { a.cols };
        let name = || format!("matmul {rows} x {inner} x {cols}");
        let flops = 2.0 * rows as f64 * inner as f64 * cols as f64;
        self.time_flops(name, flops, |d| d.matmul(alpha, a, b, beta, c));
    }

    fn embedding_forward(&self, tokens: &D::Tokens, table: &D::Buffer, y: &mut D::Buffer) {
        self.time("embedding", |d| d.embedding_forward(tokens, table, y));
    }

    fn embedding_backward(&self, tokens: &D::Tokens, dy: &D::Buffer, dtable: &mut D::Buffer) {
        self.time("embedding, backward", |d| d.embedding_backward(tokens, dy, dtable));
    }

    fn rms_norm_forward(&self, x: &D::Buffer, weight: &D::Buffer, eps: f32, y: &mut D::Buffer, rstd: &mut D::Buffer) {
        self.time("rms_norm", |d| d.rms_norm_forward(x, weight, eps, y, rstd));
    }

    fn add_rms_norm_forward(
        &self,
        x: &D::Buffer,
        branch: &D::Buffer,
        sum: &mut D::Buffer,
        weight: &D::Buffer,
        eps: f32,
        y: &mut D::Buffer,
        rstd: &mut D::Buffer,
    ) {
        self.time("add and rms_norm", |d| d.add_rms_norm_forward(x, branch, sum, weight, eps, y, rstd));
    }

    fn rms_norm_backward(
        &self,
        x: &D::Buffer,
        weight: &D::Buffer,
        rstd: &D::Buffer,
        dy: &D::Buffer,
        dx: &mut D::Buffer,
        dweight: Option<&mut D::Buffer>,
    ) {
        self.time("rms_norm, backward", |d| d.rms_norm_backward(x, weight, rstd, dy, dx, dweight));
    }

    fn rope_forward(&self, shape: RopeShape, cos: &D::Buffer, sin: &D::Buffer, x: &mut D::Buffer) {
        self.time("rope", |d| d.rope_forward(shape, cos, sin, x));
    }

    fn rope_backward(&self, shape: RopeShape, cos: &D::Buffer, sin: &D::Buffer, dx: &mut D::Buffer) {
        self.time("rope, backward", |d| d.rope_backward(shape, cos, sin, dx));
    }

    fn attention_forward(
        &self,
        shape: AttentionShape,
        q: &D::Buffer,
        k: &D::Buffer,
        v: &D::Buffer,
        o: &mut D::Buffer,
        lse: &mut D::Buffer,
    ) {
        self.time("attention", |d| d.attention_forward(shape, q, k, v, o, lse));
    }

    fn attention_backward(
        &self,
        shape: AttentionShape,
        qkv: [&mut D::Buffer; 3],
        o: &D::Buffer,
        lse: &D::Buffer,
        d_o: &D::Buffer,
    ) {
        self.time("attention, backward", |d| d.attention_backward(shape, qkv, o, lse, d_o));
    }

    fn swiglu_forward(&self, gate: &D::Buffer, up: &D::Buffer, y: &mut D::Buffer) {
        self.time("swiglu", |d| d.swiglu_forward(gate, up, y));
    }

    fn swiglu_backward(&self, dy: &D::Buffer, gate: &mut D::Buffer, up: &mut D::Buffer) {
        self.time("swiglu, backward", |d| d.swiglu_backward(dy, gate, up));
    }

    fn cross_entropy(
        &self,
        vocab: usize,
        first: usize,
        rows: usize,
        targets: &D::Tokens,
        logits: &mut D::Buffer,
        losses: &mut D::Buffer,
        scale: Option<f32>,
    ) {
        self.time("cross_entropy", |d| d.cross_entropy(vocab, first, rows, targets, logits, losses, scale));
    }

    fn sum(&self, x: &D::Buffer) -> f64 {
        self.time("sum", |d| d.sum(x))
    }

    fn quantise(&self, how: Quantisation, rows: usize, cols: usize, x: &D::Buffer) -> D::Quantised {
        self.time("quantise", |d| d.quantise(how, rows, cols, x))
    }

    fn dequantise(&self, x: &D::Quantised, y: &mut D::Buffer) {
        self.time("dequantise", |d| d.dequantise(x, y));
    }

    fn upload_quantised(&self, x: &Quantised) -> D::Quantised {
        self.time("upload", |d| d.upload_quantised(x))
    }

    fn read_quantised(&self, x: &D::Quantised) -> Quantised {
        self.time("download", |d| d.read_quantised(x))
    }

    fn prune(&self, how: Pruning, m: &mut D::Buffer, v: &mut D::Buffer) {
        self.time("prune", |d| d.prune(how, m, v));
    }

    fn step_stats(&self) -> D::StepStats {
        self.time("allocate", |d| d.step_stats())
    }

    fn accumulate_losses(&self, scale: f64, losses: &D::Buffer, stats: &mut D::StepStats) {
        self.time("sum", |d| d.accumulate_losses(scale, losses, stats));
    }

    fn accumulate_and_clip(&self, gradients: &[&D::Buffer], max_norm: f64, stats: &mut D::StepStats) {
        self.time("gradient norm", |d| d.accumulate_and_clip(gradients, max_norm, stats));
    }

    fn pack_step_stats(&self, stats: &D::StepStats, signal: f32, place: usize, shares: &mut D::Buffer) {
        self.time("copy", |d| d.pack_step_stats(stats, signal, place, shares));
    }

    fn reduce_step_stats(&self, shares: &D::Buffer, stats: &mut D::StepStats) {
        self.time("sum", |d| d.reduce_step_stats(shares, stats));
    }

    fn read_step_stats(&self, stats: &D::StepStats) -> Result<StepStats> {
        self.time("download", |d| d.read_step_stats(stats))
    }

    fn adamw(
        &self,
        step: &AdamW,
        stats: &D::StepStats,
        p: &mut D::Buffer,
        g: &D::Buffer,
        m: &mut D::Buffer,
        v: &mut D::Buffer,
    ) {
        self.time("adamw", |d| d.adamw(step, stats, p, g, m, v));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::Cpu;

    #[test]
    fn calls_are_counted_and_products_have_a_rate() {
        let device = Profiled::new(Cpu);
        let (a, mut c) = (device.upload(&[1.0, 2.0]), device.zeros(4));
        for _ in 0..3 {
            device.matmul(1.0, Mat::new(&a, 1, 2).t(), Mat::new(&a, 1, 2), 0.0, MatMut::new(&mut c, 2, 2));
        }
        assert_eq!(c, [1.0, 2.0, 2.0, 4.0]);
        let operations = device.operations();
        let product = operations.iter().find(|o| o.operation == "matmul 2 x 1 x 2").unwrap();
        assert!(product.calls == 3 && product.gflops.is_some());
        assert!(operations.is_sorted_by(|a, b| a.seconds >= b.seconds));
        let trace = device.trace();
        let events = trace["traceEvents"].as_array().unwrap();
        assert_eq!(events.len(), 5);
        assert!(events.iter().all(|e| e["ph"] == "X" && e["dur"].as_f64().unwrap() >= 0.0));
    }
}
