//! The inner loops of a merge, over one chunk in the first-level cache, vectorised for the processor at hand.

use super::apply::Sums;
use crate::delta::Real;

/// Independent partial sums, so that the compiler may use vectors.
const LANES: usize = 16;

/// `out = weight + delta`.
#[multiversion::multiversion(targets("x86_64+avx2+fma", "aarch64+neon"))]
pub(super) fn add<T: Real>(weight: &[T], delta: &[T], out: &mut [T]) {
    for ((o, &w), &d) in out.iter_mut().zip(weight).zip(delta) {
        *o = w + d;
    }
}

/// The sums over one chunk of the delta `d`, the weight `w` and the stored result `q`; and whether all `w` and `q` are
/// finite. Partial sums are kept in T: a chunk is too short for their error to matter.
#[multiversion::multiversion(targets("x86_64+avx2+fma", "aarch64+neon"))]
pub(super) fn measure<T: Real>(delta: &[T], weight: &[T], stored: &[T]) -> (Sums, bool) {
    let zero = || [T::zero(); LANES];
    // x * 0 is 0 for finite x, else NaN; it stays NaN in the sum.
    let (mut dd, mut dq, mut ee, mut spoilt) = (zero(), zero(), zero(), zero());
    let mut lane = |i: usize, d: T, w: T, q: T| {
        let change = q - w;
        let error = change - d;
        dd[i] = dd[i] + d * d;
        dq[i] = dq[i] + d * change;
        ee[i] = ee[i] + error * error;
        spoilt[i] = spoilt[i] + change * T::zero();
    };
    let ((d, d_rest), (w, w_rest), (q, q_rest)) =
        (delta.as_chunks::<LANES>(), weight.as_chunks::<LANES>(), stored.as_chunks::<LANES>());
    for ((d, w), q) in d.iter().zip(w).zip(q) {
        for i in 0..LANES {
            lane(i, d[i], w[i], q[i]);
        }
    }
    for (i, ((&d, &w), &q)) in d_rest.iter().zip(w_rest).zip(q_rest).enumerate() {
        lane(i, d, w, q);
    }
    let total = |lanes: [T; LANES]| lanes.iter().map(|x| x.to_f64()).sum::<f64>();
    (Sums { delta: total(dd), kept: total(dq), error: total(ee) }, total(spoilt) == 0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sums_are_those_of_the_definition() {
        let n = 100;
        let weight: Vec<f32> = (0..n).map(|i| i as f32).collect();
        let delta = vec![0.5f32; n];
        let stored: Vec<f32> = weight.iter().enumerate().map(|(i, w)| if i < 40 { w + 1.0 } else { *w }).collect();
        let (sums, finite) = measure(&delta, &weight, &stored);
        assert_eq!(sums, Sums { delta: 25.0, kept: 20.0, error: 25.0 });
        assert!(finite);
        for bad in [f32::NAN, f32::INFINITY] {
            let mut spoilt = stored.clone();
            spoilt[99] = bad;
            assert!(!measure(&delta, &weight, &spoilt).1);
            assert!(!measure(&delta, &spoilt, &stored).1);
        }
    }
}
