//! Minimum, maximum, mean, standard deviation, zeros, NaN and infinities of tensors, in one pass over their bytes.

use super::moments::Moments;
use crate::{
    checkpoint::{Dtype, READ, Reader, Tensor, dtype},
    delta::unravel,
    error::Result,
    progress::Progress,
    work_queue,
};
use serde::Serialize;

/// Statistics of the values. Minimum, maximum, mean and standard deviation are over the finite ones, and absent when
/// there are none.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Stats {
    /// Smallest finite value.
    pub min: Option<f64>,
    /// Largest finite value.
    pub max: Option<f64>,
    /// Mean.
    pub mean: Option<f64>,
    /// Standard deviation, of the population.
    pub std: Option<f64>,
    /// How many are 0 or -0.
    pub zeros: u64,
    /// How many are not a number.
    pub nan: u64,
    /// How many are infinite.
    pub inf: u64,
    /// Index of the first that is not finite.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_non_finite: Option<Vec<usize>>,
}

/// Elements that one task reads.
const PIECE: usize = 1 << 20;

/// Elements that are summed together where the processor has a loop for their type.
const RUN: usize = 1 << 14;

/// Elements that are decoded and summed together otherwise, in the first-level cache.
const CHUNK: usize = 2048;

/// Statistics of each tensor; `None` for types whose values cannot be read. The threads share all pieces of all
/// tensors, which are combined in order, so that the result does not depend on the number of threads.
pub(super) fn of(tensors: &[Tensor], progress: &Progress) -> Result<Vec<Option<Stats>>> {
    let known = |t: &Tensor| dtype::is_float(t.dtype()) || is_integer(t.dtype());
    let pieces: Vec<(usize, usize)> = tensors
        .iter()
        .enumerate()
        .filter(|(_, t)| known(t))
        .flat_map(|(i, t)| (0..t.elements()).step_by(PIECE).map(move |first| (i, first)))
        .collect();
    let bar = progress.bytes("reading", tensors.iter().map(|t| t.bytes().len() as u64).sum());
    let moments = work_queue::run_in_order(pieces.len(), Scratch::default, |scratch, piece| {
        progress.check()?;
        let (i, first) = pieces[piece];
        let count = PIECE.min(tensors[i].elements() - first);
        let moments = scratch.moments(&tensors[i], first, count)?;
        bar.inc((count * tensors[i].dtype().bitsize() / 8) as u64);
        Ok(moments)
    });
    bar.finish_and_clear();
    let mut totals: Vec<Option<Moments>> = tensors.iter().map(|t| known(t).then(Moments::default)).collect();
    for (&(i, _), part) in pieces.iter().zip(moments?) {
        totals[i] = totals[i].take().map(|total| total.and(part));
    }
    Ok(totals.into_iter().zip(tensors).map(|(total, t)| Some(Stats::new(&total?, t))).collect())
}

/// Buffers of one thread.
#[derive(Default)]
struct Scratch {
    reader: Reader,
    single: Vec<f32>,
    double: Vec<f64>,
}

impl Scratch {
    fn moments(&mut self, tensor: &Tensor, first: usize, count: usize) -> Result<Moments> {
        let dtype = tensor.dtype();
        let size = dtype.bitsize() / 8;
        let (begin, end) = (first * size, (first + count) * size);
        let mut all = Moments::default();
        for at in (begin..end).step_by(READ) {
            let bytes = self.reader.read(tensor, at..end.min(at + READ))?;
            for (i, run) in bytes.chunks(RUN * size).enumerate() {
                all = all.and(match of_stored(dtype, run) {
                    Some(moments) => moments,
                    None => decoded(dtype, run, at / size + i * RUN, &mut self.single, &mut self.double)?,
                });
            }
        }
        Ok(all)
    }
}

/// Of stored values, in one pass over their bytes: `None` where there is no such loop for them or the processor, where
/// their number does not suit it, and where they are not all finite.
fn of_stored(dtype: Dtype, bytes: &[u8]) -> Option<Moments> {
    #[cfg(target_arch = "x86_64")]
    return super::avx512::moments(dtype, bytes);
    #[cfg(not(target_arch = "x86_64"))]
    None
}

fn decoded(dtype: Dtype, bytes: &[u8], first: usize, single: &mut Vec<f32>, double: &mut Vec<f64>) -> Result<Moments> {
    let size = dtype.bitsize() / 8;
    let mut all = Moments::default();
    for (i, bytes) in bytes.chunks(CHUNK * size).enumerate() {
        let (at, n) = (first + i * CHUNK, bytes.len() / size);
        all = all.and(match dtype {
            Dtype::F32 | Dtype::F16 | Dtype::BF16 => {
                single.resize(n, 0.0);
                dtype::decode_f32(dtype, bytes, single)?;
                Moments::of(single, at)
            }
            other => {
                double.resize(n, 0.0);
                match other {
                    Dtype::F64 => dtype::decode_f64(other, bytes, double)?,
                    _ => decode_integers(other, bytes, double),
                }
                Moments::of(double, at)
            }
        });
    }
    Ok(all)
}

fn is_integer(dtype: Dtype) -> bool {
    use Dtype::{BOOL, I8, I16, I32, I64, U8, U16, U32, U64};
    matches!(dtype, BOOL | U8 | I8 | U16 | I16 | U32 | I32 | U64 | I64)
}

fn decode_integers(dtype: Dtype, bytes: &[u8], out: &mut [f64]) {
    macro_rules! decode {
        ($($dtype:ident $int:ty),*) => {
            match dtype {
                $(Dtype::$dtype => {
                    for (o, b) in out.iter_mut().zip(bytes.as_chunks::<{ size_of::<$int>() }>().0) {
                        *o = <$int>::from_le_bytes(*b) as f64;
                    }
                })*
                _ => out.fill(f64::NAN),
            }
        };
    }
    decode!(BOOL u8, U8 u8, I8 i8, U16 u16, I16 i16, U32 u32, I32 i32, U64 u64, I64 i64);
}

impl Stats {
    fn new(moments: &Moments, tensor: &Tensor) -> Stats {
        let any = |x: f64| (moments.finite > 0).then_some(x);
        Stats {
            min: any(moments.min),
            max: any(moments.max),
            mean: any(moments.mean),
            std: any((moments.squares / moments.finite.max(1) as f64).sqrt()),
            zeros: moments.zeros,
            nan: moments.nan,
            inf: moments.inf,
            first_non_finite: moments.first_non_finite.map(|i| unravel(i, tensor.shape())),
        }
    }
}
