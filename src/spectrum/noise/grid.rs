//! The numbers of a floating-point type, and how far apart they are.

use crate::checkpoint::Dtype;

/// Numbers with so many bits after the leading one, evenly spaced below the smallest normal number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    /// Bits after the leading one.
    fraction_bits: i64,
    /// Exponent of the smallest normal number.
    min_exponent: i64,
}

const BF16: Grid = Grid { fraction_bits: 7, min_exponent: -126 };
const F16: Grid = Grid { fraction_bits: 10, min_exponent: -14 };
const E4M3: Grid = Grid { fraction_bits: 3, min_exponent: -6 };
const E5M2: Grid = Grid { fraction_bits: 2, min_exponent: -14 };

/// Fewer values than this that are not zero may be numbers of FP8 by coincidence.
const FEWEST: usize = 16;

impl Grid {
    /// The numbers of a stored type; `None` for types that are not floating point.
    pub fn of(dtype: Dtype) -> Option<Grid> {
        match dtype {
            Dtype::F64 => Some(Grid { fraction_bits: 52, min_exponent: -1022 }),
            Dtype::F32 => Some(Grid { fraction_bits: 23, min_exponent: -126 }),
            Dtype::F16 => Some(F16),
            Dtype::BF16 => Some(BF16),
            Dtype::F8_E4M3 => Some(E4M3),
            Dtype::F8_E5M2 => Some(E5M2),
            _ => None,
        }
    }

    /// The one with fewer bits.
    pub fn coarser_of(self, other: Grid) -> Grid {
        if other.fraction_bits < self.fraction_bits { other } else { self }
    }

    /// Whether this has fewer bits.
    pub fn is_coarser_than(self, other: Grid) -> bool {
        self.fraction_bits < other.fraction_bits
    }

    /// The coarsest of the usual types (F32, F16, BF16, FP8) whose numbers all of `values` are, which are numbers of this grid:
    /// a model that was rounded to BF16 keeps the low 16 bits of its F32 values zero. This grid, if the values are few
    /// or show no bits at all (a matrix of ones).
    pub fn shown_by(self, values: &[f64]) -> Grid {
        const FRACTION: u64 = (1 << 52) - 1;
        let (mut bits, mut nonzero) = (0u64, 0usize);
        for x in values {
            bits |= x.to_bits() & FRACTION;
            nonzero += usize::from(*x != 0.0);
        }
        if bits == 0 {
            return self;
        }
        let used = 52 - i64::from(bits.trailing_zeros());
        let single = Grid { fraction_bits: 23, min_exponent: -126 };
        // FP8 in the range of a wider type: scaled by a power of two, so that its smallest number is not known.
        let scaled = |grid: Grid| Grid { min_exponent: self.min_exponent, ..grid };
        let all = |grid: Grid| used <= grid.fraction_bits && grid.is_coarser_than(self);
        // Subnormal numbers of F16 use fewer bits; values below them show that it is not F16.
        let fp8 = [scaled(E5M2), scaled(E4M3)].into_iter().filter(|_| nonzero >= FEWEST);
        fp8.chain([BF16, F16, single]).find(|grid| all(*grid)).unwrap_or(self)
    }

    /// `u(x)^2` by exponent arithmetic on the bits of `x`, without branches: [`crate::checkpoint::dtype::ulp`] squared.
    pub fn squared_step(self, x: f64) -> f64 {
        let exponent = ((x.to_bits() >> 52) & 0x7ff) as i64 - 1023;
        let squared = 2 * (exponent.max(self.min_exponent) - self.fraction_bits);
        // Squares below the smallest normal f64 (F64 weights below 1e-138) count as zero.
        f64::from_bits(((squared + 1023).clamp(0, 2046) as u64) << 52)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::dtype::ulp;

    #[test]
    fn squared_steps_agree_with_the_definition() {
        for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
            let grid = Grid::of(dtype).unwrap();
            for x in [0.0, 1.0, -1.5, 1.9999, 2.0, 0.02, -3e-5, 6e-8, 1e-30, 1e-40, 65504.0] {
                assert_eq!(grid.squared_step(x), ulp(dtype, x).powi(2), "{dtype:?} {x}");
            }
        }
        assert_eq!(Grid::of(Dtype::F64).unwrap().squared_step(1.0), f64::EPSILON.powi(2));
        assert_eq!(Grid::of(Dtype::F64).unwrap().squared_step(1e-300), 0.0);
        assert_eq!(E4M3.squared_step(0.001), 2f64.powi(-18), "the smallest number of E4M3 is 2^-9");
    }

    #[test]
    fn values_show_the_type_they_were_rounded_to() {
        let single = Grid::of(Dtype::F32).unwrap();
        let values: Vec<f64> = (1..200).map(|i| f64::from((i as f32 * 0.7).sin())).collect();
        let keep = |bits: u32| -> Vec<f64> {
            values.iter().map(|x| f64::from_bits(x.to_bits() & !((1u64 << (52 - bits)) - 1))).collect()
        };
        assert_eq!(single.shown_by(&values), single);
        assert_eq!(single.shown_by(&keep(7)), BF16);
        assert_eq!(single.shown_by(&keep(10)), F16);
        assert_eq!(single.shown_by(&keep(3)).fraction_bits, 3);
        assert_eq!(BF16.shown_by(&keep(2)).fraction_bits, 2);
        assert_eq!(BF16.shown_by(&keep(7)), BF16);
        // One value more precise than the rest, few values, and no bits at all.
        assert_eq!(single.shown_by(&[keep(7), vec![values[0]]].concat()), single);
        assert_eq!(single.shown_by(&keep(7)[..5]), BF16);
        assert_eq!(single.shown_by(&keep(3)[..5]), BF16);
        assert_eq!(single.shown_by(&[1.0; 100]), single);
    }
}
