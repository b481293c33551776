//! Reading the tensors of a module.

use crate::{
    adapter::{Module, config},
    checkpoint::{Dtype, Tensor},
    delta::{Real, unravel},
    error::{Error, Result},
};
use ndarray::{Array2, ArrayViewMut2};
use std::ops::Range;

/// The values of `tensor`, all finite.
pub fn vector<T: Real>(tensor: &Tensor) -> Result<Vec<T>> {
    let mut values = vec![T::zero(); tensor.elements()];
    T::read(tensor, 0, &mut values)?;
    match values.iter().position(|v| !v.is_finite()) {
        None => Ok(values),
        Some(i) => Err(Error::request(format!(
            "'{}' in '{}' holds {} at {:?}",
            tensor.name(),
            tensor.file().path().display(),
            values[i],
            unravel(i, tensor.shape())
        ))
        .help("the adapter's training diverged or its file is damaged")),
    }
}

/// The values of `tensor` as a matrix of the given extents, all finite.
pub fn matrix<T: Real>(tensor: &Tensor, (rows, columns): (usize, usize)) -> Result<Array2<T>> {
    let bad = |e| Error::environment(format!("'{}' as [{rows}, {columns}]: {e}", tensor.name()));
    Array2::from_shape_vec((rows, columns), vector(tensor)?).map_err(bad)
}

/// The extents of a slot that must hold a matrix.
pub fn extents(module: &Module, slot: &str) -> Result<(usize, usize)> {
    let tensor = module.need(slot)?;
    match *tensor.shape() {
        [rows, columns] if rows > 0 && columns > 0 => Ok((rows, columns)),
        ref shape => Err(module.damaged(&format!("'{slot}' has shape {shape:?}, expected a matrix"))),
    }
}

/// The values of a slot that must hold a matrix.
pub fn table(module: &Module, slot: &str) -> Result<Array2<f64>> {
    matrix(&module.need(slot)?, extents(module, slot)?)
}

/// The values of a slot.
pub fn list(module: &Module, slot: &str) -> Result<Vec<f64>> {
    vector(&module.need(slot)?)
}

/// The whole numbers of `tensor`, none negative.
pub fn indices(module: &Module, tensor: &Tensor) -> Result<Vec<usize>> {
    fn read<const N: usize>(bytes: &[u8], number: fn([u8; N]) -> i64) -> Option<Vec<usize>> {
        bytes.as_chunks::<N>().0.iter().map(|&b| usize::try_from(number(b)).ok()).collect()
    }
    let bytes = tensor.bytes();
    let found = match tensor.dtype() {
        Dtype::I64 => read(bytes, i64::from_le_bytes),
        Dtype::I32 => read(bytes, |b| i32::from_le_bytes(b).into()),
        Dtype::I16 => read(bytes, |b| i16::from_le_bytes(b).into()),
        Dtype::U8 => read(bytes, |b| u8::from_le_bytes(b).into()),
        Dtype::U16 => read(bytes, |b| u16::from_le_bytes(b).into()),
        Dtype::U32 => read(bytes, |b| u32::from_le_bytes(b).into()),
        _ => None,
    };
    found.ok_or_else(|| module.damaged(&format!("'{}' holds {:?}, expected indices", tensor.name(), tensor.dtype())))
}

/// `alpha / r` of the module, each by its pattern.
pub fn scaling(module: &Module) -> Result<f64> {
    let (config, name) = (module.config(), module.name());
    let alpha = config.alpha_pattern.get(name).or_else(|| config.number("alpha"));
    let alpha = alpha.ok_or_else(|| module.damaged("adapter_config.json has no alpha"))?;
    match config.rank_of(name) {
        0 => Err(module.damaged("adapter_config.json gives it rank 0, expected at least 1")),
        r => Ok(config::scaling(alpha, r, false)),
    }
}

/// The shape of [`core`].
pub fn core_shape(module: &Module, t: &str, a: &str, b: &str) -> Result<(usize, usize)> {
    let (shape, a, b) = (module.need(t)?.shape(), extents(module, a)?, extents(module, b)?);
    match *shape {
        [i, j, k, l] if (i, j) == (a.0, b.0) && k * l > 0 => Ok((a.1, b.1 * k * l)),
        _ => Err(module.damaged(&format!("'{t}' {shape:?} does not join factors {a:?} and {b:?}"))),
    }
}

/// The kernel of a convolution from a core t `[i, j, k, l]` and factors a `[i, out]` and b `[j, in]`, as a matrix
/// `[out, in * k * l]`: `sum_ij a[i, out] b[j, in] t[i, j, k, l]`.
pub fn core(module: &Module, t: &str, a: &str, b: &str) -> Result<Array2<f64>> {
    let (rows, columns) = core_shape(module, t, a, b)?;
    let tensor = module.need(t)?;
    let (a, b) = (table(module, a)?, table(module, b)?);
    let kernel = columns / b.ncols();
    let t: Array2<f64> = matrix(&tensor, (a.nrows(), b.nrows() * kernel))?;
    let half = a.t().dot(&t);
    Ok(Array2::from_shape_fn((rows, columns), |(p, column)| {
        let (q, k) = (column / kernel, column % kernel);
        (0..b.nrows()).map(|j| b[[j, q]] * half[[p, j * kernel + k]]).sum()
    }))
}

/// Single elements of a matrix.
pub struct Sparse(Vec<((usize, usize), f64)>);

impl Sparse {
    /// Of elements in any order; those in one place add up.
    pub fn new(mut entries: Vec<((usize, usize), f64)>) -> Sparse {
        entries.sort_by_key(|(place, _)| *place);
        Sparse(entries)
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        self.0.len() * size_of::<((usize, usize), f64)>()
    }

    /// Adds those of `rows` to `out`, which holds these rows.
    pub fn add(&self, rows: Range<usize>, mut out: ArrayViewMut2<f64>) {
        let first = self.0.partition_point(|((row, _), _)| *row < rows.start);
        for ((row, column), value) in self.0[first..].iter().take_while(|((row, _), _)| *row < rows.end) {
            out[[row - rows.start, *column]] += value;
        }
    }
}

/// The `k` largest singular parts of `weight`, added up (LAPACK `dgesdd`).
pub fn largest_parts(weight: Array2<f64>, k: usize) -> Result<Array2<f64>> {
    use ndarray_linalg::{JobSvd, SVDDCInto};
    let failed = |e| Error::environment(format!("LAPACK dgesdd: {e}"));
    let (u, sigma, v) = weight.svddc_into(JobSvd::Some).map_err(failed)?;
    let (Some(mut u), Some(v)) = (u, v) else { return Err(Error::environment("LAPACK dgesdd gave no vectors")) };
    u.axis_iter_mut(ndarray::Axis(1)).zip(&sigma).for_each(|(mut column, s)| column *= *s);
    Ok(u.slice(ndarray::s![.., ..k]).dot(&v.slice(ndarray::s![..k, ..])))
}
