//! Reading the tensors of a module.

use crate::{
    adapter::Module,
    checkpoint::Tensor,
    delta::{Real, unravel},
    error::{Error, Result},
};
use ndarray::Array2;

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
