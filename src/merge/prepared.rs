//! What the blocks of one output share: decoded factors, and the norms that DoRA needs.

use super::{
    device::{Gpu, Uploaded},
    plan::{Output, Term},
    rounding::{Rounder, Rounding},
};
use crate::{
    adapter::Module,
    checkpoint::Tensor,
    delta::{LowRank, Real, unravel},
    error::{Error, Result},
    interrupt,
};
use ndarray::{Array2, ArrayViewMut2, s};
use std::{collections::BTreeMap, ops::Range};

/// Elements of one block of the pass that measures norms.
const BLOCK: usize = 1 << 19;

/// Everything that is added to an output, ready for its blocks.
pub(super) struct Prepared<'g, T> {
    /// First row, and the delta from there on: one per adapter, or one per expert.
    deltas: Vec<(usize, LowRank<T>)>,
    /// The same on a GPU, where it takes their products.
    on_gpu: Option<Uploaded<'g>>,
    /// The sum of all vectors, for a bias.
    bias: Option<Vec<T>>,
    /// Replaced rows, in the source's stored type.
    pub tokens: BTreeMap<usize, Vec<u8>>,
    /// DoRA's factors.
    pub rescale: Option<Rescale<T>>,
    pub rounder: Rounder,
}

/// DoRA (arXiv:2402.09353, eq. 5): `W' = magnitude / ||W + dW|| * (W + dW)`, with one norm per output of the layer.
pub(super) struct Rescale<T> {
    pub factors: Vec<T>,
    /// One factor per column of the stored weight instead of one per row.
    pub by_column: bool,
}

impl<'g, T: Real> Prepared<'g, T> {
    pub(super) fn new(output: &Output, rounding: Rounding, gpu: Option<&'g Gpu>) -> Result<Self> {
        let mut prepared = Prepared {
            deltas: Vec::new(),
            on_gpu: None,
            bias: None,
            tokens: read_tokens::<T>(output)?,
            rescale: None,
            rounder: Rounder::new(rounding, &output.spec.name),
        };
        for term in &output.terms {
            match term {
                Term::LowRank { module, transposed, weight } => {
                    let scaling = T::from_f64(weight * module.scaling);
                    if module.experts == 1 {
                        prepared.deltas.push((0, LowRank { scaling, ..LowRank::read(module, *transposed)? }));
                    } else {
                        prepared.deltas.extend(experts(module, *transposed, scaling)?);
                    }
                }
                Term::Bias { vector, factor } => prepared.add_bias(vector, T::from_f64(*factor))?,
            }
        }
        if let Some(gpu) = gpu.filter(|gpu| gpu.takes(output)) {
            prepared.on_gpu = Some(gpu.upload(&prepared.deltas)?);
            prepared.deltas.clear();
        }
        if let Some((module, transposed)) = output.dora() {
            prepared.rescale = Some(prepared.rescale(output, module, transposed)?);
        }
        Ok(prepared)
    }

    fn add_bias(&mut self, vector: &Tensor, factor: T) -> Result<()> {
        let values = read_finite::<T>(vector)?;
        let bias = self.bias.get_or_insert_with(|| vec![T::zero(); values.len()]);
        bias.iter_mut().zip(values).for_each(|(b, v)| *b = *b + factor * v);
        Ok(())
    }

    /// Overwrites `out` with rows `rows` of the sum of all deltas.
    pub(super) fn delta(&self, rows: &Range<usize>, mut out: ArrayViewMut2<T>) -> Result<()> {
        if let Some(on_gpu) = &self.on_gpu {
            let columns = out.ncols();
            // Only what is computed in f32 goes to a GPU: here T is f32. Blocks are whole rows of a buffer.
            let values = out.as_slice_mut().unwrap_or_default();
            on_gpu.rows(rows, columns, bytemuck::cast_slice_mut(values))?;
            self.add_bias_to(out);
            return Ok(());
        }
        // A single delta that covers the block saves clearing it.
        if let [(0, only)] = &self.deltas[..]
            && self.bias.is_none()
        {
            only.rows(rows.clone(), out);
            return Ok(());
        }
        out.fill(T::zero());
        for (first, delta) in &self.deltas {
            let (from, to) = (rows.start.max(*first), rows.end.min(first + delta.shape().0));
            if from < to {
                delta.add_rows(from - first..to - first, out.slice_mut(s![from - rows.start..to - rows.start, ..]));
            }
        }
        self.add_bias_to(out);
        Ok(())
    }

    fn add_bias_to(&self, mut out: ArrayViewMut2<T>) {
        if let Some(bias) = &self.bias {
            out.iter_mut().zip(bias).for_each(|(o, &b)| *o = *o + b);
        }
    }

    fn rescale(&self, output: &Output, module: &Module, by_column: bool) -> Result<Rescale<T>> {
        let (rows, columns) = output.matrix_shape();
        let mut squares = vec![0f64; if by_column { columns } else { rows }];
        let step = (BLOCK / columns.max(1)).max(1);
        let mut weight = vec![T::zero(); step * columns];
        let mut delta = Array2::zeros((step, columns));
        for first in (0..rows).step_by(step) {
            interrupt::check()?;
            let block = first..rows.min(first + step);
            self.delta(&block, delta.slice_mut(s![..block.len(), ..]))?;
            let weight = &mut weight[..block.len() * columns];
            T::read(&output.source, first * columns, weight)?;
            for (i, (w, d)) in weight.iter().zip(delta.iter()).enumerate() {
                let place = if by_column { i % columns } else { first + i / columns };
                squares[place] += (*w + *d).to_f64().powi(2);
            }
        }
        let magnitude = module.magnitude.as_ref().map(read_finite::<f64>).transpose()?.unwrap_or_default();
        let mut factors = Vec::with_capacity(squares.len());
        for (i, (m, square)) in magnitude.iter().zip(&squares).enumerate() {
            if *square == 0.0 {
                return Err(Error::request(format!(
                    "cannot merge '{}': base and delta add up to zero for output {i}, which DoRA cannot rescale",
                    output.spec.name
                ))
                .help("the base or the adapter is damaged"));
            }
            factors.push(T::from_f64(m / square.sqrt()));
        }
        Ok(Rescale { factors, by_column })
    }
}

/// One delta per expert. PEFT stacks A expert by expert, `[experts * r, in]`, but interleaves B, `[out, r * experts]`.
fn experts<T: Real>(module: &Module, transposed: bool, scaling: T) -> Result<Vec<(usize, LowRank<T>)>> {
    let all = LowRank::<T>::read(module, false)?;
    let (r, experts) = (module.r, module.experts);
    let one = |e: usize| {
        let a = all.right.slice(s![e * r..(e + 1) * r, ..]);
        let b = all.left.slice(s![.., e..;experts]);
        let (left, right) =
            if transposed { (a.t().to_owned(), b.t().to_owned()) } else { (b.to_owned(), a.to_owned()) };
        (e * left.nrows(), LowRank { left, right, scaling })
    };
    Ok((0..experts).map(one).collect())
}

fn read_finite<T: Real>(tensor: &Tensor) -> Result<Vec<T>> {
    let mut values = vec![T::zero(); tensor.elements()];
    T::read(tensor, 0, &mut values)?;
    match values.iter().position(|v| !v.is_finite()) {
        None => Ok(values),
        Some(i) => Err(Error::request(format!(
            "'{}' in '{}' holds {} at {:?}",
            tensor.name(),
            tensor.file().path().display(),
            values[i],
            unravel(i, tensor.shape())
        ))
        .help("the adapter's training diverged or its file is damaged")),
    }
}

fn read_tokens<T: Real>(output: &Output) -> Result<BTreeMap<usize, Vec<u8>>> {
    let (mut tokens, dtype) = (BTreeMap::new(), output.source.dtype());
    for replaced in &output.tokens {
        let values = read_finite::<T>(&replaced.rows)?;
        let width = output.matrix_shape().1;
        for (&index, row) in replaced.indices.iter().zip(values.chunks(width.max(1))) {
            let mut bytes = vec![0; width * dtype.bitsize() / 8];
            T::encode(dtype, row, &mut bytes)?;
            tokens.insert(index, bytes);
        }
    }
    Ok(tokens)
}

impl<T: Real> Rescale<T> {
    /// `out = factor * (weight + delta)` for a chunk that starts at the flat index `first`; `delta` becomes the intended
    /// change, `out - weight`.
    pub(super) fn apply(&self, first: usize, columns: usize, weight: &[T], delta: &mut [T], out: &mut [T]) {
        for (i, ((o, &w), d)) in out.iter_mut().zip(weight).zip(delta).enumerate() {
            let place = if self.by_column { (first + i) % columns } else { (first + i) / columns };
            *o = self.factors[place] * (w + *d);
            *d = *o - w;
        }
    }
}
