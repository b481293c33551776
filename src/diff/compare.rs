//! The values of two tensors of one shape, in one pass over both.

use super::{
    Status, Tolerance,
    sums::{self, Sums},
};
use crate::{
    checkpoint::{Dtype, READ, Reader, Tensor, dtype},
    delta::unravel,
    error::Result,
    progress::Progress,
    work_queue,
};
use serde::Serialize;

/// How far two tensors are from each other. The measures are over the places where both are finite; values that are
/// NaN on both sides, or the same infinity, count as equal, any other place that is not finite as different.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// Whether all bytes agree (only possible within one type).
    pub identical: bool,
    /// Largest `|a - b|`.
    pub max_abs: f64,
    /// Where it is; absent if it is 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_abs_at: Option<Vec<usize>>,
    /// `||a - b|| / ||b||` in the Frobenius norm; null if only `b` is 0, and for types that are no floating point.
    pub relative_frobenius: Option<f64>,
    /// `<a, b> / (||a|| ||b||)`; null if one of them is 0.
    pub cosine: Option<f64>,
    /// Values that are off by more than the tolerance.
    pub beyond_tolerance: u64,
    /// Places where exactly one side is finite, or where both are not and disagree.
    pub non_finite: u64,
}

impl Difference {
    pub(super) fn status(&self, same_dtype: bool) -> Status {
        match self.beyond_tolerance + self.non_finite {
            0 if self.identical && same_dtype => Status::Identical,
            0 => Status::Close,
            _ => Status::Different,
        }
    }
}

/// Elements that one task reads from both sides.
const PIECE: usize = 1 << 20;

/// Elements that are compared together where the processor has a loop for their types.
const RUN: usize = 1 << 14;

/// Elements that are decoded and compared together otherwise, in the first-level cache.
const CHUNK: usize = 2048;

/// Compares each pair. The threads share all pieces of all pairs, which are summed in order, so that the result
/// does not depend on the number of threads.
pub(super) fn all(pairs: &[(Tensor, Tensor)], tolerance: Tolerance, progress: &Progress) -> Result<Vec<Difference>> {
    let pieces: Vec<(usize, usize)> = pairs
        .iter()
        .enumerate()
        .flat_map(|(i, (a, _))| (0..a.elements()).step_by(PIECE).map(move |first| (i, first)))
        .collect();
    let total = pairs.iter().map(|(a, b)| (a.bytes().len() + b.bytes().len()) as u64).sum();
    let bar = progress.bytes("comparing", total);
    let sums = work_queue::run_in_order(pieces.len(), Scratch::default, |scratch, piece| {
        progress.check()?;
        let (i, first) = pieces[piece];
        let (a, b) = &pairs[i];
        let count = PIECE.min(a.elements() - first);
        let sums = scratch.compare(a, b, first, count, tolerance)?;
        bar.inc((count * (a.dtype().bitsize() + b.dtype().bitsize()) / 8) as u64);
        Ok(sums)
    });
    bar.finish_and_clear();
    let mut totals = vec![Sums::default(); pairs.len()];
    for (&(i, _), part) in pieces.iter().zip(sums?) {
        totals[i].add(part);
    }
    totals.iter().zip(pairs).map(|(sums, (a, b))| Difference::new(sums, a, b)).collect()
}

/// Buffers of one thread.
#[derive(Default)]
struct Scratch {
    readers: [Reader; 2],
    singles: [Vec<f32>; 2],
    doubles: [Vec<f64>; 2],
}

impl Scratch {
    fn compare(&mut self, a: &Tensor, b: &Tensor, first: usize, count: usize, tolerance: Tolerance) -> Result<Sums> {
        let (size_a, size_b) = (a.dtype().bitsize() / 8, b.dtype().bitsize() / 8);
        if size_a == 0 {
            // Packed types: values share bytes, so the bytes are compared, once.
            return Ok(if first == 0 { unequal(a.bytes(), b.bytes(), 1) } else { Sums::default() });
        }
        let step = (READ / size_a.max(size_b)).max(1);
        let mut all = Sums::default();
        for at in (first..first + count).step_by(step) {
            let end = (first + count).min(at + step);
            let [left, right] = &mut self.readers;
            let (x, y) = (left.read(a, at * size_a..end * size_a)?, right.read(b, at * size_b..end * size_b)?);
            if !dtype::is_float(a.dtype()) {
                all.add(unequal(x, y, size_a));
                continue;
            }
            for (i, (x, y)) in x.chunks(RUN * size_a).zip(y.chunks(RUN * size_b)).enumerate() {
                let (sides, at) = ([(a.dtype(), x), (b.dtype(), y)], at + i * RUN);
                all.add(match of_stored(sides, tolerance) {
                    Some(sums) => Sums { max_in: at, ..sums },
                    None => decoded(sides, at, tolerance, &mut self.singles, &mut self.doubles)?,
                });
            }
        }
        Ok(all)
    }
}

/// Of stored values, in one pass over their bytes: `None` where there is no such loop for the types or the processor,
/// where their number does not suit it, and where they are not all finite.
fn of_stored(sides: [(Dtype, &[u8]); 2], tolerance: Tolerance) -> Option<Sums> {
    #[cfg(target_arch = "x86_64")]
    return super::avx512::sums(sides, tolerance);
    #[cfg(not(target_arch = "x86_64"))]
    None
}

/// Integers and flags: a tolerance for weights means nothing to them.
fn unequal(a: &[u8], b: &[u8], size: usize) -> Sums {
    let beyond = match a == b {
        true => 0,
        false => a.chunks(size).zip(b.chunks(size)).filter(|(a, b)| a != b).count() as u64,
    };
    Sums { beyond, unlike: beyond > 0, ..Sums::default() }
}

fn decoded(
    sides: [(Dtype, &[u8]); 2],
    first: usize,
    tolerance: Tolerance,
    singles: &mut [Vec<f32>; 2],
    doubles: &mut [Vec<f64>; 2],
) -> Result<Sums> {
    let [(dtype_a, a), (dtype_b, b)] = sides;
    let (size_a, size_b) = (dtype_a.bitsize() / 8, dtype_b.bitsize() / 8);
    let mut all = Sums { unlike: sides[0] != sides[1], ..Sums::default() };
    for (i, (a, b)) in a.chunks(CHUNK * size_a).zip(b.chunks(CHUNK * size_b)).enumerate() {
        let (at, n) = (first + i * CHUNK, a.len() / size_a);
        all.add(if dtype_a == Dtype::F64 || dtype_b == Dtype::F64 {
            let [x, y] = &mut *doubles;
            x.resize(n, 0.0);
            y.resize(n, 0.0);
            dtype::decode_f64(dtype_a, a, x)?;
            dtype::decode_f64(dtype_b, b, y)?;
            sums::chunk(x, y, at, tolerance)
        } else {
            let [x, y] = &mut *singles;
            x.resize(n, 0.0);
            y.resize(n, 0.0);
            dtype::decode_f32(dtype_a, a, x)?;
            dtype::decode_f32(dtype_b, b, y)?;
            sums::chunk(x, y, at, tolerance)
        });
    }
    Ok(all)
}

/// The first place of the maximum: only the run that it is in is known so far.
fn place_of_max(sums: &Sums, a: &Tensor, b: &Tensor) -> Result<Option<usize>> {
    if sums.max == 0.0 {
        return Ok(None);
    }
    let count = RUN.min(a.elements() - sums.max_in);
    let (mut x, mut y) = (vec![0.0; count], vec![0.0; count]);
    a.read_f64(sums.max_in, &mut x)?;
    b.read_f64(sums.max_in, &mut y)?;
    let place = x.iter().zip(&y).position(|(x, y)| (x - y).abs() == sums.max);
    Ok(place.map(|i| sums.max_in + i))
}

impl Difference {
    fn new(sums: &Sums, a: &Tensor, b: &Tensor) -> Result<Difference> {
        let float = dtype::is_float(a.dtype());
        let (norm_a, norm_b) = (sums.aa.sqrt(), sums.bb.sqrt());
        let relative = if sums.dd == 0.0 { Some(0.0) } else { (norm_b > 0.0).then(|| sums.dd.sqrt() / norm_b) };
        Ok(Difference {
            identical: !sums.unlike,
            max_abs: sums.max,
            max_abs_at: place_of_max(sums, a, b)?.map(|i| unravel(i, a.shape())),
            relative_frobenius: relative.filter(|_| float),
            // A vector and itself: exactly 1, whatever the rounding of the sums.
            cosine: (float && norm_a > 0.0 && norm_b > 0.0)
                .then(|| if sums.dd == 0.0 { 1.0 } else { (sums.ab / (norm_a * norm_b)).clamp(-1.0, 1.0) }),
            beyond_tolerance: sums.beyond,
            non_finite: sums.non_finite,
        })
    }
}
