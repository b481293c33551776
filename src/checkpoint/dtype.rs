//! Stored bytes <-> numbers: F64, F32, F16, BF16 (little endian), and how rounding is done.

use crate::error::{Error, Result};
use half::{bf16, f16, slice::HalfFloatSliceExt};
pub use safetensors::Dtype;
use std::borrow::Cow;

/// Bytes of one element. Sub-byte types (packed floats) have none and are refused when a file is opened.
pub fn size_of(dtype: Dtype) -> Option<usize> {
    let bits = dtype.bitsize();
    bits.is_multiple_of(8).then_some(bits / 8)
}

/// Whether [`decode_f32`], [`decode_f64`] and [`encode_f32`] know this type.
pub fn is_float(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16)
}

/// Parses `f32`, `float32`, `bf16`, `bfloat16`, ... as used on the command line and in `config.json`.
pub fn parse_float(name: &str) -> Option<Dtype> {
    match name.trim_start_matches("torch.").to_ascii_lowercase().as_str() {
        "f64" | "float64" | "double" => Some(Dtype::F64),
        "f32" | "float32" | "float" => Some(Dtype::F32),
        "f16" | "float16" | "half" => Some(Dtype::F16),
        "bf16" | "bfloat16" => Some(Dtype::BF16),
        _ => None,
    }
}

/// The name `torch` and `config.json` use: `float32`, `bfloat16`, ...
pub fn torch_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F64 => "float64",
        Dtype::F32 => "float32",
        Dtype::F16 => "float16",
        Dtype::BF16 => "bfloat16",
        _ => "unknown",
    }
}

/// Distance from `|x|` to the next larger number of the stored type (the unit in the last place at `x`).
/// Subnormal numbers share the smallest unit. `x` must be finite.
pub fn ulp(dtype: Dtype, x: f64) -> f64 {
    // Significand bits (with the hidden one) and the exponent of the smallest normal number.
    let (bits, min_exponent) = match dtype {
        Dtype::F64 => (53, -1022),
        Dtype::F32 => (24, -126),
        Dtype::F16 => (11, -14),
        Dtype::BF16 => (8, -126),
        _ => return 0.0,
    };
    let exponent = if x == 0.0 { min_exponent } else { exponent(x).max(min_exponent) };
    f64::powi(2.0, exponent - (bits - 1))
}

/// `floor(log2(|x|))` for finite non-zero `x`, exact.
fn exponent(x: f64) -> i32 {
    let field = ((x.to_bits() >> 52) & 0x7ff) as i32;
    if field == 0 { exponent(x * f64::powi(2.0, 64)) - 64 } else { field - 1023 }
}

fn unsupported(dtype: Dtype) -> Error {
    Error::request(format!("cannot read {dtype:?} as floating point")).help("supported: F64, F32, F16, BF16")
}

/// Decodes little-endian bytes into `out`; F64 is rounded to nearest. `bytes` must hold `out.len()` elements.
pub fn decode_f32(dtype: Dtype, bytes: &[u8], out: &mut [f32]) -> Result<()> {
    match dtype {
        Dtype::F32 => bytemuck::cast_slice_mut::<f32, u8>(out).copy_from_slice(bytes),
        Dtype::BF16 => decode_bf16(bytes, out),
        Dtype::F16 => match bytemuck::try_cast_slice::<u8, f16>(bytes) {
            Ok(halves) => halves.convert_to_f32_slice(out),
            Err(_) => {
                for (o, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *o = f16::from_le_bytes(*b).to_f32();
                }
            }
        },
        Dtype::F64 => {
            for (o, b) in out.iter_mut().zip(bytes.as_chunks::<8>().0) {
                *o = f64::from_le_bytes(*b) as f32;
            }
        }
        _ => return Err(unsupported(dtype)),
    }
    Ok(())
}

/// Decodes little-endian bytes into `out`, exactly. `bytes` must hold `out.len()` elements.
pub fn decode_f64(dtype: Dtype, bytes: &[u8], out: &mut [f64]) -> Result<()> {
    match dtype {
        Dtype::F64 => bytemuck::cast_slice_mut::<f64, u8>(out).copy_from_slice(bytes),
        Dtype::F32 => {
            for (o, b) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *o = f64::from(f32::from_le_bytes(*b));
            }
        }
        Dtype::F16 => {
            for (o, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *o = f16::from_le_bytes(*b).to_f64();
            }
        }
        Dtype::BF16 => {
            for (o, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *o = f64::from(bf16::from_le_bytes(*b).to_f32());
            }
        }
        _ => return Err(unsupported(dtype)),
    }
    Ok(())
}

/// Encodes `values` into little-endian bytes, rounding to nearest, ties to even.
pub fn encode_f32<'a>(dtype: Dtype, values: &'a [f32]) -> Result<Cow<'a, [u8]>> {
    if dtype == Dtype::F32 {
        return Ok(Cow::Borrowed(bytemuck::cast_slice(values)));
    }
    let mut bytes = vec![0; values.len() * size_of(dtype).unwrap_or(0)];
    encode_f32_into(dtype, values, &mut bytes)?;
    Ok(Cow::Owned(bytes))
}

/// [`encode_f32`] into `out`, which holds exactly as many elements as `values`.
pub fn encode_f32_into(dtype: Dtype, values: &[f32], out: &mut [u8]) -> Result<()> {
    match dtype {
        Dtype::F32 => out.copy_from_slice(bytemuck::cast_slice(values)),
        Dtype::BF16 => encode_bf16(values, out),
        Dtype::F16 => match bytemuck::try_cast_slice_mut::<u8, f16>(out) {
            Ok(halves) => halves.convert_from_f32_slice(values),
            Err(_) => {
                for (o, &x) in out.as_chunks_mut::<2>().0.iter_mut().zip(values) {
                    *o = f16::from_f32(x).to_le_bytes();
                }
            }
        },
        Dtype::F64 => {
            for (o, &x) in out.as_chunks_mut::<8>().0.iter_mut().zip(values) {
                *o = f64::from(x).to_le_bytes();
            }
        }
        _ => return Err(unsupported(dtype)),
    }
    Ok(())
}

/// Encodes `values` into `out`, which holds exactly as many elements: one rounding to nearest, ties to even.
pub fn encode_f64_into(dtype: Dtype, values: &[f64], out: &mut [u8]) -> Result<()> {
    match dtype {
        Dtype::F64 => out.copy_from_slice(bytemuck::cast_slice(values)),
        Dtype::F32 => {
            for (o, &x) in out.as_chunks_mut::<4>().0.iter_mut().zip(values) {
                *o = (x as f32).to_le_bytes();
            }
        }
        Dtype::F16 => {
            for (o, &x) in out.as_chunks_mut::<2>().0.iter_mut().zip(values) {
                *o = f16::from_f64(x).to_le_bytes();
            }
        }
        Dtype::BF16 => {
            for (o, &x) in out.as_chunks_mut::<2>().0.iter_mut().zip(values) {
                *o = bf16::from_f64(x).to_le_bytes();
            }
        }
        _ => return Err(unsupported(dtype)),
    }
    Ok(())
}

/// Branch-free, so that the compiler vectorises it: adding half of the last kept place (less one bit where that place is
/// even) carries into it exactly when rounding to nearest, ties to even, goes up. NaN stays NaN.
#[multiversion::multiversion(targets("x86_64+avx2", "x86_64+sse4.1", "aarch64+neon"))]
fn encode_bf16(values: &[f32], out: &mut [u8]) {
    for (o, &x) in out.as_chunks_mut::<2>().0.iter_mut().zip(values) {
        let bits = x.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        let quiet = (bits >> 16) | 0x40;
        let half = if bits & 0x7fff_ffff > 0x7f80_0000 { quiet } else { rounded };
        *o = (half as u16).to_le_bytes();
    }
}

#[multiversion::multiversion(targets("x86_64+avx2", "x86_64+sse4.1", "aarch64+neon"))]
fn decode_bf16(bytes: &[u8], out: &mut [f32]) {
    for (o, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
        *o = f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ulp_matches_the_spacing_of_each_type() {
        assert_eq!(ulp(Dtype::F32, 1.0), f64::from(f32::EPSILON));
        assert_eq!(ulp(Dtype::F32, 1.999), f64::from(f32::EPSILON));
        assert_eq!(ulp(Dtype::F32, -2.0), 2.0 * f64::from(f32::EPSILON));
        assert_eq!(ulp(Dtype::BF16, 1.0), f64::from(bf16::EPSILON.to_f32()));
        assert_eq!(ulp(Dtype::F16, 1.0), f16::EPSILON.to_f64());
        assert_eq!(ulp(Dtype::F16, 0.0), f16::MIN_POSITIVE_SUBNORMAL.to_f64());
        assert_eq!(ulp(Dtype::F64, 1.0), f64::EPSILON);
    }

    #[test]
    fn every_half_survives_a_round_trip() {
        for dtype in [Dtype::F16, Dtype::BF16] {
            let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
            let mut values = vec![0f32; 1 << 16];
            decode_f32(dtype, &bytes, &mut values).unwrap();
            let back = encode_f32(dtype, &values).unwrap();
            for (i, (a, b)) in bytes.chunks(2).zip(back.chunks(2)).enumerate() {
                assert!(a == b || values[i].is_nan(), "{dtype:?} {i:#06x}");
            }
        }
    }

    #[test]
    fn rounding_to_bf16_agrees_with_the_reference_everywhere() {
        let values: Vec<f32> = (0..=u16::MAX)
            .flat_map(|h| [0, 1, 0x7fff, 0x8000, 0x8001].map(|l| f32::from_bits((u32::from(h) << 16) | l)))
            .collect();
        let mut bytes = vec![0; 2 * values.len()];
        encode_f32_into(Dtype::BF16, &values, &mut bytes).unwrap();
        for (x, b) in values.iter().zip(bytes.as_chunks::<2>().0) {
            let (ours, theirs) = (bf16::from_le_bytes(*b), bf16::from_f32(*x));
            assert!(ours.to_bits() == theirs.to_bits() || ours.is_nan() && theirs.is_nan(), "{x}: {ours} and {theirs}");
        }
    }
}
