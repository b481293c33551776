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

/// What decoding, [`add`], rounding and [`measure`] do, in one pass, for bf16 weights that stay bf16: stores
/// `round(weight + delta)`. Two bytes per number leave the cache instead of fourteen.
#[multiversion::multiversion(targets("x86_64+avx2+fma", "aarch64+neon"))]
pub(super) fn merge_bf16(weight: &[u8], delta: &[f32], stored: &mut [u8]) -> (Sums, bool) {
    let (mut dd, mut dq, mut ee, mut spoilt) = ([0f32; LANES], [0f32; LANES], [0f32; LANES], [0f32; LANES]);
    let mut lane = |i: usize, weight: [u8; 2], d: f32| {
        let w = f32::from_bits(u32::from(u16::from_le_bytes(weight)) << 16);
        let bits = (w + d).to_bits();
        // To nearest, ties to even. A NaN may come out as anything: `spoilt` has seen it.
        let half = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        let change = f32::from_bits(half << 16) - w;
        let error = change - d;
        dd[i] += d * d;
        dq[i] += d * change;
        ee[i] += error * error;
        spoilt[i] += change * 0.0 + (w + d) * 0.0;
        (half as u16).to_le_bytes()
    };
    let (w, w_rest) = weight.as_chunks::<2>().0.as_chunks::<LANES>();
    let (d, d_rest) = delta.as_chunks::<LANES>();
    let (q, q_rest) = stored.as_chunks_mut::<2>().0.as_chunks_mut::<LANES>();
    for ((w, d), q) in w.iter().zip(d).zip(q) {
        for i in 0..LANES {
            q[i] = lane(i, w[i], d[i]);
        }
    }
    for (i, ((w, d), q)) in w_rest.iter().zip(d_rest).zip(q_rest).enumerate() {
        *q = lane(i, *w, *d);
    }
    let total = |lanes: [f32; LANES]| lanes.iter().map(|x| f64::from(*x)).sum::<f64>();
    (Sums { delta: total(dd), kept: total(dq), error: total(ee) }, total(spoilt) == 0.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Dtype;

    #[test]
    fn one_pass_over_bf16_does_what_the_single_steps_do() {
        let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        let mut weight = vec![0f32; 1 << 16];
        f32::decode(Dtype::BF16, &bytes, &mut weight).unwrap();
        for scale in [0.0, 1e-3, 0.4, 3e38] {
            let delta: Vec<f32> = (0..1 << 16).map(|i| scale * ((i * 7919 % 2001) as f32 / 1000.0 - 1.0)).collect();
            for first in (0..1 << 16).step_by(21) {
                let range = first..(first + 21).min(1 << 16);
                let (w, d) = (&weight[range.clone()], &delta[range.clone()]);
                let (mut sum, mut stored, mut kept) = (vec![0.0; w.len()], vec![0; 2 * w.len()], vec![0.0; w.len()]);
                add(w, d, &mut sum);
                f32::encode(Dtype::BF16, &sum, &mut stored).unwrap();
                f32::decode(Dtype::BF16, &stored, &mut kept).unwrap();
                let expected = measure(d, w, &kept);
                let mut fused = vec![0; 2 * w.len()];
                let found = merge_bf16(&bytes[2 * range.start..2 * range.end], d, &mut fused);
                assert_eq!(found.1, expected.1, "{range:?} {scale}");
                if found.1 {
                    assert_eq!((found, fused), (expected, stored), "{range:?} {scale}");
                }
            }
        }
    }

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
