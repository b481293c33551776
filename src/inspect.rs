//! What is in a checkpoint or an adapter: names, shapes, dtypes, sizes; on request the values' statistics.

use crate::{
    adapter::config::CONFIG_NAME,
    checkpoint::{Checkpoint, Dtype, Tensor, TensorFile, dtype},
    delta::unravel,
    error::{Error, Result},
    interrupt,
    progress::Progress,
};
use globset::GlobMatcher;
use rayon::prelude::*;
use serde::Serialize;
use std::{collections::BTreeMap, path::PathBuf};

/// What to look at.
#[derive(Clone, Debug)]
pub struct Options {
    /// A checkpoint (folder or file), or an adapter folder.
    pub path: PathBuf,
    /// Only tensors whose name matches.
    pub filter: Option<GlobMatcher>,
    /// Read the values, too.
    pub stats: bool,
}

/// The result of `inspect`.
#[derive(Clone, Debug, Serialize)]
pub struct InspectReport {
    /// Version of this layout.
    pub schema: u32,
    /// What was inspected.
    pub path: PathBuf,
    /// Its files.
    pub files: Vec<FileSummary>,
    /// The tensors that match the filter, in the order of their bytes.
    pub tensors: Vec<TensorSummary>,
    /// Elements of these tensors.
    pub parameters: u64,
    /// Bytes of these tensors.
    pub bytes: u64,
    /// Elements by dtype.
    pub dtypes: BTreeMap<String, u64>,
}

/// One file of a checkpoint.
#[derive(Clone, Debug, Serialize)]
pub struct FileSummary {
    /// File name.
    pub name: String,
    /// Bytes, header included.
    pub bytes: u64,
    /// Tensors in it.
    pub tensors: usize,
    /// `__metadata__`.
    pub metadata: BTreeMap<String, String>,
}

/// One tensor.
#[derive(Clone, Debug, Serialize)]
pub struct TensorSummary {
    /// Name as stored.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Extents.
    pub shape: Vec<usize>,
    /// Bytes.
    pub bytes: u64,
    /// File name.
    pub file: String,
    /// With `stats`, for floating point tensors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stats: Option<Stats>,
}

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

/// Looks into the headers; with `stats`, also reads the values, on all threads.
pub fn run(options: &Options, progress: &Progress) -> Result<InspectReport> {
    let checkpoint = open(&options.path)?;
    let wanted = |t: &Tensor| options.filter.as_ref().is_none_or(|f| f.is_match(t.name()));
    let tensors: Vec<Tensor> = checkpoint.tensors().filter(wanted).collect();
    if tensors.is_empty() && !checkpoint.is_empty() {
        return Err(Error::request(format!("no tensor of '{}' matches the filter", options.path.display()))
            .help("* matches any characters: --filter '*self_attn*'"));
    }
    let stats = if options.stats { stats_of(&tensors, progress)? } else { vec![None; tensors.len()] };
    let mut dtypes: BTreeMap<String, u64> = BTreeMap::new();
    for t in &tensors {
        *dtypes.entry(format!("{:?}", t.dtype())).or_default() += t.elements() as u64;
    }
    let name = |file: &TensorFile| file.path().file_name().unwrap_or_default().to_string_lossy().into_owned();
    Ok(InspectReport {
        schema: 1,
        path: options.path.clone(),
        files: checkpoint
            .files()
            .iter()
            .map(|f| FileSummary {
                name: name(f),
                bytes: f.len(),
                tensors: f.tensors().len(),
                metadata: f.metadata().clone(),
            })
            .collect(),
        parameters: tensors.iter().map(|t| t.elements() as u64).sum(),
        bytes: tensors.iter().map(|t| t.bytes().len() as u64).sum(),
        dtypes,
        tensors: tensors
            .iter()
            .zip(stats)
            .map(|(t, stats)| TensorSummary {
                name: t.name().to_owned(),
                dtype: t.dtype(),
                shape: t.shape().to_vec(),
                bytes: t.bytes().len() as u64,
                file: name(t.file()),
                stats,
            })
            .collect(),
    })
}

fn open(path: &std::path::Path) -> Result<Checkpoint> {
    let adapter = path.join(crate::adapter::ADAPTER_NAME);
    if path.join(CONFIG_NAME).exists() && adapter.exists() {
        return Checkpoint::from_files(path, vec![TensorFile::open(&adapter)?]);
    }
    Checkpoint::open(path)
}

/// Elements that one task reads.
const PIECE: usize = 1 << 20;

fn stats_of(tensors: &[Tensor], progress: &Progress) -> Result<Vec<Option<Stats>>> {
    let bar = progress.bytes("reading", tensors.iter().map(|t| t.bytes().len() as u64).sum());
    let result = tensors
        .iter()
        .map(|t| {
            if !dtype::is_float(t.dtype()) {
                return Ok(None);
            }
            let pieces: Vec<usize> = (0..t.elements()).step_by(PIECE).collect();
            let partial = pieces.par_iter().map(|&first| {
                interrupt::check()?;
                let count = PIECE.min(t.elements() - first);
                let moments = Moments::of(t, first, count)?;
                bar.inc((count * t.dtype().bitsize() / 8) as u64);
                Ok(moments)
            });
            let all = partial.try_reduce(Moments::default, |a, b| Ok(a.and(b)))?;
            Ok(Some(all.finish(t)))
        })
        .collect();
    bar.finish_and_clear();
    result
}

/// Sums of one piece, which pieces in order combine.
#[derive(Clone, Debug)]
struct Moments {
    min: f64,
    max: f64,
    finite: u64,
    mean: f64,
    squares: f64,
    zeros: u64,
    nan: u64,
    inf: u64,
    first_non_finite: Option<usize>,
}

impl Default for Moments {
    fn default() -> Self {
        Moments {
            min: f64::INFINITY,
            max: f64::NEG_INFINITY,
            finite: 0,
            mean: 0.0,
            squares: 0.0,
            zeros: 0,
            nan: 0,
            inf: 0,
            first_non_finite: None,
        }
    }
}

impl Moments {
    fn of(tensor: &Tensor, first: usize, count: usize) -> Result<Moments> {
        const CHUNK: usize = 4096;
        let mut values = [0f64; CHUNK];
        let mut all = Moments::default();
        for at in (0..count).step_by(CHUNK) {
            let values = &mut values[..CHUNK.min(count - at)];
            tensor.read_f64(first + at, values)?;
            all = all.and(Moments::of_values(values, first + at));
        }
        Ok(all)
    }

    fn of_values(values: &[f64], first: usize) -> Moments {
        let fast = Moments::of_finite(values);
        if fast.mean.is_finite() && fast.squares.is_finite() {
            return fast;
        }
        let finite: Vec<f64> = values.iter().copied().filter(|v| v.is_finite()).collect();
        Moments {
            nan: values.iter().filter(|v| v.is_nan()).count() as u64,
            inf: values.iter().filter(|v| v.is_infinite()).count() as u64,
            first_non_finite: values.iter().position(|v| !v.is_finite()).map(|i| first + i),
            ..Moments::of_finite(&finite)
        }
    }

    /// Two passes over a piece that is in the cache: first the mean, then the squares about it.
    fn of_finite(values: &[f64]) -> Moments {
        let (min, max, sum, zeros) = scan(values);
        let mean = if values.is_empty() { 0.0 } else { sum / values.len() as f64 };
        Moments {
            min,
            max,
            finite: values.len() as u64,
            mean,
            squares: squares_about(values, mean),
            zeros,
            ..Moments::default()
        }
    }

    /// Chan, Golub and LeVeque's rule for combining means and sums of squares (1983).
    fn and(self, b: Moments) -> Moments {
        let n = self.finite + b.finite;
        let (share, gap) = (b.finite as f64 / n.max(1) as f64, b.mean - self.mean);
        Moments {
            min: self.min.min(b.min),
            max: self.max.max(b.max),
            finite: n,
            mean: self.mean + gap * share,
            squares: self.squares + b.squares + gap * gap * self.finite as f64 * share,
            zeros: self.zeros + b.zeros,
            nan: self.nan + b.nan,
            inf: self.inf + b.inf,
            first_non_finite: self.first_non_finite.or(b.first_non_finite),
        }
    }

    fn finish(self, tensor: &Tensor) -> Stats {
        let any = |x: f64| (self.finite > 0).then_some(x);
        Stats {
            min: any(self.min),
            max: any(self.max),
            mean: any(self.mean),
            std: any((self.squares / self.finite.max(1) as f64).sqrt()),
            zeros: self.zeros,
            nan: self.nan,
            inf: self.inf,
            first_non_finite: self.first_non_finite.map(|i| unravel(i, tensor.shape())),
        }
    }
}

const LANES: usize = 8;

/// Minimum, maximum, sum and number of zeros.
#[multiversion::multiversion(targets("x86_64+avx2+fma", "aarch64+neon"))]
fn scan(values: &[f64]) -> (f64, f64, f64, u64) {
    let (mut min, mut max, mut sum, mut zeros) =
        ([f64::INFINITY; LANES], [f64::NEG_INFINITY; LANES], [0f64; LANES], [0u64; LANES]);
    let mut lane = |i: usize, x: f64| {
        min[i] = if x < min[i] { x } else { min[i] };
        max[i] = if x > max[i] { x } else { max[i] };
        sum[i] += x;
        zeros[i] += u64::from(x == 0.0);
    };
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for (i, &x) in chunk.iter().enumerate() {
            lane(i, x);
        }
    }
    for (i, &x) in rest.iter().enumerate() {
        lane(i, x);
    }
    (
        min.iter().copied().fold(f64::INFINITY, f64::min),
        max.iter().copied().fold(f64::NEG_INFINITY, f64::max),
        sum.iter().sum(),
        zeros.iter().sum(),
    )
}

#[multiversion::multiversion(targets("x86_64+avx2+fma", "aarch64+neon"))]
fn squares_about(values: &[f64], mean: f64) -> f64 {
    let mut sum = [0f64; LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for (s, &x) in sum.iter_mut().zip(chunk) {
            *s += (x - mean) * (x - mean);
        }
    }
    for (s, &x) in sum.iter_mut().zip(rest) {
        *s += (x - mean) * (x - mean);
    }
    sum.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_combine_to_the_moments_of_the_whole() {
        let values: Vec<f64> = (0..1000).map(|i| f64::from(i % 37) - 5.0).collect();
        let whole = Moments::of_values(&values, 0);
        let parts = values.chunks(111).fold(Moments::default(), |all, part| all.and(Moments::of_values(part, 0)));
        let mean = values.iter().sum::<f64>() / 1000.0;
        let squares: f64 = values.iter().map(|x| (x - mean).powi(2)).sum();
        for m in [&whole, &parts] {
            assert!((m.mean - mean).abs() < 1e-12 && (m.squares / squares - 1.0).abs() < 1e-12);
            assert_eq!((m.min, m.max, m.zeros, m.finite), (-5.0, 31.0, 27, 1000));
        }
    }

    #[test]
    fn values_that_are_not_finite_are_counted_and_left_out() {
        let m = Moments::of_values(&[1.0, f64::NAN, 3.0, f64::NEG_INFINITY], 10);
        assert_eq!((m.nan, m.inf, m.first_non_finite, m.finite), (1, 1, Some(11), 2));
        assert_eq!((m.min, m.max, m.mean), (1.0, 3.0, 2.0));
    }
}
