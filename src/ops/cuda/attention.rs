//! Attention on a GPU, in two ways. Where scores are to be exact in f32, or too many for memory, the kernels of attention.cu
//! go through them in tiles. Elsewhere the products are cuBLAS's, on tensor cores: the scores of some heads
//! exist for a while, and softmax.cu turns them into probabilities.

use super::{
    Arg, Cuda, Extents, WARPS,
    blas::{Factors, Matrix, Product},
    buffer::{CudaBuffer, width},
    memory::Memory,
    typed,
};
use crate::ops::{AttentionShape, Element};
use std::ops::Range;

/// Bytes of scores that exist at a time, and the longest window whose scores may. Fewer are more launches than a fast GPU has
/// time for: with these, 16 windows of 512 tokens and 12 heads are two pieces forward and three backward.
const SCORES: usize = 256 << 20;
const LONGEST: usize = 4096;

/// Bytes of shared memory for `whole` tiles of `tile` rows of D, and `square` tiles of scores.
fn shared_bytes(tile: usize, head_dim: usize, whole: usize, square: usize) -> u32 {
    (4 * tile * (whole * (head_dim + 1) + square * (tile + 1))) as u32
}

fn extents(shape: &AttentionShape) -> Extents {
    let &AttentionShape { len, heads, kv_heads, head_dim, .. } = shape;
    let [len, heads, kv_heads, dim] = [len, heads, kv_heads, head_dim].map(|x| x as u32);
    Extents { len, heads, kv_heads, dim, scale_bits: shape.scale().to_bits() }
}

fn with_extents<const N: usize>(shape: &AttentionShape, args: [Arg; N]) -> Vec<Arg> {
    [Arg::Extents(extents(shape))].into_iter().chain(args).collect()
}

pub(super) fn check(shape: &AttentionShape, q: [&CudaBuffer; 2], kv: [&CudaBuffer; 2], lse: &CudaBuffer) {
    let &AttentionShape { batch, len, heads, kv_heads, head_dim } = shape;
    assert!(head_dim <= 256, "attention: the CUDA kernels take heads of up to 256 elements");
    assert!(q.iter().all(|x| x.len == batch * len * heads * head_dim), "attention: q, o");
    assert!(kv.iter().all(|x| x.len == batch * len * kv_heads * head_dim), "attention: k, v");
    assert!(q.iter().chain(&kv).all(|x| x.element == q[0].element), "attention: elements");
    assert_eq!(lse.len, batch * heads * len, "attention: lse");
}

impl Cuda {
    fn materialises_scores(&self, shape: &AttentionShape, element: Element) -> bool {
        (element == Element::Bf16 || self.0.blas.allows_tf32()) && shape.len <= LONGEST
    }

    /// Bytes that backward takes for a while, which is more than forward does.
    pub(super) fn attention_workspace(&self, shape: &AttentionShape, element: Element) -> u64 {
        let &AttentionShape { batch, len, heads, kv_heads, head_dim } = shape;
        let per_window = len * kv_heads * head_dim;
        let scores = if self.materialises_scores(shape, element) {
            let bytes = 8 + 2 * width(element);
            let [windows, most] = Heads::at_a_time(shape, bytes);
            // Gradients of keys and values, scores, and where the matrices of a product are.
            windows * (8 * per_window + most * (bytes * len * len + 24))
        } else {
            2 * width(element) * batch * per_window
        };
        (4 * batch * heads * len + scores) as u64
    }

    pub(super) fn attend(
        &self,
        shape: AttentionShape,
        [q, k, v]: [&CudaBuffer; 3],
        o: &mut CudaBuffer,
        lse: &mut CudaBuffer,
    ) {
        if self.materialises_scores(&shape, q.element) {
            return self.attend_by_products(shape, [q, k, v], o, lse);
        }
        let AttentionShape { batch, len, heads, head_dim, .. } = shape;
        let (kernel, tile) = match head_dim {
            ..=128 => (typed!("attention_forward_32", q.element), 32),
            _ => (typed!("attention_forward_16", q.element), 16),
        };
        let grid = [len.div_ceil(tile), heads, batch].map(|x| x as u32);
        let args = with_extents(&shape, [q.into(), k.into(), v.into(), (&o).into(), (&lse).into()]);
        self.launch(kernel, grid, shared_bytes(tile, head_dim, 2, 1), &args);
    }

    /// delta (B, H, T) = rowsum(dO · O).
    fn attention_delta(&self, shape: &AttentionShape, o: &CudaBuffer, d_o: &CudaBuffer) -> Memory {
        let rows = shape.batch * shape.len * shape.heads;
        let delta = self.allocate(rows);
        let args = with_extents(shape, [o.into(), d_o.into(), (&delta).into(), rows.into()]);
        let blocks = (rows as u64).div_ceil(u64::from(WARPS)) as u32;
        self.launch(typed!("attention_delta", o.element), [blocks, 1, 1], 0, &args);
        delta
    }

    pub(super) fn attend_backward(
        &self,
        shape: AttentionShape,
        [q, k, v]: [&mut CudaBuffer; 3],
        o: &CudaBuffer,
        lse: &CudaBuffer,
        d_o: &CudaBuffer,
    ) {
        let delta = self.attention_delta(&shape, o, d_o);
        if self.materialises_scores(&shape, q.element) {
            return self.backward_by_products(shape, [q, k, v], lse, &delta, d_o);
        }
        let AttentionShape { batch, len, heads, kv_heads, head_dim } = shape;
        let (kernel_q, kernel_kv, tile) = match head_dim {
            ..=64 => (typed!("attention_backward_q_32", q.element), typed!("attention_backward_kv_32", q.element), 32),
            65..=128 => {
                (typed!("attention_backward_q_16", q.element), typed!("attention_backward_kv_16", q.element), 16)
            }
            _ => (typed!("attention_backward_q_8", q.element), typed!("attention_backward_kv_8", q.element), 8),
        };
        let inputs = [&q.memory, &k.memory, &v.memory, &lse.memory, &delta, &d_o.memory];
        let inputs = || with_extents(&shape, inputs.map(Arg::from));
        let grid = |heads: usize| [len.div_ceil(tile), heads, batch].map(|x| x as u32);
        // All blocks of both kernels read keys and values, so their gradients lie elsewhere first. A block of queries is
        // read by the one that replaces it, once the kernel for keys and values is done with it.
        let [dk, dv] = [&*k, &*v].map(|x| self.allocate_bytes(width(x.element) * x.len));
        let args: Vec<Arg> = inputs().into_iter().chain([(&dk).into(), (&dv).into()]).collect();
        self.launch(kernel_kv, grid(kv_heads), shared_bytes(tile, head_dim, 4, 2), &args);
        let args: Vec<Arg> = inputs().into_iter().chain([(&q.memory).into()]).collect();
        self.launch(kernel_q, grid(heads), shared_bytes(tile, head_dim, 4, 1), &args);
        // Copied, not swapped: buffers that keep their memory are the same in every pass ([`super::launch_queue`]).
        for (gradient, x) in [(&dk, k), (&dv, v)] {
            self.convert((gradient.address(), x.element), (x.address(0), x.element), x.len);
        }
    }
}

/// Some heads: of one window some, or all of several windows. The query heads `group`, `group + H/K`, ... of each, of which
/// every one has a key/value head of its own.
struct Heads<'a> {
    shape: &'a AttentionShape,
    windows: Range<usize>,
    group: usize,
    /// Key/value heads of each window.
    kv: Range<usize>,
}

impl Heads<'_> {
    /// Windows, and heads of each, that are taken together, so that `bytes` per score do not exceed [`SCORES`]; 1 at least.
    fn at_a_time(shape: &AttentionShape, bytes: usize) -> [usize; 2] {
        let heads = SCORES / (bytes * shape.len * shape.len);
        [(heads / shape.kv_heads).clamp(1, shape.batch), heads.clamp(1, shape.kv_heads)]
    }

    /// All of them in turn, where one window has too many some at a time. `then` comes after the last ones of some windows.
    fn each(shape: &AttentionShape, bytes: usize, mut work: impl FnMut(&Heads), mut then: impl FnMut(Range<usize>)) {
        let [step, most] = Self::at_a_time(shape, bytes);
        for first_window in (0..shape.batch).step_by(step) {
            let windows = || first_window..(first_window + step).min(shape.batch);
            for group in 0..shape.heads / shape.kv_heads {
                for first in (0..shape.kv_heads).step_by(most) {
                    let kv = first..(first + most).min(shape.kv_heads);
                    work(&Heads { shape, windows: windows(), group, kv });
                }
            }
            then(windows());
        }
    }

    fn count(&self) -> usize {
        self.windows.len() * self.kv.len()
    }

    /// By columns, as cuBLAS has it: (D, T) of each query head in q, o or their gradients.
    fn queries(&self, x: &CudaBuffer) -> Matrix {
        let AttentionShape { len, heads, kv_heads, head_dim: d, .. } = *self.shape;
        let (per_kv, window) = (heads / kv_heads, len * heads * d);
        let offset = self.windows.start * window + (self.kv.start * per_kv + self.group) * d;
        Matrix::new(x.address(0), x.element, offset, heads * d).every(per_kv * d).again(window)
    }

    /// (D, T) of each key/value head in k or v.
    fn keys(&self, x: &CudaBuffer) -> Matrix {
        let AttentionShape { len, kv_heads, head_dim: d, .. } = *self.shape;
        let window = len * kv_heads * d;
        let offset = self.windows.start * window + self.kv.start * d;
        Matrix::new(x.address(0), x.element, offset, kv_heads * d).every(d).again(window)
    }

    /// (D, T) of each key/value head in the f32 gradient of these windows.
    fn key_gradients(&self, x: &Memory) -> Matrix {
        let AttentionShape { len, kv_heads, head_dim: d, .. } = *self.shape;
        Matrix::new(x.address(), Element::F32, self.kv.start * d, kv_heads * d).every(d).again(len * kv_heads * d)
    }

    /// (keys, queries) of each head.
    fn scores(&self, x: &Memory, element: Element) -> Matrix {
        let each = self.shape.len * self.shape.len;
        Matrix::new(x.address(), element, 0, self.shape.len).every(each).again(self.kv.len() * each)
    }

    /// For the kernels of softmax.cu: rows in all, the first head's place among all, how heads follow each other. Windows that
    /// are taken together are taken whole, so one number says it.
    fn rows(&self) -> [Arg; 3] {
        let AttentionShape { len, heads, kv_heads, .. } = *self.shape;
        let per_kv = heads / kv_heads;
        let first = self.windows.start * heads + self.kv.start * per_kv + self.group;
        [(self.count() * len).into(), (first as u32).into(), (per_kv as u32).into()]
    }
}

impl Cuda {
    #[allow(clippy::too_many_arguments)]
    fn per_head(&self, heads: &Heads, [m, n, k]: [usize; 3], alpha: f32, a: Matrix, b: Matrix, beta: f32, c: Matrix) {
        let count = [heads.windows.len(), heads.kv.len()];
        self.multiply(Product { m, n, k, count, factors: Factors::Numbers { alpha, beta }, a, b, c, places: None });
    }

    fn attend_by_products(
        &self,
        shape: AttentionShape,
        [q, k, v]: [&CudaBuffer; 3],
        o: &mut CudaBuffer,
        lse: &mut CudaBuffer,
    ) {
        let (len, d, element) = (shape.len, shape.head_dim, q.element);
        let work = |heads: &Heads| {
            let n = heads.count() * len * len;
            let (scores, p) = (self.allocate(n), self.allocate_bytes(width(element) * n));
            let s = || heads.scores(&scores, Element::F32);
            self.per_head(heads, [len, len, d], 1.0, heads.keys(k).t(), heads.queries(q), 0.0, s());
            let rows = heads.rows();
            let blocks = (heads.count() * len).div_ceil(WARPS as usize) as u32;
            let args = with_extents(&shape, [(&scores).into(), (&p).into(), (&*lse).into()]);
            let args: Vec<Arg> = args.into_iter().chain(rows).collect();
            self.launch(typed!("softmax_forward", element), [blocks, 1, 1], 0, &args);
            self.per_head(heads, [d, len, len], 1.0, heads.keys(v), heads.scores(&p, element), 0.0, heads.queries(o));
        };
        Heads::each(&shape, 4 + width(element), work, |_| {});
    }

    fn backward_by_products(
        &self,
        shape: AttentionShape,
        [q, k, v]: [&mut CudaBuffer; 3],
        lse: &CudaBuffer,
        delta: &Memory,
        d_o: &CudaBuffer,
    ) {
        let (len, d, element, per_window) = (shape.len, shape.head_dim, q.element, k.len / shape.batch);
        let bytes = 8 + 2 * width(element);
        // Of windows that are taken together, until no head needs their keys and values any more.
        let [windows, _] = Heads::at_a_time(&shape, bytes);
        let [dk, dv] = [(); 2].map(|()| self.allocate(windows * per_window));
        let work = |heads: &Heads| {
            let n = heads.count() * len * len;
            let [scores, d_p] = [(); 2].map(|()| self.allocate(n));
            let [p, ds] = [(); 2].map(|()| self.allocate_bytes(width(element) * n));
            let f32_scores = |x| heads.scores(x, Element::F32);
            self.per_head(heads, [len, len, d], 1.0, heads.keys(k).t(), heads.queries(q), 0.0, f32_scores(&scores));
            self.per_head(heads, [len, len, d], 1.0, heads.keys(v).t(), heads.queries(d_o), 0.0, f32_scores(&d_p));
            let rows = heads.rows();
            let blocks = (heads.count() * len).div_ceil(WARPS as usize) as u32;
            let args = [&scores, &d_p, &lse.memory, delta, &p, &ds].map(Arg::from);
            let args: Vec<Arg> = with_extents(&shape, args).into_iter().chain(rows).collect();
            self.launch(typed!("softmax_backward", element), [blocks, 1, 1], 0, &args);
            let beta = if heads.group == 0 { 0.0 } else { 1.0 };
            let [p, ds] = [&p, &ds].map(|x| move || heads.scores(x, element));
            let scale = shape.scale();
            self.per_head(heads, [d, len, len], 1.0, heads.queries(d_o), p().t(), beta, heads.key_gradients(&dv));
            self.per_head(heads, [d, len, len], scale, heads.queries(q), ds().t(), beta, heads.key_gradients(&dk));
            self.per_head(heads, [d, len, len], scale, heads.keys(k), ds(), 0.0, heads.queries(q));
        };
        let then = |windows: Range<usize>| {
            for (gradient, x) in [(&dk, &*k), (&dv, &*v)] {
                let target = (x.address(windows.start * per_window), element);
                self.convert((gradient.address(), Element::F32), target, windows.len() * per_window);
            }
        };
        Heads::each(&shape, bytes, work, then);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_heads_come_once_and_their_windows_end_after_them() {
        let shape = AttentionShape { batch: 5, len: 16, heads: 12, kv_heads: 4, head_dim: 8 };
        // Heads whose scores there is room for, and the pieces that makes.
        for (room, pieces) in [(0, 60), (1, 60), (3, 30), (4, 15), (7, 15), (8, 9), (19, 6), (20, 3), (1000, 3)] {
            let bytes = SCORES / (16 * 16 * room).max(1) - usize::from(room > 0);
            let (mut seen, mut ended, mut count) = (vec![0; 60], 0, 0);
            let work = |heads: &Heads| {
                count += 1;
                assert!(heads.count() <= room.max(1));
                assert!(heads.windows.len() == 1 || heads.kv == (0..4), "what `rows` counts on");
                let places = heads.windows.clone().flat_map(|w| heads.kv.clone().map(move |kv| 12 * w + 3 * kv));
                places.for_each(|place| seen[place + heads.group] += 1);
            };
            Heads::each(&shape, bytes, work, |windows| {
                assert!(windows.start == ended && windows.len() <= Heads::at_a_time(&shape, bytes)[0]);
                ended = windows.end;
            });
            assert!(seen.iter().all(|times| *times == 1) && ended == 5 && count == pieces, "{room}: {count} {seen:?}");
        }
    }
}
