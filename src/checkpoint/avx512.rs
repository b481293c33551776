//! Loads of stored values into AVX-512 registers as f64, for loops that keep several sums in one pass over the bytes, which
//! the compiler does not vectorise by itself.

use super::Dtype;
use std::arch::x86_64::*;

/// Values that [`load`] takes.
pub const LANES: usize = 16;

/// Whether the processor has what the functions here need: AVX-512 F, BW, DQ and VL, and POPCNT.
pub fn available() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("popcnt")
}

/// A type of stored values that fit f32.
pub trait Stored {
    /// F32, F16 or BF16.
    const DTYPE: Dtype;
    /// Bytes of one value.
    const SIZE: usize;
}

/// F32
pub struct StoredF32;

/// F16
pub struct StoredF16;

/// BF16
pub struct StoredBf16;

impl Stored for StoredF32 {
    const DTYPE: Dtype = Dtype::F32;
    const SIZE: usize = 4;
}

impl Stored for StoredF16 {
    const DTYPE: Dtype = Dtype::F16;
    const SIZE: usize = 2;
}

impl Stored for StoredBf16 {
    const DTYPE: Dtype = Dtype::BF16;
    const SIZE: usize = 2;
}

/// Sixteen values in their order. `bytes` holds them all.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,popcnt")]
pub fn load<T: Stored>(bytes: &[u8]) -> __m512 {
    assert!(bytes.len() >= LANES * T::SIZE);
    let from = bytes.as_ptr();
    // SAFETY: none of the loads asks for alignment, and none reads beyond the length just checked.
    unsafe {
        match T::DTYPE {
            Dtype::F32 => _mm512_loadu_ps(from.cast()),
            Dtype::F16 => _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())),
            _ => {
                let upper = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(upper))
            }
        }
    }
}

/// Exactly the same values as two vectors of f64.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,popcnt")]
pub fn widen(x: __m512) -> [__m512d; 2] {
    [_mm512_cvtps_pd(_mm512_castps512_ps256(x)), _mm512_cvtps_pd(_mm512_extractf32x8_ps::<1>(x))]
}

/// The sum of all lanes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,popcnt")]
pub fn total<const N: usize>(sums: [__m512d; N]) -> f64 {
    let mut all = 0.0;
    for sum in sums {
        all += _mm512_reduce_add_pd(sum);
    }
    all
}
