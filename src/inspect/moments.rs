//! Sums over values from which their statistics follow, combined piece by piece.

/// Sums of some elements, which combine in order.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Moments {
    pub min: f64,
    pub max: f64,
    pub finite: u64,
    pub mean: f64,
    /// Sum of squared distances to the mean.
    pub squares: f64,
    pub zeros: u64,
    pub nan: u64,
    pub inf: u64,
    pub first_non_finite: Option<usize>,
}

impl Default for Moments {
    fn default() -> Self {
        Moments {
            min: f64::INFINITY,
            max: f64::NEG_INFINITY,
            finite: 0,
            mean: 0.0,
            squares: 0.0,
            zeros: 0,
            nan: 0,
            inf: 0,
            first_non_finite: None,
        }
    }
}

impl Moments {
    /// Of a few thousand values, the first of which has the flat index `first`.
    pub(super) fn of<T: Value>(values: &[T], first: usize) -> Moments {
        let fast = Moments::of_finite(values);
        if fast.mean.is_finite() && fast.squares.is_finite() {
            return fast;
        }
        let is_finite = |v: &T| (*v).into().is_finite();
        let finite: Vec<T> = values.iter().copied().filter(is_finite).collect();
        let nan = values.iter().filter(|v| (**v).into().is_nan()).count() as u64;
        Moments {
            nan,
            inf: (values.len() - finite.len()) as u64 - nan,
            first_non_finite: values.iter().position(|v| !is_finite(v)).map(|i| first + i),
            ..Moments::of_finite(&finite)
        }
    }

    /// Sums of distances to the first value: values that lie close together far from zero keep all their digits.
    fn of_finite<T: Value>(values: &[T]) -> Moments {
        let Some(&pivot) = values.first() else { return Moments::default() };
        let pivot = pivot.into();
        let (min, max, zeros) = extremes(values);
        let (sum, squares) = sums_about(values, pivot);
        Moments { min, max, zeros, ..Moments::about(pivot, values.len(), sum, squares) }
    }

    /// Mean and squares from the sums of `x - pivot` and of its square over `n` values.
    pub(super) fn about(pivot: f64, n: usize, sum: f64, squares: f64) -> Moments {
        let about_mean = squares - sum * sum / n as f64;
        Moments {
            finite: n as u64,
            mean: pivot + sum / n as f64,
            squares: about_mean.max(if squares.is_nan() { f64::NAN } else { 0.0 }),
            ..Moments::default()
        }
    }

    /// The rule of Chan, Golub and LeVeque (1983) for means and sums of squares.
    pub(super) fn and(self, b: Moments) -> Moments {
        let n = self.finite + b.finite;
        let (share, gap) = (b.finite as f64 / n.max(1) as f64, b.mean - self.mean);
        Moments {
            min: self.min.min(b.min),
            max: self.max.max(b.max),
            finite: n,
            mean: self.mean + gap * share,
            squares: self.squares + b.squares + gap * gap * self.finite as f64 * share,
            zeros: self.zeros + b.zeros,
            nan: self.nan + b.nan,
            inf: self.inf + b.inf,
            first_non_finite: self.first_non_finite.or(b.first_non_finite),
        }
    }
}

/// f32 (holds every F16 and BF16) and f64.
pub(super) trait Value: Copy + PartialOrd + Into<f64> + Default {}

impl Value for f32 {}

impl Value for f64 {}

/// Independent partial sums. The compiler turns loops over this many lanes and few accumulators into vectors; with 16
/// lanes, or with all sums in one loop, it unrolls them into scalar code at the highest optimisation level.
const LANES: usize = 32;

/// Smallest, largest, and how many are 0. `values` is not empty.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma", "aarch64+neon"))]
fn extremes<T: Value>(values: &[T]) -> (f64, f64, u64) {
    let (mut min, mut max, mut zeros) = ([values[0]; LANES], [values[0]; LANES], [0u32; LANES]);
    let (chunks, rest) = values.as_chunks::<LANES>();
    for x in chunks {
        for i in 0..LANES {
            min[i] = if x[i] < min[i] { x[i] } else { min[i] };
            max[i] = if x[i] > max[i] { x[i] } else { max[i] };
            zeros[i] = zeros[i].wrapping_add(u32::from(x[i] == T::default()));
        }
    }
    let ends = min.iter().chain(&max).chain(rest).map(|&x| x.into());
    let (low, high) = ends.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), x: f64| (l.min(x), h.max(x)));
    let rest = rest.iter().filter(|&&x| x == T::default()).count() as u64;
    (low, high, zeros.iter().map(|&n| u64::from(n)).sum::<u64>() + rest)
}

/// Sums of `x - pivot` and of its square.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma", "aarch64+neon"))]
fn sums_about<T: Value>(values: &[T], pivot: f64) -> (f64, f64) {
    let (mut sum, mut squares) = ([0f64; LANES], [0f64; LANES]);
    let (chunks, rest) = values.as_chunks::<LANES>();
    for x in chunks {
        for i in 0..LANES {
            let d = x[i].into() - pivot;
            sum[i] += d;
            squares[i] += d * d;
        }
    }
    let rest = || rest.iter().map(|&x| x.into() - pivot);
    (sum.into_iter().chain(rest()).sum(), squares.into_iter().chain(rest().map(|d| d * d)).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_combine_to_the_moments_of_the_whole() {
        let values: Vec<f64> = (0..1000).map(|i| f64::from(i % 37) - 5.0).collect();
        let whole = Moments::of(&values, 0);
        let parts = values.chunks(111).fold(Moments::default(), |all, part| all.and(Moments::of(part, 0)));
        let mean = values.iter().sum::<f64>() / 1000.0;
        let squares: f64 = values.iter().map(|x| (x - mean).powi(2)).sum();
        for m in [&whole, &parts] {
            assert!((m.mean - mean).abs() < 1e-12 && (m.squares / squares - 1.0).abs() < 1e-12);
            assert_eq!((m.min, m.max, m.zeros, m.finite), (-5.0, 31.0, 27, 1000));
        }
    }

    #[test]
    fn values_far_from_zero_keep_their_spread() {
        let values: Vec<f32> = (0..999).map(|i| 4096.0 + (i % 3) as f32 / 1024.0).collect();
        let m = Moments::of(&values, 0);
        assert!((m.squares / 999.0 - 2.0 / 3.0 / 1024f64.powi(2)).abs() < 1e-15);
    }

    #[test]
    fn values_that_are_not_finite_are_counted_and_left_out() {
        for first in [1.0, f32::NAN] {
            let m = Moments::of(&[first, f32::NAN, 3.0, f32::NEG_INFINITY, 1.0], 10);
            let nan = if first.is_nan() { 2 } else { 1 };
            assert_eq!((m.nan, m.inf, m.first_non_finite), (nan, 1, Some(12 - nan as usize)));
            assert_eq!((m.finite, m.min, m.max), (4 - nan, 1.0, 3.0));
        }
        let nothing = Moments::of(&[f32::INFINITY; 3], 0);
        assert_eq!((nothing.finite, nothing.inf, nothing.mean), (0, 3, 0.0));
    }

    #[test]
    fn huge_values_are_finite() {
        let m = Moments::of(&[f32::MAX, -f32::MAX], 0);
        assert_eq!((m.finite, m.inf, m.mean), (2, 0, 0.0));
    }
}
