//! What the blocks of one output share: its updates, built and ready for rows.

use super::{
    device::Gpu,
    plan::Output,
    rounding::{Rounder, Rounding},
};
use crate::{
    adapter::types::values,
    delta::{Effect, Planned, Real, Update, Visit, Weight},
    error::{Error, Result},
};
use ndarray::{ArrayView2, ArrayViewMut2};
use std::{collections::BTreeMap, ops::Range};

/// Elements of one block of the pass over the weight that some updates need before they give rows.
const BLOCK: usize = 1 << 19;

/// The number types that merges are computed in.
pub(super) trait Element: Real {
    fn build(planned: &Planned) -> Result<Box<dyn Update<Self>>>;
}

impl Element for f32 {
    fn build(planned: &Planned) -> Result<Box<dyn Update<f32>>> {
        planned.build_f32().unwrap_or_else(|| Err(Error::environment("an update that needs f64 is computed in f32")))
    }
}

impl Element for f64 {
    fn build(planned: &Planned) -> Result<Box<dyn Update<f64>>> {
        planned.build_f64()
    }
}

/// The updates of an output, in order, ready for its blocks.
pub(super) struct Prepared<T> {
    updates: Vec<Box<dyn Update<T>>>,
    /// Replaced rows, in the source's stored type.
    pub tokens: BTreeMap<usize, Vec<u8>>,
    pub rounder: Rounder,
}

/// What [`Prepared::compute`] left in its buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Computed {
    /// The delta; the new weight is the sum, not yet formed.
    Delta,
    /// The new weight, and its difference from the old one as the delta.
    Weight,
}

impl<T: Element> Prepared<T> {
    pub(super) fn new(output: &Output, rounding: Rounding, gpu: Option<&Gpu>) -> Result<Self> {
        let mut built = output.updates.iter().map(T::build).collect::<Result<Vec<_>>>()?;
        if let Some(gpu) = gpu.filter(|gpu| gpu.takes(output)) {
            gpu.take_products(&mut built)?;
        }
        let rounder = Rounder::new(rounding, &output.spec.name);
        let mut prepared = Prepared { updates: Vec::new(), tokens: read_tokens::<T>(output)?, rounder };
        for mut update in built {
            update.prepare(&Before { output, prepared: &prepared })?;
            prepared.updates.push(update);
        }
        Ok(prepared)
    }

    /// Whether some update is computed from the weight's values.
    pub(super) fn reads_weight(&self) -> bool {
        self.updates.iter().any(|update| update.effect() == Effect::Rewrites)
    }

    /// Overwrites `delta` with rows `rows` of the sum of all updates, which all are added.
    pub(super) fn delta(&self, rows: &Range<usize>, mut delta: ArrayViewMut2<T>) -> Result<()> {
        // A single update saves clearing the block.
        if let [only] = &self.updates[..] {
            return only.rows(rows.clone(), empty(), delta);
        }
        delta.fill(T::zero());
        let mut own = if self.updates.is_empty() { Vec::new() } else { vec![T::zero(); delta.len()] };
        for update in &self.updates {
            add(update.as_ref(), rows, &mut own, delta.view_mut())?;
        }
        Ok(())
    }

    /// Applies one update after the other to rows `rows` of the weight. Overwrites `delta` with what they change together,
    /// and `new` with the new weight if the last one gave it.
    pub(super) fn compute(
        &self,
        rows: &Range<usize>,
        weight: ArrayView2<T>,
        mut new: ArrayViewMut2<T>,
        mut delta: ArrayViewMut2<T>,
    ) -> Result<Computed> {
        delta.fill(T::zero());
        let mut computed = Computed::Delta;
        let mut buffer = vec![T::zero(); weight.len()];
        for update in &self.updates {
            if update.effect() == Effect::Adds {
                add(update.as_ref(), rows, &mut buffer, delta.view_mut())?;
                computed = Computed::Delta;
                continue;
            }
            let before = match &self.updates[..] {
                [_] => weight.view(),
                _ => {
                    buffer.iter_mut().zip(weight.iter().zip(delta.iter())).for_each(|(b, (&w, &d))| *b = w + d);
                    view(weight.dim(), &buffer)?
                }
            };
            update.rows(rows.clone(), before, new.view_mut())?;
            delta.iter_mut().zip(new.iter().zip(weight.iter())).for_each(|(d, (&n, &w))| *d = n - w);
            computed = Computed::Weight;
        }
        Ok(computed)
    }
}

fn empty<'v, T>() -> ArrayView2<'v, T> {
    // An extent of 0 fits any buffer.
    ArrayView2::from_shape((0, 0), &[]).unwrap_or_else(|_| unreachable!())
}

fn view<T>(shape: (usize, usize), values: &[T]) -> Result<ArrayView2<'_, T>> {
    ArrayView2::from_shape(shape, values).map_err(|e| Error::environment(format!("a block of rows: {e}")))
}

fn add<T: Real>(update: &dyn Update<T>, rows: &Range<usize>, own: &mut [T], mut delta: ArrayViewMut2<T>) -> Result<()> {
    let bad = |e| Error::environment(format!("a block of rows: {e}"));
    let mut own = ArrayViewMut2::from_shape(delta.dim(), own).map_err(bad)?;
    update.rows(rows.clone(), empty(), own.view_mut())?;
    delta.zip_mut_with(&own, |sum, &own| *sum = *sum + own);
    Ok(())
}

/// The weight as the next update finds it: the source, changed by the updates before.
struct Before<'p, 'a, T> {
    output: &'p Output<'a>,
    prepared: &'p Prepared<T>,
}

impl<T: Element> Weight<T> for Before<'_, '_, T> {
    fn shape(&self) -> (usize, usize) {
        self.output.matrix_shape()
    }

    fn blocks(&self, visit: &mut Visit<T>) -> Result<()> {
        let columns = self.output.matrix_shape().1;
        let (mut source, mut new, mut delta) = (Vec::new(), Vec::new(), Vec::new());
        for rows in self.output.row_blocks(BLOCK) {
            let shape = (rows.len(), columns);
            source.resize(rows.len() * columns, T::zero());
            T::read(&self.output.source, rows.start * columns, &mut source)?;
            if !self.prepared.updates.is_empty() {
                [&mut new, &mut delta].iter_mut().for_each(|buffer| buffer.resize(source.len(), T::zero()));
                let bad = |e| Error::environment(format!("a block of rows: {e}"));
                let [new_rows, delta_rows] =
                    [&mut new, &mut delta].map(|buffer| ArrayViewMut2::from_shape(shape, &mut buffer[..]).map_err(bad));
                match self.prepared.compute(&rows, view(shape, &source)?, new_rows?, delta_rows?)? {
                    Computed::Delta => source.iter_mut().zip(&delta).for_each(|(w, &d)| *w = *w + d),
                    Computed::Weight => source.copy_from_slice(&new),
                }
            }
            visit(rows, view(shape, &source)?)?;
        }
        Ok(())
    }
}

fn read_tokens<T: Real>(output: &Output) -> Result<BTreeMap<usize, Vec<u8>>> {
    let (mut tokens, dtype) = (BTreeMap::new(), output.source.dtype());
    for replaced in &output.tokens {
        let read = values::vector::<T>(&replaced.rows)?;
        let width = output.matrix_shape().1;
        for (&index, row) in replaced.indices.iter().zip(read.chunks(width.max(1))) {
            let mut bytes = vec![0; width * dtype.bitsize() / 8];
            T::encode(dtype, row, &mut bytes)?;
            tokens.insert(index, bytes);
        }
    }
    Ok(tokens)
}
