//! Weights in a few bits each, as bitsandbytes keeps them: NF4 with doubly quantised scales (QLoRA, arXiv 2305.14314), and
//! int8 by rows (LLM.int8(), arXiv 2208.07339, without its outliers). The kernels of quantise.cu give the same bits.

use rayon::prelude::*;
use std::sync::OnceLock;

/// How weights are quantised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quantisation {
    /// 4 bits: one of the 16 quantiles of a normal distribution, times the largest size of 64 neighbours. `double` keeps
    /// these scales in 8 bits, too: 4.13 bits per weight in all instead of 4.5.
    Nf4 {
        /// Whether the scales are quantised.
        double: bool,
    },
    /// 8 bits: whole numbers up to 127, times 1/127 of the largest size of the row.
    Int8,
}

/// Elements that share a scale of NF4, and scales that share a scale of theirs.
pub(super) const BLOCK: usize = 64;
pub(super) const NESTED: usize = 256;

/// The numbers of NF4 (QLoRA, appendix E).
pub const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// The largest gap between two neighbours of NF4.
pub const LARGEST_GAP: f64 = 0.303_807_2;

/// The numbers of scales in 8 bits: dynamic quantisation (arXiv 2110.02861), seven decades from 1e-6 on with 1, 2, 4, ...
/// numbers of each sign, 0 and 1; sorted.
pub(super) fn dynamic() -> &'static [f32; 256] {
    static TABLE: OnceLock<[f32; 256]> = OnceLock::new();
    TABLE.get_or_init(|| {
        let mut positive = Vec::with_capacity(127);
        for decade in 0..7 {
            let count = 1usize << decade;
            // Bounds from 0.1 to 1 in f32, counted from either end: torch.linspace.
            let step = (1.0f32 - 0.1) / count as f32;
            let bound = |i: usize| match 2 * i <= count {
                true => step.mul_add(i as f32, 0.1),
                false => (-step).mul_add((count - i) as f32, 1.0),
            };
            let scale = 10f64.powi(decade - 6);
            positive.extend((0..count).map(|i| (scale * f64::from((bound(i) + bound(i + 1)) / 2.0)) as f32));
        }
        let mut table = [0.0; 256];
        for (i, x) in positive.into_iter().enumerate() {
            (table[128 + i], table[126 - i]) = (x, -x);
        }
        table[255] = 1.0;
        table
    })
}

impl Quantisation {
    /// Elements that share a scale, in a matrix with so many columns.
    pub(super) fn block(self, cols: usize) -> usize {
        if self == Quantisation::Int8 { cols } else { BLOCK }
    }

    /// `nf4` or `int8`.
    pub fn name(self) -> &'static str {
        if self == Quantisation::Int8 { "int8" } else { "nf4" }
    }

    /// Bytes of a matrix.
    pub fn bytes(self, rows: usize, cols: usize) -> usize {
        let (n, scales) = (rows * cols, (rows * cols).div_ceil(self.block(cols)));
        match self {
            Quantisation::Int8 => n + 4 * scales,
            Quantisation::Nf4 { double: false } => n.div_ceil(2) + 4 * scales,
            Quantisation::Nf4 { double: true } => n.div_ceil(2) + scales + 4 * scales.div_ceil(NESTED) + 4,
        }
    }
}

/// A matrix in few bits, on the host.
#[derive(Clone, Debug, PartialEq)]
pub struct Quantised {
    /// How.
    pub how: Quantisation,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// One byte per element, or for NF4 per two, the first in the upper half.
    pub codes: Vec<u8>,
    /// What the codes are multiplied with.
    pub scales: Scales,
}

impl Quantised {
    /// Whether there are as many codes and scales as a matrix of these extents has.
    pub fn is_complete(&self) -> bool {
        let n = self.rows * self.cols;
        let blocks = n.div_ceil(self.how.block(self.cols));
        let codes = if self.how == Quantisation::Int8 { n } else { n.div_ceil(2) };
        let scales = match (&self.scales, self.how) {
            (Scales::Double { codes, nested, .. }, Quantisation::Nf4 { double: true }) => {
                codes.len() == blocks && nested.len() == blocks.div_ceil(NESTED)
            }
            (Scales::F32(scales), Quantisation::Int8 | Quantisation::Nf4 { double: false }) => scales.len() == blocks,
            _ => false,
        };
        self.codes.len() == codes && scales
    }
}

/// The largest size of each block.
#[derive(Clone, Debug, PartialEq)]
pub enum Scales {
    /// As they are.
    F32(Vec<f32>),
    /// `offset + nested[i / 256] · dynamic[codes[i]]`
    Double {
        /// One per block.
        codes: Vec<u8>,
        /// The largest distance from the offset of 256 scales.
        nested: Vec<f32>,
        /// The mean of all scales.
        offset: f32,
    },
}

impl Scales {
    fn double(scales: &[f32]) -> Scales {
        let offset = (scales.iter().map(|s| f64::from(*s)).sum::<f64>() / scales.len().max(1) as f64) as f32;
        let (mut codes, mut nested) = (Vec::with_capacity(scales.len()), Vec::new());
        for scales in scales.chunks(NESTED) {
            let most = scales.iter().fold(0f32, |most, s| most.max((s - offset).abs()));
            codes.extend(scales.iter().map(|s| nearest(dynamic(), share(s - offset, most))));
            nested.push(most);
        }
        Scales::Double { codes, nested, offset }
    }

    /// What the codes are multiplied with.
    fn values(&self) -> Vec<f32> {
        match self {
            Scales::F32(scales) => scales.clone(),
            Scales::Double { codes, nested, offset } => {
                let value = |(i, code): (usize, &u8)| dynamic()[*code as usize] * nested[i / NESTED] + offset;
                codes.iter().enumerate().map(value).collect()
            }
        }
    }
}

/// `x / most`; 0 where all are 0.
fn share(x: f32, most: f32) -> f32 {
    if most > 0.0 { x / most } else { 0.0 }
}

/// The place of the number in a sorted table that is nearest to x, the smaller one of two equally near.
fn nearest(table: &[f32], x: f32) -> u8 {
    let middles = 0..table.len() - 1;
    let (mut low, mut high) = (middles.start, middles.end);
    while low < high {
        let at = (low + high) / 2;
        if (table[at] + table[at + 1]) / 2.0 < x { low = at + 1 } else { high = at }
    }
    low as u8
}

/// Quantises a row-major matrix.
pub fn quantise(how: Quantisation, rows: usize, cols: usize, x: &[f32]) -> Quantised {
    assert_eq!(x.len(), rows * cols, "quantise: extents");
    let block = how.block(cols);
    let most = |x: &[f32]| x.iter().fold(0f32, |most, x| most.max(x.abs()));
    let scales: Vec<f32> = x.par_chunks(block).map(most).collect();
    let (codes, scales) = match how {
        Quantisation::Int8 => {
            let code =
                |x: &f32, scale: f32| if scale > 0.0 { (x * (127.0 / scale)).round_ties_even() as i8 as u8 } else { 0 };
            let rows =
                x.par_chunks(block).zip(&scales).map(|(x, s)| x.iter().map(|x| code(x, *s)).collect::<Vec<u8>>());
            (rows.collect::<Vec<_>>().concat(), Scales::F32(scales))
        }
        Quantisation::Nf4 { double } => {
            let blocks = x.par_chunks(block).zip(&scales).map(|(x, scale)| {
                let code = |x: &f32| nearest(&NF4, share(*x, *scale));
                // Half a pair goes with a 0.
                let pair = |pair: &[f32]| code(&pair[0]) << 4 | code(pair.get(1).unwrap_or(&0.0));
                x.chunks(2).map(pair).collect::<Vec<u8>>()
            });
            let codes = blocks.collect::<Vec<_>>().concat();
            (codes, if double { Scales::double(&scales) } else { Scales::F32(scales) })
        }
    };
    Quantised { how, rows, cols, codes, scales }
}

/// The values, row by row.
pub fn dequantise(x: &Quantised, y: &mut [f32]) {
    assert_eq!(y.len(), x.rows * x.cols, "dequantise: extents");
    let (block, scales) = (x.how.block(x.cols), x.scales.values());
    match x.how {
        Quantisation::Int8 => {
            let blocks = y.par_chunks_mut(block).zip(x.codes.par_chunks(block)).zip(&scales);
            blocks.for_each(|((y, codes), scale)| {
                for (y, code) in y.iter_mut().zip(codes) {
                    *y = f32::from(*code as i8) * scale * (1.0 / 127.0);
                }
            });
        }
        Quantisation::Nf4 { .. } => {
            let blocks = y.par_chunks_mut(block).zip(x.codes.par_chunks(block / 2)).zip(&scales);
            blocks.for_each(|((y, codes), scale)| {
                for (y, code) in y.chunks_mut(2).zip(codes) {
                    let halves = [code >> 4, code & 15];
                    y.iter_mut().zip(halves).for_each(|(y, code)| *y = NF4[code as usize] * scale);
                }
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{checkpoint::TensorFile, ops::testing::noise};
    use std::path::Path;

    const ROWS: usize = 151;
    const COLS: usize = 127;

    #[test]
    fn codes_scales_and_values_are_those_of_bitsandbytes() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/quantised/bitsandbytes.safetensors");
        let file = TensorFile::open(&path).unwrap();
        let bytes = |name: &str| file.tensor_named(name).unwrap().bytes().to_vec();
        let floats = |name: &str| file.tensor_named(name).unwrap().to_f32().unwrap().into_owned();
        let x: Vec<f32> = noise(5, ROWS * COLS).iter().map(|x| 0.1 * (x * x * x)).collect();
        for (how, name) in [
            (Quantisation::Nf4 { double: false }, "nf4"),
            (Quantisation::Nf4 { double: true }, "nf4_double"),
            (Quantisation::Int8, "int8"),
        ] {
            let found = quantise(how, ROWS, COLS, &x);
            let codes = if name == "int8" { "int8.codes" } else { "nf4.codes" };
            let differ = found.codes.iter().zip(&bytes(codes)).filter(|(a, b)| a != b).count();
            assert_eq!((found.codes.len(), differ), (bytes(codes).len(), 0), "{name}");
            let scales = format!("{name}.scales");
            match &found.scales {
                Scales::F32(found) => assert_eq!(*found, floats(&scales), "{name}"),
                Scales::Double { codes, nested, offset } => {
                    assert!(*codes == bytes(&scales) && *nested == floats("nf4_double.nested"), "{name}");
                    assert_eq!(*offset, floats("nf4_double.offset")[0]);
                }
            }
            let mut values = vec![9.0; x.len()];
            dequantise(&found, &mut values);
            let expected = floats(&format!("{name}.values"));
            assert_eq!(values[..expected.len()], expected, "{name}");
            let size = found.codes.len()
                + match &found.scales {
                    Scales::F32(scales) => 4 * scales.len(),
                    Scales::Double { codes, nested, .. } => codes.len() + 4 * nested.len() + 4,
                };
            assert_eq!(size, how.bytes(ROWS, COLS), "{name}");
        }
    }

    #[test]
    fn no_value_is_further_off_than_half_a_gap() {
        let gap = NF4.windows(2).map(|w| f64::from(w[1]) - f64::from(w[0])).fold(0.0, f64::max);
        assert!((gap - LARGEST_GAP).abs() < 1e-6, "{gap}");
        let x = noise(7, 64 * 20);
        for (how, unit) in [(Quantisation::Nf4 { double: false }, gap / 2.0), (Quantisation::Int8, 0.5 / 127.0)] {
            let mut y = vec![9.0; x.len()];
            dequantise(&quantise(how, 20, 64, &x), &mut y);
            for (x, y) in x.chunks(64).zip(y.chunks(64)) {
                let most = x.iter().fold(0f64, |most, x| most.max(f64::from(*x).abs()));
                assert!(x.iter().zip(y).all(|(x, y)| f64::from((x - y).abs()) <= 1.00001 * unit * most));
            }
        }
        // Nothing stays nothing.
        let mut y = vec![9.0; 70];
        for how in [Quantisation::Nf4 { double: true }, Quantisation::Int8] {
            dequantise(&quantise(how, 2, 35, &[0.0; 70]), &mut y);
            assert_eq!(y, [0.0; 70]);
        }
    }
}
