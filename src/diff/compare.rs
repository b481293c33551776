//! The values of two tensors of one shape, in one pass over both.

use super::Status;
use crate::{
    checkpoint::{Dtype, Tensor, dtype},
    delta::unravel,
    error::Result,
    interrupt,
    progress::Progress,
};
use rayon::prelude::*;
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
const PIECE: usize = 1 << 17;

/// Elements that are decoded and compared together, in the first-level cache.
const CHUNK: usize = 2048;

/// Compares each pair. All pieces of all pairs are spread over the threads, then summed in order, so that the result
/// does not depend on the number of threads.
pub(super) fn all(pairs: &[(Tensor, Tensor)], atol: f64, rtol: f64, progress: &Progress) -> Result<Vec<Difference>> {
    let pieces: Vec<(usize, usize)> = pairs
        .iter()
        .enumerate()
        .flat_map(|(i, (a, _))| (0..a.elements()).step_by(PIECE).map(move |first| (i, first)))
        .collect();
    let total = pairs.iter().map(|(a, b)| (a.bytes().len() + b.bytes().len()) as u64).sum();
    let bar = progress.bytes("comparing", total);
    let sums: Result<Vec<Sums>> = pieces
        .par_iter()
        .map_init(Scratch::default, |scratch, &(i, first)| {
            interrupt::check()?;
            let (a, b) = &pairs[i];
            let count = PIECE.min(a.elements() - first);
            let sums = scratch.compare(a, b, first, count, atol, rtol)?;
            bar.inc((count * (a.dtype().bitsize() + b.dtype().bitsize()) / 8) as u64);
            Ok(sums)
        })
        .collect();
    bar.finish_and_clear();
    let mut totals = vec![Sums::default(); pairs.len()];
    for (&(i, _), part) in pieces.iter().zip(sums?) {
        totals[i].add(part);
    }
    Ok(totals.into_iter().zip(pairs).map(|(sums, (a, _))| sums.finish(a)).collect())
}

/// Sums over elements.
#[derive(Clone, Debug, Default)]
struct Sums {
    max: f64,
    max_at: usize,
    aa: f64,
    bb: f64,
    ab: f64,
    dd: f64,
    beyond: u64,
    non_finite: u64,
    unlike: bool,
}

impl Sums {
    fn add(&mut self, other: Sums) {
        if other.max > self.max {
            (self.max, self.max_at) = (other.max, other.max_at);
        }
        self.aa += other.aa;
        self.bb += other.bb;
        self.ab += other.ab;
        self.dd += other.dd;
        self.beyond += other.beyond;
        self.non_finite += other.non_finite;
        self.unlike |= other.unlike;
    }

    fn finish(self, a: &Tensor) -> Difference {
        let float = dtype::is_float(a.dtype());
        let (norm_a, norm_b) = (self.aa.sqrt(), self.bb.sqrt());
        let relative = if self.dd == 0.0 { Some(0.0) } else { (norm_b > 0.0).then(|| self.dd.sqrt() / norm_b) };
        Difference {
            identical: !self.unlike,
            max_abs: self.max,
            max_abs_at: (self.max > 0.0).then(|| unravel(self.max_at, a.shape())),
            relative_frobenius: relative.filter(|_| float),
            // A vector and itself: exactly 1, whatever the rounding of the sums.
            cosine: (float && norm_a > 0.0 && norm_b > 0.0)
                .then(|| if self.dd == 0.0 { 1.0 } else { (self.ab / (norm_a * norm_b)).clamp(-1.0, 1.0) }),
            beyond_tolerance: self.beyond,
            non_finite: self.non_finite,
        }
    }
}

/// Buffers of one thread.
#[derive(Default)]
struct Scratch {
    singles: [Vec<f32>; 2],
    doubles: [Vec<f64>; 2],
}

impl Scratch {
    fn compare(&mut self, a: &Tensor, b: &Tensor, first: usize, count: usize, atol: f64, rtol: f64) -> Result<Sums> {
        let (dtype_a, dtype_b) = (a.dtype(), b.dtype());
        let (size_a, size_b) = (dtype_a.bitsize() / 8, dtype_b.bitsize() / 8);
        let a = &a.bytes()[first * size_a..(first + count) * size_a];
        let b = &b.bytes()[first * size_b..(first + count) * size_b];
        let mut all = Sums { unlike: dtype_a != dtype_b, ..Sums::default() };
        if !dtype::is_float(dtype_a) {
            // Integers and flags: a tolerance for weights means nothing to them.
            let unequal = a.chunks(size_a).zip(b.chunks(size_b)).filter(|(a, b)| a != b).count();
            all.beyond = unequal as u64;
            all.unlike = unequal > 0;
            return Ok(all);
        }
        let chunks = a.chunks(CHUNK * size_a).zip(b.chunks(CHUNK * size_b));
        for (i, (a, b)) in chunks.enumerate() {
            let (at, n) = (first + i * CHUNK, a.len() / size_a);
            all.unlike |= a != b;
            let max = all.max;
            all.add(if dtype_a == Dtype::F64 || dtype_b == Dtype::F64 {
                let [x, y] = &mut self.doubles;
                x.resize(n, 0.0);
                y.resize(n, 0.0);
                dtype::decode_f64(dtype_a, a, x)?;
                dtype::decode_f64(dtype_b, b, y)?;
                chunk(x, y, at, max, atol, rtol)
            } else {
                let [x, y] = &mut self.singles;
                x.resize(n, 0.0);
                y.resize(n, 0.0);
                dtype::decode_f32(dtype_a, a, x)?;
                dtype::decode_f32(dtype_b, b, y)?;
                chunk(x, y, at, max, atol, rtol)
            });
        }
        Ok(all)
    }
}

/// A chunk with the flat index `first` of its first value. The index of its maximum is looked for only where it exceeds
/// `max`, and values that are not finite take a path of their own.
fn chunk<T: Copy + Into<f64>>(a: &[T], b: &[T], first: usize, max: f64, atol: f64, rtol: f64) -> Sums {
    let mut sums = fast(a, b, atol, rtol);
    if !(sums.aa.is_finite() && sums.bb.is_finite()) {
        return careful(a, b, first, atol, rtol);
    }
    if sums.max > max {
        let at = a.iter().zip(b).position(|(&a, &b)| (a.into() - b.into()).abs() == sums.max);
        sums.max_at = first + at.unwrap_or(0);
    }
    sums
}

fn careful<T: Copy + Into<f64>>(a: &[T], b: &[T], first: usize, atol: f64, rtol: f64) -> Sums {
    let mut sums = Sums::default();
    for (i, (&a, &b)) in a.iter().zip(b).enumerate() {
        let (a, b) = (a.into(), b.into());
        if !(a.is_finite() && b.is_finite()) {
            sums.non_finite += u64::from(!(a == b || a.is_nan() && b.is_nan()));
            continue;
        }
        let d = (a - b).abs();
        let one = Sums { max: d, max_at: first + i, aa: a * a, bb: b * b, ab: a * b, dd: d * d, ..Sums::default() };
        sums.add(Sums { beyond: u64::from(d > atol + rtol * b.abs()), ..one });
    }
    sums
}

/// The sums of values that are all finite (others show as sums that are not), without the place of the maximum.
fn fast<T: Copy + Into<f64>>(a: &[T], b: &[T], atol: f64, rtol: f64) -> Sums {
    let whole = a.len() - a.len() % LANES;
    let ((aa, bb), (ab, dd)) = (norms(&a[..whole], &b[..whole]), products(&a[..whole], &b[..whole]));
    let (max, beyond) = gaps(&a[..whole], &b[..whole], atol, rtol);
    let mut sums = Sums { max, aa, bb, ab, dd, beyond, ..Sums::default() };
    sums.add(careful(&a[whole..], &b[whole..], 0, atol, rtol));
    if sums.non_finite > 0 {
        sums.aa = f64::NAN;
    }
    sums
}

/// Independent partial sums. The compiler turns loops over this many lanes and few accumulators into vectors; with 16
/// lanes, or with all sums in one loop, it unrolls them into scalar code at the highest optimisation level.
const LANES: usize = 32;

/// Calls `step(i, a, b)` for every lane of every chunk; both slices hold whole chunks.
macro_rules! lanes {
    ($a:expr, $b:expr, |$i:ident, $x:ident, $y:ident| $step:block) => {
        for (a, b) in $a.as_chunks::<LANES>().0.iter().zip($b.as_chunks::<LANES>().0) {
            for $i in 0..LANES {
                let ($x, $y): (f64, f64) = (a[$i].into(), b[$i].into());
                $step
            }
        }
    };
}

/// `sum a^2` and `sum b^2`.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma", "aarch64+neon"))]
fn norms<T: Copy + Into<f64>>(a: &[T], b: &[T]) -> (f64, f64) {
    let (mut aa, mut bb) = ([0f64; LANES], [0f64; LANES]);
    lanes!(a, b, |i, x, y| {
        aa[i] += x * x;
        bb[i] += y * y;
    });
    (aa.iter().sum(), bb.iter().sum())
}

/// `sum a b` and `sum (a - b)^2`.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma", "aarch64+neon"))]
fn products<T: Copy + Into<f64>>(a: &[T], b: &[T]) -> (f64, f64) {
    let (mut ab, mut dd) = ([0f64; LANES], [0f64; LANES]);
    lanes!(a, b, |i, x, y| {
        ab[i] += x * y;
        dd[i] += (x - y) * (x - y);
    });
    (ab.iter().sum(), dd.iter().sum())
}

/// `max |a - b|`, and how many are beyond the tolerance (counted in f64, as wide as the other lanes).
#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma", "aarch64+neon"))]
fn gaps<T: Copy + Into<f64>>(a: &[T], b: &[T], atol: f64, rtol: f64) -> (f64, u64) {
    let (mut max, mut beyond) = ([0f64; LANES], [0f64; LANES]);
    lanes!(a, b, |i, x, y| {
        let d = (x - y).abs();
        max[i] = if d > max[i] { d } else { max[i] };
        beyond[i] += if d > atol + rtol * y.abs() { 1.0 } else { 0.0 };
    });
    (max.into_iter().fold(0.0, f64::max), beyond.iter().sum::<f64>() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fast_and_the_careful_path_agree() {
        let a: Vec<f32> = (0..999).map(|i| (i as f32 * 0.7).sin()).collect();
        let b: Vec<f32> =
            a.iter().enumerate().map(|(i, x)| x + if i % 10 == 3 { i as f32 * 1e-4 } else { 0.0 }).collect();
        let (x, y) = (chunk(&a, &b, 5, 0.0, 1e-3, 1e-3), careful(&a, &b, 5, 1e-3, 1e-3));
        assert_eq!((x.max, x.max_at, x.beyond, x.non_finite), (y.max, y.max_at, y.beyond, 0));
        assert_eq!(x.max_at, 5 + 993);
        for (x, y) in [(x.aa, y.aa), (x.bb, y.bb), (x.ab, y.ab), (x.dd, y.dd)] {
            assert!((x / y - 1.0).abs() < 1e-13);
        }
    }

    #[test]
    fn nan_equals_nan_and_infinity_itself_but_nothing_else() {
        let (nan, inf) = (f32::NAN, f32::INFINITY);
        let sums = chunk(&[nan, inf, inf, nan, 1.0, 2.0], &[nan, inf, -inf, 1.0, 1.0, 2.5], 0, 0.0, 0.0, 0.0);
        assert_eq!((sums.non_finite, sums.beyond, sums.max, sums.max_at), (2, 1, 0.5, 5));
    }
}
