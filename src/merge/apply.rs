//! One block of rows: decode, update, round once, and measure what the rounding kept.

use super::{
    plan::Output,
    prepared::{Computed, Element, Prepared},
    row_arithmetic,
};
use crate::{
    checkpoint::{Dtype, dtype},
    delta::{Real, unravel},
    error::{Error, Result},
};
use ndarray::{ArrayView2, ArrayViewMut2};
use std::{
    borrow::Cow,
    collections::BTreeMap,
    ops::{AddAssign, Range},
};

/// Elements that are decoded, added and rounded together: small enough for the first-level cache.
const CHUNK: usize = 2048;

/// Buffers of one thread, reused from block to block.
pub(super) struct Scratch<T> {
    delta: Vec<T>,
    /// The block before and after updates that read it.
    whole: [Vec<T>; 2],
    weight: Vec<T>,
    rounded: Vec<T>,
    /// The block as it will be stored.
    pub bytes: Vec<u8>,
}

impl<T: Real> Scratch<T> {
    pub(super) fn new() -> Self {
        let chunk = || vec![T::zero(); CHUNK];
        Scratch {
            delta: Vec::new(),
            whole: [Vec::new(), Vec::new()],
            weight: chunk(),
            rounded: chunk(),
            bytes: Vec::new(),
        }
    }
}

/// Sums over elements: of the intended delta d, the weight W and the stored result Q.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Sums {
    /// `sum d^2`
    pub delta: f64,
    /// `sum d (Q - W)`
    pub kept: f64,
    /// `sum (Q - W - d)^2`
    pub error: f64,
}

impl AddAssign for Sums {
    fn add_assign(&mut self, other: Sums) {
        self.delta += other.delta;
        self.kept += other.kept;
        self.error += other.error;
    }
}

/// Computes rows `rows` of `output` into `scratch.bytes`, stored as `to`.
pub(super) fn rows<T: Element>(
    output: &Output,
    to: Dtype,
    prepared: &Prepared<T>,
    rows: Range<usize>,
    scratch: &mut Scratch<T>,
) -> Result<Sums> {
    let (_, columns) = output.matrix_shape();
    let (first, count) = (rows.start * columns, rows.len() * columns);
    let from = output.source.dtype();
    let (from_size, to_size) = (from.bitsize() / 8, to.bitsize() / 8);
    scratch.delta.resize(count, T::zero());
    scratch.bytes.resize(count * to_size, 0);
    let stored = &output.source.bytes()[first * from_size..(first + count) * from_size];
    let source = with_tokens(stored, &rows, &prepared.tokens);
    let shape = (rows.len(), columns);
    let bad = |e| Error::environment(format!("block of '{}': {e}", output.spec.name));
    let delta = ArrayViewMut2::from_shape(shape, &mut scratch.delta[..]).map_err(bad)?;
    let mut computed = Computed::Delta;
    if prepared.reads_weight() {
        let [before, after] = &mut scratch.whole;
        [&mut *before, &mut *after].into_iter().for_each(|buffer| buffer.resize(count, T::zero()));
        T::decode(from, &source, before)?;
        let before = ArrayView2::from_shape(shape, &before[..]).map_err(bad)?;
        let after = ArrayViewMut2::from_shape(shape, &mut after[..]).map_err(bad)?;
        computed = prepared.compute(&rows, before, after, delta)?;
    } else {
        prepared.delta(&rows, delta)?;
    }
    let changed = !output.updates.is_empty();
    let plain = changed && computed == Computed::Delta && prepared.rounder.is_nearest() && size_of::<T>() == 4;
    let in_one_pass = plain && (from, to) == (Dtype::BF16, Dtype::BF16);
    let mut sums = Sums::default();
    let chunks = source.chunks(CHUNK * from_size).zip(scratch.bytes.chunks_mut(CHUNK * to_size));
    for (i, ((source, stored), delta)) in chunks.zip(scratch.delta.chunks_mut(CHUNK)).enumerate() {
        if in_one_pass {
            let (chunk_sums, finite) = row_arithmetic::merge_bf16(source, bytemuck::cast_slice(delta), stored);
            if finite {
                sums += chunk_sums;
                continue;
            }
        }
        let (weight, rounded) = (&mut scratch.weight[..delta.len()], &mut scratch.rounded[..delta.len()]);
        T::decode(from, source, weight)?;
        match computed {
            Computed::Delta => row_arithmetic::add(weight, delta, rounded),
            Computed::Weight => rounded.copy_from_slice(&scratch.whole[1][i * CHUNK..][..delta.len()]),
        }
        prepared.rounder.encode(to, first + i * CHUNK, rounded, stored)?;
        T::decode(to, stored, rounded)?;
        let (chunk_sums, finite) = row_arithmetic::measure(delta, weight, rounded);
        if !finite {
            refuse_non_finite(output, first + i * CHUNK, weight, rounded, to, changed)?;
        }
        sums += chunk_sums;
    }
    Ok(sums)
}

/// The source's bytes of `rows`, some rows replaced.
fn with_tokens<'s>(source: &'s [u8], rows: &Range<usize>, tokens: &BTreeMap<usize, Vec<u8>>) -> Cow<'s, [u8]> {
    let mut source = Cow::Borrowed(source);
    let width = source.len() / rows.len().max(1);
    for (row, bytes) in tokens.range(rows.clone()) {
        let at = (row - rows.start) * width;
        source.to_mut()[at..at + width].copy_from_slice(bytes);
    }
    source
}

/// Names the first element that spoils a chunk. NaN and infinity pass through tensors that are only recast.
fn refuse_non_finite<T: Real>(
    output: &Output,
    first: usize,
    weight: &[T],
    rounded: &[T],
    to: Dtype,
    changed: bool,
) -> Result<()> {
    let name = &output.spec.name;
    let place = |i: usize| unravel(first + i, &output.spec.shape);
    if changed && let Some(i) = weight.iter().position(|w| !w.is_finite()) {
        return Err(Error::request(format!(
            "cannot merge '{name}': base '{}' holds {} at {:?}",
            output.source.file().path().display(),
            weight[i],
            place(i)
        ))
        .help("the base is damaged, or its training diverged"));
    }
    if let Some(i) = rounded.iter().zip(weight).position(|(q, w)| !q.is_finite() && w.is_finite()) {
        let at = place(i);
        return Err(Error::request(format!(
            "'{name}' at {at:?} does not fit {}: it becomes {}",
            dtype::torch_name(to),
            rounded[i]
        ))
        .help("choose a wider type: --dtype f32 or --dtype bf16"));
    }
    Ok(())
}
