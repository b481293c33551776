//! The small set of operations on buffers that training needs, and the trait a device implements.
//!
//! Shapes, row-major: B windows (batch), T positions (len), N = B·T rows, C hidden width, H query heads, K key/value
//! heads, D head width, F inner width of the MLP, V vocabulary.
//!
//! Gradient contract: gradients of parameters accumulate (`+=`), gradients of activations overwrite (`=`).
//! The exception is the residual stream: what flows back through a norm is added to the gradient that bypassed it.
//!
//! Operations do not return errors: shapes are the caller's promise (asserted), and a device that can fail in the
//! middle remembers the failure for [`Device::status`].
//!
//! One file per operation, with its forward and its backward side by side, and its kernels for NVIDIA GPUs in the file of the
//! same name with `.cu`.

mod adamw;
mod attention;
mod cpu;
mod cross_entropy;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(not(feature = "cuda"))]
#[path = "without_cuda.rs"]
mod cuda;
mod dropout;
mod elementwise;
mod embedding;
mod math;
mod matmul;
mod philox;
mod profiled;
mod prune;
pub(crate) mod quantise;
mod rms_norm;
mod rope;
mod round;
mod step_stats;
mod swiglu;

pub use adamw::AdamW;
pub use attention::AttentionShape;
pub use cpu::Cpu;
pub use cross_entropy::IGNORE;
#[cfg(not(feature = "cuda"))]
pub use cuda::unavailable;
#[cfg(feature = "cuda")]
pub use cuda::{Communicator, Cuda, DeviceSpan, NcclId, NcclLibrary, ReductionStaging, Sum};
pub use cuda::{CudaOptions, FOLDERS_VARIABLE, GpuGram, GpuMatrix, Products, Solver};
pub use dropout::Dropout;
pub use matmul::{Factor, Mat, MatMut};
pub use profiled::{OperationTime, Profiled};
pub use prune::Pruning;
pub use quantise::{LARGEST_GAP, NF4, Quantisation, Quantised, Scales};
pub use rope::RopeShape;
pub use round::Rounding;
pub use step_stats::{PACKED_STATS, StepStats};

use crate::error::Result;
use std::borrow::Cow;

/// What the elements of a buffer are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    /// Single precision.
    F32,
    /// bfloat16, where the device has it; elsewhere f32. Operations read and write it, and compute in f32.
    Bf16,
}

/// How operations reach the device: one by one, or deferred and replayed as CUDA graphs. Either way they run in the order of
/// enqueueing, also those of other threads that share the device.
pub trait LaunchQueue {
    /// Begins deferring operations, so that sequences that come again can be captured as a graph and replayed; false if this device
    /// submits every operation at once.
    fn begin_capture(&self) -> bool;
    /// Submits all deferred operations, and goes on deferring. Reading a value does so, too.
    fn flush(&self);
    /// Submits all deferred operations, and defers no more.
    fn end_capture(&self);
}

/// Where buffers live and operations run. No method has a default, here or in [`LaunchQueue`]: a device that wraps another one
/// cannot forget to forward it.
pub trait Device: LaunchQueue + Send + Sync {
    /// Elements on the device: f32 but for activations, their gradients, and weights that products read, which may be bf16.
    type Buffer: Send + Sync + 'static;
    /// u32 elements on the device: token ids.
    type Tokens: Send + Sync;
    /// A [`Quantised`] matrix on the device.
    type Quantised: Send + Sync;
    /// A [`StepStats`] on the device.
    type StepStats: Send + Sync;

    /// A new buffer of zeros.
    fn zeros_of(&self, element: Element, len: usize) -> Self::Buffer;
    /// A new buffer of f32 zeros.
    fn zeros(&self, len: usize) -> Self::Buffer;
    /// A new f32 buffer with these values.
    fn upload(&self, values: &[f32]) -> Self::Buffer;
    /// Replaces the whole buffer, rounding to the nearest where it is bf16.
    fn write(&self, buffer: &mut Self::Buffer, values: &[f32]);
    /// The whole buffer.
    fn read(&self, buffer: &Self::Buffer) -> Vec<f32>;
    /// The whole buffer, without a copy where the device's memory is the host's.
    fn view<'a>(&self, buffer: &'a Self::Buffer) -> Cow<'a, [f32]>;
    /// Elements of a buffer.
    fn len(&self, buffer: &Self::Buffer) -> usize;
    /// Bytes that an element takes here.
    fn width(&self, element: Element) -> usize;
    /// The capacity of a buffer's memory in bytes.
    fn capacity(&self, buffer: &Self::Buffer) -> usize;
    /// The address of a buffer, unique among buffers that are not empty.
    fn address(&self, buffer: &Self::Buffer) -> u64;
    /// Changes a buffer's elements and length without another allocation; its capacity must suffice. Its contents are unspecified
    /// afterwards.
    fn resize_in_place(&self, buffer: &mut Self::Buffer, element: Element, len: usize);
    /// New token ids.
    fn upload_tokens(&self, tokens: &[u32]) -> Self::Tokens;
    /// Waits for everything that was enqueued; the error of the first operation that failed.
    fn status(&self) -> Result<()>;
    /// Bytes that buffers can still take, if that can be told.
    fn free_memory(&self) -> Option<u64>;
    /// Reserves so many bytes in one piece, where the device allocates from a pool; false if it has not enough memory.
    fn reserve(&self, bytes: u64) -> bool;
    /// Bytes that training takes besides its buffers: workspaces of operations, or the program itself, if it shares the memory.
    fn overhead(&self, shape: &AttentionShape, element: Element) -> u64;
    /// The most bytes that were in use at a time, where that is not the program's own memory.
    fn peak_memory(&self) -> Option<u64>;
    /// Whether products may round their factors to TF32 (10 bits) where that is faster. Not at first; most devices have none.
    fn allow_tf32(&self, allow: bool);

    /// `x = value`.
    fn fill(&self, x: &mut Self::Buffer, value: f32);
    /// `x *= factor`.
    fn scale(&self, x: &mut Self::Buffer, factor: f32);
    /// `y += alpha · x`.
    fn axpy(&self, alpha: f32, x: &Self::Buffer, y: &mut Self::Buffer);
    /// `y = x`, rounded to the nearest where y is bf16 and x is not.
    fn copy(&self, x: &Self::Buffer, y: &mut Self::Buffer);
    /// Every element to a number that bf16 holds.
    fn round_to_bf16(&self, rounding: Rounding, x: &mut Self::Buffer);
    /// `sum x²`, in f64.
    fn sum_of_squares(&self, x: &Self::Buffer) -> f64;
    /// `sum x · y`, in f64.
    fn dot(&self, x: &Self::Buffer, y: &Self::Buffer) -> f64;
    /// `dp += (1 - tanh² p) · sum x · y`, of one number p: the gradient of a product's factor [`Factor::Tanh`].
    fn tanh_backward(&self, p: &Self::Buffer, x: &Self::Buffer, y: &Self::Buffer, dp: &mut Self::Buffer);

    /// `y = x / (1 - p)` where `dropout` keeps, else 0, for as many elements as both have.
    fn dropout_forward(&self, dropout: Dropout, x: &Self::Buffer, y: &mut Self::Buffer);
    /// `dx += dy / (1 - p)` where `dropout` keeps, for as many elements as both have.
    fn dropout_backward(&self, dropout: Dropout, dy: &Self::Buffer, dx: &mut Self::Buffer);

    /// `c = alpha · a · b + beta · c`; with `beta` 0, `c` is not read. a and b have the same elements; c has those or f32.
    fn matmul<'a>(
        &self,
        alpha: impl Into<Factor<'a, Self::Buffer>>,
        a: Mat<'_, Self::Buffer>,
        b: Mat<'_, Self::Buffer>,
        beta: f32,
        c: MatMut<'_, Self::Buffer>,
    );

    /// `y[n] = table[tokens[n]]`: tokens (N), table (V, C), y (N, C).
    fn embedding_forward(&self, tokens: &Self::Tokens, table: &Self::Buffer, y: &mut Self::Buffer);
    /// `dtable[tokens[n]] += dy[n]`, in the order of n.
    fn embedding_backward(&self, tokens: &Self::Tokens, dy: &Self::Buffer, dtable: &mut Self::Buffer);

    /// RMSNorm over the last axis (arXiv:1910.07467): `y = weight · x · rstd`, `rstd = (mean x² + eps)^-1/2`.
    /// x, y (N, C); weight (C); rstd (N), kept for backward. Weight and rstd are f32.
    fn rms_norm_forward(
        &self,
        x: &Self::Buffer,
        weight: &Self::Buffer,
        eps: f32,
        y: &mut Self::Buffer,
        rstd: &mut Self::Buffer,
    );
    /// `sum = x + branch`, and [`Device::rms_norm_forward`] of that: the residual stream goes on, and into the next norm.
    #[allow(clippy::too_many_arguments)]
    fn add_rms_norm_forward(
        &self,
        x: &Self::Buffer,
        branch: &Self::Buffer,
        sum: &mut Self::Buffer,
        weight: &Self::Buffer,
        eps: f32,
        y: &mut Self::Buffer,
        rstd: &mut Self::Buffer,
    );
    /// Adds to `dx` (N, C), the gradient of the residual stream, and to `dweight` (C), if given.
    fn rms_norm_backward(
        &self,
        x: &Self::Buffer,
        weight: &Self::Buffer,
        rstd: &Self::Buffer,
        dy: &Self::Buffer,
        dx: &mut Self::Buffer,
        dweight: Option<&mut Self::Buffer>,
    );

    /// Rotary embedding (arXiv:2104.09864), halves paired as in Hugging Face: elements i and i + D/2 of each head turn
    /// by the angle of their position. In place on x (B, T, heads, D); cos, sin (at least T, D/2).
    fn rope_forward(&self, shape: RopeShape, cos: &Self::Buffer, sin: &Self::Buffer, x: &mut Self::Buffer);
    /// The opposite turn, in place on dx.
    fn rope_backward(&self, shape: RopeShape, cos: &Self::Buffer, sin: &Self::Buffer, dx: &mut Self::Buffer);

    /// Causal attention, `softmax(q kᵀ / √D) v` per head; query head h reads key/value head `h / (H/K)`.
    /// q, o (B, T, H, D); k, v (B, T, K, D); lse (B, H, T): log of the sum of exponentials, kept for backward.
    fn attention_forward(
        &self,
        shape: AttentionShape,
        q: &Self::Buffer,
        k: &Self::Buffer,
        v: &Self::Buffer,
        o: &mut Self::Buffer,
        lse: &mut Self::Buffer,
    );
    /// Replaces `qkv`, the forward's inputs, by their gradients; `o` and `lse` are its outputs.
    fn attention_backward(
        &self,
        shape: AttentionShape,
        qkv: [&mut Self::Buffer; 3],
        o: &Self::Buffer,
        lse: &Self::Buffer,
        d_o: &Self::Buffer,
    );

    /// `y = silu(gate) · up`, `silu(x) = x / (1 + e^-x)`; gate and up of one length, y of no less.
    fn swiglu_forward(&self, gate: &Self::Buffer, up: &Self::Buffer, y: &mut Self::Buffer);
    /// Replaces `gate` and `up` by their gradients; dy may be longer.
    fn swiglu_backward(&self, dy: &Self::Buffer, gate: &mut Self::Buffer, up: &mut Self::Buffer);

    /// Cross-entropy of some rows of logits (rows, V) against `targets[first .. first + rows]`:
    /// `losses[first + i] = log sum exp(logits[i]) - logits[i][target]`, 0 where the target is [`IGNORE`].
    /// With a `scale`, `logits` become `scale · (softmax - one_hot)`, 0 where ignored; without, they stay as they are.
    #[allow(clippy::too_many_arguments)]
    fn cross_entropy(
        &self,
        vocab: usize,
        first: usize,
        rows: usize,
        targets: &Self::Tokens,
        logits: &mut Self::Buffer,
        losses: &mut Self::Buffer,
        scale: Option<f32>,
    );
    /// `sum x`, in f64; the order of the sum depends on the length alone.
    fn sum(&self, x: &Self::Buffer) -> f64;

    /// Quantises the row-major f32 matrix x (rows, cols).
    fn quantise(&self, how: Quantisation, rows: usize, cols: usize, x: &Self::Buffer) -> Self::Quantised;
    /// The values of a quantised matrix, row by row; y is f32 or bf16.
    fn dequantise(&self, x: &Self::Quantised, y: &mut Self::Buffer);
    /// A quantised matrix from the host.
    fn upload_quantised(&self, x: &Quantised) -> Self::Quantised;
    /// A quantised matrix, to the host.
    fn read_quantised(&self, x: &Self::Quantised) -> Quantised;

    /// Treats the moments m and v of one tensor as a restart does.
    fn prune(&self, how: Pruning, m: &mut Self::Buffer, v: &mut Self::Buffer);

    /// Step statistics that are all zero.
    fn step_stats(&self) -> Self::StepStats;
    /// Adds `scale · sum losses`, in f64, to the statistics' loss.
    fn accumulate_losses(&self, scale: f64, losses: &Self::Buffer, stats: &mut Self::StepStats);
    /// Adds the squares of all elements of these buffers, in f64, and then clips: see [`StepStats::clip`].
    fn accumulate_and_clip(&self, gradients: &[&Self::Buffer], max_norm: f64, stats: &mut Self::StepStats);
    /// Puts this process's share of an update's numbers, the loss and a `signal`, in its `place` among those of all processes,
    /// [`PACKED_STATS`] elements each.
    fn pack_step_stats(&self, stats: &Self::StepStats, signal: f32, place: usize, shares: &mut Self::Buffer);
    /// Replaces the statistics' loss and signals by those of all processes together.
    fn reduce_step_stats(&self, shares: &Self::Buffer, stats: &mut Self::StepStats);
    /// The numbers on the host: waits for everything that was enqueued, and fails if some of it did.
    fn read_step_stats(&self, stats: &Self::StepStats) -> Result<StepStats>;

    /// One decoupled-weight-decay Adam update of parameter `p` with gradient `g`, times the statistics' factor, and moments `m`,
    /// `v`. Nothing moves where the factor is NaN.
    fn adamw(
        &self,
        step: &AdamW,
        stats: &Self::StepStats,
        p: &mut Self::Buffer,
        g: &Self::Buffer,
        m: &mut Self::Buffer,
        v: &mut Self::Buffer,
    );
}

#[cfg(test)]
pub(crate) mod testing {
    //! Shared by the tests of the operations: pseudo-random inputs, f64 finite differences, comparison.

    /// Values in (-1, 1), the same for the same `seed`.
    pub fn noise(seed: u64, len: usize) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let step = |_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((state >> 40) as f32 / (1u64 << 23) as f32) - 1.0
        };
        (0..len).map(step).collect()
    }

    pub fn wide(x: &[f32]) -> Vec<f64> {
        x.iter().map(|&x| f64::from(x)).collect()
    }

    /// Largest difference over the largest reference value.
    pub fn relative_error(actual: &[f32], expected: &[f64]) -> f64 {
        assert_eq!(actual.len(), expected.len());
        assert!(actual.iter().all(|x| x.is_finite()), "not finite");
        let top = expected.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
        let worst = actual.iter().zip(expected).fold(0.0, |m: f64, (a, e)| m.max((f64::from(*a) - e).abs()));
        if top == 0.0 { worst } else { worst / top }
    }

    pub fn assert_close(what: &str, actual: &[f32], expected: &[f64], tolerance: f64) {
        let error = relative_error(actual, expected);
        assert!(error <= tolerance, "{what}: relative error {error:e} exceeds {tolerance:e}");
    }

    /// Central differences of a scalar function of `x`, in f64 (error about 1e-9 for values near 1).
    pub fn gradient(x: &[f64], f: impl Fn(&[f64]) -> f64) -> Vec<f64> {
        let h = 1e-5;
        let mut x = x.to_vec();
        (0..x.len())
            .map(|i| {
                let old = x[i];
                x[i] = old + h;
                let up = f(&x);
                x[i] = old - h;
                let down = f(&x);
                x[i] = old;
                (up - down) / (2.0 * h)
            })
            .collect()
    }

    pub fn dot(a: &[f64], b: &[f64]) -> f64 {
        a.iter().zip(b).map(|(x, y)| x * y).sum()
    }
}
