//! [`Moments`] of stored values in one pass over their bytes, with AVX-512.

use super::moments::Moments;
use crate::checkpoint::{
    Dtype,
    avx512::{self, LANES, Stored, StoredBf16, StoredF16, StoredF32, load, total, widen},
};
use std::arch::x86_64::*;

/// Values of one step: two vectors of f32.
const STEP: usize = 2 * LANES;

/// Of values that are all finite and fill whole steps, else `None`.
pub(super) fn moments(dtype: Dtype, bytes: &[u8]) -> Option<Moments> {
    if bytes.is_empty() || !bytes.len().is_multiple_of(STEP * dtype.bitsize() / 8) || !avx512::available() {
        return None;
    }
    // SAFETY: the processor has been asked.
    let moments = unsafe {
        match dtype {
            Dtype::F32 => of_singles(bytes),
            Dtype::F16 => of_halves::<StoredF16>(bytes),
            Dtype::BF16 => of_halves::<StoredBf16>(bytes),
            _ => return None,
        }
    };
    (moments.mean.is_finite() && moments.squares.is_finite()).then_some(moments)
}

/// Sums of distances to the first value, in f64.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,popcnt")]
fn of_singles(bytes: &[u8]) -> Moments {
    let pivot = f64::from(f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]));
    let about = _mm512_set1_pd(pivot);
    let mut min = [_mm512_set1_ps(f32::INFINITY); 2];
    let mut max = [_mm512_set1_ps(f32::NEG_INFINITY); 2];
    let (mut sums, mut squares, mut zeros) = ([_mm512_setzero_pd(); 4], [_mm512_setzero_pd(); 4], 0);
    for step in bytes.chunks_exact(STEP * StoredF32::SIZE) {
        for (v, bytes) in step.chunks_exact(LANES * StoredF32::SIZE).enumerate() {
            let x = load::<StoredF32>(bytes);
            min[v] = _mm512_min_ps(min[v], x);
            max[v] = _mm512_max_ps(max[v], x);
            zeros += u64::from(_mm512_cmp_ps_mask::<_CMP_EQ_OQ>(x, _mm512_setzero_ps()).count_ones());
            for (h, x) in widen(x).into_iter().enumerate() {
                let d = _mm512_sub_pd(x, about);
                sums[2 * v + h] = _mm512_add_pd(sums[2 * v + h], d);
                squares[2 * v + h] = _mm512_fmadd_pd(d, d, squares[2 * v + h]);
            }
        }
    }
    let (min, max) = extremes(min, max);
    let n = bytes.len() / StoredF32::SIZE;
    Moments { min, max, zeros, ..Moments::about(pivot, n, total(sums), total(squares)) }
}

/// The smallest and the largest lane of two vectors each.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,popcnt")]
fn extremes(min: [__m512; 2], max: [__m512; 2]) -> (f64, f64) {
    let min = _mm512_reduce_min_ps(_mm512_min_ps(min[0], min[1]));
    let max = _mm512_reduce_max_ps(_mm512_max_ps(max[0], max[1]));
    // Adding 0 makes 0 of -0.
    (f64::from(min) + 0.0, f64::from(max) + 0.0)
}

/// F16 and BF16 have so few bits that sums of up to 2^15 values, and of their squares, lose next to nothing in f64: no
/// pivot is needed. Extremes and zeros are found on the bits as they are stored.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,popcnt")]
fn of_halves<T: Stored>(bytes: &[u8]) -> Moments {
    let magnitude = _mm512_set1_epi16(0x7fff);
    let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
    let one = _mm512_set1_pd(1.0);
    let (mut min, mut max) = (_mm512_set1_epi16(i16::MAX), _mm512_set1_epi16(i16::MIN));
    let (mut sums, mut squares, mut zeros) = ([_mm512_setzero_pd(); 4], [_mm512_setzero_pd(); 4], 0);
    for step in bytes.as_chunks::<{ STEP * 2 }>().0 {
        // SAFETY: the chunk is as long as the vector, and the load asks for no alignment.
        let stored = unsafe { _mm512_loadu_si512(step.as_ptr().cast()) };
        let ordered = in_order(stored);
        min = _mm512_min_epi16(min, ordered);
        max = _mm512_max_epi16(max, ordered);
        zeros += u64::from(_mm512_testn_epi16_mask(stored, magnitude).count_ones());
        let vectors = if T::DTYPE == Dtype::BF16 {
            // Every other one each: their order does not matter to sums.
            let (even, odd) = (_mm512_slli_epi32::<16>(stored), _mm512_and_si512(stored, upper));
            [_mm512_castsi512_ps(even), _mm512_castsi512_ps(odd)]
        } else {
            [load::<T>(&step[..STEP]), load::<T>(&step[STEP..])]
        };
        for (v, x) in vectors.into_iter().enumerate() {
            for (h, x) in widen(x).into_iter().enumerate() {
                sums[2 * v + h] = _mm512_fmadd_pd(x, one, sums[2 * v + h]);
                squares[2 * v + h] = _mm512_fmadd_pd(x, x, squares[2 * v + h]);
            }
        }
    }
    let (min, max) = extremes(values::<T>(min), values::<T>(max));
    Moments { min, max, zeros, ..Moments::about(0.0, bytes.len() / 2, total(sums), total(squares)) }
}

/// Sign and magnitude <-> two's complement: as integers, the results are ordered as the numbers that the bits stand for.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,popcnt")]
fn in_order(halves: __m512i) -> __m512i {
    let negative = _mm512_srai_epi16::<15>(halves);
    _mm512_xor_si512(halves, _mm512_and_si512(negative, _mm512_set1_epi16(0x7fff)))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,popcnt")]
fn values<T: Stored>(ordered: __m512i) -> [__m512; 2] {
    let mut bytes = [0u8; 2 * STEP];
    // SAFETY: the array is as long as the vector, and the store asks for no alignment.
    unsafe { _mm512_storeu_si512(bytes.as_mut_ptr().cast(), in_order(ordered)) };
    [load::<T>(&bytes[..STEP]), load::<T>(&bytes[STEP..])]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::dtype;

    #[test]
    fn one_pass_over_the_bytes_does_what_decoding_first_does() {
        for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
            for (scale, offset) in [(1e-3, 0.0), (3.0, 0.0), (1.0, 100.0), (0.0, -2.5), (0.0, 0.0), (1.0, -100.0)] {
                let value = |i: i32| offset + scale * (((i * 7919) % 2001 - 1000) as f32 / 1000.0);
                let values: Vec<f32> = (0..1 << 14).map(value).collect();
                let bytes = dtype::encode_f32(dtype, &values).unwrap();
                let mut stored = vec![0.0; values.len()];
                dtype::decode_f32(dtype, &bytes, &mut stored).unwrap();
                let expected = Moments::of(&stored, 0);
                let Some(found) = moments(dtype, &bytes) else { return assert!(!avx512::available()) };
                let context = format!("{dtype:?} {scale} {offset}: {found:?}, expected {expected:?}");
                assert_eq!(
                    (found.min, found.max, found.zeros),
                    (expected.min, expected.max, expected.zeros),
                    "{context}"
                );
                assert_eq!(found.finite, expected.finite);
                assert!((found.mean - expected.mean).abs() <= 1e-14 * (scale + offset.abs()) as f64, "{context}");
                // None at all where all values are the same.
                assert!((found.squares - expected.squares).abs() <= 1e-10 * expected.squares, "{context}");
            }
        }
    }

    #[test]
    fn values_of_every_kind_are_seen_or_left_to_the_careful_way() {
        if !avx512::available() {
            return;
        }
        for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
            for place in 0..STEP {
                let with = |x: f32| {
                    let mut values = [-3.0; STEP];
                    values[place] = x;
                    moments(dtype, &dtype::encode_f32(dtype, &values).unwrap())
                };
                for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    assert_eq!(with(bad), None);
                }
                let (zero, low, high) = (with(-0.0).unwrap(), with(-4.0).unwrap(), with(6e-8).unwrap());
                assert_eq!((zero.min, zero.max, zero.zeros), (-3.0, 0.0, 1));
                assert_eq!((low.min, low.max), (-4.0, -3.0));
                // The smallest of f16 (next to the smallest, in the others) is no zero.
                assert!(high.max > 0.0 && high.zeros == 0);
            }
            assert_eq!(moments(dtype, &[0; STEP * 4 + 2]), None);
        }
    }
}
