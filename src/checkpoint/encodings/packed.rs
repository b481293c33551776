//! Numbers of 8 bits and fewer, and integers packed into 32-bit words.

/// E4M3 without infinities (OCP 8-bit floating point specification, `float8_e4m3fn`): 4 exponent bits, bias 7; all ones
/// are NaN.
pub(super) fn e4m3(byte: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f32::from(byte & 7));
    let magnitude = match (exponent, byte & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa * f32::powi(2.0, -9),
        _ => (8.0 + mantissa) * f32::powi(2.0, exponent - 10),
    };
    if byte & 0x80 == 0 { magnitude } else { -magnitude }
}

/// E5M2 (`float8_e5m2`): the upper byte of an IEEE half.
pub(super) fn e5m2(byte: u8) -> f32 {
    half::f16::from_bits(u16::from(byte) << 8).to_f32()
}

/// E8M0 (OCP microscaling formats): `2^(byte - 127)`; 255 is NaN.
pub(super) fn e8m0(byte: u8) -> f32 {
    match byte {
        255 => f32::NAN,
        0 => f32::MIN_POSITIVE / 2.0,
        _ => f32::from_bits(u32::from(byte) << 23),
    }
}

/// E2M1 (OCP microscaling formats): the 16 values of a 4-bit float, sign in the highest bit.
pub(super) const E2M1: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// All 256 values of an 8-bit float.
pub(super) fn table(of: fn(u8) -> f32) -> [f32; 256] {
    std::array::from_fn(|i| of(i as u8))
}

/// The `i`-th of the integers of `bits` bits (a divisor of 32) that `word` holds, the lowest bits first.
pub(super) fn unpack(word: u32, bits: usize, i: usize) -> u32 {
    (word >> (bits * i)) & (u32::MAX >> (32 - bits))
}
