//! Attention on a GPU, in two ways. Where scores are to be exact in f32, or too many for memory, the kernels of attention.cu
//! go through them in tiles. Elsewhere the products are cuBLAS's, on tensor cores: the scores of some heads of one window
//! exist for a while, and softmax.cu turns them into probabilities.

use super::{
    Arg, Cuda, Extents, WARPS,
    blas::{Alpha, Matrix, Product},
    buffer::{CudaBuffer, width},
    memory::Memory,
    typed,
};
use crate::ops::{AttentionShape, Element};

/// Bytes of scores that exist at a time, and the longest window whose scores may.
const SCORES: usize = 64 << 20;
const LONGEST: usize = 4096;

/// Bytes of shared memory for `whole` tiles of `tile` rows of D, and `square` tiles of scores.
fn shared_bytes(tile: usize, head_dim: usize, whole: usize, square: usize) -> u32 {
    (4 * tile * (whole * (head_dim + 1) + square * (tile + 1))) as u32
}

fn extents(shape: &AttentionShape) -> Extents {
    let &AttentionShape { len, heads, kv_heads, head_dim, .. } = shape;
    let [len, heads, kv_heads, dim] = [len, heads, kv_heads, head_dim].map(|x| x as u32);
    Extents { len, heads, kv_heads, dim, scale: shape.scale() }
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
    fn has_scores(&self, shape: &AttentionShape, element: Element) -> bool {
        (element == Element::Bf16 || self.0.blas.allows_tf32()) && shape.len <= LONGEST
    }

    /// Bytes that backward takes for a while, which is more than forward does.
    pub(super) fn attention_workspace(&self, shape: &AttentionShape, element: Element) -> u64 {
        let &AttentionShape { batch, len, heads, kv_heads, head_dim } = shape;
        let per_window = len * kv_heads * head_dim;
        let scores = if self.has_scores(shape, element) {
            let bytes = (8 + 2 * width(element)) * len * len;
            8 * per_window + bytes * (SCORES / bytes).clamp(1, kv_heads)
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
        if self.has_scores(&shape, q.element) {
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
        if self.has_scores(&shape, q.element) {
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
        let [mut dk, mut dv] = [&*k, &*v].map(|x| self.allocate_bytes(width(x.element) * x.len));
        let args: Vec<Arg> = inputs().into_iter().chain([(&dk).into(), (&dv).into()]).collect();
        self.launch(kernel_kv, grid(kv_heads), shared_bytes(tile, head_dim, 4, 2), &args);
        let args: Vec<Arg> = inputs().into_iter().chain([(&q.memory).into()]).collect();
        self.launch(kernel_q, grid(heads), shared_bytes(tile, head_dim, 4, 1), &args);
        std::mem::swap(&mut k.memory, &mut dk);
        std::mem::swap(&mut v.memory, &mut dv);
    }
}

/// Some heads of one window: the query heads `group`, `group + H/K`, ... of which each has a key/value head of its own.
struct Heads<'a> {
    shape: &'a AttentionShape,
    window: usize,
    group: usize,
    /// The first key/value head, and how many.
    first: usize,
    count: usize,
}

impl Heads<'_> {
    /// All of them in turn, so that `bytes` per score do not exceed [`SCORES`], where that can be. `then` comes after the
    /// last ones of each window.
    fn each(shape: &AttentionShape, bytes: usize, mut work: impl FnMut(&Heads), mut then: impl FnMut(usize)) {
        let most = (SCORES / (bytes * shape.len * shape.len)).max(1);
        for window in 0..shape.batch {
            for group in 0..shape.heads / shape.kv_heads {
                for first in (0..shape.kv_heads).step_by(most) {
                    let count = most.min(shape.kv_heads - first);
                    work(&Heads { shape, window, group, first, count });
                }
            }
            then(window);
        }
    }

    /// By columns, as cuBLAS has it: (D, T) of each query head in q, o or their gradients.
    fn queries(&self, x: &CudaBuffer) -> Matrix {
        let AttentionShape { len, heads, kv_heads, head_dim: d, .. } = *self.shape;
        let per_kv = heads / kv_heads;
        let offset = (self.window * len * heads + self.first * per_kv + self.group) * d;
        Matrix::new(x.address(0), x.element, offset, heads * d).every(per_kv * d)
    }

    /// (D, T) of each key/value head in k or v.
    fn keys(&self, x: &CudaBuffer) -> Matrix {
        let AttentionShape { len, kv_heads, head_dim: d, .. } = *self.shape;
        let offset = (self.window * len * kv_heads + self.first) * d;
        Matrix::new(x.address(0), x.element, offset, kv_heads * d).every(d)
    }

    /// (D, T) of each key/value head in the f32 gradient of one window.
    fn key_gradients(&self, x: &Memory) -> Matrix {
        let AttentionShape { kv_heads, head_dim: d, .. } = *self.shape;
        Matrix::new(x.address(), Element::F32, self.first * d, kv_heads * d).every(d)
    }

    /// (keys, queries) of each head.
    fn scores(&self, x: &Memory, element: Element) -> Matrix {
        let len = self.shape.len;
        Matrix::new(x.address(), element, 0, len).every(len * len)
    }

    /// For the kernels of softmax.cu: rows in all, where the window's first head begins, how heads follow each other.
    fn rows(&self) -> [Arg; 3] {
        let AttentionShape { len, heads, kv_heads, .. } = *self.shape;
        let per_kv = heads / kv_heads;
        let first = self.window * heads + self.first * per_kv + self.group;
        [(self.count * len).into(), (first as u32).into(), (per_kv as u32).into()]
    }
}

impl Cuda {
    #[allow(clippy::too_many_arguments)]
    fn per_head(&self, heads: &Heads, [m, n, k]: [usize; 3], alpha: f32, a: Matrix, b: Matrix, beta: f32, c: Matrix) {
        let product = Product { m, n, k, count: heads.count, alpha: Alpha::Number(alpha), a, b, beta, c };
        self.attempt(|gpu| self.0.blas.multiply(gpu, &product));
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
            let scores = self.allocate(heads.count * len * len);
            let p = self.allocate_bytes(width(element) * heads.count * len * len);
            let s = || heads.scores(&scores, Element::F32);
            self.per_head(heads, [len, len, d], 1.0, heads.keys(k).t(), heads.queries(q), 0.0, s());
            let rows = heads.rows();
            let blocks = (heads.count * len).div_ceil(WARPS as usize) as u32;
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
        // Of one window, until no head needs its keys and values any more.
        let [dk, dv] = [(); 2].map(|()| self.allocate(per_window));
        let work = |heads: &Heads| {
            let n = heads.count * len * len;
            let [scores, d_p] = [(); 2].map(|()| self.allocate(n));
            let [p, ds] = [(); 2].map(|()| self.allocate_bytes(width(element) * n));
            let f32_scores = |x| heads.scores(x, Element::F32);
            self.per_head(heads, [len, len, d], 1.0, heads.keys(k).t(), heads.queries(q), 0.0, f32_scores(&scores));
            self.per_head(heads, [len, len, d], 1.0, heads.keys(v).t(), heads.queries(d_o), 0.0, f32_scores(&d_p));
            let rows = heads.rows();
            let blocks = (heads.count * len).div_ceil(WARPS as usize) as u32;
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
        let then = |window: usize| {
            for (gradient, x) in [(&dk, &*k), (&dv, &*v)] {
                let target = (x.address(window * per_window), element);
                self.convert((gradient.address(), Element::F32), target, per_window);
            }
        };
        Heads::each(&shape, 8 + 2 * width(element), work, then);
    }
}
