//! The update of one stored weight, whatever made it: an adapter of any type, or the difference of two checkpoints.
//!
//! An update is planned from headers alone ([`Planned`]), built when its tensor's turn comes, prepared with one pass over the
//! weight where it needs one, and then computed in row blocks by any number of threads.

use super::{low_rank::LowRank, real::Real};
use crate::{checkpoint::Tensor, error::Result};
use ndarray::{ArrayView2, ArrayViewMut2, s};
use std::{ops::Range, path::Path};

/// What an update's rows are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// They are added to the weight, and computed without it.
    Adds,
    /// They take the weight's place, and are computed from it: scaled, rotated, normalised.
    Rewrites,
}

/// A change of one weight, seen as a matrix `[rows, columns]` in the order of its stored elements.
pub trait Update<T: Real>: Send + Sync {
    /// `(rows, columns)` of the weight it fits.
    fn shape(&self) -> (usize, usize);

    /// Bytes it occupies in memory.
    fn bytes(&self) -> usize;

    /// What its rows are.
    fn effect(&self) -> Effect {
        Effect::Adds
    }

    /// Reads the weight once before any row is computed: norms, decompositions.
    fn prepare(&mut self, _weight: &dyn Weight<T>) -> Result<()> {
        Ok(())
    }

    /// Overwrites `out` (`[rows.len(), columns]`) with rows `rows` of what is added to the weight, or takes its place.
    /// `weight` holds these rows of the weight for [`Effect::Rewrites`]; for [`Effect::Adds`] it may be empty.
    fn rows(&self, rows: Range<usize>, weight: ArrayView2<T>, out: ArrayViewMut2<T>) -> Result<()>;

    /// The update as low-rank products, each with the row where it begins; `None` if it is something else. Where the update
    /// rewrites the weight these are the products inside it.
    fn factors(&self) -> Option<&[(usize, LowRank<T>)]> {
        None
    }

    /// The part of an update that rewrites the weight which is a sum of low-rank products, so that another device may
    /// compute it.
    fn product_mut(&mut self) -> Option<&mut Box<dyn Update<T>>> {
        None
    }
}

/// A weight that is read once, from the first row to the last.
pub trait Weight<T: Real> {
    /// `(rows, columns)`.
    fn shape(&self) -> (usize, usize);

    /// Calls `visit` with consecutive blocks of rows.
    fn blocks(&self, visit: &mut Visit<T>) -> Result<()>;
}

/// What is done with consecutive rows of a weight.
pub type Visit<'v, T> = dyn FnMut(Range<usize>, ArrayView2<T>) -> Result<()> + 'v;

type Build<'a, T> = Box<dyn Fn() -> Result<Box<dyn Update<T>>> + Send + Sync + 'a>;

/// An update whose tensors fit its target; their values have not been read.
pub struct Planned<'a> {
    /// `(rows, columns)` of the weight.
    pub shape: (usize, usize),
    /// Rank of what it adds; 0 where that is no product of factors.
    pub rank: usize,
    /// The file that it comes from, for messages.
    pub file: &'a Path,
    /// The tensors that building it reads.
    pub tensors: Vec<Tensor<'a>>,
    /// It rescales the sum of the weight and its own delta: no order with other deltas is agreed on.
    pub alone: bool,
    /// Blocks of rows begin at multiples of this: rows that are mixed with each other stay together.
    pub row_group: usize,
    single: Option<Build<'a, f32>>,
    double: Build<'a, f64>,
}

impl<'a> Planned<'a> {
    /// An update that is computed in the weight's arithmetic: f32, or f64 for weights stored as F64.
    pub fn new(
        file: &'a Path,
        shape: (usize, usize),
        single: impl Fn() -> Result<Box<dyn Update<f32>>> + Send + Sync + 'a,
        double: impl Fn() -> Result<Box<dyn Update<f64>>> + Send + Sync + 'a,
    ) -> Planned<'a> {
        Planned { single: Some(Box::new(single)), ..Planned::in_double(file, shape, double) }
    }

    /// An update that is computed in f64, whatever the weight is stored as.
    pub fn in_double(
        file: &'a Path,
        shape: (usize, usize),
        double: impl Fn() -> Result<Box<dyn Update<f64>>> + Send + Sync + 'a,
    ) -> Planned<'a> {
        let (tensors, double) = (Vec::new(), Box::new(double));
        Planned { shape, rank: 0, file, tensors, alone: false, row_group: 1, single: None, double }
    }

    /// Whether it is computed in f64 only.
    pub fn needs_double(&self) -> bool {
        self.single.is_none()
    }

    /// Bytes that building it reads.
    pub fn bytes_read(&self) -> u64 {
        self.tensors.iter().map(|t| t.bytes().len() as u64).sum()
    }

    /// Reads its tensors as f64.
    pub fn build_f64(&self) -> Result<Box<dyn Update<f64>>> {
        (self.double)()
    }

    /// Reads its tensors as f32; `None` if it [needs f64](Planned::needs_double).
    pub fn build_f32(&self) -> Option<Result<Box<dyn Update<f32>>>> {
        self.single.as_ref().map(|build| build())
    }
}

/// Low-rank products below each other, each with the row where it begins: one product, or one per expert.
pub struct Stacked<T> {
    parts: Vec<(usize, LowRank<T>)>,
    rows: usize,
}

impl<T: Real> Stacked<T> {
    /// Of `parts`, which cover the rows of the weight without a gap.
    pub fn new(parts: Vec<(usize, LowRank<T>)>) -> Stacked<T> {
        let rows = parts.iter().map(|(first, part)| first + part.shape().0).max().unwrap_or(0);
        Stacked { parts, rows }
    }
}

impl<T: Real> Update<T> for Stacked<T> {
    fn shape(&self) -> (usize, usize) {
        (self.rows, self.parts.first().map_or(0, |(_, part)| part.shape().1))
    }

    fn bytes(&self) -> usize {
        self.parts.iter().map(|(_, part)| (part.left.len() + part.right.len()) * size_of::<T>()).sum()
    }

    fn rows(&self, rows: Range<usize>, _: ArrayView2<T>, mut out: ArrayViewMut2<T>) -> Result<()> {
        // A single product that covers the block saves clearing it.
        if let [(0, only)] = &self.parts[..] {
            only.rows(rows, out);
            return Ok(());
        }
        out.fill(T::zero());
        for (first, part) in &self.parts {
            let (from, to) = (rows.start.max(*first), rows.end.min(first + part.shape().0));
            if from < to {
                part.add_rows(from - first..to - first, out.slice_mut(s![from - rows.start..to - rows.start, ..]));
            }
        }
        Ok(())
    }

    fn factors(&self) -> Option<&[(usize, LowRank<T>)]> {
        Some(&self.parts)
    }
}
