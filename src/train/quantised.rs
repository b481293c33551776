//! Quantised weights in the state of a checkpoint, as they are: `codes.NAME` (U8, bytes), `scales.NAME` (F32, or U8 where they
//! are quantised, too: then also `nested.NAME` and `offset.NAME`, F32).

use crate::{
    checkpoint::{Checkpoint, Dtype, Tensor, TensorSpec},
    error::{Error, Result},
    ops::{Quantisation, Quantised, Scales},
};

/// What is stored for the weight called `name`.
pub(super) fn tensors(name: &str, values: Quantised) -> Vec<(TensorSpec, Vec<u8>)> {
    let bytes = |what: &str, bytes: Vec<u8>| {
        let spec = TensorSpec { name: format!("{what}.{name}"), dtype: Dtype::U8, shape: vec![bytes.len()] };
        (spec, bytes)
    };
    let floats = |what: &str, x: &[f32]| {
        let spec = TensorSpec { name: format!("{what}.{name}"), dtype: Dtype::F32, shape: vec![x.len()] };
        (spec, x.iter().flat_map(|x| x.to_le_bytes()).collect())
    };
    let mut all = vec![bytes("codes", values.codes)];
    match values.scales {
        Scales::F32(scales) => all.push(floats("scales", &scales)),
        Scales::Double { codes, nested, offset } => {
            all.extend([bytes("scales", codes), floats("nested", &nested), floats("offset", &[offset])]);
        }
    }
    all
}

/// The same from a checkpoint's state.
pub(super) fn read(state: &Checkpoint, name: &str, how: Quantisation, [rows, cols]: [usize; 2]) -> Result<Quantised> {
    let tensor = |what: &str| -> Result<Tensor<'_>> { state.tensor(&format!("{what}.{name}")) };
    let floats = |what: &str| -> Result<Vec<f32>> { Ok(tensor(what)?.to_f32()?.into_owned()) };
    let codes = tensor("codes")?.bytes().to_vec();
    let scales = if how == (Quantisation::Nf4 { double: true }) {
        let offset = floats("offset")?.first().copied().unwrap_or(f32::NAN);
        Scales::Double { codes: tensor("scales")?.bytes().to_vec(), nested: floats("nested")?, offset }
    } else {
        Scales::F32(floats("scales")?)
    };
    let found = Quantised { how, rows, cols, codes, scales };
    match found.is_complete() {
        true => Ok(found),
        false => Err(Error::request(format!(
            "'{}': the quantised weight '{name}' is not one of [{rows}, {cols}] in {}",
            state.path().display(),
            how.name()
        ))),
    }
}
