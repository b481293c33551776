//! The CPU: buffers are vectors, loops run on rayon's threads, products in OpenBLAS.

use super::{
    AdamW, AttentionShape, Device, Dropout, Element, Factor, LaunchQueue, Mat, MatMut, PACKED_STATS, Pruning,
    Quantisation, Quantised, RopeShape, Rounding, StepStats, adamw, attention, cross_entropy, dropout, elementwise,
    embedding, matmul, prune, quantise, rms_norm, rope, round, swiglu,
};
use crate::error::Result;
use std::borrow::Cow;

/// The host's processor and memory.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cpu;

impl LaunchQueue for Cpu {
    fn begin_capture(&self) -> bool {
        false
    }

    fn flush(&self) {}

    fn end_capture(&self) {}
}

impl Device for Cpu {
    type Buffer = Vec<f32>;
    type Tokens = Vec<u32>;
    type Quantised = Quantised;
    type StepStats = StepStats;

    fn zeros_of(&self, _element: Element, len: usize) -> Vec<f32> {
        vec![0.0; len]
    }

    fn zeros(&self, len: usize) -> Vec<f32> {
        vec![0.0; len]
    }

    fn upload(&self, values: &[f32]) -> Vec<f32> {
        values.to_vec()
    }

    fn write(&self, buffer: &mut Vec<f32>, values: &[f32]) {
        elementwise::copy(values, buffer);
    }

    fn read(&self, buffer: &Vec<f32>) -> Vec<f32> {
        buffer.clone()
    }

    fn view<'a>(&self, buffer: &'a Vec<f32>) -> Cow<'a, [f32]> {
        Cow::Borrowed(buffer)
    }

    fn len(&self, buffer: &Vec<f32>) -> usize {
        buffer.len()
    }

    fn width(&self, _element: Element) -> usize {
        size_of::<f32>()
    }

    fn capacity(&self, buffer: &Vec<f32>) -> usize {
        size_of::<f32>() * buffer.capacity()
    }

    fn address(&self, buffer: &Vec<f32>) -> u64 {
        buffer.as_ptr().addr() as u64
    }

    fn resize_in_place(&self, buffer: &mut Vec<f32>, _element: Element, len: usize) {
        elementwise::set_len(buffer, len);
    }

    fn upload_tokens(&self, tokens: &[u32]) -> Vec<u32> {
        tokens.to_vec()
    }

    fn status(&self) -> Result<()> {
        Ok(())
    }

    fn free_memory(&self) -> Option<u64> {
        // `MemAvailable` (Linux).
        let info = std::fs::read_to_string("/proc/meminfo").ok()?;
        let line = info.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
        Some(1024 * line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()?)
    }

    fn reserve(&self, bytes: u64) -> bool {
        self.free_memory().is_none_or(|free| bytes <= free)
    }

    fn peak_memory(&self) -> Option<u64> {
        None
    }

    fn allow_tf32(&self, _allow: bool) {}

    fn overhead(&self, _shape: &AttentionShape, _element: Element) -> u64 {
        // Code, thread stacks, the buffers of the BLAS library, text being read. Measured.
        20 << 20
    }

    fn fill(&self, x: &mut Vec<f32>, value: f32) {
        elementwise::fill(x, value);
    }

    fn scale(&self, x: &mut Vec<f32>, factor: f32) {
        elementwise::scale(x, factor);
    }

    fn axpy(&self, alpha: f32, x: &Vec<f32>, y: &mut Vec<f32>) {
        elementwise::axpy(alpha, x, y);
    }

    fn copy(&self, x: &Vec<f32>, y: &mut Vec<f32>) {
        elementwise::copy(x, y);
    }

    fn round_to_bf16(&self, rounding: Rounding, x: &mut Vec<f32>) {
        round::to_bf16(rounding, x);
    }

    fn sum_of_squares(&self, x: &Vec<f32>) -> f64 {
        elementwise::sum_of_squares(x)
    }

    fn dot(&self, x: &Vec<f32>, y: &Vec<f32>) -> f64 {
        elementwise::dot(x, y)
    }

    fn dropout_forward(&self, dropout: Dropout, x: &Vec<f32>, y: &mut Vec<f32>) {
        dropout::forward(dropout, x, y);
    }

    fn dropout_backward(&self, dropout: Dropout, dy: &Vec<f32>, dx: &mut Vec<f32>) {
        dropout::backward(dropout, dy, dx);
    }

    fn tanh_backward(&self, p: &Vec<f32>, x: &Vec<f32>, y: &Vec<f32>, dp: &mut Vec<f32>) {
        let s = f64::from(p[0].tanh());
        dp[0] = (f64::from(dp[0]) + (1.0 - s * s) * elementwise::dot(x, y)) as f32;
    }

    fn matmul<'a>(
        &self,
        alpha: impl Into<Factor<'a, Vec<f32>>>,
        a: Mat<Vec<f32>>,
        b: Mat<Vec<f32>>,
        beta: f32,
        c: MatMut<Vec<f32>>,
    ) {
        matmul::matmul(alpha.into(), a, b, beta, c);
    }

    fn embedding_forward(&self, tokens: &Vec<u32>, table: &Vec<f32>, y: &mut Vec<f32>) {
        embedding::forward(tokens, table, y);
    }

    fn embedding_backward(&self, tokens: &Vec<u32>, dy: &Vec<f32>, dtable: &mut Vec<f32>) {
        embedding::backward(tokens, dy, dtable);
    }

    fn rms_norm_forward(&self, x: &Vec<f32>, weight: &Vec<f32>, eps: f32, y: &mut Vec<f32>, rstd: &mut Vec<f32>) {
        rms_norm::forward(x, weight, eps, y, rstd);
    }

    fn add_rms_norm_forward(
        &self,
        x: &Vec<f32>,
        branch: &Vec<f32>,
        sum: &mut Vec<f32>,
        weight: &Vec<f32>,
        eps: f32,
        y: &mut Vec<f32>,
        rstd: &mut Vec<f32>,
    ) {
        rms_norm::add_forward([x, branch], sum, weight, eps, y, rstd);
    }

    fn rms_norm_backward(
        &self,
        x: &Vec<f32>,
        weight: &Vec<f32>,
        rstd: &Vec<f32>,
        dy: &Vec<f32>,
        dx: &mut Vec<f32>,
        dweight: Option<&mut Vec<f32>>,
    ) {
        rms_norm::backward(x, weight, rstd, dy, dx, dweight.map(|d| &mut d[..]));
    }

    fn rope_forward(&self, shape: RopeShape, cos: &Vec<f32>, sin: &Vec<f32>, x: &mut Vec<f32>) {
        rope::forward(shape, cos, sin, x);
    }

    fn rope_backward(&self, shape: RopeShape, cos: &Vec<f32>, sin: &Vec<f32>, dx: &mut Vec<f32>) {
        rope::backward(shape, cos, sin, dx);
    }

    fn attention_forward(
        &self,
        shape: AttentionShape,
        q: &Vec<f32>,
        k: &Vec<f32>,
        v: &Vec<f32>,
        o: &mut Vec<f32>,
        lse: &mut Vec<f32>,
    ) {
        attention::forward(shape, q, k, v, o, lse);
    }

    fn attention_backward(
        &self,
        shape: AttentionShape,
        [q, k, v]: [&mut Vec<f32>; 3],
        o: &Vec<f32>,
        lse: &Vec<f32>,
        d_o: &Vec<f32>,
    ) {
        attention::backward(shape, [q, k, v], o, lse, d_o);
    }

    fn swiglu_forward(&self, gate: &Vec<f32>, up: &Vec<f32>, y: &mut Vec<f32>) {
        swiglu::forward(gate, up, y);
    }

    fn swiglu_backward(&self, dy: &Vec<f32>, gate: &mut Vec<f32>, up: &mut Vec<f32>) {
        swiglu::backward(dy, gate, up);
    }

    fn cross_entropy(
        &self,
        vocab: usize,
        first: usize,
        rows: usize,
        targets: &Vec<u32>,
        logits: &mut Vec<f32>,
        losses: &mut Vec<f32>,
        scale: Option<f32>,
    ) {
        let own = first..first + rows;
        cross_entropy::rows(vocab, &targets[own.clone()], &mut logits[..rows * vocab], &mut losses[own], scale);
    }

    fn sum(&self, x: &Vec<f32>) -> f64 {
        elementwise::sum(x)
    }

    fn quantise(&self, how: Quantisation, rows: usize, cols: usize, x: &Vec<f32>) -> Quantised {
        quantise::quantise(how, rows, cols, x)
    }

    fn dequantise(&self, x: &Quantised, y: &mut Vec<f32>) {
        quantise::dequantise(x, y);
    }

    fn upload_quantised(&self, x: &Quantised) -> Quantised {
        x.clone()
    }

    fn read_quantised(&self, x: &Quantised) -> Quantised {
        x.clone()
    }

    fn prune(&self, how: Pruning, m: &mut Vec<f32>, v: &mut Vec<f32>) {
        prune::prune(how, m, v);
    }

    fn step_stats(&self) -> StepStats {
        StepStats::default()
    }

    fn accumulate_losses(&self, scale: f64, losses: &Vec<f32>, stats: &mut StepStats) {
        stats.loss += scale * elementwise::sum(losses);
    }

    fn accumulate_and_clip(&self, gradients: &[&Vec<f32>], max_norm: f64, stats: &mut StepStats) {
        stats.squares += gradients.iter().map(|g| elementwise::sum_of_squares(g)).sum::<f64>();
        stats.clip(max_norm);
    }

    fn read_step_stats(&self, stats: &StepStats) -> Result<StepStats> {
        Ok(*stats)
    }

    fn pack_step_stats(&self, stats: &StepStats, signal: f32, place: usize, shares: &mut Vec<f32>) {
        shares[PACKED_STATS * place..][..PACKED_STATS].copy_from_slice(&stats.share(signal));
    }

    fn reduce_step_stats(&self, shares: &Vec<f32>, stats: &mut StepStats) {
        stats.join(shares);
    }

    fn adamw(
        &self,
        step: &AdamW,
        stats: &StepStats,
        p: &mut Vec<f32>,
        g: &Vec<f32>,
        m: &mut Vec<f32>,
        v: &mut Vec<f32>,
    ) {
        adamw::update(step, stats.factor, p, g, m, v);
    }
}
