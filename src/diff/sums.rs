//! Sums over two runs of values from which their difference follows.

/// Two values are equal if `|a - b| <= atol + rtol * |b|`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tolerance {
    pub atol: f64,
    pub rtol: f64,
}

impl Tolerance {
    #[inline(always)]
    fn at(self, b: f64) -> f64 {
        self.atol + self.rtol * b.abs()
    }
}

/// Sums over elements.
#[derive(Clone, Debug, Default)]
pub(super) struct Sums {
    /// `max |a - b|` of finite values.
    pub max: f64,
    /// The flat index that the run with the maximum begins at.
    pub max_in: usize,
    /// `sum a^2`
    pub aa: f64,
    /// `sum b^2`
    pub bb: f64,
    /// `sum a b`
    pub ab: f64,
    /// `sum (a - b)^2`
    pub dd: f64,
    /// How many are off by more than the tolerance.
    pub beyond: u64,
    /// Where exactly one side is finite, or both are not and disagree.
    pub non_finite: u64,
    /// Whether the bytes or the types differ.
    pub unlike: bool,
}

impl Sums {
    pub(super) fn add(&mut self, other: Sums) {
        if other.max > self.max {
            (self.max, self.max_in) = (other.max, other.max_in);
        }
        self.aa += other.aa;
        self.bb += other.bb;
        self.ab += other.ab;
        self.dd += other.dd;
        self.beyond += other.beyond;
        self.non_finite += other.non_finite;
        self.unlike |= other.unlike;
    }
}

/// Of two runs of values, the first of which has the flat index `first`.
pub(super) fn chunk<T: Copy + Into<f64>>(a: &[T], b: &[T], first: usize, tolerance: Tolerance) -> Sums {
    let fast = fast(a, b, tolerance);
    let finite = fast.aa.is_finite() && fast.bb.is_finite();
    Sums { max_in: first, ..if finite { fast } else { careful(a, b, tolerance) } }
}

fn careful<T: Copy + Into<f64>>(a: &[T], b: &[T], tolerance: Tolerance) -> Sums {
    let mut sums = Sums::default();
    for (&a, &b) in a.iter().zip(b) {
        let (a, b) = (a.into(), b.into());
        if !(a.is_finite() && b.is_finite()) {
            sums.non_finite += u64::from(!(a == b || a.is_nan() && b.is_nan()));
            continue;
        }
        let d = (a - b).abs();
        let beyond = u64::from(d > tolerance.at(b));
        sums.add(Sums { max: d, aa: a * a, bb: b * b, ab: a * b, dd: d * d, beyond, ..Sums::default() });
    }
    sums
}

/// The sums of values that are all finite (others show as sums that are not), without the place of the maximum.
fn fast<T: Copy + Into<f64>>(a: &[T], b: &[T], tolerance: Tolerance) -> Sums {
    let whole = a.len() - a.len() % LANES;
    let ((aa, bb), (ab, dd)) = (norms(&a[..whole], &b[..whole]), products(&a[..whole], &b[..whole]));
    let (max, beyond) = gaps(&a[..whole], &b[..whole], tolerance);
    let mut sums = Sums { max, aa, bb, ab, dd, beyond, ..Sums::default() };
    sums.add(careful(&a[whole..], &b[whole..], tolerance));
    if sums.non_finite > 0 {
        sums.aa = f64::NAN;
    }
    sums
}

/// Independent partial sums. The compiler turns loops over this many lanes and few accumulators into vectors; with 16
/// lanes, or with all sums in one loop, it unrolls them into scalar code at the highest optimisation level.
const LANES: usize = 32;

/// Calls `step(i, a, b)` for every lane of every chunk; both slices hold whole chunks.
macro_rules! for_each_lane {
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
    for_each_lane!(a, b, |i, x, y| {
        aa[i] += x * x;
        bb[i] += y * y;
    });
    (aa.iter().sum(), bb.iter().sum())
}

/// `sum a b` and `sum (a - b)^2`.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma", "aarch64+neon"))]
fn products<T: Copy + Into<f64>>(a: &[T], b: &[T]) -> (f64, f64) {
    let (mut ab, mut dd) = ([0f64; LANES], [0f64; LANES]);
    for_each_lane!(a, b, |i, x, y| {
        ab[i] += x * y;
        dd[i] += (x - y) * (x - y);
    });
    (ab.iter().sum(), dd.iter().sum())
}

/// `max |a - b|`, and how many are beyond the tolerance (counted in f64, as wide as the other lanes).
#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma", "aarch64+neon"))]
fn gaps<T: Copy + Into<f64>>(a: &[T], b: &[T], tolerance: Tolerance) -> (f64, u64) {
    let (mut max, mut beyond) = ([0f64; LANES], [0f64; LANES]);
    for_each_lane!(a, b, |i, x, y| {
        let d = (x - y).abs();
        max[i] = if d > max[i] { d } else { max[i] };
        beyond[i] += if d > tolerance.at(y) { 1.0 } else { 0.0 };
    });
    (max.into_iter().fold(0.0, f64::max), beyond.iter().sum::<f64>() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    const WIDE: Tolerance = Tolerance { atol: 1e-3, rtol: 1e-3 };

    #[test]
    fn the_fast_and_the_careful_path_agree() {
        let a: Vec<f32> = (0..999).map(|i| (i as f32 * 0.7).sin()).collect();
        let b: Vec<f32> =
            a.iter().enumerate().map(|(i, x)| x + if i % 10 == 3 { i as f32 * 1e-4 } else { 0.0 }).collect();
        let (x, y) = (chunk(&a, &b, 5, WIDE), careful(&a, &b, WIDE));
        assert_eq!((x.max, x.max_in, x.beyond, x.non_finite), (y.max, 5, y.beyond, 0));
        for (x, y) in [(x.aa, y.aa), (x.bb, y.bb), (x.ab, y.ab), (x.dd, y.dd)] {
            assert!((x / y - 1.0).abs() < 1e-13);
        }
    }

    #[test]
    fn nan_equals_nan_and_infinity_itself_but_nothing_else() {
        let (nan, inf) = (f32::NAN, f32::INFINITY);
        let none = Tolerance { atol: 0.0, rtol: 0.0 };
        let sums = chunk(&[nan, inf, inf, nan, 1.0, 2.0], &[nan, inf, -inf, 1.0, 1.0, 2.5], 0, none);
        assert_eq!((sums.non_finite, sums.beyond, sums.max), (2, 1, 0.5));
    }
}
