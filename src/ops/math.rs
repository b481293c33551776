//! Elementary functions as branch-free arithmetic, so that the compiler can vectorise the loops that call them.

/// `e^x`, within 2 units in the last place; 0 below -87.3 (no subnormal results), capped near the largest f32 above 88.3.
///
/// Cephes: `x = n ln 2 + r`, `|r| <= ln 2 / 2`, a degree-5 polynomial in r, and n put into the exponent field.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 · 2^23: adding it leaves the nearest integer in the low bits
    let clamped = x.clamp(-87.3, 88.3);
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = clamped - n * 0.693_359_4 - n * -2.121_944_4e-4;
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let y = p * (r * r) + r + 1.0;
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0f32.to_bits()));
    let y = y * power;
    if x < -87.3 { 0.0 } else { y }
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// Lanes of [`sum_by`] and [`max`]: enough for two AVX-512 registers.
const LANES: usize = 32;

/// `sum f(x, y)` over two slices of one length, in f32 over blocks of 1024 and f64 between them: the order, and so the
/// result, depends on the length alone.
#[inline(always)]
pub fn sum_by(x: &[f32], y: &[f32], f: impl Fn(f32, f32) -> f32) -> f64 {
    debug_assert_eq!(x.len(), y.len());
    let mut total = 0.0;
    for (x, y) in x.chunks(1024).zip(y.chunks(1024)) {
        let (xs, ys) = (x.as_chunks::<LANES>(), y.as_chunks::<LANES>());
        let mut lanes = [0f32; LANES];
        for (x, y) in xs.0.iter().zip(ys.0) {
            for i in 0..LANES {
                lanes[i] += f(x[i], y[i]);
            }
        }
        for (lane, (x, y)) in lanes.iter_mut().zip(xs.1.iter().zip(ys.1)) {
            *lane += f(*x, *y);
        }
        total += lanes.iter().map(|&x| f64::from(x)).sum::<f64>();
    }
    total
}

/// `x = e^(x - shift)`, and the sum of the results, in the order of [`sum_by`].
#[inline(always)]
pub fn replace_by_exp(x: &mut [f32], shift: f32) -> f64 {
    let mut total = 0.0;
    for x in x.chunks_mut(1024) {
        let (chunks, rest) = x.as_chunks_mut::<LANES>();
        let mut lanes = [0f32; LANES];
        for chunk in chunks {
            for i in 0..LANES {
                chunk[i] = exp(chunk[i] - shift);
                lanes[i] += chunk[i];
            }
        }
        for (lane, x) in lanes.iter_mut().zip(rest) {
            *x = exp(*x - shift);
            *lane += *x;
        }
        total += lanes.iter().map(|&x| f64::from(x)).sum::<f64>();
    }
    total
}

/// The largest element; NaN elements are passed over.
#[inline(always)]
pub fn max(x: &[f32]) -> f32 {
    let (chunks, rest) = x.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] = if chunk[i] > lanes[i] { chunk[i] } else { lanes[i] };
        }
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |m, &x| if x > m { x } else { m })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        let mut worst = 0.0f64;
        for i in 0..2_000_000 {
            let x = -87.3 + 175.6 * (i as f32 / 2e6);
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) - exact).abs() / exact);
        }
        assert!(worst < 2.0 * f64::from(f32::EPSILON), "{worst:e}");
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1e30), 0.0);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn sums_and_maxima_see_every_element() {
        for len in [0usize, 1, 31, 32, 33, 1023, 1024, 1025, 5000] {
            let x: Vec<f32> = (0..len).map(|i| i as f32).collect();
            assert_eq!(sum_by(&x, &x, |x, _| x), (len * len.saturating_sub(1) / 2) as f64, "{len}");
            for at in [0, len / 2, len.saturating_sub(1)] {
                if at < len {
                    let mut x = vec![-5.0; len];
                    x[at] = 3.0;
                    assert_eq!(max(&x), 3.0, "{len} {at}");
                }
            }
        }
    }
}
