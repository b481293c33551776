//! Updates given as functions, for methods that need no structure of their own. All are computed in f64.

use super::{
    low_rank::LowRank,
    update::{Effect, Stacked, Update, Visit, Weight},
};
use crate::error::{Error, Result};
use ndarray::{Array2, ArrayView2, ArrayViewMut2, s};
use std::ops::Range;

/// An update in f64, ready to be applied.
pub type Boxed = Box<dyn Update<f64>>;

/// `scaling * left @ right`.
pub fn low_rank(left: Array2<f64>, right: Array2<f64>, scaling: f64) -> Boxed {
    Box::new(Stacked::new(vec![(0, LowRank { left, right, scaling })]))
}

/// Rows that are added: `rows` overwrites `[rows, columns]` with them. `held`: bytes that it keeps in memory.
pub fn adding<F>(shape: (usize, usize), held: usize, rows: F) -> Boxed
where
    F: Fn(Range<usize>, ArrayViewMut2<f64>) + Send + Sync + 'static,
{
    let rows = move |range, _: ArrayView2<f64>, out: ArrayViewMut2<f64>| rows(range, out);
    Box::new(Rows { shape, held, effect: Effect::Adds, rows })
}

/// Rows that take the weight's place, computed from the same rows of the weight.
pub fn rewriting<F>(shape: (usize, usize), held: usize, rows: F) -> Boxed
where
    F: Fn(Range<usize>, ArrayView2<f64>, ArrayViewMut2<f64>) + Send + Sync + 'static,
{
    Box::new(Rows { shape, held, effect: Effect::Rewrites, rows })
}

struct Rows<F> {
    shape: (usize, usize),
    held: usize,
    effect: Effect,
    rows: F,
}

impl<F> Update<f64> for Rows<F>
where
    F: Fn(Range<usize>, ArrayView2<f64>, ArrayViewMut2<f64>) + Send + Sync,
{
    fn shape(&self) -> (usize, usize) {
        self.shape
    }

    fn bytes(&self) -> usize {
        self.held
    }

    fn effect(&self) -> Effect {
        self.effect
    }

    fn rows(&self, rows: Range<usize>, weight: ArrayView2<f64>, out: ArrayViewMut2<f64>) -> Result<()> {
        (self.rows)(rows, weight, out);
        Ok(())
    }
}

/// `W + left @ right` where `factors` finds left and right in one pass over W.
pub fn low_rank_of_weight<F>(shape: (usize, usize), held: usize, factors: F) -> Boxed
where
    F: Fn(&dyn Weight<f64>) -> Result<(Array2<f64>, Array2<f64>)> + Send + Sync + 'static,
{
    Box::new(LowRankOfWeight { shape, held, factors, found: None })
}

struct LowRankOfWeight<F> {
    shape: (usize, usize),
    held: usize,
    factors: F,
    found: Option<LowRank<f64>>,
}

impl<F> Update<f64> for LowRankOfWeight<F>
where
    F: Fn(&dyn Weight<f64>) -> Result<(Array2<f64>, Array2<f64>)> + Send + Sync,
{
    fn shape(&self) -> (usize, usize) {
        self.shape
    }

    fn bytes(&self) -> usize {
        self.held + self.found.as_ref().map_or(0, |f| 8 * (f.left.len() + f.right.len()))
    }

    fn effect(&self) -> Effect {
        Effect::Rewrites
    }

    fn prepare(&mut self, weight: &dyn Weight<f64>) -> Result<()> {
        let (left, right) = (self.factors)(weight)?;
        self.found = Some(LowRank { left, right, scaling: 1.0 });
        Ok(())
    }

    fn rows(&self, rows: Range<usize>, weight: ArrayView2<f64>, mut out: ArrayViewMut2<f64>) -> Result<()> {
        let found = self.found.as_ref().ok_or_else(unprepared)?;
        found.rows(rows, out.view_mut());
        out += &weight;
        Ok(())
    }
}

/// An update that needs the whole weight at once: `new` makes the new weight of the old one. Both are in memory for a moment,
/// then the new one until its rows are written.
pub fn whole<F>(shape: (usize, usize), held: usize, new: F) -> Boxed
where
    F: Fn(Array2<f64>) -> Result<Array2<f64>> + Send + Sync + 'static,
{
    Box::new(Whole { shape, held, new, result: None })
}

struct Whole<F> {
    shape: (usize, usize),
    held: usize,
    new: F,
    result: Option<Array2<f64>>,
}

impl<F> Update<f64> for Whole<F>
where
    F: Fn(Array2<f64>) -> Result<Array2<f64>> + Send + Sync,
{
    fn shape(&self) -> (usize, usize) {
        self.shape
    }

    fn bytes(&self) -> usize {
        self.held + self.result.as_ref().map_or(0, |r| 8 * r.len())
    }

    fn effect(&self) -> Effect {
        Effect::Rewrites
    }

    fn prepare(&mut self, weight: &dyn Weight<f64>) -> Result<()> {
        self.result = Some((self.new)(read_whole(weight)?)?);
        Ok(())
    }

    fn rows(&self, rows: Range<usize>, _: ArrayView2<f64>, mut out: ArrayViewMut2<f64>) -> Result<()> {
        out.assign(&self.result.as_ref().ok_or_else(unprepared)?.slice(s![rows, ..]));
        Ok(())
    }
}

/// The update of a weight that is stored transposed, from that of the weight itself. Factors change places; everything else
/// is computed at once.
pub fn transposed(inner: Boxed) -> Boxed {
    let (rows, columns) = inner.shape();
    if inner.effect() == Effect::Adds
        && let Some([(0, only)]) = inner.factors()
    {
        return low_rank(only.right.t().to_owned(), only.left.t().to_owned(), only.scaling);
    }
    Box::new(Transposed { shape: (columns, rows), inner, result: None })
}

struct Transposed {
    shape: (usize, usize),
    inner: Boxed,
    result: Option<Array2<f64>>,
}

impl Update<f64> for Transposed {
    fn shape(&self) -> (usize, usize) {
        self.shape
    }

    fn bytes(&self) -> usize {
        self.inner.bytes() + self.result.as_ref().map_or(0, |r| 8 * r.len())
    }

    fn effect(&self) -> Effect {
        self.inner.effect()
    }

    fn prepare(&mut self, weight: &dyn Weight<f64>) -> Result<()> {
        let turned = InMemory(read_whole(weight)?.reversed_axes().as_standard_layout().into_owned());
        self.inner.prepare(&turned)?;
        let mut new = Array2::zeros(turned.0.dim());
        self.inner.rows(0..turned.0.nrows(), turned.0.view(), new.view_mut())?;
        self.result = Some(new.reversed_axes().as_standard_layout().into_owned());
        Ok(())
    }

    fn rows(&self, rows: Range<usize>, _: ArrayView2<f64>, mut out: ArrayViewMut2<f64>) -> Result<()> {
        out.assign(&self.result.as_ref().ok_or_else(unprepared)?.slice(s![rows, ..]));
        Ok(())
    }
}

/// A weight that is in memory.
pub struct InMemory(pub Array2<f64>);

impl Weight<f64> for InMemory {
    fn shape(&self) -> (usize, usize) {
        self.0.dim()
    }

    fn blocks(&self, visit: &mut Visit<f64>) -> Result<()> {
        visit(0..self.0.nrows(), self.0.view())
    }
}

/// All rows of a weight.
pub fn read_whole(weight: &dyn Weight<f64>) -> Result<Array2<f64>> {
    let mut all = Array2::zeros(weight.shape());
    weight.blocks(&mut |rows, block| {
        all.slice_mut(s![rows, ..]).assign(&block);
        Ok(())
    })?;
    Ok(all)
}

fn unprepared() -> Error {
    Error::environment("rows of an update were computed before it was prepared")
}
