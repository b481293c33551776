//! [`Sums`] over stored values in one pass over their bytes, with AVX-512.

use super::sums::{Sums, Tolerance};
use crate::checkpoint::{
    Dtype,
    avx512::{self, LANES, Stored, StoredBf16, StoredF16, StoredF32, load, total, widen},
};
use std::arch::x86_64::*;

/// Vectors of f32 on each side that one step takes: enough sums in flight to hide how long an addition takes.
const VECTORS: usize = 2;

/// Of values that are all finite and fill whole steps, else `None`.
pub(super) fn sums(sides: [(Dtype, &[u8]); 2], tolerance: Tolerance) -> Option<Sums> {
    let [(a, x), (b, y)] = sides;
    if x.is_empty() || !x.len().is_multiple_of(VECTORS * LANES * a.bitsize() / 8) || !avx512::available() {
        return None;
    }
    macro_rules! of {
        ($($dtype_a:ident $stored_a:ident, $dtype_b:ident $stored_b:ident;)*) => {
            match (a, b) {
                // SAFETY: the processor has been asked.
                $((Dtype::$dtype_a, Dtype::$dtype_b) => unsafe { of::<$stored_a, $stored_b>(x, y, tolerance) },)*
                _ => return None,
            }
        };
    }
    let sums = of! {
        F32 StoredF32, F32 StoredF32;
        F16 StoredF16, F16 StoredF16;
        BF16 StoredBf16, BF16 StoredBf16;
        F32 StoredF32, BF16 StoredBf16;
        BF16 StoredBf16, F32 StoredF32;
        F32 StoredF32, F16 StoredF16;
        F16 StoredF16, F32 StoredF32;
    };
    (sums.aa.is_finite() && sums.bb.is_finite()).then_some(sums)
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,popcnt")]
fn of<A: Stored, B: Stored>(a: &[u8], b: &[u8], tolerance: Tolerance) -> Sums {
    let exact = tolerance.atol == 0.0 && tolerance.rtol == 0.0;
    let (atol, rtol) = (_mm512_set1_pd(tolerance.atol), _mm512_set1_pd(tolerance.rtol));
    let zero = [_mm512_setzero_pd(); 2 * VECTORS];
    let (mut aa, mut bb, mut ab, mut dd, mut max) = (zero, zero, zero, zero, zero);
    let (mut beyond, mut unlike) = (0, _mm512_setzero_si512());
    let steps = a.chunks_exact(VECTORS * LANES * A::SIZE).zip(b.chunks_exact(VECTORS * LANES * B::SIZE));
    for (a, b) in steps {
        let vectors = a.chunks_exact(LANES * A::SIZE).zip(b.chunks_exact(LANES * B::SIZE));
        for (v, (a, b)) in vectors.enumerate() {
            let (x, y) = (load::<A>(a), load::<B>(b));
            if A::DTYPE == B::DTYPE {
                unlike = _mm512_or_si512(unlike, _mm512_xor_si512(_mm512_castps_si512(x), _mm512_castps_si512(y)));
            }
            if exact {
                beyond += u64::from(_mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(x, y).count_ones());
            }
            for (h, (x, y)) in widen(x).into_iter().zip(widen(y)).enumerate() {
                let (i, d) = (2 * v + h, _mm512_sub_pd(x, y));
                aa[i] = _mm512_fmadd_pd(x, x, aa[i]);
                bb[i] = _mm512_fmadd_pd(y, y, bb[i]);
                ab[i] = _mm512_fmadd_pd(x, y, ab[i]);
                dd[i] = _mm512_fmadd_pd(d, d, dd[i]);
                max[i] = _mm512_max_pd(max[i], _mm512_abs_pd(d));
                if !exact {
                    let allowed = _mm512_add_pd(atol, _mm512_mul_pd(rtol, _mm512_abs_pd(y)));
                    beyond += u64::from(_mm512_cmp_pd_mask::<_CMP_GT_OQ>(_mm512_abs_pd(d), allowed).count_ones());
                }
            }
        }
    }
    let max = _mm512_max_pd(_mm512_max_pd(max[0], max[1]), _mm512_max_pd(max[2], max[3]));
    Sums {
        max: _mm512_reduce_max_pd(max),
        aa: total(aa),
        bb: total(bb),
        ab: total(ab),
        dd: total(dd),
        beyond,
        unlike: A::DTYPE != B::DTYPE || _mm512_test_epi32_mask(unlike, unlike) != 0,
        ..Sums::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{checkpoint::dtype, diff::sums::chunk};

    const TYPES: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::BF16];

    #[test]
    fn one_pass_over_the_bytes_does_what_decoding_first_does() {
        let a: Vec<f32> = (0..4096).map(|i| (i as f32 * 0.7).sin()).collect();
        for gap in [0.0, 1e-3, 1e-30, 0.3] {
            let b: Vec<f32> =
                a.iter().enumerate().map(|(i, x)| x + if i % 10 == 3 { i as f32 * gap } else { 0.0 }).collect();
            for (from, to) in TYPES.into_iter().flat_map(|a| TYPES.map(|b| (a, b))) {
                let (x, y) = (dtype::encode_f32(from, &a).unwrap(), dtype::encode_f32(to, &b).unwrap());
                let (mut kept_a, mut kept_b) = (vec![0.0; 4096], vec![0.0; 4096]);
                dtype::decode_f32(from, &x, &mut kept_a).unwrap();
                dtype::decode_f32(to, &y, &mut kept_b).unwrap();
                for (atol, rtol) in [(0.0, 0.0), (1e-2, 0.0), (0.0, 1e-2)] {
                    let tolerance = Tolerance { atol, rtol };
                    let Some(found) = sums([(from, &x), (to, &y)], tolerance) else {
                        assert!(!avx512::available() || from != to);
                        continue;
                    };
                    let expected = chunk(&kept_a, &kept_b, 0, tolerance);
                    assert_eq!((found.max, found.beyond), (expected.max, expected.beyond), "{from:?} {to:?} {gap}");
                    assert_eq!(found.unlike, (from, &x) != (to, &y), "{from:?} {to:?} {gap}");
                    let pairs = [(found.aa, expected.aa), (found.bb, expected.bb), (found.ab, expected.ab)];
                    for (x, y) in pairs.into_iter().chain([(found.dd, expected.dd)]) {
                        assert!((x - y).abs() <= 1e-13 * y.abs(), "{from:?} {to:?} {gap}: {x}, expected {y}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_difference_that_vanishes_when_squared_in_f32_does_not_vanish() {
        let (mut a, mut b) = (vec![0f32; 32], vec![0f32; 32]);
        (a[5], b[5]) = (1e-30, 2e-30);
        let bytes = |x: &[f32]| dtype::encode_f32(Dtype::BF16, x).unwrap().into_owned();
        let (a, b) = (bytes(&a), bytes(&b));
        let none = Tolerance { atol: 0.0, rtol: 0.0 };
        let Some(found) = sums([(Dtype::BF16, &a), (Dtype::BF16, &b)], none) else { return };
        assert!(found.dd > 0.9e-60 && found.max > 0.9e-30 && found.beyond == 1 && found.unlike);
    }

    #[test]
    fn what_is_not_finite_or_fills_no_step_is_left_to_the_careful_way() {
        let none = Tolerance { atol: 0.0, rtol: 0.0 };
        for dtype in TYPES {
            let good = dtype::encode_f32(dtype, &[1.0; 32]).unwrap();
            for bad in [f32::NAN, f32::INFINITY] {
                let mut values = [1.0; 32];
                values[31] = bad;
                let bad = dtype::encode_f32(dtype, &values).unwrap();
                assert!(sums([(dtype, &good), (dtype, &bad)], none).is_none());
                assert!(sums([(dtype, &bad), (dtype, &good)], none).is_none());
            }
            let half = &good[..good.len() / 2];
            assert!(sums([(dtype, half), (dtype, half)], none).is_none());
        }
    }
}
